"""What a format does to the weights, layer by layer, before any text is read.

    found = formats.analyse(model, block_sizes=[64, 128])     # of a full-precision model, its linear layers

`relative_squared_error` is ||w - q(w)||^2 / ||w||^2, over a layer or over all of them (sums over sums); `sqnr_db` is
-10 log10 of it. NF4, FP4 and int8 are quantized and dequantized by bitsandbytes itself. Beside them, with the same
blocks:

    lloyd_max            the best 16 levels for this layer's own weights (`codebooks`): the best of all codebooks
    gaussian_lloyd_max   the best 16 levels for Gaussian weights in blocks of this size
    uniform              16 evenly spaced levels times absmax
    asymmetric           16 evenly spaced levels from a block's smallest weight to its largest: two numbers a block
                         instead of one, so it is no codebook times absmax and may beat the best of them

Are the weights Gaussian? Per layer, of x = w / absmax in blocks of 64: `ks_distance`, the largest difference between
the distribution functions of x and of a Gaussian in the same blocks (Kolmogorov-Smirnov). A distance and no test,
because with a million weights every test rejects.

Weights that were quantized before (the embedded model's: Q4_1, 16 values in a block of 32) stand on a few values a
block. Their distances and errors are then those of a grid, not of trained weights; a format whose grid falls on theirs
is flattered, the asymmetric one most, and Lloyd-Max finds a local optimum only.
"""

import math
import time

import torch
from bitsandbytes import functional

from helpers import StudyError
from helpers.fidelity import codebooks
from helpers.params import Configuration
from helpers.setup.layers import dequantize, linear_layers, stored_dtype

BLOCK_SIZE = 64
FIGURE_BINS = 128
SHARE = {"cpu": 0.125, "cuda": 1.0}  # of every layer's weights, for the effect of block size
STORED = {"nf4": "uint8, two weights each", "fp4": "uint8, two weights each", "int8": "int8"}  # by bitsandbytes
OWN = ("lloyd_max", "gaussian_lloyd_max", "uniform")


def round_trip(weight: torch.Tensor, name: str, block_size: int = BLOCK_SIZE, double: bool = False) -> torch.Tensor:
    """A weight quantized by bitsandbytes as `nf4` or `fp4` and dequantized; double: with scales quantized in turn.

    It goes in as one row padded to whole blocks, the blocks that it has as a matrix: bitsandbytes 0.50.2's AVX512
    kernel dequantizes a matrix wrongly if the block size does not divide its row length (576 and 128: ten times the
    error).
    """
    flat = weight.detach().reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size))
    packed, state = functional.quantize_4bit(padded, blocksize=block_size, quant_type=name, compress_statistics=double)
    return functional.dequantize_4bit(packed, state).reshape(-1)[: flat.numel()].view(weight.shape)


def round_trip_int8(weight: torch.Tensor) -> torch.Tensor:
    """A weight (out, in) as LLM.int8() holds it: from float16, one scale a row."""
    values, scales, _ = functional.int8_vectorwise_quant(weight.detach().to(torch.float16).contiguous())
    return functional.int8_vectorwise_dequant(values, scales).to(weight.dtype)


def round_trip_asymmetric(weight: torch.Tensor, block_size: int = BLOCK_SIZE) -> torch.Tensor:
    """A weight rounded to 16 evenly spaced levels from its block's smallest to its largest (exact scale and zero)."""
    flat = weight.detach().reshape(-1).float()
    blocks = torch.cat([flat, flat[-1:].expand(-flat.numel() % block_size)]).view(-1, block_size)
    low = blocks.amin(dim=1, keepdim=True)
    step = ((blocks.amax(dim=1, keepdim=True) - low) / 15).clamp_min(torch.finfo(torch.float32).tiny)
    back = ((blocks - low) / step).round() * step + low
    return back.view(-1)[: flat.numel()].view(weight.shape).to(weight.dtype)


def squared_error(weight: torch.Tensor, other: torch.Tensor) -> float:
    return (weight.float() - other.float()).square().sum(dtype=torch.float64).item()


def squared_size(weight: torch.Tensor) -> float:
    return weight.float().square().sum(dtype=torch.float64).item()


def _format(error: float, dtype: str | None) -> dict:
    return {"relative_squared_error": error, "sqnr_db": -10 * math.log10(error) if error else None, "dtype": dtype}


def own_error(full_model, model, configuration: Configuration) -> dict:
    """What a quantized model's weights lost: schema.FormatError. Raises StudyError if there is nothing to compare."""
    if configuration.quantization.method == "awq":
        raise StudyError("AWQ moves scales into neighbouring layers: not comparable")
    total, size, stored = 0.0, 0.0, set()
    for name, module in linear_layers(model).items():
        original = full_model.get_submodule(name)
        weight = original.weight.T if type(original).__name__ == "Conv1D" else original.weight  # GPT-2's layers
        total += squared_error(weight, dequantize(module).to(weight.device))
        size += squared_size(weight)
        stored.add(stored_dtype(module))
    if not size:
        raise StudyError(f"{type(model).__name__} has no linear layers besides its output layer")
    return _format(total / size, dtype=", ".join(sorted(stored)))


def ks_distance(counts: torch.Tensor, reference: torch.Tensor) -> float:
    """Kolmogorov-Smirnov distance between two distributions over the same bins (BINS,), at the bins' edges."""
    mine, other = counts.double().cumsum(0), reference.cumsum(0)
    return (mine / mine[-1] - other / other[-1]).abs().max().item()


def analyse(model, block_sizes: list[int], progress=None) -> dict:
    """Errors, codebooks and shape of a full-precision model's linear layers: schema.WeightErrors.

    All at a block size of 64 but the sweep `block_sizes`, which takes the first SHARE of every layer. Raises StudyError
    if the model has no linear layers besides its output layer.
    """
    start, layers = time.perf_counter(), linear_layers(model)
    if not layers:
        raise StudyError(f"{type(model).__name__} has no linear layers besides its output layer: no weights to analyse")
    rows, counts = _shapes(layers)
    whole = [module.weight.detach() for module in layers.values()]
    levels, errors, together = _one_block_size(whole, BLOCK_SIZE)
    levels |= {"lloyd_max": _best(together, levels)[0].tolist()}
    share = SHARE[whole[0].device.type]
    parts, table = [weight.reshape(-1)[: 4096 * math.ceil(share * weight.numel() / 4096)] for weight in whole], []
    for size in sorted(set(block_sizes)):
        # Four bits and a float32 scale a block; the asymmetric grid's two numbers count as 16 bits each (tinygemm).
        shape = {"block_size": size, "bits_per_weight": 4 + 32 / size}
        for kind, error in _one_block_size(parts, size)[1].items():
            table.append({"format": kind} | shape | {"relative_squared_error": error, "ppl": None, "ln_ratio": None})
        if progress:
            progress(f"weights in blocks of {size}: done")
    gaussian = codebooks.gaussian_blocks(BLOCK_SIZE, by_square=False)
    edges = torch.linspace(-1, 1, FIGURE_BINS + 1, dtype=torch.float64)
    return {
        "codebooks": {name: {"levels": sorted(book)} for name, book in levels.items()},
        "formats": {kind: _format(error, dtype=STORED.get(kind)) for kind, error in errors.items()},
        "layers": rows,
        "block_sizes": table,  # `perturb.block_sizes` fills ppl and ln_ratio in
        "block_sizes_read": {"reason": "not read yet"},
        "histogram": {
            "edges": edges.tolist(),
            "density": _figure_density(counts),
            "gaussian_density": _figure_density(gaussian.mass),
        },
        "seconds": time.perf_counter() - start,
    }


def _figure_density(mass: torch.Tensor) -> list[float]:
    coarse = mass.double().view(FIGURE_BINS, -1).sum(1)
    return (coarse / coarse.sum() * FIGURE_BINS / 2).tolist()


def _shapes(layers: dict) -> tuple[list[dict], torch.Tensor]:
    """Rows on the form of each layer's distribution, and the counts (BINS,) of all x."""
    gaussian = codebooks.gaussian_blocks(BLOCK_SIZE, by_square=False)
    rows, total = [], torch.zeros(codebooks.BINS, dtype=torch.float64)
    for name, module in layers.items():
        weight = module.weight.detach()
        x, _ = codebooks.normalized(weight, BLOCK_SIZE)
        counts = codebooks.density(x, torch.ones_like(x)).mass.cpu()
        total += counts
        rows.append({"layer": name, "weights": weight.numel(), "ks_distance": ks_distance(counts, gaussian.mass)})
    return rows, total


def _one_block_size(weights: list[torch.Tensor], size: int) -> tuple[dict, dict, codebooks.Density]:
    """In blocks of `size`, over all weights: codebooks, relative squared errors of all formats (int8, with a scale a
    row, only of matrices), and the distribution of normalized weights."""
    sizes, errors, densities = torch.tensor([squared_size(w) for w in weights], dtype=torch.float64), {}, []
    for weight in weights:
        back = {kind: round_trip(weight, kind, size) for kind in ("nf4", "fp4")}
        back |= {"int8": round_trip_int8(weight)} if weight.ndim == 2 else {}
        back["asymmetric"] = round_trip_asymmetric(weight, size)
        errors |= {kind: errors.get(kind, 0.0) + squared_error(weight, other) for kind, other in back.items()}
        x, absmax = codebooks.normalized(weight, size)
        densities.append(codebooks.density(x, absmax.double().square()))
    stacked = codebooks.Density(*(torch.stack(part).cpu() for part in zip(*densities, strict=True)))
    levels = {name: codebooks.library(name) for name in ("nf4", "fp4")}
    optimum = codebooks.lloyd_max(codebooks.gaussian_blocks(size), torch.tensor(levels["nf4"]))[0].tolist()
    levels |= {"gaussian_lloyd_max": optimum, "uniform": codebooks.uniform()}
    own = {"lloyd_max": _best(stacked, levels)[1]}
    own |= {kind: codebooks.relative_squared_error(stacked, torch.tensor(levels[kind])) for kind in OWN[1:]}
    errors |= {kind: (relative * sizes).sum().item() for kind, relative in own.items()}
    order = [kind for kind in ("nf4", "fp4", "int8", *OWN, "asymmetric") if kind in errors]
    together = codebooks.Density(*(part.sum(0) for part in stacked))
    return levels, {kind: errors[kind] / sizes.sum().item() for kind in order}, together


def _best(distribution: codebooks.Density, levels: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd-Max from the Gaussian's optimum and from NF4, whichever ends lower: a grid of weights has several local
    optima."""
    (a, error_a), (b, error_b) = (
        codebooks.lloyd_max(distribution, torch.tensor(levels[n])) for n in ("gaussian_lloyd_max", "nf4")
    )
    return torch.where((error_a <= error_b).unsqueeze(-1), a, b), torch.minimum(error_a, error_b)
