"""Where a study computes and what that takes: device, dtype, free and peak memory.

MB is 2**20 bytes, as `get_memory_footprint() / 2**20` is printed in the paper.
"""

import contextlib
import ctypes
import functools
import gc
import re
import resource
import sys
from pathlib import Path

import torch

MB = 2**20


def device_and_dtype(wanted: str = "auto", own: torch.dtype | None = None) -> tuple[torch.device, torch.dtype, str]:
    """Where to compute, in what, and why. The reason is stored beside every result.

    wanted: what the configuration or the study asks for; own: the model's dtype (config.json), which is the baseline on
    a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted != "auto":
        return device, getattr(torch, wanted), f"{wanted}: asked for in the parameters"
    if device.type == "cpu":
        return device, torch.float32, "float32: no GPU here, and 16-bit arithmetic on a CPU is slow or missing"
    if own is None:
        return device, torch.float16, "float16: the model's config.json names no dtype"
    return device, own, f"{str(own).removeprefix('torch.')}: the model's own (config.json)"


def environment(wanted: str = "auto", own: str | None = None) -> dict:
    """Device, dtype and why; for 00_setup. own: the name of the model's dtype."""
    device, dtype, reason = device_and_dtype(wanted, getattr(torch, own) if own else None)
    return {"device": device.type, "dtype": str(dtype).removeprefix("torch."), "dtype_reason": reason}


def free() -> None:
    """Give memory back to the device; the caller has dropped its references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trim() -> None:
    """Give freed memory that the C library still holds back to the system, where it can (glibc)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def kv_cache_bytes_per_token(cache) -> float:
    """Bytes of keys and values that one token of one sequence adds, read off a filled transformers cache. Raises
    NotImplementedError for a cache of another kind, such as a state-space model's.

    A layer with a sliding window adds none beyond it."""
    layers = getattr(cache, "layers", None) or []
    if not layers or not all(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
        raise NotImplementedError(f"{type(cache).__name__} does not hold keys and values in every layer")
    return sum((la.keys.nbytes + la.values.nbytes) / (la.keys.shape[0] * la.keys.shape[2]) for la in layers)


def process_peak_mb() -> float:
    """Peak resident memory of this process since it started, or since `reset_peak` (MB)."""
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures and of what warms up for them: cuBLAS keeps a workspace (32 MiB on an H100) for every
    stream that it has seen, until the process ends."""
    return torch.cuda.Stream(device)


def reset_peak(device: torch.device) -> str | None:
    """Start a new phase of peak memory. Returns why that is not possible here, or None."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        return f"peak memory of one phase: this system does not let a process reset its peak ({error.strerror})"
    return None


def peak_mb(device: torch.device) -> float:
    """Peak since `reset_peak` (MB): allocated by torch on a GPU, resident in the whole process on a CPU."""
    return torch.cuda.max_memory_allocated() / MB if device.type == "cuda" else process_peak_mb()
