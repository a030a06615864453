"""Sixteen levels for a weight: how good they can be.

A 4-bit format scales each block of weights by its largest magnitude (absmax) and rounds to the nearest of 16 levels in
[-1, 1], its codebook. The squared error of a weight is absmax^2 times that of its normalized value x = w / absmax, so
every sum here weighs x with absmax^2: then the error of a codebook is its relative squared error ||w - q(w)||^2 /
||w||^2, and the codebook that minimizes it (Lloyd 1957, published in IEEE Trans. Inf. Theory 28(2), 1982; Max, IRE
Trans. Inf. Theory 6(1), 1960) bounds all formats of that kind from below.

A distribution of x is a `Density`: in each of BINS equal bins of [-1, 1] its mass and first and second moment. Batches
of them (a layer each) are handled at once. Within a bin mass counts as spread evenly, which moves an error by less than
1e-4 of itself.

    >>> import torch
    >>> gaussian = gaussian_blocks(64)                    # weights that are Gaussian, in blocks of 64
    >>> best, error = lloyd_max(gaussian, torch.linspace(-1, 1, 16))
    >>> round(error.item(), 4)
    0.0076
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from bitsandbytes import functional
from scipy.special import ndtr

BINS = 2**14
LEVELS = 16


class Density(NamedTuple):
    """Sums over a distribution of x in [-1, 1], each (..., BINS) in float64."""

    mass: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor


def normalized(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x = w / absmax of its block (as bitsandbytes takes them), and the absmax of each weight's block, (n,) float32."""
    flat = weight.detach().reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    x = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)
    return x.view(-1)[: flat.numel()], absmax.expand_as(blocks).reshape(-1)[: flat.numel()]


def density(x: torch.Tensor, weights: torch.Tensor) -> Density:
    """The density of values x (n,) in [-1, 1] that count for `weights` (n,)."""
    bins = ((x + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
    weights, x = weights.double(), x.double()
    sums = (torch.bincount(bins, weights=w, minlength=BINS) for w in (weights, weights * x, weights * x * x))
    return Density(*sums)


def gaussian_blocks(block_size: int, by_square: bool = True, nodes: int = 400) -> Density:
    """The density of z / max|z| for blocks of independent Gaussian z, total mass 1, by quadrature over the maximum m.

    Given m, one of the block's values is -1 or 1, the others are Gaussians cut off at m. `by_square` weighs with m^2.
    """
    grid, steps = np.polynomial.legendre.leggauss(nodes)
    m, steps = 4.5 * (grid + 1), 4.5 * steps  # m from 0 to 9
    inside = 2 * ndtr(m) - 1
    p = steps * block_size * 2 * np.exp(-(m**2) / 2) / math.sqrt(2 * math.pi) * inside ** (block_size - 1)
    p = p * (m**2 if by_square else 1)
    p /= p.sum()
    keep = p > 1e-16
    m, inside, p = m[keep], inside[keep], p[keep]
    edges = np.linspace(-1, 1, BINS + 1)
    cumulative = sum(pi * ndtr(mi * edges) / zi for mi, zi, pi in zip(m, inside, p, strict=True))
    mass = np.diff(cumulative) * (1 - 1 / block_size)
    centre = (edges[1:] + edges[:-1]) / 2
    sums = [mass, mass * centre, mass * (centre**2 + (edges[1] - edges[0]) ** 2 / 12)]
    for k, sign in ((0, -1), (-1, 1)):
        for total, power in zip(sums, (1, sign, 1), strict=True):
            total[k] += power / (2 * block_size)
    return Density(*(torch.from_numpy(s) for s in sums))


def _cells(sums: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Sums (..., 16) of the cells between thresholds (..., 15), from cumulative sums (..., BINS + 1)."""
    place = ((thresholds + 1) * (BINS / 2)).clamp(0, BINS)
    low = place.floor().long().clamp(max=BINS - 1)
    below, above = sums.gather(-1, low), sums.gather(-1, low + 1)
    inner = below + (above - below) * (place - low)
    return torch.diff(inner, dim=-1, prepend=torch.zeros_like(inner[..., :1]), append=sums[..., -1:])


def _cumulative(distribution: Density) -> list[torch.Tensor]:
    return [torch.nn.functional.pad(s, (1, 0)).cumsum(-1) for s in distribution]


def _midpoints(levels: torch.Tensor) -> torch.Tensor:
    return (levels[..., 1:] + levels[..., :-1]) / 2


def _error(cumulative: list[torch.Tensor], levels: torch.Tensor) -> torch.Tensor:
    mass, first, second = (_cells(s, _midpoints(levels)) for s in cumulative)
    return (second - 2 * levels * first + levels**2 * mass).sum(-1) / cumulative[2][..., -1]


def relative_squared_error(distribution: Density, levels: torch.Tensor) -> torch.Tensor:
    """Relative squared error (...) of rounding to the nearest of `levels` (sorted, (16,) or (..., 16))."""
    levels = levels.to(distribution.mass).sort(-1).values
    return _error(_cumulative(distribution), levels.expand(*distribution.mass.shape[:-1], levels.shape[-1]))


def lloyd_max(distribution: Density, start: torch.Tensor, steps: int = 5000) -> tuple[torch.Tensor, torch.Tensor]:
    """The codebook (..., 16) that minimizes the relative squared error, and that error (...).

    Lloyd's iteration: every level moves to the mean of what is rounded to it, until none moves by more than 1e-7. Never
    worse than `start` (16,); the global optimum for a log-concave density (a Gaussian), for others a local one.
    """
    cumulative = _cumulative(distribution)
    levels = start.to(distribution.mass).sort().values.expand(*distribution.mass.shape[:-1], -1).contiguous()
    for step in range(steps):
        mass, first, _ = (_cells(s, _midpoints(levels)) for s in cumulative)
        moved = torch.where(mass > 0, first / mass.clamp_min(1e-300), levels)
        done = step % 50 == 49 and (moved - levels).abs().max() < 1e-7
        levels = moved
        if done:
            break
    return levels, _error(cumulative, levels)


def library(name: str) -> list[float]:
    """bitsandbytes' codebook of `nf4` or `fp4`, in order of size. FP4 has a zero of either sign."""
    return sorted(functional.get_4bit_type(name, device="cpu").tolist())


def uniform() -> list[float]:
    return torch.linspace(-1, 1, LEVELS, dtype=torch.float64).tolist()
