"""The hardware's limit beside every figure: bytes that must move, operations that must be done, and where the time
goes instead.

A decode step must read every weight once, as it is stored, with its quantization state and the keys and values so
far; a prefill must also do two operations per weight and token. Divided by the copy bandwidth and the matmul rate
that this device reaches in the same run (`bandwidth_and_rate`), these are times that no kernel can beat: the roofline
of Williams et al. (2009).

GB is 10**9 bytes and TFLOPS 10**12 operations per second.
"""

import re
from typing import NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from helpers.benchmark import conditions, timing
from helpers.setup.layers import linear_layers, stored_bytes, stored_dtype

MATMUL, PACKED_MATMUL = "matmul", "matmul and dequantization in one"
COMPILED_MATMUL = "matmul, written by torch.compile"
# Kernel names by what they do; the first that matches counts. bitsandbytes: csrc/kernels.cu and csrc/gemm_4bit.cu;
# torch's int4: aten/src/ATen/native/cuda/int4mm.cu. Inductor names a kernel after the operators that it fuses.
GPU_KERNELS = [
    (COMPILED_MATMUL, r"^triton_.*_(?:mm|addmm|bmm|mv)(?:_|$)"),
    ("attention", r"^triton_.*softmax"),
    ("other kernels of torch.compile", r"^triton_"),
    ("dequantization", r"dequant"),
    (PACKED_MATMUL, r"gem[mv]_?4bit|4bit_inference|tinygemm"),
    ("quantization of activations", r"int8vectorquant|quantize"),
    ("attention", r"fmha|flash|attention|softmax"),
    (MATMUL, r"gem[mv]|cutlass|nvjet|cublas|splitk|dot_kernel"),
]
CPU_OPERATORS = [
    ("dequantization", r"bitsandbytes::dequant"),
    (PACKED_MATMUL, r"bitsandbytes::gem[mv]_4bit"),
    ("quantization of activations", r"bitsandbytes::int8_(vectorwise|double)_quant"),
    (MATMUL, r"bitsandbytes::int8|aten::(mm|bmm|addmm|matmul|linear|_int_mm)$|mkldnn"),
    ("attention", r"attention|softmax"),
]
LAUNCHES = "launches and gaps between kernels"


def bandwidth_and_rate(device: torch.device, dtype: torch.dtype) -> dict:
    """schema_benchmark.Hardware: copying a large tensor, and multiplying two large matrices of `dtype`."""
    copied, side = (2**30, 8192) if device.type == "cuda" else (2**27, 1024)
    copy, multiply = _copy_samples(copied, device), _matmul_samples(side, device, dtype)
    return {
        "name": conditions.name(device),
        "copy_bandwidth_gb_per_second": rate_gb(2 * copied, timing.summary(copy, "ms")["median_ms"]),
        "matmul_tflops": 2 * side**3 / timing.summary(multiply, "ms")["median_ms"] / 1e9,
    }


def _copy_samples(count: int, device: torch.device) -> list[float]:
    source = torch.ones(count // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return timing.repeat(lambda: target.copy_(source), device, repeats=10, warmup=3)


def _matmul_samples(side: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return timing.repeat(lambda: left @ right, device, repeats=10, warmup=3)


def rate_gb(count: float, ms: float) -> float:
    """GB/s of `count` bytes in `ms`."""
    return count / ms / 1e6


def limit_ms(byte_count: float, operations: float, hardware: dict) -> float:
    """Least time (ms): the later of both limits, moving the bytes and doing the operations."""
    return max(
        byte_count / hardware["copy_bandwidth_gb_per_second"] / 1e6, operations / hardware["matmul_tflops"] / 1e9
    )


def weight_bytes(model) -> int:
    """Bytes of weights and quantization state that every forward pass reads, as they are stored.

    An input embedding of its own is left out: a row of it is read for each token (`step_bytes`), not all of it.
    """
    total = sum(stored_bytes(model).values())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    return total if tied else total - embedding.nbytes


def step_bytes(model, batch: int, context: float, kv_bytes_per_token: float | None, tokens: int = 1) -> int:
    """Bytes that one pass over `tokens` new tokens per row must move: weights once, an embedding row per token,
    `context` cached tokens per row read, the new ones written. Of experts (MoE), those that so many tokens can meet.
    Keys and values of another kind of cache (None) are not counted."""
    embedding = model.get_input_embeddings().weight
    rows = batch * tokens * embedding.shape[1] * embedding.element_size()
    idle = sum(w.bytes * max(0.0, 1 - batch * tokens * w.share) for w in _expert_weights(model))
    return int(weight_bytes(model) - idle + rows + batch * (context + tokens) * (kv_bytes_per_token or 0))


class Multiplied(NamedTuple):
    """A weight that tokens are multiplied with."""

    count: int
    bytes: int
    share: float  # of tokens that meet it: below 1 for an expert


def _expert_share(model, experts: int | None = None) -> float:
    """Share of a mixture's experts that one token meets."""
    config = model.config.get_text_config()

    def first(names: str) -> int | None:
        return next((v for name in names.split() if isinstance(v := getattr(config, name, None), int)), None)

    chosen = first("num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts")
    experts = experts or first("num_local_experts num_experts n_routed_experts")
    return min(1.0, chosen / experts) if chosen and experts else 1.0


def _expert_weights(model) -> list[Multiplied]:
    """Experts' weights: one tensor of three dimensions for all (transformers 5), or a linear layer each."""
    found = []
    for name, module in model.named_modules():
        if re.search(r"\.experts$", name):
            found += [
                Multiplied(p.numel(), p.nbytes, _expert_share(model, p.shape[0]))
                for p in module.parameters(recurse=False)
                if p.dim() == 3
            ]
        elif re.search(r"\.experts\.\d+\.", name) and isinstance(module, torch.nn.Linear):
            size = stored_bytes(module)
            found.append(Multiplied(module.in_features * module.out_features, sum(size.values()), _expert_share(model)))
    return found


def _layer_weights(model) -> int:
    """Weights of all linear layers but the output head and experts. GPT-2's Conv1D is one, with its sides exchanged."""
    head, count = model.get_output_embeddings(), 0
    for name, module in model.named_modules():
        if module is head or re.search(r"\.experts\.\d+\.", name):
            continue
        if isinstance(module, torch.nn.Linear):
            count += module.in_features * module.out_features
        elif isinstance(module, Conv1D):
            count += module.weight.numel()
    return count


def operations(model, batch: int, tokens: int) -> int:
    """Multiplications and additions of a prefill of `tokens` tokens per row.

    Two per weight and token (the output head only for the last token), and in attention two each for scores and mix per
    head dimension and visible token (causal). What state-space layers do beside their linear layers is not counted.
    """
    config = model.config.get_text_config()
    head, heads = model.get_output_embeddings(), getattr(config, "num_attention_heads", None)
    experts = sum(w.count * w.share for w in _expert_weights(model))
    inner = 2 * tokens * (_layer_weights(model) + experts)
    outer = 2 * head.in_features * head.out_features if head is not None else 0
    attention = 0
    if isinstance(heads, int):
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        attention = 4 * config.num_hidden_layers * heads * size * tokens * (tokens + 1) // 2
    return int(batch * (inner + outer + attention))


def matmul_bytes(model) -> dict[str, int]:
    """Bytes of weights that one step's matmuls read, by the kind of kernel that reads them: packed, and plain ones.

    Empty where weights are widened before they are multiplied, so that a matmul reads other bytes than are stored.
    """
    layers = linear_layers(model)
    widened = any(hasattr(getattr(m, "weight", None), "__tensor_flatten__") for m in layers.values())
    if widened or not layers:
        return {}
    head, found = model.get_output_embeddings(), {PACKED_MATMUL: 0, MATMUL: 0}
    for module in layers.values():
        kind = PACKED_MATMUL if stored_dtype(module).startswith(("uint8", "int4")) else MATMUL
        found[kind] += sum(stored_bytes(module).values())
    found[MATMUL] += head.weight.nbytes if head is not None else 0
    return found


def classify(name: str, table: list[tuple[str, str]]) -> str:
    return next((what for what, pattern in table if re.search(pattern, name, re.IGNORECASE)), "other")


def shares(kernels: list[tuple[str, float, float]], table, wall_ms: float | None = None, read=None) -> list[dict]:
    """schema_benchmark.Profile's rows, largest first, that add up to the step: to `wall_ms` where it is longer than the
    kernels together (the rest is LAUNCHES), else to their sum.

    kernels: (name, ms, count) per step. read: bytes that the kernels of a kind read, for their speed (None: unknown).
    """
    ms_of, count_of, read = {}, {}, dict(read or {})
    for name, ms, count in kernels:
        what = classify(name, table)
        ms_of[what], count_of[what] = ms_of.get(what, 0.0) + ms, count_of.get(what, 0.0) + count
    if COMPILED_MATMUL in ms_of:  # reads what a plain one would; if there are both, nobody can tell which read what
        read[COMPILED_MATMUL] = read.pop(MATMUL, 0) if MATMUL not in ms_of else 0
        if MATMUL in ms_of:
            read.pop(MATMUL, None)
    busy = sum(ms_of.values())
    if wall_ms is not None and wall_ms > busy:
        ms_of[LAUNCHES] = wall_ms - busy
    whole = sum(ms_of.values())
    return [
        {
            "what": what,
            "ms_per_step": ms,
            "share": ms / whole,
            "kernels": count_of.get(what),
            "gb_per_second": rate_gb(read[what], ms) if read.get(what) else None,
        }
        for what, ms in sorted(ms_of.items(), key=lambda item: -item[1])
        if ms > 0
    ]


def profile(function, device: torch.device, wall_ms: float | None = None, steps: int = 1, read=None) -> list[dict]:
    """Where one step's time goes: rows as in `shares`. Raises RuntimeError where the profiler can't be used.

    function: runs `steps` steps. wall_ms: time of one step without the profiler, whose own cost would otherwise count
    as launches; on a CPU the operators' own times add up to the whole.
    """
    gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as run:
        function()
        timing.synchronize(device)
    if gpu:
        events = [e for e in run.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        found = [(e.name, e.time_range.elapsed_us() / 1e3 / steps, 1 / steps) for e in events]
    else:
        found = [(e.key, e.self_cpu_time_total / 1e3 / steps, e.count / steps) for e in run.key_averages()]
    if not found:
        raise RuntimeError("the profiler saw no kernels on this device")
    return shares(found, GPU_KERNELS if gpu else CPU_OPERATORS, wall_ms if gpu else None, read)
