"""Attention over keys and values that many answers share, as every supported architecture means it.

transformers hands an attention function what is special about a layer: a sliding window, a cap on scores (Gemma 2),
attention sinks (gpt-oss). Here they are kept together as the layer's `Kind`, and none is passed over."""

from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

ATTENTION = "shared_context"
# What else models pass, and what greedy answers don't depend on.
IGNORED = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}
IGNORED |= {"output_router_logits", "past_key_values"}


class Kind(NamedTuple):
    """A layer's attention. window: tokens that one sees, itself included; sinks: [heads]."""

    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None


# What every layer of the running pass does, and knows which slots its tokens belong to: a function of layer, query,
# key, value and kind. Not an argument of the pass: not every architecture hands those on.
ATTEND: ContextVar = ContextVar("attend")


def shared_context(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """transformers' attention interface: query [batch, heads, tokens, head_dim], key and value [batch, kv_heads,
    tokens, head_dim] of the new tokens; returns [batch, tokens, heads, head_dim]. Raises TypeError for an argument
    that it doesn't know."""
    window, softcap, sinks = (kwargs.pop(name, None) for name in ("sliding_window", "softcap", "s_aux"))
    if odd := sorted(name for name, given in kwargs.items() if given is not None and name not in IGNORED):
        raise TypeError(f"{type(module).__name__} passes {', '.join(odd)} to its attention, which is not known here")
    return ATTEND.get()(module.layer_idx, query, key, value, Kind(scaling, window, softcap, sinks)), None


AttentionInterface.register(ATTENTION, shared_context)


def additive(visible, dtype):
    """A mask to add to scores: 0 where `visible`, else -inf."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def dot_product(query, key, value, mask, kind: Kind, sinks=None):
    """[batch, heads, rows, head_dim] of queries [batch, heads, rows, head_dim] over keys and values [batch, kv_heads,
    columns, head_dim]. mask: additive, [..., rows, columns], or None: rows are the last columns' own tokens, each of
    which sees all before it. sinks: kind's, one per row, [..., heads, rows]."""
    shared = query.shape[1] // key.shape[1]
    if kind.plain:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=kind.scaling, enable_gqa=shared > 1
        )
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if kind.scaling is None else kind.scaling)
    if kind.softcap is not None:
        scores = torch.tanh(scores / kind.softcap) * kind.softcap
    if mask is None:
        mask = additive(torch.ones(scores.shape[2:], dtype=torch.bool, device=query.device).tril(), query.dtype)
    scores = scores + mask
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
    scores = torch.cat([scores, sinks[..., None].expand(*scores.shape[:3], 1)], -1)
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ value


def tree_attention(groups, heads: int, device, dtype):
    """Attention of a prefill: groups of requests (helpers.evaluate.prefixes) whose tokens stand one behind the other;
    every token sees its own branch up to itself, and the path before it. A function of query [1, heads, tokens,
    head_dim], key and value [1, kv_heads, ...] and the layer's kind, that returns [1, tokens, heads, head_dim]."""
    branches, start = [], 0
    for group in groups:
        branches += [([(start + a, start + b) for a, b in path], start + c, start + d) for path, c, d in group.branches]
        start += group.columns
    queries = [stop - first for _, first, stop in branches]
    behind = [sum(b - a for a, b in path) for path, *_ in branches]
    seen = [n + before for n, before in zip(queries, behind, strict=True)]
    columns = None  # of all branches' paths, one behind the other
    if any(behind):
        spans = [span for path, first, stop in branches for span in (*path, (first, stop))]
        columns = torch.cat([torch.arange(*span) for span in spans]).to(device)
    flash = fast(device, dtype)
    ends = [torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32) for sizes in (queries, seen)]
    masks: dict = {}

    def mask(n: int, window: int | None):
        if (n, window) not in masks:
            own, before = torch.arange(behind[n], seen[n])[:, None], torch.arange(seen[n])
            visible = own >= before if window is None else (own >= before) & (own - before < window)
            masks[n, window] = additive(visible, dtype).to(device)
        return masks[n, window]

    def mix(query, key, value, kind: Kind):
        if columns is not None:
            key, value = key[:, :, columns], value[:, :, columns]
        if flash and kind.plain and query.shape[-1] <= 256:
            # varlen_attn of torch 2.11 takes no shared key heads.
            pair = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
            flat = (t[0].transpose(0, 1) for t in (query, *pair))
            window = (-1 if kind.window is None else kind.window - 1, 0)
            return varlen_attn(*flat, *ends, max(queries), max(seen), scale=kind.scaling, window_size=window)[None]
        if query.is_cuda:  # SDPA in float32 would hold every score for shared key heads
            key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
        mixed = []
        parts = zip(query.split(queries, 2), key.split(seen, 2), value.split(seen, 2), strict=True)
        for n, part in enumerate(parts):
            window = kind.window if kind.window and kind.window < seen[n] else None
            plain = window is None and not behind[n]
            sinks = None if kind.sinks is None else kind.sinks[:, None]
            mixed.append(dot_product(*part, None if plain else mask(n, window), kind, sinks))
        return torch.cat(mixed, 2).transpose(1, 2)

    return mix


def fast(device, dtype) -> bool:
    """Whether FlashAttention's kernel for contexts of different lengths runs here."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
