"""What a round of `hf-dialogue` may hold at a time, and the sizes that were found to pay."""

from dataclasses import dataclass

import psutil
import torch

from helpers.evaluate.requests import Group
from helpers.evaluate.slots import bytes_per_column, bytes_per_token, room
from helpers.setup.layers import widest_layer

INT32 = 2**31
MAX_TURNS = 64  # rows over one context; a larger group is split
CPU_SLOTS = 12
CPU_CONTEXTS = 4  # of the longest context; more at a time are no faster
CPU_GUESSED_TOKENS = 48  # guesses fill up a step of fewer tokens: it costs little more
GUESSES = 15  # for one row
CHEAP_TOKENS = 4  # a step of so many takes hardly longer than of one: guessed even where guesses are bad
CPU_ROWS = 128
CPU_PREFILL_TOKENS = 512
CUDA_SLOTS = 64
CUDA_ROWS = 1024
CUDA_PREFILL_TOKENS = (
    32768  # starting a pass takes the host as long as a GPU needs for so many of a small model's tokens
)
CUDA_GUESSED_TOKENS = 128
SLOTS_SHARE, ACTIVATIONS_SHARE = 0.6, 0.3  # of free memory


@dataclass
class Limits:
    """What one round may hold at a time."""

    slots: int
    rows: int
    prefill_tokens: int
    columns: int  # KV columns over all slots plus one prefill's headroom; unused by StaticSlots

    def halved(self) -> "Limits | None":
        if max(self.slots, self.rows) == 1:
            return None
        return Limits(**{name: max(1, value // 2) for name, value in vars(self).items()})


def find(lm, groups: list[Group]) -> Limits:
    """Limits from free memory, from what is worth holding, and so that rows times columns of any layer stay
    under 2^31."""
    cuda = lm.device.type == "cuda"
    if cuda:
        free = torch.cuda.mem_get_info(lm.device)[0]
        free += torch.cuda.memory_reserved(lm.device) - torch.cuda.memory_allocated(lm.device)
    else:
        free = psutil.virtual_memory().available
    width = columns(groups, CUDA_ROWS if cuda else CPU_ROWS)
    slot_bytes = width * bytes_per_column(lm.model)
    most = INT32 // widest_layer(lm.model) - 1
    prefill = min(
        CUDA_PREFILL_TOKENS if cuda else CPU_PREFILL_TOKENS,
        most,
        int(free * ACTIVATIONS_SHARE / bytes_per_token(lm.model)),
    )
    slots = min(
        CUDA_SLOTS if cuda else CPU_SLOTS,
        int(free * SLOTS_SHARE / slot_bytes),
        sum(len(g.requests) for g in groups),
    )
    found = {"slots": slots, "rows": min(CUDA_ROWS if cuda else CPU_ROWS, most), "prefill_tokens": prefill}
    found = {name: max(1, int(lm.wanted[name] or value)) for name, value in found.items()}
    if not lm._packed():
        return Limits(**found, columns=width * found["slots"])
    # As much as so many of the longest context need, one of them while it is run: stock needs that too.
    return Limits(**found, columns=width * min(found["slots"], lm.contexts) + running(lm.model, groups[0].length))


def running(model, tokens: int) -> int:
    """Columns that take as much memory as so many tokens' activations do in a prefill."""
    return int(tokens * bytes_per_token(model) / bytes_per_column(model))


def columns(groups: list[Group], rows: int) -> int:
    """Columns of a slot to begin with: the longest context, and room for answers of ordinary length."""
    turns = min(max(len(g.requests) for g in groups), rows, MAX_TURNS)
    most = max(r.max_gen_toks for g in groups for r in g.requests)
    return groups[0].length + min(turns * most, room(turns))
