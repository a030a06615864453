"""Contexts whose keys and values many answers share: prefill once, decode many rows.

Vocabulary. A *slot* holds one context's keys and values, and behind them those of the tokens generated over it, a
*column* a token. A *row* is one answer being generated: it sees its request's path through the slot's group
(helpers.evaluate.prefixes) and its own generated columns, and nothing of its neighbours'.

    slots = PackedSlots(model, slots=8)
    rows = slots.prefill(group_by_prefix(requests, rows=64), [slot])    # greedy first tokens: rows[0][0].token ...
    slots.step(rows[0])                      # each row's next token; drop finished rows between steps

The model's own forward runs, without its cache: an attention function (helpers.evaluate.attention) keeps keys and
values in the slots. Linear layers see packed rows, so that a row that has left costs nothing. Here the attention goes
slot by slot over exactly its columns, as suits a CPU; helpers.evaluate.static_slots works on fixed buffers, so that a
CUDA graph can hold the step."""

import itertools
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from helpers.evaluate.architectures import finish, sizes
from helpers.evaluate.attention import ATTEND, ATTENTION, additive, dot_product, tree_attention
from helpers.evaluate.prefixes import Group
from helpers.setup.device import trim

COLUMN_MULTIPLE = 16  # the memory-efficient attention kernel wants an aligned mask
HEAD_ROWS = 256  # logits of so many rows at a time
ROOM = 64  # columns that a packed slot has or gets for answers
TALL_ROWS = 64  # more of them are no faster as columns


@dataclass
class Row:
    """One answer. `length`: tokens of its context; `made`: tokens generated so far; `token`: the newest."""

    slot: int
    turn: int
    length: int
    token: int
    made: int = 1


class Place(NamedTuple):
    """A token that a step runs, and where. `lane`: whose mask it sees by."""

    slot: int
    lane: int
    column: int
    token: int
    position: int


def room(turns: int) -> int:
    """Columns for the answers of so many rows to begin with; few answers are long, and a slot can grow."""
    return max(32, 16 * turns)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def few_rows() -> int:
    """So many rows and fewer are faster as they stand. MKL has kernels for few rows, but not for others' processors."""
    with suppress(OSError):
        return 8 if "GenuineIntel" in Path("/proc/cpuinfo").read_text() else 1
    return 1


class WeightsAtTheLeft(TorchFunctionMode):
    """Linear layers of few float32 rows as weight times columns: the same products, and a CPU's matrix library is up
    to three times faster with them (eight times with the vocabulary's)."""

    few = few_rows()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and not kwargs:
            rows, weight, bias = (*args, None)[:3]
            plain = bias is None and rows.dtype is torch.float32 and type(weight) is torch.nn.Parameter
            if plain and self.few < rows.numel() // rows.shape[-1] <= TALL_ROWS:
                return (weight @ rows.flatten(0, -2).T).T.unflatten(0, rows.shape[:-1])
        return function(*args, **(kwargs or {}))


class Slots:
    """What both forms share: the model's forward, prefill, and which guesses are kept. A form keeps the contexts'
    keys and values (`_storing`: a function for all layers) and opens the slots' rows (`_open`). In a step it gives
    guesses their lanes (`_lanes`), has columns for all (`_make_room`), runs the tokens (`_run`), and lets the rows
    see those that were kept (`_keep`)."""

    first = 0  # the first slot that is not scratch

    def __init__(self, model, slots: int):
        config = model.config
        self.model, self.count = model, slots + self.first
        self.device, self.dtype = model.device, model.dtype
        self.heads, self.kv_heads, self.head_dim = sizes(config)
        self.group = self.heads // self.kv_heads
        self.layers = config.num_hidden_layers
        self.used = [0] * self.count
        self.fallbacks: list[str] = []
        self.captures = 0

    def _zeros(self, *shape, dtype=None):
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def _forward(self, ids, positions, attend):
        """Hidden states [tokens, width] of the model's own forward over tokens [tokens], with this folder's
        attention."""
        config = self.model.config
        before = config._attn_implementation
        config._attn_implementation = ATTENTION

        def meant(layer, query, key, value, kind):
            # transformers' SDPA passes over a cap on scores; so do the answers that are compared.
            return attend(layer, query, key, value, kind._replace(softcap=None) if before == "sdpa" else kind)

        token = ATTEND.set(meant)
        try:
            with self._linear():
                found = self.model.get_decoder()(input_ids=ids[None], position_ids=positions[None], use_cache=False)
                return found.last_hidden_state[0]
        finally:
            ATTEND.reset(token)
            config._attn_implementation = before

    def logits(self, hidden):
        """The model's logits [rows, vocabulary] from hidden states [rows, width]."""
        with self._linear():
            return finish(self.model, self.model.get_output_embeddings()(hidden))

    def _likeliest(self, hidden):
        """Greedy tokens [rows] from hidden states [rows, width], without ever holding the logits of all rows."""
        return torch.cat([self.logits(some).argmax(-1) for some in hidden.split(HEAD_ROWS)])

    def _linear(self):
        return WeightsAtTheLeft() if self.device.type == "cpu" else nullcontext()

    # ---- prefill

    @torch.inference_mode()
    def run(self, groups: list[Group], store=None):
        """Hidden states [tokens, width] of groups' tokens, one group behind the other, without padding. store: what
        becomes of a layer's keys and values, [tokens, kv_heads, head_dim]."""
        ids = torch.tensor([token for group in groups for token in group.tokens], device=self.device)
        positions = torch.tensor([position for group in groups for position in group.positions], device=self.device)
        mix = tree_attention(groups, self.heads, self.device, self.dtype)

        def attend(layer, query, key, value, kind):
            if store:
                store(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
            return mix(query, key, value, kind)

        return self._forward(ids, positions, attend)

    @torch.inference_mode()
    def prefill(self, groups: list[Group], slots: list[int]) -> list[list[Row]]:
        """Run groups into slots. Returns a list of rows per group, one for each request, with the greedy token that
        follows it."""
        starts = [0, *itertools.accumulate(group.columns for group in groups)]
        # The vocabulary's logits are computed where a row begins and nowhere else: [rows, vocabulary], not [tokens,
        # vocabulary].
        at = [start + path[-1][1] - 1 for start, g in zip(starts, groups, strict=False) for path in g.paths]
        begin = torch.tensor(at, device=self.device)
        first = self._likeliest(self.run(groups, self._storing(groups, slots, starts))[begin])
        self._meanwhile(len(at), max(*self.used, *(group.columns for group in groups)) + 1)
        first, rows = iter(first.tolist()), []
        for slot, group in zip(slots, groups, strict=True):
            self.used[slot] = group.columns
            rows.append([Row(slot, n, len(r.tokens), next(first)) for n, r in enumerate(group.requests)])
        self._open(slots, groups)
        return rows

    def _meanwhile(self, rows: int, columns: int) -> None:
        """What the host can do for the next step while a GPU is at work on the prefill."""

    def _opened(self, group: Group, rows: int, columns: int):
        """The mask [rows, columns] by which requests see their paths."""
        seen = torch.zeros(rows, columns, dtype=torch.bool)
        for row, path in zip(seen, group.paths, strict=False):
            for start, stop in path:
                row[start:stop] = True
        return additive(seen, self.dtype).to(self.device)

    def _closed(self, *shape):
        """An additive mask that shows nothing."""
        return torch.full(shape, -torch.inf, dtype=self.dtype, device=self.device)

    def forget(self, slots: list[int]) -> None:
        """What these slots hold is not needed any more; buffers that stay are written anew."""
        for slot in slots:
            self.used[slot] = 0

    # ---- decode

    @torch.inference_mode()
    def step(self, rows: list[Row], drafts: list[list[int]] | None = None) -> list[list[int]]:
        """Every row's next tokens: one, and one more for each token guessed for it (`drafts`) up to the first wrong
        guess. Guesses run along and are kept only where the model itself says the same: greedy speculative decoding
        (Leviathan et al., 2022, https://arxiv.org/abs/2211.17192). Rows of one slot must stand together."""
        parts, end = self._places(rows, drafts or [[]] * len(rows))
        self._make_room(end)
        said, found, kept = iter(self._run(parts)), [], []
        for row, part in zip(rows, parts, strict=True):
            tokens = [next(said) for _ in part]
            right = next((n for n, place in enumerate(part[1:]) if place.token != tokens[n]), len(part) - 1)
            found.append(tokens[: right + 1])
            kept.append(part[: right + 1])
            row.token = tokens[right]
            row.made += right + 1
            self.used[row.slot] = part[right].column + 1  # behind it are at most wrong guesses, which stay hidden
        self._keep(kept)
        return found

    def _places(self, rows: list[Row], drafts: list[list[int]]) -> tuple[list[list[Place]], list[int]]:
        """For every row where its token and its guesses go; and the columns that every slot then has."""
        parts, end = [], self.used.copy()
        for row, lanes, draft in zip(rows, self._lanes(rows, drafts), drafts, strict=True):
            fed = enumerate(zip([row.turn, *lanes], [row.token, *draft], strict=False))
            parts.append(
                [
                    Place(row.slot, lane, end[row.slot] + n, token, row.length + row.made - 1 + n)
                    for n, (lane, token) in fed
                ]
            )
            end[row.slot] += len(parts[-1])
        return parts, end


class PackedSlots(Slots):
    """Every slot has buffers of its own length, and a step runs exactly the tokens it is given."""

    def __init__(self, model, slots: int):
        super().__init__(model, slots)
        # By layer and slot: keys and values [2, columns, kv_heads, head_dim].
        self.kept: list[list] = [[None] * self.count for _ in range(self.layers)]
        self.masks: list = [None] * self.count  # [rows, columns]
        self.positions: list = [None] * self.count  # of a column's token, [columns]

    def forget(self, slots: list[int]) -> None:
        super().forget(slots)
        for slot in slots:
            self.masks[slot] = self.positions[slot] = None
            for kept in self.kept:
                kept[slot] = None

    def prefill(self, groups: list[Group], slots: list[int]) -> list[list[Row]]:
        trim()  # what earlier steps left in the heap would add to this prefill's needs, and what it leaves to theirs
        rows = super().prefill(groups, slots)
        trim()
        return rows

    def _storing(self, groups, slots, starts):
        # Before the model runs: among its short-lived tensors they would leave holes in the heap.
        for kept in self.kept:
            for slot, group in zip(slots, groups, strict=True):
                kept[slot] = self._buffer(group.columns + ROOM)

        def store(layer, key, value):
            for slot, start, stop in zip(slots, starts, starts[1:], strict=False):
                keys, values = self.kept[layer][slot][:, : stop - start]
                keys[:], values[:] = key[start:stop], value[start:stop]

        return store

    def _buffer(self, columns: int):
        # Not zeroed: nothing behind the last column in use is ever looked at.
        shape = 2, round_up(columns, COLUMN_MULTIPLE), self.kv_heads, self.head_dim
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _open(self, slots: list[int], groups: list[Group]) -> None:
        for slot, group in zip(slots, groups, strict=True):
            columns = self.kept[0][slot].shape[1]
            self.masks[slot] = self._opened(group, len(group.paths), columns)
            self.positions[slot] = self._zeros(columns, dtype=torch.long)
            self.positions[slot][: group.columns] = torch.tensor(group.positions)

    def _reserve(self, slot: int, end: int) -> None:
        """Room in a slot for columns up to `end`."""
        before = self.masks[slot].shape[1]
        if end <= before:
            return
        for kept in self.kept:
            longer = self._buffer(max(end, before + ROOM))
            longer[:, :before] = kept[slot]
            kept[slot] = longer
        mask = self._closed(len(self.masks[slot]), longer.shape[1])
        mask[:, :before] = self.masks[slot]
        self.masks[slot] = mask
        self.positions[slot] = F.pad(self.positions[slot], (0, mask.shape[1] - before))

    def _make_room(self, end: list[int]) -> None:
        for slot, (before, after) in enumerate(zip(self.used, end, strict=True)):
            if after > before:
                self._reserve(slot, after)

    @staticmethod
    def _lanes(rows, drafts) -> list[list[int]]:
        """A guess sees by its row's own mask, and by `own` in `_run`."""
        return [[row.turn] * len(draft) for row, draft in zip(rows, drafts, strict=True)]

    def _keep(self, parts: list[list[Place]]) -> None:
        for part in parts:
            for place in part:
                self.masks[place.slot][place.lane, place.column] = 0

    def _run(self, parts: list[list[Place]]) -> list[int]:
        """The model's next token after each place's."""
        places = [place for part in parts for place in part]
        turn, ids, positions = torch.tensor([(p.lane, p.token, p.position) for p in places]).to(self.device).unbind(1)
        spans, start = [], 0
        for slot, mine in itertools.groupby(places, key=lambda p: p.slot):
            spans.append((slot, start, start := start + len(list(mine))))
        work = []
        for slot, start, stop in spans:
            begin, end = self.used[slot], self.used[slot] + stop - start
            self.positions[slot][begin:end] = positions[start:stop]
            # A token sees its row's past, itself, and the guesses of its row that stand before it.
            own = (turn[start:stop, None] == turn[None, start:stop]).tril()
            mask = self.masks[slot][turn[start:stop], :end]
            mask[:, begin:] = additive(own, self.dtype)
            back = positions[start:stop, None] - self.positions[slot][None, :end]
            work.append((slot, slice(start, stop), slice(begin, end), back, mask, {}))

        def attend(layer, query, key, value, kind):
            new = torch.stack((key[0], value[0])).transpose(1, 2)
            # Query heads that share a key head stand behind one another as its rows: nothing is repeated in memory.
            shape = self.kv_heads, self.group, len(places), self.head_dim
            asked = query.reshape(shape).transpose(1, 2).reshape(1, self.kv_heads, -1, self.head_dim)
            mixed = torch.empty_like(asked)
            for slot, tokens, columns, back, mask, masks in work:
                if kind.window not in masks:
                    seen = mask if kind.window is None else mask.masked_fill(back >= kind.window, -torch.inf)
                    masks[kind.window] = seen.repeat_interleave(self.group, 0)
                kept = self.kept[layer][slot]
                kept[:, columns] = new[:, tokens]
                keys, values = kept[:, None, : columns.stop].transpose(2, 3)
                mine = slice(tokens.start * self.group, tokens.stop * self.group)
                sinks = None if kind.sinks is None else kind.sinks.view(self.kv_heads, self.group).repeat(1, len(back))
                mixed[:, :, mine] = dot_product(asked[:, :, mine], keys, values, masks[kind.window], kind, sinks)
            return (
                mixed.view(self.kv_heads, len(places), -1)
                .transpose(0, 1)
                .reshape(1, len(places), self.heads, self.head_dim)
            )

        return self._likeliest(self._forward(ids, positions, attend)).tolist()
