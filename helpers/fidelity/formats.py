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

Are the weights Gaussian? Per layer, of x = w / absmax in blocks of 64: `excess_kurtosis`, the kurtosis of x less that
of a Gaussian in the same blocks, and `ks_distance`, the largest difference between the distribution functions of x and
of that Gaussian (Kolmogorov-Smirnov). A distance and no test, because with a million weights every test rejects.
`ks_chance` is its mean for as many independent Gaussian weights; `ks_curve` says how many layers are how close.

Weights that were quantized before (the embedded model's: Q4_1, 16 values in a block of 32) stand on a few values a
block: `distinct_values_per_block` shows it. Their distances and errors are then those of a grid, not of trained
weights; a format whose grid falls on theirs is flattered, the asymmetric one most, and Lloyd-Max finds a local optimum
only.
"""

import math
import re
import time

import torch
from bitsandbytes import functional

from helpers import StudyError
from helpers.fidelity import codebooks
from helpers.params import Configuration
from helpers.setup.layers import dequantize, linear_layers, stored_dtype

BLOCK_SIZE = 64
FIGURE_BINS = 128
SHARE = {"cpu": 0.25, "cuda": 1.0}  # of every layer's weights, for the effect of block size
STORED = {"nf4": "uint8, two weights each", "fp4": "uint8, two weights each", "int8": "int8"}  # by bitsandbytes
OWN = ("lloyd_max", "gaussian_lloyd_max", "uniform")
KS_GRID = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)


def round_trips(weight: torch.Tensor, name: str, block_size: int = BLOCK_SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight quantized by bitsandbytes as `nf4` or `fp4` and dequantized: with exact scales, and with scales
    quantized in turn (double quantization).

    It goes in as one row padded to whole blocks, the blocks that it has as a matrix: bitsandbytes 0.50.2's AVX512
    kernel dequantizes a matrix wrongly if the block size does not divide its row length (576 and 128: ten times the
    error).
    """
    flat = weight.detach().reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size))
    packed, state = functional.quantize_4bit(padded, blocksize=block_size, quant_type=name)

    def back() -> torch.Tensor:
        return functional.dequantize_4bit(packed, state).reshape(-1)[: flat.numel()].view(weight.shape)

    exact, offset = back(), state.absmax.mean()
    scales, nested = functional.quantize_blockwise(state.absmax - offset, blocksize=256)  # as quantize_4bit does it
    state.absmax = functional.dequantize_blockwise(scales, nested).float() + offset
    return exact, back()


def round_trip_int8(weight: torch.Tensor) -> torch.Tensor:
    """A weight (out, in) as LLM.int8() holds it: from float16, one scale a row."""
    values, scales, _ = functional.int8_vectorwise_quant(weight.detach().to(torch.float16).contiguous())
    return functional.int8_vectorwise_dequant(values, scales).to(weight.dtype)


def round_trip_asymmetric(weight: torch.Tensor, block_size: int = BLOCK_SIZE) -> torch.Tensor:
    """A weight rounded to 16 evenly spaced levels from the smallest to the largest of its block (exact scale and
    zero)."""
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


def sqnr_db(relative_squared_error: float) -> float | None:
    """Signal to quantization noise in decibels; none where there is no error."""
    return -10 * math.log10(relative_squared_error) if relative_squared_error > 0 else None


def bits_per_weight(block_size: int, double_quant: bool) -> float:
    """Four bits and a share of the block's scale: float32, or 8 bits and a float32 for 256 scales (Dettmers et al.
    2023, section 3). The asymmetric grid's two numbers count as 16 bits each, as in tinygemm."""
    return 4 + (8 + 32 / 256 if double_quant else 32) / block_size


def _format(error: float, size: float, **more) -> dict:
    relative = error / size
    return {"relative_squared_error": relative, "sqnr_db": sqnr_db(relative)} | more


def own_error(full_model, model, configuration: Configuration) -> dict:
    """What a quantized model's weights lost against full precision's: schema.FormatError. Raises StudyError if there is
    nothing to compare."""
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
    return _format(total, size, dtype=", ".join(sorted(stored)))


def kind_and_depth(name: str) -> tuple[str, int | None]:
    """`model.layers.3.self_attn.q_proj` -> ("q_proj", 3)."""
    number = re.search(r"\.(\d+)\.", name)
    return name.split(".")[-1], int(number[1]) if number else None


def excess_kurtosis(values: torch.Tensor) -> float:
    """Fourth central moment over the squared variance, less 3."""
    centred = values.double() - values.double().mean()
    square = centred.square()
    return (square.square().mean() / square.mean() ** 2).item() - 3


def _density_kurtosis(distribution: codebooks.Density) -> float:
    """Excess kurtosis of a symmetric density, from its bins' centres."""
    centre = (torch.arange(codebooks.BINS, dtype=torch.float64) + 0.5) * (2 / codebooks.BINS) - 1
    centre[0], centre[-1] = -1, 1  # hold the atoms
    return (
        (distribution.mass * centre**4).sum() / (distribution.mass * centre**2).sum() ** 2 * distribution.mass.sum()
    ).item() - 3


def ks_distance(counts: torch.Tensor, reference: torch.Tensor) -> float:
    """Kolmogorov-Smirnov distance between two distributions over the same bins (BINS,), at the bins' edges."""
    mine, other = counts.double().cumsum(0), reference.cumsum(0)
    return (mine / mine[-1] - other / other[-1]).abs().max().item()


def distinct_values_per_block(weight: torch.Tensor, block_size: int = BLOCK_SIZE, sample: int = 1000) -> float:
    """Mean number of different values in the first blocks of a weight."""
    blocks = weight.detach().reshape(-1)[: sample * block_size]
    blocks = blocks[: blocks.numel() // block_size * block_size].view(-1, block_size).sort(dim=1).values
    return (blocks.diff(dim=1) != 0).sum(dim=1).add(1).double().mean().item()


def analyse(model, block_sizes: list[int], progress=None) -> dict:
    """Errors, codebooks and shape of a full-precision model's linear layers: schema.WeightErrors.

    All at a block size of 64 but the sweep `block_sizes`, which takes the first `block_sizes_share` of every layer (a
    CPU a quarter). Raises StudyError if the model has no linear layers besides its output layer.
    """
    start, layers = time.perf_counter(), linear_layers(model)
    if not layers:
        raise StudyError(f"{type(model).__name__} has no linear layers besides its output layer: no weights to analyse")
    rows, counts = _shapes(layers)
    whole = {name: m.weight.detach() for name, m in layers.items()}
    at_64 = _one_block_size(whole, BLOCK_SIZE)
    share = SHARE[next(iter(whole.values())).device.type]
    parts, table = {name: _beginning(weight, share) for name, weight in whole.items()}, []
    for size in sorted(set(block_sizes)):
        table += _one_block_size(parts, size)["rows"]
        if progress:
            progress(f"weights in blocks of {size}: done")
    for row in rows:
        row["errors"] = at_64["errors"][row["layer"]]
    gaussian = codebooks.gaussian_blocks(BLOCK_SIZE, by_square=False)
    edges = torch.linspace(-1, 1, FIGURE_BINS + 1, dtype=torch.float64)
    return {
        "block_size": BLOCK_SIZE,
        "codebooks": {name: codebooks.describe(levels) for name, levels in at_64["levels"].items()},
        "formats": at_64["formats"],
        "layers": rows,
        "ks_curve": ks_curve(rows),
        "block_sizes": [row | {"ppl": None, "ln_ratio": None} for row in table],  # `perturb.block_sizes` fills them in
        "block_sizes_share": share,
        "block_sizes_read": {"reason": "not read yet"},
        "histogram": {
            "edges": edges.tolist(),
            "density": _figure_density(counts),
            "gaussian_density": _figure_density(gaussian.mass),
        },
        "gaussian": at_64["gaussian"] | {"excess_kurtosis": _density_kurtosis(gaussian)},
        "seconds": time.perf_counter() - start,
    }


def ks_curve(rows: list[dict]) -> list[dict]:
    """Rows of at_most (KS distance), and the share of layers and of weights that are no further from a Gaussian."""
    count = sum(row["weights"] for row in rows)
    near = {cut: [row["weights"] for row in rows if row["ks_distance"] <= cut] for cut in KS_GRID}
    return [{"at_most": cut, "layers": len(n) / len(rows), "weights": sum(n) / count} for cut, n in near.items()]


def _figure_density(mass: torch.Tensor) -> list[float]:
    coarse = mass.double().view(FIGURE_BINS, -1).sum(1)
    return (coarse / coarse.sum() * FIGURE_BINS / 2).tolist()


def _shapes(layers: dict) -> tuple[list[dict], torch.Tensor]:
    """Rows on the form of each layer's distribution, and the counts (BINS,) of all x."""
    gaussian = codebooks.gaussian_blocks(BLOCK_SIZE, by_square=False)
    base, rows, total = _density_kurtosis(gaussian), [], torch.zeros(codebooks.BINS, dtype=torch.float64)
    for name, module in layers.items():
        weight = module.weight.detach()
        x, _ = codebooks.normalized(weight, BLOCK_SIZE)
        counts = codebooks.density(x, torch.ones_like(x)).mass.cpu()
        total += counts
        kind, depth = kind_and_depth(name)
        rows.append(
            {
                "layer": name,
                "kind": kind,
                "depth": depth,
                "weights": weight.numel(),
                "excess_kurtosis": excess_kurtosis(x) - base,
                "excess_kurtosis_raw": excess_kurtosis(weight),
                "ks_distance": ks_distance(counts, gaussian.mass),
                "ks_chance": math.sqrt(math.pi / 2)
                * math.log(2)
                / math.sqrt(weight.numel()),  # mean of Kolmogorov's distribution
                "distinct_values_per_block": distinct_values_per_block(weight),
            }
        )
    return rows, total


def _beginning(weight: torch.Tensor, share: float) -> torch.Tensor:
    """The first `share` of a weight, flat, in whole blocks of any size."""
    return weight.reshape(-1)[: 4096 * math.ceil(share * weight.numel() / 4096)]


def _one_block_size(layers: dict[str, torch.Tensor], size: int) -> dict:
    """Errors of all formats in blocks of `size`: by layer, for all together, for Gaussian weights; and the codebooks.
    int8, with a scale a row, only of matrices."""
    sizes = {name: squared_size(weight) for name, weight in layers.items()}
    errors = {name: {} for name in layers}
    table = {}  # (format, double_quant) -> summed squared error
    densities = []
    for name, weight in layers.items():
        back = {
            (kind, double): q for kind in ("nf4", "fp4") for double, q in enumerate(round_trips(weight, kind, size))
        }
        back["asymmetric", False] = round_trip_asymmetric(weight, size)
        if weight.ndim == 2:
            back["int8", False] = round_trip_int8(weight)
        for (kind, double), quantized in back.items():
            error = squared_error(weight, quantized)
            table[kind, bool(double)] = table.get((kind, bool(double)), 0.0) + error
            if not double:
                errors[name][kind] = error / sizes[name]
        x, absmax = codebooks.normalized(weight, size)
        densities.append(codebooks.density(x, absmax.double().square()))
    stacked = codebooks.Density(*(torch.stack(part).cpu() for part in zip(*densities, strict=True)))
    gaussian = codebooks.gaussian_blocks(size)
    levels = {name: codebooks.library(name) for name in ("nf4", "fp4")} | {"uniform": codebooks.uniform()}
    levels["gaussian_lloyd_max"] = codebooks.lloyd_max(gaussian, torch.tensor(levels["nf4"]))[0].tolist()
    levels["lloyd_max"] = _best(codebooks.Density(*(part.sum(0) for part in stacked)), levels)[0].tolist()
    own = {"lloyd_max": _best(stacked, levels)[1]}
    own |= {kind: codebooks.relative_squared_error(stacked, torch.tensor(levels[kind])) for kind in OWN[1:]}
    for kind, relative in own.items():
        for name, value in zip(layers, relative.tolist(), strict=True):
            errors[name][kind] = value
        table[kind, False] = sum(value * sizes[name] for name, value in zip(layers, relative.tolist(), strict=True))
    whole = sum(sizes.values())
    order = [kind for kind in ("nf4", "fp4", "int8", *OWN, "asymmetric") if (kind, False) in table]
    return {
        "levels": {kind: levels[kind] for kind in ("nf4", "fp4", "lloyd_max", "gaussian_lloyd_max", "uniform")},
        "errors": {name: {kind: found[kind] for kind in order} for name, found in errors.items()},
        "formats": {kind: _format(table[kind, False], whole, dtype=STORED.get(kind)) for kind in order},
        "rows": [
            {
                "format": kind,
                "block_size": size,
                "double_quant": double,
                "bits_per_weight": bits_per_weight(size, double),
            }
            | _format(error, whole)
            for (kind, double), error in table.items()
            if kind != "int8"  # has no blocks
        ],
        "gaussian": {
            kind: codebooks.relative_squared_error(gaussian, torch.tensor(levels[kind])).item()
            for kind in ("nf4", "fp4", "gaussian_lloyd_max", "uniform")
        },
    }


def _best(distribution: codebooks.Density, levels: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd-Max from the Gaussian's optimum and from NF4, whichever ends lower: a grid of weights has several local
    optima."""
    (a, error_a), (b, error_b) = (
        codebooks.lloyd_max(distribution, torch.tensor(levels[n])) for n in ("gaussian_lloyd_max", "nf4")
    )
    return torch.where((error_a <= error_b).unsqueeze(-1), a, b), torch.minimum(error_a, error_b)
