"""What a round of `hf-dialogue` may hold at a time, and the sizes that were found to pay."""

from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size

from helpers.evaluate.architectures import bytes_per_column, bytes_per_token
from helpers.evaluate.prefixes import Group
from helpers.evaluate.slots import room
from helpers.setup.layers import widest_layer

INT32 = 2**31
MAX_TURNS = 64  # rows over one context; more requests make another group
CPU_SLOTS = 12
CPU_CONTEXTS = 4  # of the longest context; more at a time are no faster
CPU_GUESSED_TOKENS = 48  # guesses fill up a step of fewer tokens: it costs little more
GUESSES = 15  # for one row
CHEAP_TOKENS = 4  # a step of so many takes hardly longer than of one: guessed even where guesses are bad
CPU_ROWS = 128
CPU_PREFILL_TOKENS = 512
CPU_SCORED_TOKENS = 4096  # of one pass; the logits of a batch of one take stock as much memory
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


def halving(lm, limits, attempt: Callable) -> None:
    """`attempt` with these limits, and with half of them as often as memory runs out; the last error is raised."""
    while limits is not None:
        smaller = limits.halved() if isinstance(limits, Limits) else limits // 2 or None
        try:
            return attempt(limits)
        except (RuntimeError, MemoryError) as error:
            if smaller is None or not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                raise
        # Outside the handler: the exception's traceback would keep the round's buffers alive.
        lm.counts["out_of_memory"] += 1
        limits = smaller
        if lm.device.type == "cuda":
            torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def tokens_at_a_time(lm, most: int, token_bytes: int | None = None) -> int:
    """Tokens of one pass: no more than `most`, than free memory takes (token_bytes: of each; default: a layer's
    activations), and than keep rows times columns of any layer under 2^31."""
    memory = free_bytes(lm.device) * ACTIVATIONS_SHARE / (token_bytes or bytes_per_token(lm.model))
    return max(1, min(most, INT32 // widest_layer(lm.model) - 1, int(memory)))


def scored_tokens(lm) -> int:
    most = CUDA_PREFILL_TOKENS if lm.device.type == "cuda" else CPU_SCORED_TOKENS
    return int(lm.wanted["prefill_tokens"] or tokens_at_a_time(lm, most))


def find(lm, groups: list[Group]) -> Limits:
    """Limits from free memory, from what is worth holding, and so that rows times columns of any layer stay
    under 2^31."""
    cuda = lm.device.type == "cuda"
    width = columns(groups, CUDA_ROWS if cuda else CPU_ROWS)
    slot_bytes = width * bytes_per_column(lm.model)
    slots = min(
        CUDA_SLOTS if cuda else CPU_SLOTS,
        int(free_bytes(lm.device) * SLOTS_SHARE / slot_bytes),
        sum(len(g.requests) for g in groups),
    )
    prefill = tokens_at_a_time(lm, CUDA_PREFILL_TOKENS if cuda else CPU_PREFILL_TOKENS)
    rows = min(CUDA_ROWS if cuda else CPU_ROWS, INT32 // widest_layer(lm.model) - 1)
    found = {"slots": slots, "rows": rows, "prefill_tokens": prefill}
    found = {name: max(1, int(lm.wanted[name] or value)) for name, value in found.items()}
    if not lm.packed():
        return Limits(**found, columns=width * found["slots"])
    # As much as so many of the longest context need, one of them while it is run: stock needs that too.
    return Limits(**found, columns=width * min(found["slots"], lm.contexts) + running(lm.model, groups[0].columns))


def running(model, tokens: int) -> int:
    """Columns that take as much memory as so many tokens' activations do in a prefill."""
    return int(tokens * bytes_per_token(model) / bytes_per_column(model))


def columns(groups: list[Group], rows: int) -> int:
    """Columns of a slot to begin with: the longest context, and room for answers of ordinary length."""
    turns = min(max(len(g.requests) for g in groups), rows, MAX_TURNS)
    most = max(r.max_gen_toks for g in groups for r in g.requests)
    return groups[0].columns + min(turns * most, room(turns))
