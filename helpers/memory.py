"""What a model really occupies, in bytes, and what it needs while it runs.

`get_memory_footprint()`, the figure that papers quote, counts parameters and buffers. bitsandbytes keeps part of a quantized
weight elsewhere: absmax, codebook and offset of a 4-bit layer in its `quant_state` (twice, with double quantization), the row
scales of an int8 layer in an attribute of the weight. `tensors(model)` finds them all, each once.

Vocabulary: MB is 2**20 bytes, as `get_memory_footprint() / 2**20` is printed in the paper.
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


def trim() -> None:
    """Give freed memory that the C library still holds back to the system; where the library can't (only glibc can), nothing."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _state_tensors(state, prefix: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a bitsandbytes QuantState, the nested one of double quantization included."""
    found = {}
    for name, value in vars(state).items():
        if isinstance(value, torch.Tensor):
            found[prefix + name] = value
        elif name == "state2" and value is not None:
            found |= _state_tensors(value, prefix + "state2.")
    return found


def quantization_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that belong to a quantized layer's weight but are neither parameters nor buffers, by name.

    4-bit: absmax, code, offset, state2.absmax, state2.code. int8: SCB (on the weight before, in `state` after the first run).
    """
    found = {}
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        found |= _state_tensors(state)
    for holder in (weight, getattr(module, "state", None)):
        scales = getattr(holder, "SCB", None)
        if isinstance(scales, torch.Tensor):
            found["SCB"] = scales
    return found


def inner(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain tensors inside a wrapper of several (torchao's: integers or float8 values, and scales), by name; none in a plain one.

    The wrapper has the shape and type of the weight that it stands for, so its own `nbytes` is not what it occupies.
    """
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]} if hasattr(tensor, "__tensor_flatten__") else {}


def tensors(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All tensors that hold the model: (parameters and buffers, quantization state), by name; what is shared is listed once."""
    plain, state, seen = {}, {}, set()

    def add(target, name, tensor):
        key = (tensor.device, tensor.data_ptr())
        if key not in seen and tensor.nbytes:
            seen.add(key)
            target[name] = tensor

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        for part, held in (inner(tensor) or {"": tensor}).items():
            if part in ("", "qdata"):
                add(plain, name, held)
            else:
                add(state, f"{name}.{part}", held)
    for name, module in model.named_modules():
        # An int8 layer moves its packed weight into `state.CB` at the first run.
        packed = getattr(getattr(module, "state", None), "CB", None)
        if isinstance(packed, torch.Tensor):
            add(plain, f"{name}.weight", packed)
        for part, tensor in quantization_state(module).items():
            add(state, f"{name}.{part}", tensor)
    return plain, state


def stored_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of {parameters_and_buffers, quantization_state}; a codebook shared by all layers counts once."""
    plain, state = tensors(model)
    return {"parameters_and_buffers": sum(t.nbytes for t in plain.values()), "quantization_state": sum(t.nbytes for t in state.values())}


def checkpoint_bytes(model: torch.nn.Module) -> int:
    """Bytes of the tensors that `save_pretrained` writes, tied weights once."""
    seen = {}
    for value in model.state_dict().values():
        for tensor in (inner(value) or {"": value}).values():
            if isinstance(tensor, torch.Tensor):
                seen[tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
    return sum(seen.values())


def kv_cache_bytes_per_token(cache) -> float:
    """Bytes of keys and values that one token of one sequence keeps, read off a filled transformers cache."""
    total = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    batch, _, length, _ = cache.layers[0].keys.shape
    return total / (batch * length)


def process_peak_mb() -> float:
    """Peak resident memory of this process since it started, or since `reset_peak` (MB)."""
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures and of what warms up for them. cuBLAS keeps a workspace (32 MiB on an H100) for every stream that it has
    seen, until the process ends: with a stream for each capture they would add up."""
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
