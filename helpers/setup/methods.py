"""Quantization methods: what each needs, how it is loaded, and which kernel it runs.

    methods.require(configuration)          # before any work: NotHere says why this machine can't do it
    METHODS["gptq"].packages                # ("llmcompressor", "compressed_tensors")

| method | weights | when | runs as |
|---|---|---|---|
| none | 16 or 32 bit | | torch |
| bitsandbytes-4bit | NF4 or FP4, blocks of 64 | on loading | packed |
| bitsandbytes-int8 | LLM.int8(): int8 per row, activations' outlier columns in 16 bit | on loading | packed |
| torchao-float8 | FP8 (e4m3) per row; no relation to LLM.int8() | on loading | widened (`dynamic`: float8) |
| torchao-int8 | 8-bit integers, a scale per row, weights only | on loading | widened |
| torchao-int4 | groups, rounded to nearest or HQQ | on loading | packed, a GPU only |
| gptq, awq | 4-bit integers in groups, calibrated (`calibrated`) | once, cached | unpacked |

Widened: the weight becomes the compute type before each multiplication. Unpacked: transformers 5.17
(quantizers/quantizer_compressed_tensors.py) has no kernel for such checkpoints and decompresses them on the first
forward pass, on every device. Here that is done on loading, so that memory and time are those of the unpacked model
throughout. Their accuracy and checkpoint are 4-bit, their memory and speed are not; vLLM, for one, keeps them packed.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

from helpers import NotHere, StudyError
from helpers.params import Configuration

INSTALL = "run `make setup METHODS=all`"


class Method(NamedTuple):
    config: Callable  # (options, dtype) -> transformers' quantization_config, or none
    kernel: Callable  # (options, device type, dtype's name) -> what multiplies, in words
    packed: bool  # the device holds the weights in the method's own bits while the model runs
    packages: tuple[str, ...] = ()  # beside requirements.txt
    capability: Callable = lambda options: (
        None
    )  # least compute capability of a GPU, (major, minor); none: a CPU will do
    dtype: str | None = None  # the only type that its kernel computes in
    calibrated: bool = False


def _bitsandbytes4(options, dtype):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quant_type,
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def _bitsandbytes8(options, dtype):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=options.threshold)


def _float8(options, dtype):
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8WeightOnlyConfig, PerRow
    from transformers import TorchAoConfig

    # torchao would otherwise tune torch.compile for this configuration and not for those it is compared with.
    if options.activations == "dynamic":
        return TorchAoConfig(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False))
    return TorchAoConfig(Float8WeightOnlyConfig(set_inductor_config=False))


def _int8(options, dtype):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))


def _int4(options, dtype):
    """HQQ: Badri and Shaji, 2023, https://mobiusml.github.io/hqq_blog/; torchao's own version of it."""
    from torchao.quantization import Int4WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(
        Int4WeightOnlyConfig(
            group_size=options.group_size,
            int4_packing_format="tile_packed_to_4d",
            int4_choose_qparams_algorithm=options.algorithm,
            set_inductor_config=False,
        )
    )


def _compressed(options, dtype):
    from transformers import CompressedTensorsConfig

    return CompressedTensorsConfig(dequantize=True)


def _float8_kernel(options, device, dtype):
    if options.activations == "dynamic":
        return "float8 multiplication of weights and activations (torch._scaled_mm)"
    return f"float8 weights, dequantized to {dtype} before each multiplication (torchao)"


def _unpacked_kernel(options, device, dtype):
    return f"unpacked to {dtype} on loading, then as full precision (torch)"


METHODS = {
    "none": Method(lambda options, dtype: None, lambda options, device, dtype: f"{dtype} (torch)", packed=False),
    "bitsandbytes-4bit": Method(
        _bitsandbytes4,
        lambda options, device, dtype: f"packed {options.quant_type}, {dtype} arithmetic (bitsandbytes)",
        packed=True,
    ),
    "bitsandbytes-int8": Method(
        _bitsandbytes8,
        lambda options, device, dtype: (
            "int8 multiplication" + (f", outliers in {dtype}" if options.threshold else "") + " (bitsandbytes)"
        ),
        packed=True,
    ),
    "torchao-float8": Method(
        _float8,
        _float8_kernel,
        packed=True,
        packages=("torchao",),
        capability=lambda options: (8, 9) if options.activations == "dynamic" else None,
    ),
    "torchao-int8": Method(
        _int8,
        lambda options, device, dtype: f"int8 weights, widened to {dtype} before each multiplication (torchao)",
        packed=True,
        packages=("torchao",),
    ),
    "torchao-int4": Method(
        _int4,
        lambda options, device, dtype: "packed int4, tinygemm (torch._weight_int4pack_mm)",
        packed=True,
        packages=("torchao",),
        capability=lambda options: (8, 0),
        dtype="bfloat16",
    ),
    "gptq": Method(
        _compressed, _unpacked_kernel, packed=False, packages=("llmcompressor", "compressed_tensors"), calibrated=True
    ),
    "awq": Method(
        _compressed, _unpacked_kernel, packed=False, packages=("llmcompressor", "compressed_tensors"), calibrated=True
    ),
}


def require(configuration: Configuration) -> None:
    """Raises NotHere if this machine lacks a package or the hardware, StudyError if the configuration asks for a type
    its kernel lacks.
    """
    name, options = configuration.configuration, configuration.quantization
    method = METHODS[options.method]
    missing = [p for p in method.packages if importlib.util.find_spec(p) is None]
    if missing:
        raise NotHere(f"{name}: {options.method} needs {' and '.join(missing)}, not installed here; {INSTALL}")
    if needed := method.capability(options):
        import torch

        wanted = f"{name}: {options.method} needs a GPU of compute capability {_dotted(needed)} or more"
        if not torch.cuda.is_available():
            raise NotHere(f"{wanted}, and there is no GPU here")
        if torch.cuda.get_device_capability() < needed:
            raise NotHere(
                f"{wanted}, and {torch.cuda.get_device_name()} has {_dotted(torch.cuda.get_device_capability())}"
            )
    if method.dtype and configuration.dtype != method.dtype:
        raise StudyError(
            f"{name}: dtype is {configuration.dtype}, but {options.method} has a kernel for {method.dtype} alone; "
            "write that"
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
