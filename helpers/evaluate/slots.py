"""Contexts whose keys and values many answers share: prefill once, decode many rows.

Vocabulary. A *slot* holds one context's keys and values, and behind them those of the tokens generated over it, a
*column* a token. A *row* is one answer being generated: it sees the first `length` columns of its slot's context and
its own generated columns, and nothing of its neighbours'. A *group* is a context with the lengths at which rows
begin: a dialogue's last prompt, with its turns' ends.

    slots = PackedSlots(model, slots=8) rows = slots.prefill([(tokens, [210, 260, 305])], [slot])     # greedy first
    tokens: rows[0].token ... slots.step(rows)                                               # each row's next token;
    drop finished rows between steps

The model's own forward runs, without its cache: an attention function (`shared_context`) keeps keys and values in the
slots. Linear layers see packed rows, so that a row that has left costs nothing. Here the attention goes slot by slot
over exactly its columns, as suits a CPU; helpers.static_slots works on fixed buffers, so that a CUDA graph can hold
the step."""

import itertools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from helpers.setup.device import trim

ATTENTION = "shared_context"
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
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


def unsupported(model) -> str | None:
    """Why this model's attention can't be replaced, or None. Checked: architecture, sliding windows, wrappers,
    placement."""
    config = model.config
    kind = getattr(config, "model_type", None)
    if kind not in SUPPORTED:
        return f"architecture {kind}: not one of {', '.join(SUPPORTED)}"
    if not type(model).__module__.startswith(f"transformers.models.{kind}."):
        return f"model class {type(model).__module__}.{type(model).__name__}: not transformers' own"
    if getattr(config, "sliding_window", None) is not None and kind == "mistral":
        return f"sliding window of {config.sliding_window} tokens"
    odd = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
    if odd:
        return f"layers of type {', '.join(odd)}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        return f"rotary embedding of type {rope}: depends on the batch's longest context"
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        return f"weights on {len(devices)} devices"
    return None


def bytes_per_column(model) -> int:
    """Keys and values of one token in all layers, bytes."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize


def bytes_per_token(model) -> int:
    """Activations of one token within a layer of a prefill, bytes: what the MLP and the attention hold at a time,
    rounded up."""
    config = model.config
    return (4 * config.intermediate_size + 8 * config.hidden_size) * model.dtype.itemsize


def room(turns: int) -> int:
    """Columns for the answers of so many rows to begin with; few answers are long, and a slot can grow."""
    return max(32, 16 * turns)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def shared_context(module, query, key, value, attention_mask, scaling=None, dropout=0.0, attend=None, **kwargs):
    """transformers' attention interface: query [batch, heads, tokens, head_dim], key and value [batch, kv_heads,
    tokens, head_dim] of the new tokens; returns [batch, tokens, heads, head_dim]. `attend` knows which slots they
    belong to."""
    return attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(ATTENTION, shared_context)


class WeightsAtTheLeft(TorchFunctionMode):
    """Linear layers of few float32 rows as weight times columns: the same products, and a CPU's matrix library is up
    to three times faster with them (eight times with the vocabulary's)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and not kwargs:
            rows, weight, bias = (*args, None)[:3]
            plain = bias is None and rows.dtype is torch.float32 and type(weight) is torch.nn.Parameter
            if plain and 1 < rows.numel() // rows.shape[-1] <= TALL_ROWS:
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
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.group = self.heads // self.kv_heads
        self.layers = config.num_hidden_layers
        self.used = [0] * self.count
        self.fallbacks: list[str] = []
        self.captures = 0

    def _zeros(self, *shape, dtype=None):
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def _forward(self, ids, positions, attend):
        """Hidden states [batch, tokens, hidden] of the model's own forward with this file's attention."""
        config = self.model.config
        before = config._attn_implementation
        config._attn_implementation = ATTENTION
        try:
            with self._linear():
                return self.model.model(
                    input_ids=ids, position_ids=positions, use_cache=False, attend=attend
                ).last_hidden_state
        finally:
            config._attn_implementation = before

    def _likeliest(self, hidden):
        """Greedy tokens [rows] from hidden states [rows, width], without ever holding the logits of all rows."""
        with self._linear():
            return torch.cat([self.model.lm_head(some).argmax(-1) for some in hidden.split(HEAD_ROWS)])

    def _linear(self):
        return WeightsAtTheLeft() if self.device.type == "cpu" else nullcontext()

    # ---- prefill

    @torch.inference_mode()
    def prefill(self, groups: list[tuple[list[int], list[int]]], slots: list[int]) -> list[list[Row]]:
        """Run contexts (tokens, lengths at which a row begins) into slots. Returns a list of rows per group, each
        with the greedy token that follows its first `length` tokens."""
        # One behind the other, without padding.
        starts = [0, *itertools.accumulate(len(tokens) for tokens, _ in groups)]
        ids = torch.tensor([token for tokens, _ in groups for token in tokens], device=self.device)
        positions = torch.cat([torch.arange(len(tokens)) for tokens, _ in groups]).to(self.device)
        # The vocabulary's logits are computed where a row begins and nowhere else: [rows, vocabulary], not [tokens,
        # vocabulary].
        at = [start + length - 1 for start, (_, lengths) in zip(starts, groups, strict=False) for length in lengths]
        begin = torch.tensor(at, device=self.device)
        store, mix = self._storing(groups, slots, starts, positions), self._mixing(starts)

        def attend(layer, query, key, value, scaling):
            store(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
            return mix(query, key, value, scaling)

        first = self._likeliest(self._forward(ids[None], positions[None], attend)[0, begin])
        self._meanwhile(len(at), max(*self.used, *(len(tokens) for tokens, _ in groups)) + 1)
        first, rows = iter(first.tolist()), []
        for slot, (tokens, lengths) in zip(slots, groups, strict=True):
            self.used[slot] = len(tokens)
            rows.append([Row(slot, turn, length, next(first)) for turn, length in enumerate(lengths)])
        self._open(slots, [lengths for _, lengths in groups])
        return rows

    def _meanwhile(self, rows: int, columns: int) -> None:
        """What the host can do for the next step while a GPU is at work on the prefill."""

    def _mixing(self, starts: list[int]):
        """Attention of contexts that stand one behind the other, each token over its own context up to itself: a
        function of query [1, heads, tokens, head_dim], key and value, that returns [1, tokens, heads, head_dim]."""
        lengths = [stop - start for start, stop in itertools.pairwise(starts)]
        longest, flash, ends = max(lengths), self._flash(), torch.tensor(starts, dtype=torch.int32, device=self.device)

        def mix(query, key, value, scaling):
            if self.device.type == "cuda":
                # varlen_attn of torch 2.11 takes no shared key heads; SDPA in float32 would hold every score for them.
                key, value = key.repeat_interleave(self.group, 1), value.repeat_interleave(self.group, 1)
            if flash:
                flat = (t[0].transpose(0, 1) for t in (query, key, value))
                return varlen_attn(*flat, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0))[None]
            shared = key.shape[1] < self.heads
            contexts = zip(*(t.split(lengths, 2) for t in (query, key, value)), strict=True)
            mixed = [
                F.scaled_dot_product_attention(*own, is_causal=True, scale=scaling, enable_gqa=shared)
                for own in contexts
            ]
            return torch.cat(mixed, 2).transpose(1, 2)

        return mix

    def _flash(self) -> bool:
        """Whether FlashAttention's kernel for contexts of different lengths takes this model."""
        if self.device.type != "cuda" or self.dtype not in (torch.float16, torch.bfloat16):
            return False
        return self.head_dim <= 256 and torch.cuda.get_device_capability(self.device) >= (8, 0)

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

    def forget(self, slots: list[int]) -> None:
        super().forget(slots)
        for slot in slots:
            self.masks[slot] = None
            for kept in self.kept:
                kept[slot] = None

    def prefill(self, groups: list[tuple[list[int], list[int]]], slots: list[int]) -> list[list[Row]]:
        trim()  # what earlier steps left in the heap would add to this prefill's needs, and what it leaves to theirs
        rows = super().prefill(groups, slots)
        trim()
        return rows

    def _storing(self, groups, slots, starts, positions):
        # Before the model runs: among its short-lived tensors they would leave holes in the heap.
        for kept in self.kept:
            for slot, (tokens, _) in zip(slots, groups, strict=True):
                kept[slot] = self._buffer(len(tokens) + ROOM)

        def store(layer, key, value):
            for slot, start, stop in zip(slots, starts, starts[1:], strict=False):
                keys, values = self.kept[layer][slot][:, : stop - start]
                keys[:], values[:] = key[start:stop], value[start:stop]

        return store

    def _buffer(self, columns: int):
        # Not zeroed: nothing behind the last column in use is ever looked at.
        shape = 2, round_up(columns, COLUMN_MULTIPLE), self.kv_heads, self.head_dim
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _open(self, slots: list[int], lengths: list[list[int]]) -> None:
        for slot, seen in zip(slots, lengths, strict=True):
            columns = torch.arange(self.kept[0][slot].shape[1], device=self.device)[None]
            ends = torch.tensor(seen, device=self.device)[:, None]
            self.masks[slot] = self._zeros(len(seen), columns.shape[1]).masked_fill_(columns >= ends, -torch.inf)

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
            # A token sees its row's past, itself, and the guesses of its row that stand before it.
            own = (turn[start:stop, None] == turn[None, start:stop]).tril()
            mask = self.masks[slot][turn[start:stop], :end]
            mask[:, begin:] = self._closed(*own.shape).masked_fill_(own, 0)
            work.append((slot, slice(start, stop), slice(begin, end), mask.repeat_interleave(self.group, 0)))

        def attend(layer, query, key, value, scaling):
            new = torch.stack((key[0], value[0])).transpose(1, 2)
            # Query heads that share a key head stand behind one another as its rows: nothing is repeated in memory.
            shape = self.kv_heads, self.group, len(places), self.head_dim
            asked = query.reshape(shape).transpose(1, 2).reshape(1, self.kv_heads, -1, self.head_dim)
            mixed = torch.empty_like(asked)
            for slot, tokens, columns, mask in work:
                kept = self.kept[layer][slot]
                kept[:, columns] = new[:, tokens]
                keys, values = kept[:, None, : columns.stop].transpose(2, 3)
                mine = slice(tokens.start * self.group, tokens.stop * self.group)
                mixed[:, :, mine] = F.scaled_dot_product_attention(
                    asked[:, :, mine], keys, values, attn_mask=mask, scale=scaling
                )
            return (
                mixed.view(self.kv_heads, len(places), -1)
                .transpose(0, 1)
                .reshape(1, len(places), self.heads, self.head_dim)
            )

        hidden = self._forward(ids[None], positions[None], attend)
        return self._likeliest(hidden[0]).tolist()
