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
| gptq, awq | 4-bit integers in groups, calibrated (`calibrated`) | once, cached | packed on a GPU, else unpacked |

Widened: the weight becomes the compute type before each multiplication. Packed int4 runs on torch's tinygemm
(`packed`), in bfloat16. Where it can't, GPTQ and AWQ are unpacked on loading: accuracy and checkpoint are theirs,
memory and speed are full precision's, and not measured again.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

from helpers import NotHere, StudyError
from helpers.params import Configuration
from helpers.setup import packed

INSTALL = "run `make setup METHODS=all`"


class Method(NamedTuple):
    config: Callable  # (options, dtype) -> transformers' quantization_config, or none
    kernel: str | Callable  # what multiplies: words with {options} and {dtype}, or (options, device type, dtype's name)
    packages: tuple[str, ...] = ()  # beside requirements.txt
    capability: Callable = lambda options: None  # least compute capability of a GPU; none: a CPU will do
    packed: bool = True  # the device holds the weights in the method's own bits while the model runs
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


def quantization_arguments(given: dict) -> dict:
    """`from_pretrained`'s arguments as transformers 5 takes them: load_in_4bit or load_in_8bit, with the keys of
    BitsAndBytesConfig beside it, become `quantization_config`. Raises ValueError for both at once."""
    from transformers import BitsAndBytesConfig

    theirs = ("load_in_", "bnb_4bit_", "llm_int8_")
    options = {key: value for key, value in given.items() if key.startswith(theirs)}
    rest = {key: value for key, value in given.items() if key not in options}
    if options.get("load_in_4bit") or options.get("load_in_8bit"):
        rest["quantization_config"] = BitsAndBytesConfig(**options)
    return rest


def _torchao(kind: str, **arguments):
    """transformers' configuration for one of torchao's. HQQ: Badri and Shaji, 2023, mobiusml.github.io/hqq_blog"""
    from torchao import quantization
    from transformers import TorchAoConfig

    # torchao would otherwise tune torch.compile for this configuration and not for those it is compared with.
    return TorchAoConfig(getattr(quantization, kind)(set_inductor_config=False, **arguments))


def _float8(options, dtype):
    if options.activations == "none":
        return _torchao("Float8WeightOnlyConfig")
    from torchao.quantization import PerRow

    return _torchao("Float8DynamicActivationFloat8WeightConfig", granularity=PerRow())


def _int4(options, dtype):
    names = {"group_size": options.group_size, "int4_choose_qparams_algorithm": options.algorithm}
    return _torchao("Int4WeightOnlyConfig", int4_packing_format="tile_packed_to_4d", **names)


def _compressed(options, dtype):
    from transformers import CompressedTensorsConfig

    # Packed layers are replaced after loading (`packed.replace_layers`); others are unpacked by transformers.
    return CompressedTensorsConfig(dequantize=_obstacle(options, dtype) is not None)


def _obstacle(options, dtype) -> str | None:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return packed.obstacle(options.group_size, device, str(dtype).removeprefix("torch."))


def _float8_kernel(options, device, dtype):
    if options.activations == "dynamic":
        return "float8 multiplication of weights and activations (torch._scaled_mm)"
    return f"float8 weights, dequantized to {dtype} before each multiplication (torchao)"


def _calibrated_kernel(options, device, dtype):
    if why := packed.obstacle(options.group_size, device, dtype):
        return f"no 4-bit kernel here ({why}): unpacked to {dtype}, then as full precision (torch)"
    return packed.KERNEL


def _int8_kernel(options, device, dtype):
    return "int8 multiplication" + (f", outliers in {dtype}" if options.threshold else "") + " (bitsandbytes)"


TORCHAO, CALIBRATED = ("torchao",), ("llmcompressor", "compressed_tensors")
METHODS = {
    "none": Method(lambda options, dtype: None, "{dtype} (torch)", packed=False),
    "bitsandbytes-4bit": Method(_bitsandbytes4, "packed {options.quant_type}, {dtype} arithmetic (bitsandbytes)"),
    "bitsandbytes-int8": Method(_bitsandbytes8, _int8_kernel),
    "torchao-float8": Method(
        _float8, _float8_kernel, TORCHAO, lambda options: (8, 9) if options.activations == "dynamic" else None
    ),
    "torchao-int8": Method(
        lambda options, dtype: _torchao("Int8WeightOnlyConfig"),
        "int8 weights, widened to {dtype} before each multiplication (torchao)",
        TORCHAO,
    ),
    "torchao-int4": Method(_int4, packed.KERNEL, TORCHAO, lambda options: packed.CAPABILITY, dtype="bfloat16"),
    "gptq": Method(_compressed, _calibrated_kernel, CALIBRATED, calibrated=True),
    "awq": Method(_compressed, _calibrated_kernel, CALIBRATED, calibrated=True),
}


def kernel(options, device: str, dtype: str) -> str:
    """What multiplies, in words. device: cuda or cpu; dtype: the name of what is computed in."""
    given = METHODS[options.method].kernel
    return given.format(options=options, dtype=dtype) if isinstance(given, str) else given(options, device, dtype)


def is_packed(options, device: str, dtype: str) -> bool:
    """Whether the device holds the method's own bits while the model runs. device: cuda or cpu; dtype: its name."""
    method = METHODS[options.method]
    return method.packed and not (method.calibrated and packed.obstacle(options.group_size, device, dtype))


def kernel_dtype(options) -> str | None:
    """The only type in which a calibrated method's packed kernel computes, where this machine has it; else None."""
    import torch

    calibrated = METHODS[options.method].calibrated
    return "bfloat16" if calibrated and _obstacle(options, torch.bfloat16) is None else None


def wanted_dtype(configuration: Configuration) -> str | None:
    """The type that the configuration or its kernel asks for; None: neither does."""
    return configuration.dtype if configuration.dtype != "auto" else kernel_dtype(configuration.quantization)


def require(configuration: Configuration) -> None:
    """Raises NotHere if this machine lacks a package or the hardware, StudyError if a type is asked for that its
    kernel lacks."""
    name, options = configuration.configuration, configuration.quantization
    method, dotted = METHODS[options.method], lambda capability: ".".join(map(str, capability))
    if missing := [p for p in method.packages if importlib.util.find_spec(p) is None]:
        raise NotHere(f"{name}: {' and '.join(missing)} not installed here; {INSTALL}")
    if needed := method.capability(options):
        import torch

        wanted = f"{name}: {options.method} needs a GPU of compute capability {dotted(needed)} or more"
        if not torch.cuda.is_available():
            raise NotHere(f"{wanted}, and there is no GPU here")
        if (found := torch.cuda.get_device_capability()) < needed:
            raise NotHere(f"{wanted}, and {torch.cuda.get_device_name()} has {dotted(found)}")
    if method.dtype and configuration.dtype != method.dtype:
        said = f"dtype is {configuration.dtype}, but {options.method} has a kernel for {method.dtype} alone"
        raise StudyError(f"{name}: {said}; write that")
