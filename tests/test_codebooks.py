"""Codebooks against published values, brute force and samples."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import norm

from helpers.fidelity import codebooks


def plain_gaussian(scale: float = 8.0) -> codebooks.Density:
    """A standard normal, not block-normalized, as x = z / scale."""
    edges = np.linspace(-1, 1, codebooks.BINS + 1)
    mass, first = np.diff(norm.cdf(edges * scale)), np.diff(-norm.pdf(edges * scale)) / scale
    second = np.diff(norm.cdf(edges * scale) - edges * scale * norm.pdf(edges * scale)) / scale**2
    return codebooks.Density(*(torch.from_numpy(s) for s in (mass, first, second)))


def test_lloyd_max_of_a_gaussian_is_the_published_quantizer():
    # Max 1960, table I, N = 16: error 0.009497, outermost levels 2.733, next 2.069, innermost 0.1284
    levels, error = codebooks.lloyd_max(plain_gaussian(), torch.linspace(-0.5, 0.5, 16))
    assert error.item() == pytest.approx(0.009497, abs=1e-5)
    assert (levels * 8)[[8, 14, 15]].tolist() == pytest.approx([0.1284, 2.069, 2.733], abs=2e-3)


@pytest.mark.parametrize("block_size", [64, 1024])
def test_gaussian_blocks_against_their_maxima(block_size):
    """The sum of m^2 x^2 over a block is that of z^2: weighted by m^2, x^2 has mean 1 / E[m^2]. m by inversion."""
    m = norm.isf((1 - np.random.default_rng(0).random(400_000) ** (1 / block_size)) / 2)
    weighted = codebooks.gaussian_blocks(block_size)
    assert weighted.mass.sum().item() == pytest.approx(1, abs=1e-9)
    assert weighted.second.sum().item() == pytest.approx(1 / np.mean(m**2), rel=2e-3)
    cut = 1 - 2 * m * norm.pdf(m) / (2 * norm.cdf(m) - 1)  # variance of a Gaussian cut off at m
    plain = codebooks.gaussian_blocks(block_size, by_square=False)
    assert plain.second.sum().item() == pytest.approx(
        np.mean(1 / block_size + (1 - 1 / block_size) * cut / m**2), rel=2e-3
    )


def test_gaussian_blocks_are_what_samples_are():
    weight = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    x, absmax = codebooks.normalized(weight, 64)
    for squared in (False, True):
        sampled = codebooks.density(x, absmax.double() ** 2 if squared else torch.ones_like(x))
        exact = codebooks.gaussian_blocks(64, by_square=squared)
        assert (sampled.mass / sampled.mass.sum() - exact.mass).cumsum(0).abs().max() < 3e-3


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_errors_from_densities_are_those_of_rounding(name):
    weight = torch.randn(200, 640, generator=torch.Generator().manual_seed(0)) ** 3
    levels = torch.tensor(codebooks.library(name))
    x, absmax = codebooks.normalized(weight, 128)
    brute = levels[(x[:, None] - levels).abs().argmin(1)] * absmax
    expected = ((weight.flatten() - brute).double() ** 2).sum() / (weight.double() ** 2).sum()
    density = codebooks.density(x, absmax.double() ** 2)
    assert codebooks.relative_squared_error(density, levels).item() == pytest.approx(expected.item(), rel=1e-3)


def test_lloyd_max_is_the_optimum_of_brute_force():
    # A mass of 7 values and 3 levels: every split into three runs of neighbours, each at its mean.
    values, counts = torch.tensor([-0.9, -0.5, -0.4, 0.1, 0.2, 0.3, 0.95]), torch.tensor([1.0, 2, 2, 3, 1, 3, 1])
    best = min(
        sum(
            (((values[p] - np.average(values[p], weights=counts[p])) ** 2) * counts[p]).sum().item()
            for p in np.split(np.arange(7), cut)
        )
        for cut in itertools.combinations(range(1, 7), 2)
    )
    density = codebooks.density(values, counts)
    _, error = codebooks.lloyd_max(density, torch.tensor([-0.6, 0.2, 0.9]))
    assert error.item() == pytest.approx(best / (values**2 * counts).sum().item(), rel=1e-3)


def test_no_codebook_beats_lloyd_max_and_batches_are_the_same():
    densities = [codebooks.gaussian_blocks(size) for size in (64, 256)]
    stacked = codebooks.Density(*(torch.stack(part) for part in zip(*densities, strict=True)))
    nf4 = torch.tensor(codebooks.library("nf4"))
    levels, errors = codebooks.lloyd_max(stacked, nf4)
    for i, density in enumerate(densities):
        alone, error = codebooks.lloyd_max(density, nf4)
        assert (levels[i] - alone).abs().max() < 1e-4 and errors[i].item() == pytest.approx(error.item(), rel=1e-6)
        for other in (
            nf4,
            torch.tensor(codebooks.library("fp4")),
            torch.tensor(codebooks.uniform()),
            alone + 0.003,
            alone * 1.01,
        ):
            assert codebooks.relative_squared_error(density, other) > error


def test_fp4_has_the_levels_of_its_definition():
    positive = [level for level in codebooks.library("fp4") if level > 0]
    assert positive == pytest.approx([1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1], rel=1e-3)
