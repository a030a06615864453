"""The hardware's limit beside every figure: bytes that must move, operations that must be done, and where the time goes instead.

A decode step must read every weight once, as it is stored, with its quantization state and the keys and values so far; a prefill
must also do two operations per weight and token. Divided by the copy bandwidth and the matmul rate that this device reaches in the
same run (`bandwidth_and_rate`), these are times that no kernel can beat: the roofline of Williams et al. (2009).

GB is 10**9 bytes and TFLOPS 10**12 operations per second.
"""

import re

import torch

from helpers.benchmark import conditions, timing
from helpers.setup.layers import stored_bytes

# Kernel names by what they do; the first that matches counts. bitsandbytes: csrc/kernels.cu and csrc/gemm_4bit.cu.
GPU_KERNELS = [
    ("dequantization", r"dequant"),
    ("matmul and dequantization in one", r"gem[mv]_?4bit|4bit_inference"),
    ("quantization of activations", r"int8vectorquant|quantize"),
    ("attention", r"fmha|flash|attention|softmax"),
    ("fused by torch.compile", r"^triton_"),
    ("matmul", r"gem[mv]|cutlass|nvjet|cublas|splitk|dot_kernel"),
]
CPU_OPERATORS = [
    ("dequantization", r"bitsandbytes::dequant"),
    ("matmul and dequantization in one", r"bitsandbytes::gem[mv]_4bit"),
    ("quantization of activations", r"bitsandbytes::int8_(vectorwise|double)_quant"),
    ("matmul", r"bitsandbytes::int8|aten::(mm|bmm|addmm|matmul|linear|_int_mm)$|mkldnn"),
    ("attention", r"attention|softmax"),
]
LAUNCHES = "launches and gaps between kernels"


def bandwidth_and_rate(device: torch.device, dtype: torch.dtype) -> dict:
    """What this device reaches here and now: copying a large tensor, and multiplying two large matrices of `dtype`.

    Returns name, copy_bandwidth_gb_per_second (read and write counted), matmul_tflops, and the samples of both (ms).
    """
    gpu = device.type == "cuda"
    copied, side = (2**30, 8192) if gpu else (2**27, 1024)
    copy = _copy_samples(copied, device)
    multiply = _matmul_samples(side, device, dtype)
    moved = 2 * copied
    return {
        "name": conditions.name(device),
        "copy_bandwidth_gb_per_second": rate_gb(moved, timing.summary(copy, "ms")["median_ms"]),
        "matmul_tflops": rate_tflops(2 * side**3, timing.summary(multiply, "ms")["median_ms"]),
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "copied_bytes": moved,
        "copy_samples_ms": copy,
        "matmul_side": side,
        "matmul_samples_ms": multiply,
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


def rate_tflops(count: float, ms: float) -> float:
    """TFLOPS of `count` operations in `ms`."""
    return count / ms / 1e9


def memory_limit_ms(count: float, gb_per_second: float) -> float:
    """Least time (ms) to move `count` bytes."""
    return count / gb_per_second / 1e6


def compute_limit_ms(count: float, tflops: float) -> float:
    """Least time (ms) for `count` operations."""
    return count / tflops / 1e9


def limit(byte_count: float, operations: float, hardware: dict) -> tuple[float, str]:
    """The later of both limits (ms), and which it is: "memory" or "compute"."""
    moving = memory_limit_ms(byte_count, hardware["copy_bandwidth_gb_per_second"])
    computing = compute_limit_ms(operations, hardware["matmul_tflops"])
    return (moving, "memory") if moving >= computing else (computing, "compute")


def weight_bytes(model) -> int:
    """Bytes of weights and quantization state that every forward pass reads, as they are stored.

    An input embedding of its own is left out: a row of it is read for each token (`step_bytes`), not all of it.
    """
    total = sum(stored_bytes(model).values())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    return total if tied else total - embedding.nbytes


def step_bytes(model, batch: int, context: float, kv_bytes_per_token: float, tokens: int = 1) -> int:
    """Bytes that one pass over `tokens` new tokens per row must move: weights once, an embedding row per token, `context` cached
    tokens per row read, the new ones written."""
    embedding = model.get_input_embeddings().weight
    rows = batch * tokens * embedding.shape[1] * embedding.element_size()
    return int(weight_bytes(model) + rows + batch * (context + tokens) * kv_bytes_per_token)


def operations(model, batch: int, tokens: int, context: int = 0) -> int:
    """Multiplications and additions of a forward pass over `tokens` new tokens per row after `context` cached ones.

    Two per weight and token (the output head only for the last token), and in attention two each for scores and mix per head
    dimension and visible token (causal).
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    inner = 2 * tokens * sum(m.in_features * m.out_features for m in linear)
    outer = 2 * head.in_features * head.out_features
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    visible = tokens * context + tokens * (tokens + 1) // 2
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * size * visible
    return batch * (inner + outer + attention)


def classify(name: str, table: list[tuple[str, str]]) -> str:
    for what, pattern in table:
        if re.search(pattern, name, re.IGNORECASE):
            return what
    return "other"


def shares(
    durations_ms: list[tuple[str, float]], table: list[tuple[str, str]], wall_ms: float | None = None
) -> list[dict]:
    """Rows {what, ms_per_step, share}, largest first, that add up to the step: to `wall_ms` where it is given and longer than the
    kernels together (the rest is LAUNCHES), else to the sum of `durations_ms`, which are (kernel name, ms) pairs."""
    totals = {}
    for name, ms in durations_ms:
        what = classify(name, table)
        totals[what] = totals.get(what, 0.0) + ms
    busy = sum(totals.values())
    if wall_ms is not None and wall_ms > busy:
        totals[LAUNCHES] = wall_ms - busy
    whole = sum(totals.values())
    return [
        {"what": k, "ms_per_step": v, "share": v / whole}
        for k, v in sorted(totals.items(), key=lambda item: -item[1])
        if v > 0
    ]


def profile(
    function, device: torch.device, wall_ms: float | None = None, steps: int = 1
) -> tuple[list[dict], str | None]:
    """Where one step's time goes: rows as in `shares`, and why there are none where there are none.

    function: runs `steps` steps. wall_ms: time of one step without the profiler, whose own cost would otherwise count as launches;
    on a CPU the operators' own times add up to the whole.
    """
    gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    try:
        with torch.profiler.profile(activities=[activity]) as run:
            function()
            timing.synchronize(device)
    except RuntimeError as error:
        return [], f"the profiler can't be used: {error}"
    if gpu:
        events = [e for e in run.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        found = [(e.name, e.time_range.elapsed_us() / 1e3 / steps) for e in events]
    else:
        found = [(e.key, e.self_cpu_time_total / 1e3 / steps) for e in run.key_averages()]
    if not found:
        return [], "the profiler saw no kernels on this device"
    return shares(found, GPU_KERNELS if gpu else CPU_OPERATORS, wall_ms if gpu else None), None
