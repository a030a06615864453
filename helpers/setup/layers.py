"""What a model really occupies, in bytes, and what it needs while it runs.

`get_memory_footprint()`, the figure that papers quote, counts parameters and buffers. bitsandbytes keeps part of a
quantized weight elsewhere (`quantization_state`). `tensors(model)` finds them all, each once.
"""

import contextlib

import bitsandbytes as bnb
import torch
from bitsandbytes import functional

from helpers.setup.packed import Int4Linear


def quantization_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that belong to a quantized layer's weight but are neither parameters nor buffers, by name.

    4-bit: absmax, code, offset, state2.absmax, state2.code. int8: SCB (on the weight before, in `state` after the first
    run). `Int4Linear`: scales_and_zeros, a buffer."""
    if isinstance(module, Int4Linear):
        return {"scales_and_zeros": module.scales_and_zeros}
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    parts = {"": state, "state2.": getattr(state, "state2", None)}
    found = {prefix + name: value for prefix, part in parts.items() if part for name, value in vars(part).items()}
    scales = [getattr(holder, "SCB", None) for holder in (weight, getattr(module, "state", None))]
    found["SCB"] = next((given for given in scales if given is not None), None)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def inner(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain tensors inside a wrapper of several (torchao: integers or float8 values, and scales), by name; none of
    a plain one. The wrapper's own `nbytes` is not what it occupies."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    return {name: getattr(tensor, name) for name in names}


def tensors(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All tensors that hold the model: (parameters and buffers, quantization state), by name; what is shared is listed
    once."""
    plain, state, seen = {}, {}, set()

    def add(target, name, tensor):
        key = (tensor.device, tensor.data_ptr())
        if key not in seen and tensor.nbytes:
            seen.add(key)
            target[name] = tensor

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        for part, held in (inner(tensor) or {"": tensor}).items():
            if name.endswith("scales_and_zeros"):
                continue  # listed with its layer
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
    held = zip(("parameters_and_buffers", "quantization_state"), tensors(model))
    return {name: sum(t.nbytes for t in some.values()) for name, some in held}


def checkpoint_bytes(model: torch.nn.Module) -> int:
    """Bytes of the tensors that `save_pretrained` writes, tied weights once."""
    held = [part for value in model.state_dict().values() for part in (inner(value) or {"": value}).values()]
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in held if isinstance(t, torch.Tensor)}.values())


def linear_layers(model) -> dict[str, torch.nn.Linear]:
    """The linear layers that quantization replaces, by name: all but the output layer. Quantized or not."""
    output = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not output}


def repacked(module: torch.nn.Module) -> bool:
    """Has bitsandbytes rearranged a 4-bit layer for this CPU? On CPUs with AVX512-BF16 its first forward pass does, and
    from then on it computes in bfloat16, scales included, whatever the compute dtype."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def dequantize(module: torch.nn.Module) -> torch.Tensor:
    """The weight (out, in) that a linear layer computes with.

    bitsandbytes' layers are undone with its own functions. Any other quantized layer is asked for the image of the
    identity, which is its weight if it quantizes weights only (GPTQ, AWQ, weight-only FP8; formats that scale each
    activation row by its maximum keep a row of the identity too). AWQ moves scales into neighbouring layers: its weight
    is not comparable with the original. A repacked layer (`repacked`) is asked as well, and answers in bfloat16."""
    if isinstance(module, Int4Linear):
        return module.unpacked()
    weight = getattr(module, "weight", None)
    if isinstance(module, bnb.nn.Linear4bit) and not repacked(module):
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(module, bnb.nn.Linear8bitLt):
        # The first forward pass moves the weight and its scales from the parameter into the layer's state.
        scales = module.state.SCB if module.state.SCB is not None else weight.SCB
        values = module.state.CB if module.state.CB is not None else weight.data
        return functional.int8_vectorwise_dequant(values, scales)
    if hasattr(weight, "__tensor_flatten__"):  # torchao: a wrapper that says it is floating point
        with contextlib.suppress(NotImplementedError):  # int4's layout can only be multiplied with
            return weight.detach().dequantize()
    elif type(module) is torch.nn.Linear and torch.is_floating_point(weight):
        return weight.detach()
    held = [*module.parameters(), *module.buffers()]
    dtype = next((t.dtype for t in held if torch.is_floating_point(t)), torch.float32)
    with torch.inference_mode():
        image = module(torch.eye(module.in_features, dtype=dtype, device=held[0].device))
        return (image - module.bias if getattr(module, "bias", None) is not None else image).T.contiguous()


def stored_dtype(module) -> str:
    if isinstance(module, bnb.nn.Linear8bitLt):
        return "int8"  # the layer hides it once it has run
    if isinstance(module, Int4Linear):
        return "int4"
    held = [getattr(module, key, None) for key in ("weight", "weight_packed", "qweight")]
    dtype = next((t.dtype for t in held if t is not None), None)
    return str(dtype).removeprefix("torch.") + (", two weights each" if isinstance(module, bnb.nn.Linear4bit) else "")


def is_quantized(module: torch.nn.Module) -> bool:
    """A linear layer of another class (bitsandbytes), with another kind of weight (torchao), or unpacked from a
    checkpoint."""
    marks = hasattr(getattr(module, "weight", None), "__tensor_flatten__") or hasattr(module, "quantization_scheme")
    return isinstance(module, torch.nn.Linear) and (type(module) is not torch.nn.Linear or marks)


def make_plain(model: torch.nn.Module) -> None:
    """Take compressed-tensors' wrappers off an unpacked model, whose weights are final: their Python would count as
    time, their scales as memory, and torch.compile can't see through them. `quantization_scheme` stays, and tells a
    layer that was quantized (`is_quantized`)."""
    from compressed_tensors.offload import remove_dispatch

    remove_dispatch(model, onload_tensors=True)
    for module in model.modules():
        quantized = hasattr(module, "quantization_scheme") and isinstance(module, torch.nn.Linear)
        if quantized:
            if "weight" not in module._parameters:
                raise RuntimeError(f"a layer was not unpacked: it holds {sorted(module._parameters)}")
            for name in [n for n in (*module._parameters, *module._buffers) if n not in ("weight", "bias")]:
                delattr(module, name)
        if quantized or getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            module.__dict__.pop("forward", None)


def quantized_layers(model) -> dict[str, torch.nn.Module]:
    """Linear layers that are not plain torch ones, by name; `dequantize` gives the weight that one computes with."""
    return {name: module for name, module in model.named_modules() if is_quantized(module)}


def parameter_count(model) -> int:
    """Number of the model's weights, whatever they are packed in."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, Int4Linear))
    states = [(p, getattr(p, "quant_state", None)) for p in model.parameters()]  # 4-bit: two weights to a byte
    return packed + sum(p.numel() if state is None else state.shape.numel() for p, state in states)


def widest_layer(model) -> int:
    """Most columns that any linear layer reads or writes: rows times it must stay under 2^31 (bitsandbytes' LLM.int8()
    overflows). The vocabulary's layer is left out: it never gets more than HEAD_ROWS rows."""
    sides = (getattr(m, key, 1) for m in model.base_model.modules() for key in ("in_features", "out_features"))
    return max(sides, default=1)


def _int8_layers(model) -> list:
    return [m for m in model.modules() if type(m).__name__ == "Linear8bitLt"]


def widest_int8_layer(model) -> int | None:
    """Outputs of the widest LLM.int8() layer; None if the model has none."""
    return max((m.out_features for m in _int8_layers(model)), default=None)


def uncapturable(model) -> str | None:
    """Why a decode step can't be a CUDA graph, or None."""
    found = [getattr(getattr(m, "state", None), "threshold", None) for m in _int8_layers(model)]
    if threshold := next((float(t) for t in found if t), None):
        cause = f"at threshold {threshold} every layer synchronizes with the host (at threshold 0 none does)"
        return f"LLM.int8() cannot be graph-captured: {cause}"
    return None


def end_tokens(model) -> set[int]:
    """What `generate` itself stops at."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set(found) if isinstance(found, (list, tuple)) else {found} - {None}
