"""Contexts whose keys and values many answers share: prefill once, decode many rows.

Vocabulary. A *slot* holds one context's keys and values, and behind them those of the tokens generated over it, a *column* a token.
A *row* is one answer being generated: it sees the first `length` columns of its slot's context and its own generated columns, and
nothing of its neighbours'. A *group* is a context with the lengths at which rows begin: a dialogue's last prompt, with its turns' ends.

    slots = Slots(model, slots=8, turns=12, columns=1024)
    rows = slots.prefill([(tokens, [210, 260, 305])], [slot])     # greedy first tokens: rows[0].token ...
    slots.step(rows)                                               # each row's next token; drop finished rows between steps

The model's own forward runs, without its cache: an attention function (`shared_context`) keeps keys and values in the slots. Linear
layers see packed rows, so that a row that has left costs nothing. On a CPU the attention goes slot by slot over exactly its columns; the
static form (`static=True`) works on fixed buffers in buckets of rows and columns, so that a CUDA graph can hold the step.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

ATTENTION = "shared_context"
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
COLUMN_MULTIPLE = 64  # the memory-efficient attention kernel wants an aligned mask
COLUMN_BUCKET = 512
ROW_BUCKETS = (16, 128, 1024)  # few, because capturing one costs as much as dozens of its steps


class OutOfColumns(Exception):
    """The static buffers can't take another token; `Slots.grow` makes room."""


@dataclass
class Row:
    """One answer. `length`: tokens of its context; `made`: tokens generated so far; `token`: the newest."""

    slot: int
    turn: int
    length: int
    token: int
    made: int = 1


def unsupported(model) -> str | None:
    """Why this model's attention can't be replaced, or None. Checked: architecture, sliding windows, wrappers, placement."""
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


def uncapturable(model) -> str | None:
    """Why a decode step can't be a CUDA graph, or None."""
    for name, module in model.named_modules():
        if getattr(getattr(module, "state", None), "threshold", 0.0) > 0.0:
            return f"LLM.int8() with threshold {module.state.threshold} synchronizes in every layer ({name})"
    return None


def bytes_per_column(model) -> int:
    """Keys and values of one token in all layers, bytes."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize


def bytes_per_token(model) -> int:
    """Activations of one token within a layer of a prefill, bytes: what the MLP and the attention hold at a time, rounded up."""
    config = model.config
    return (4 * config.intermediate_size + 8 * config.hidden_size) * model.dtype.itemsize


def widest_layer(model) -> int:
    """Most columns that any linear layer reads or writes: rows times it must stay under 2^31 (bitsandbytes' LLM.int8() overflows)."""
    return max(max(m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear))


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def shared_context(module, query, key, value, attention_mask, scaling=None, dropout=0.0, attend=None, **kwargs):
    """transformers' attention interface: query [batch, heads, tokens, head_dim], key and value [batch, kv_heads, tokens, head_dim] of the
    new tokens; returns [batch, tokens, heads, head_dim]. `attend` knows which slots they belong to."""
    return attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(ATTENTION, shared_context)


class Slots:
    """Buffers for `slots` contexts of up to `columns` columns and `turns` rows each. Slot 0 of the static form is scratch: padding
    rows write there.

    static: the fixed-buffer step; captured: as CUDA graphs. `fallbacks` lists reasons why a step was not captured.
    """

    def __init__(self, model, slots: int, turns: int, columns: int, static: bool = False, captured: bool = False):
        config = model.config
        self.model, self.turns, self.static = model, turns, static
        self.device, self.dtype = model.device, model.dtype
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.group = self.heads // self.kv_heads
        self.first = 1 if static else 0
        self.count = slots + self.first
        self.columns = round_up(columns, COLUMN_MULTIPLE)
        self.used = [0] * self.count
        self.fallbacks: list[str] = []
        self.captured = captured
        if captured and (reason := uncapturable(model)):
            self.fallbacks.append(reason)
            self.captured = False
        self.graphs: dict = {}
        self.seen: set = set()
        self.captures = 0
        self.pool = None
        # Zeros, not empty: a masked column has weight 0, and 0 times a leftover NaN would be NaN.
        shape = (self.count, self.columns, self.kv_heads, self.head_dim)
        self.cache = [tuple(self._zeros(*shape) for _ in range(2)) for _ in range(config.num_hidden_layers)]
        self.mask = self._zeros(self.count, self.group if static else 1, turns, self.columns).fill_(-torch.inf)
        self.visible = self._zeros()
        self.buffers: dict = {}
        if static:
            self.mask[0] = 0

    def _zeros(self, *shape, dtype=None):
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def grow(self, columns: int) -> None:
        """Room for `columns` columns a slot; graphs are captured anew."""
        columns = round_up(columns, COLUMN_MULTIPLE)
        self.graphs.clear()
        self.seen.clear()
        for layer, pair in enumerate(self.cache):
            wider = tuple(self._zeros(self.count, columns, self.kv_heads, self.head_dim) for _ in range(2))
            for old, new in zip(pair, wider, strict=True):
                new[:, : self.columns] = old
            self.cache[layer] = wider
            del pair
        mask = self._zeros(*self.mask.shape[:3], columns).fill_(-torch.inf)
        mask[..., : self.columns] = self.mask
        if self.static:
            mask[0] = 0
        self.mask, self.columns = mask, columns

    def _forward(self, ids, positions, attend):
        """Hidden states [batch, tokens, hidden] of the model's own forward with this file's attention."""
        config = self.model.config
        before = config._attn_implementation
        config._attn_implementation = ATTENTION
        try:
            return self.model.model(input_ids=ids, position_ids=positions, use_cache=False, attend=attend).last_hidden_state
        finally:
            config._attn_implementation = before

    # ---- prefill

    @torch.inference_mode()
    def prefill(self, groups: list[tuple[list[int], list[int]]], slots: list[int]) -> list[list[Row]]:
        """Run contexts (tokens, lengths at which a row begins) into slots. Returns a list of rows per group, each with the greedy token
        that follows its first `length` tokens."""
        longest = max(len(tokens) for tokens, _ in groups)
        ids = torch.zeros(len(groups), longest, dtype=torch.long)
        for n, (tokens, _) in enumerate(groups):
            ids[n, : len(tokens)] = torch.tensor(tokens)
        index = torch.tensor(slots, device=self.device)

        def attend(layer, query, key, value, scaling):
            for cache, new in zip(self.cache[layer], (key, value), strict=True):
                if len(slots) == 1:
                    cache[slots[0], :longest] = new[0].transpose(0, 1)
                else:
                    cache[index, :longest] = new.transpose(1, 2)
            shared = self.group > 1
            if shared and query.is_cuda and self.dtype == torch.float32:
                # Only the kernels for 16 bits know shared key heads; the fallback would hold every score in memory.
                key, value, shared = key.repeat_interleave(self.group, 1), value.repeat_interleave(self.group, 1), False
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=shared)
            return mixed.transpose(1, 2)

        positions = torch.arange(longest, device=self.device)[None].expand(len(groups), -1)
        hidden = self._forward(ids.to(self.device), positions, attend)
        # The vocabulary's logits are computed where a row begins and nowhere else: [rows, vocabulary], not [tokens, vocabulary].
        at = [(n, length - 1) for n, (_, lengths) in enumerate(groups) for length in lengths]
        where, when = (torch.tensor(column, device=self.device) for column in zip(*at, strict=True))
        first = iter(self.model.lm_head(hidden[where, when]).argmax(-1).tolist())
        rows = []
        for slot, (tokens, lengths) in zip(slots, groups, strict=True):
            self.used[slot] = len(tokens)
            ends = torch.tensor(lengths, device=self.device)[:, None]
            hidden_columns = torch.arange(self.columns, device=self.device)[None] >= ends
            fresh = self._zeros(len(lengths), self.columns).masked_fill_(hidden_columns, -torch.inf)
            self.mask[slot, :, : len(lengths)] = fresh
            rows.append([Row(slot, turn, length, next(first)) for turn, length in enumerate(lengths)])
        return rows

    # ---- decode

    @torch.inference_mode()
    def step(self, rows: list[Row]) -> None:
        """One more token for every row. Rows of one slot must stand together. Raises OutOfColumns before anything is changed."""
        spans = self._spans(rows)
        if max(self.used[slot] + stop - start for slot, start, stop in spans) > self.columns:
            raise OutOfColumns
        columns = [0] * len(rows)
        for slot, start, stop in spans:
            columns[start:stop] = range(self.used[slot], self.used[slot] + stop - start)
            self.used[slot] += stop - start
        tokens = self._static_step(rows, columns) if self.static else self._packed_step(rows, columns, spans)
        for row, token in zip(rows, tokens, strict=True):
            row.token = token
            row.made += 1

    @staticmethod
    def _spans(rows: list[Row]) -> list[tuple[int, int, int]]:
        """(slot, first row, one past its last row) for every slot."""
        spans, start = [], 0
        for n in range(1, len(rows) + 1):
            if n == len(rows) or rows[n].slot != rows[start].slot:
                spans.append((rows[start].slot, start, n))
                start = n
        return spans

    def _packed_step(self, rows, columns, spans):
        index = torch.tensor([(r.slot, r.turn, c, r.token, r.length + r.made - 1) for r, c in zip(rows, columns, strict=True)])
        slot, turn, column, ids, positions = index.to(self.device).unbind(1)
        self.mask[slot, 0, turn, column] = 0
        work = []
        for n, start, stop in spans:
            mask = self.mask[n, 0, turn[start:stop], : self.used[n]]
            work.append((n, start, stop, self.used[n], mask.repeat(self.group, 1)))

        def attend(layer, query, key, value, scaling):
            mixed = torch.empty_like(query)
            keys, values = self.cache[layer]
            for n, start, stop, used, mask in work:
                keys[n, used - (stop - start) : used] = key[0, :, start:stop].transpose(0, 1)
                values[n, used - (stop - start) : used] = value[0, :, start:stop].transpose(0, 1)
                # Query heads that share a key head stand as its rows: nothing is repeated in memory.
                mine = query[:, :, start:stop].reshape(1, self.kv_heads, -1, self.head_dim)
                seen = keys[n, :used].transpose(0, 1)[None], values[n, :used].transpose(0, 1)[None]
                out = F.scaled_dot_product_attention(mine, *seen, attn_mask=mask, scale=scaling)
                mixed[:, :, start:stop] = out.view(1, self.heads, stop - start, self.head_dim)
            return mixed.transpose(1, 2)

        hidden = self._forward(ids[None], positions[None], attend)
        return self.model.lm_head(hidden[0]).argmax(-1).tolist()

    # ---- decode over static buffers

    def _static_step(self, rows, columns):
        count = next((n for n in ROW_BUCKETS if n >= len(rows)), round_up(len(rows), ROW_BUCKETS[-1]))
        width = min(round_up(max(columns) + 1, COLUMN_BUCKET), self.columns)
        if count not in self.buffers:
            self.buffers[count] = self._zeros(5, count, dtype=torch.long), self._zeros(count, dtype=torch.long)
        inputs, output = self.buffers[count]
        host = torch.zeros(5, count, dtype=torch.long)  # what is left over are padding rows: slot 0, column 0
        values = [(r.slot, r.turn, c, r.token, r.length + r.made - 1) for r, c in zip(rows, columns, strict=True)]
        host[:, : len(rows)] = torch.tensor(values).T
        inputs.copy_(host)
        key = (count, width)
        # The first step of a shape runs eagerly, which is the warm-up that a capture needs, and all that a shape seen once gets.
        if self.captured and key in self.seen and key not in self.graphs:
            self._capture(key)
        if key in self.graphs:
            self.graphs[key].replay()
        else:
            self._static_forward(*key)
            self.seen.add(key)
        return output[: len(rows)].tolist()

    def _static_forward(self, count: int, width: int) -> None:
        """One step for `count` rows over all slots' first `width` columns; reads and writes fixed buffers only."""
        inputs, output = self.buffers[count]
        slot, turn, column, ids, positions = inputs.unbind(0)
        for group in range(self.group):
            self.mask[:, group].index_put_((slot, turn, column), self.visible)
        mask = self.mask[..., :width].reshape(self.count, 1, self.group * self.turns, width).expand(-1, self.kv_heads, -1, -1)
        place = slot * self.turns + turn

        def attend(layer, query, key, value, scaling):
            keys, values = self.cache[layer]
            keys.index_put_((slot, column), key[0].transpose(0, 1))
            values.index_put_((slot, column), value[0].transpose(0, 1))
            padded = query.new_zeros(self.count * self.turns, self.heads, self.head_dim)
            padded.index_copy_(0, place, query[0].transpose(0, 1))
            padded = padded.view(self.count, self.turns, self.kv_heads, self.group, self.head_dim).permute(0, 2, 3, 1, 4)
            padded = padded.reshape(self.count, self.kv_heads, self.group * self.turns, self.head_dim)
            seen = keys[:, :width].transpose(1, 2), values[:, :width].transpose(1, 2)
            mixed = F.scaled_dot_product_attention(padded, *seen, attn_mask=mask, scale=scaling)
            mixed = mixed.view(self.count, self.kv_heads, self.group, self.turns, self.head_dim).permute(0, 3, 1, 2, 4)
            return mixed.reshape(self.count * self.turns, self.heads, self.head_dim).index_select(0, place)[None]

        hidden = self._forward(ids[None], positions[None], attend)
        output.copy_(self.model.lm_head(hidden[0]).argmax(-1))

    def _capture(self, key) -> None:
        """Record the step as a CUDA graph; a failure is kept with its reason, and steps run eagerly from then on."""
        try:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self._static_forward(*key)
            self.graphs[key] = graph
            self.captures += 1
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.fallbacks.append(f"CUDA graph: {str(error).splitlines()[0]}")
            self.captured = False
            self.graphs.clear()
