"""The decode step in its execution modes.

Eager `generate` starts some hundred kernels a token from Python; on a fast GPU the starting takes longer than the
work. The same step over a *static cache* (keys and values of fixed size, written in place at a position that lives on
the device) needs nothing from the host, so that a CUDA graph can hold all of it and each token costs one launch:

    decoder = Decoder(model, prompt, new_tokens=64, captured=True)     # mode "cuda_graph"
    decoder = Decoder(model, prompt, new_tokens=64, captured=True, compiled=True)      # mode "compile"
    decoder.reset()
    for _ in range(63):
        decoder.step()      # no host work but a launch; decoder.ids holds the newest token of every row

The model's own forward runs in all modes; only its cache, its attention function and, compiled, the forward of its
layers are replaced while a step runs. Greedy only; the end-of-text token is suppressed, as
`generate(min_new_tokens=...)` does.

Compiled, one function stands for all decoder layers (they differ in tensors only), so that compile time does not grow
with depth.
"""

import gc
import time
from contextlib import ExitStack, contextmanager

import torch
import torch._inductor
import torch.nn.functional as F
from transformers import AttentionInterface

from helpers.setup.device import capture_stream, kv_cache_bytes_per_token
from helpers.setup.layers import end_tokens, uncapturable

ATTENTION = "static_decode"
# Up to so many rows, compiled attention is written as products and sums, which fuse, and not as SDPA.
FUSED_ATTENTION_ROWS = 8
CAPTURE_WARMUP = 3


def compile_options(batch: int) -> dict:
    """Inductor options; those that this torch does not know are left out.

    At one row a matmul is a matrix-vector product: with coordinate descent tuning Inductor writes it as a reduction,
    fused with its neighbours and tuned to the bandwidth (torch/_inductor/decomposition.py, `mm`). Combo kernels launch
    independent kernels as one, where that measures faster. Both cost seconds a kernel, and the first changes no matmul
    of several rows, so only one row gets them. There a step is some 170 short kernels: programmatic dependent launch
    (Hopper and newer; others ignore it) starts each before the last has ended, 0.92 for 1.04 ms on an H200 (1B shape).
    """
    if batch > 1:
        return {}
    wanted = ("coordinate_descent_tuning", "combo_kernels", "benchmark_combo_kernel", "triton.enable_pdl")
    return dict.fromkeys(set(wanted) & set(torch._inductor.list_options()), True)


def static_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention of one new token per row over a static cache.

    query [batch, heads, 1, head_dim]; key, value [batch, kv_heads, length, head_dim]; attention_mask additive
    [batch or 1, 1, 1, length]. Returns [batch, 1, heads, head_dim], None. Heads that share a key head stand as its
    rows: nothing is repeated in memory (transformers' sdpa repeats keys and values as soon as there is a mask).
    """
    for option in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(option) is not None:
            raise NotImplementedError(f"attention with {option} over a static cache")
    if (kwargs.get("sliding_window") or key.shape[2]) < key.shape[2]:
        raise NotImplementedError(
            f"a context of {key.shape[2]} beyond the sliding window of {kwargs['sliding_window']}"
        )
    batch, heads, _, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], size)
    if torch.compiler.is_compiling() and batch <= FUSED_ATTENTION_ROWS:
        scores = (grouped.float().unsqueeze(3) * key.float().unsqueeze(2)).sum(-1) * scaling + attention_mask
        shares = torch.softmax(scores, dim=-1)
        mixed = (shares.unsqueeze(-1) * value.float().unsqueeze(2)).sum(-2).to(query.dtype)
    else:
        mask = attention_mask.expand(batch, key.shape[1], grouped.shape[2], key.shape[2])
        mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return mixed.reshape(batch, 1, heads, size), None


AttentionInterface.register(ATTENTION, static_attention)


class LayerCache:
    """Keys and values [batch, kv_heads, length, head_dim] of one layer; an update writes at `position`, int64 [1]."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor):
        self.keys, self.values, self.position = keys, values, position

    def update(self, key, value, layer_idx=None, *args, **kwargs):
        self.keys.index_copy_(2, self.position, key)
        self.values.index_copy_(2, self.position, value)
        return self.keys, self.values


class StepCache:
    """transformers' StaticCache, but with one position for all layers: its own counts in every layer, at five kernels
    a layer."""

    def __init__(self, layers: list[LayerCache]):
        self.layers = layers

    def update(self, key, value, layer_idx, *args, **kwargs):
        return self.layers[layer_idx].update(key, value)


@contextmanager
def _attribute(owner, name: str, value):
    """Set an attribute for a while; one that was not the instance's own is removed afterwards."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def _attention(model):
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _layer_step(layer, hidden_states, keys, values, position, kwargs):
    cache = LayerCache(keys, values, position)
    return type(layer).forward(layer, hidden_states, past_key_values=cache, **kwargs)


def _compiled_modules(model, options: dict) -> list[tuple]:
    """(module, forward) pairs that replace the model's own while a step is captured."""
    layer_step = torch.compile(_layer_step, fullgraph=True, dynamic=False, options=options)

    def forward_of(index, layer):
        def forward(hidden_states, past_key_values=None, **kwargs):
            own = past_key_values.layers[index]
            return layer_step(layer, hidden_states, own.keys, own.values, own.position, kwargs)

        return forward

    backbone = model.base_model
    pairs = [(layer, forward_of(i, layer)) for i, layer in enumerate(backbone.layers)]
    for module in (backbone.norm, backbone.rotary_emb, model.get_output_embeddings()):
        pairs.append((module, torch.compile(module.forward, fullgraph=True, dynamic=False, options=options)))
    return pairs


def obstacle(model, mode: str) -> str | None:
    """Why `model` can't run in `mode`, as far as that is known before trying; None: nothing stands against it."""
    if mode == "eager":
        return None
    if _device_type(model) != "cuda":
        return f"{mode}: a CUDA graph needs a GPU, and there is none here"
    if reason := uncapturable(model):
        return f"{mode}: {reason}"
    backbone = model.base_model
    if mode == "compile" and not all(hasattr(backbone, part) for part in ("layers", "norm", "rotary_emb")):
        return f"compile: {type(backbone).__name__} has no layers, norm and rotary_emb of the usual names"
    return None


def refuse(model, mode: str) -> None:
    """Raises NotImplementedError if something stands against `mode`."""
    if reason := obstacle(model, mode):
        raise NotImplementedError(reason)


def _device_type(model) -> str:
    return next(model.parameters()).device.type


class Decoder:
    """Greedy decoding over a static cache, one `step` a token.

    prompt: int64 [batch, tokens]; `new_tokens` counts the one that prefill gives. `repeat_rows` tiles the prompt's
    rows to that batch after prefill, for batches whose prefill would not fit. Raises what the capture or compilation
    raised, NotImplementedError for a cache without keys and values.
    """

    @torch.no_grad()
    def __init__(
        self,
        model,
        prompt,
        new_tokens: int,
        captured: bool = False,
        compiled: bool = False,
        repeat_rows: int | None = None,
    ):
        began = time.perf_counter()
        self.model, self.prompt_tokens, self.batch = model, prompt.shape[1], repeat_rows or prompt.shape[0]
        # A multiple of 16 keeps the rows of the attention mask aligned; beyond that no longer than needed.
        self.length = -(-(self.prompt_tokens + new_tokens) // 16) * 16
        self.position = torch.zeros(1, dtype=torch.int64, device=prompt.device)
        # Additive, one place opened a step: cheaper than building a mask each time.
        self.mask = torch.zeros(1, 1, 1, self.length, dtype=model.dtype, device=prompt.device)
        self.suppressed = torch.tensor(sorted(end_tokens(model)), dtype=torch.int64, device=prompt.device)
        self.cache = self._prefill(prompt)
        self.ids = self.first.clone()
        self.replaced = []
        if compiled:
            torch._dynamo.reset()
            self.replaced = _compiled_modules(model, compile_options(self.batch))
        self.graph = None
        self.reset()
        if captured:
            self.graph = _captured(self._advance, prompt.device)
            self.reset()
        self.build_seconds = time.perf_counter() - began

    def _prefill(self, prompt) -> StepCache:
        out = self.model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        first = self._choose(out.logits[:, -1])
        rows = torch.arange(self.batch, device=prompt.device) % prompt.shape[0]
        self.first = first[rows]
        layers = []
        kv_cache_bytes_per_token(getattr(out, "past_key_values", None))  # refuses caches of another kind
        for layer in out.past_key_values.layers:
            if layer.keys.shape[2] != self.prompt_tokens:
                raise NotImplementedError(
                    f"a cache that keeps {layer.keys.shape[2]} of {self.prompt_tokens} tokens (sliding window)"
                )
            pair = []
            for filled in (layer.keys, layer.values):
                static = filled.new_zeros(self.batch, filled.shape[1], self.length, filled.shape[3])
                static[:, :, : self.prompt_tokens] = filled[rows]
                pair.append(static)
            layers.append(LayerCache(*pair, self.position))
        return StepCache(layers)

    def _choose(self, logits):
        if self.suppressed.numel():
            logits.index_fill_(-1, self.suppressed, float("-inf"))
        return logits.argmax(-1, keepdim=True)

    def logits(self) -> torch.Tensor:
        """Logits [batch, vocabulary] of the next token; writes the current one into the cache. Not captured."""
        with ExitStack() as replaced:
            replaced.enter_context(_attention(self.model))
            for module, forward in self.replaced:
                replaced.enter_context(_attribute(module, "forward", forward))
            self.mask.index_fill_(-1, self.position, 0.0)
            out = self.model(
                input_ids=self.ids,
                attention_mask=self.mask,
                position_ids=self.position.view(1, 1),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return out.logits[:, -1]

    @torch.no_grad()
    def _advance(self) -> None:
        self.ids.copy_(self._choose(self.logits()))
        self.position.add_(1)

    def reset(self) -> None:
        """Back to the end of the prompt."""
        self.position.fill_(self.prompt_tokens)
        self.mask[..., : self.prompt_tokens] = 0.0
        self.mask[..., self.prompt_tokens :] = torch.finfo(self.mask.dtype).min
        self.ids.copy_(self.first)

    def step(self) -> None:
        """One token for every row."""
        (self.graph.replay if self.graph else self._advance)()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def tokens(self, count: int) -> torch.Tensor:
        """The first `count` greedy tokens, int64 [batch, count] on the CPU."""
        self.reset()
        found = [self.ids.clone()]
        for _ in range(count - 1):
            self.step()
            found.append(self.ids.clone())
        return torch.cat(found, dim=1).cpu()

    def close(self) -> None:
        """Give the cache and the graph's memory back."""
        self.graph = self.cache = self.replaced = self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _captured(work, device: torch.device) -> torch.cuda.CUDAGraph:
    """`work` as a CUDA graph, after it has warmed up on the same stream."""
    stream = capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(CAPTURE_WARMUP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph


@torch.no_grad()
def captured_prefill(model, ids: torch.Tensor):
    """A CUDA graph of the eager prefill of `ids` (its kernels, without their launches), to be replayed."""
    return _captured(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1), ids.device)
