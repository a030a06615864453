"""Weight errors of the embedded model and of made-up layers, against independent computations."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from helpers import StudyError, params
from helpers.fidelity import codebooks
from helpers.fidelity import formats as weights
from helpers.setup.layers import dequantize, linear_layers, repacked


def small(model) -> torch.nn.Module:
    """A model with few linear layers: two projections of different width, and an output layer."""

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            mlp = model.model.layers[3].mlp
            self.up_proj, self.down_proj, self.head = mlp.up_proj, mlp.down_proj, model.lm_head

        def get_output_embeddings(self):
            return self.head

    return Small()


@pytest.fixture(scope="module")
def two_layers(load):
    return small(load("fp16").model)


@pytest.fixture(scope="module")
def found(two_layers):
    return weights.analyse(two_layers, [64, 128, 256])


def test_linear_layers_are_those_that_quantization_replaces(load):
    assert list(linear_layers(load("fp16").model)) == list(linear_layers(load("nf4").model))
    assert load("nf4").info["quantized_layers"] == len(linear_layers(load("fp16").model)) == 210


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [64, 128, 1024])
def test_round_trips_are_rounding_to_the_codebook(name, block_size):
    # 576 is no multiple of 128: as a matrix bitsandbytes' CPU kernel would get this one wrong
    weight = torch.randn(192, 576, generator=torch.Generator().manual_seed(1)) * 0.02
    exact, double = (weights.round_trip(weight, name, block_size, double=double) for double in (False, True))
    x, absmax = codebooks.normalized(weight, block_size)
    levels = torch.tensor(codebooks.library(name))
    expected = (levels[(x[:, None] - levels).abs().argmin(1)] * absmax).view(weight.shape)
    differs = (exact - expected).abs() > 1e-6
    assert differs.double().mean() < 1e-4  # bitsandbytes rounds its thresholds
    assert 0 < weights.squared_error(exact, double) < 0.05 * weights.squared_error(weight, exact)


def test_round_trip_int8_is_rounding_by_row():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2)).half().float()
    scale = weight.abs().amax(1, keepdim=True) / 127
    expected = (weight / scale).round() * scale
    assert (weights.round_trip_int8(weight) - expected).abs().max() <= scale.max()  # ties of float16
    assert ((weights.round_trip_int8(weight) - expected).abs() > 1e-4).double().mean() < 0.02


def test_round_trip_asymmetric_is_rounding_between_extremes():
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(5)) + 0.3
    found = weights.round_trip_asymmetric(weight, 64).flatten()
    for start in range(0, weight.numel(), 64):
        block, ours = weight.flatten()[start : start + 64], found[start : start + 64]
        levels = torch.linspace(block.min().item(), block.max().item(), 16)
        torch.testing.assert_close(ours, levels[(block[:, None] - levels).abs().argmin(1)], rtol=1e-5, atol=1e-6)
    assert torch.equal(weights.round_trip_asymmetric(torch.full((2, 64), 0.5)), torch.full((2, 64), 0.5))


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_a_loaded_model_holds_what_round_trip_says(load, name):
    full, quantized = load("fp16").model, load(name).model
    key = "model.layers.7.self_attn.k_proj"
    weight = full.get_submodule(key).weight.detach()
    expected = weights.round_trip_int8(weight) if name == "int8" else weights.round_trip(weight, name, double=True)
    held = dequantize(quantized.get_submodule(key)).float()
    assert weights.squared_error(held, expected) < 2e-5 * weights.squared_size(
        expected
    )  # bfloat16, if a forward pass repacked it


def test_an_unknown_layer_is_asked_for_the_image_of_the_identity():
    class Packed(torch.nn.Linear):
        """Quantized weights that only forward can read."""

        def __init__(self, weight, bias):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features, self.bias = weight.shape[1], weight.shape[0], torch.nn.Parameter(bias)
            self.register_buffer("packed", (weight * 10).round().to(torch.int8))

        def forward(self, x):
            return torch.nn.functional.linear(x, self.packed.float() / 10, self.bias)

    weight = torch.tensor([[0.31, -0.5, 0.0], [1.0, 0.12, -0.9]])
    layer = Packed(weight, torch.tensor([5.0, -1.0]))
    torch.testing.assert_close(dequantize(layer), (weight * 10).round() / 10)


def test_a_packed_weight_without_dequantization_is_asked_for_the_image_of_the_identity():
    layer = torch.nn.Linear(8, 4, bias=True)
    weight = layer.weight.detach().clone()

    def fails():
        raise NotImplementedError("aten.dequantize")

    layer.weight.__tensor_flatten__ = lambda: None
    layer.weight.dequantize = fails
    torch.testing.assert_close(dequantize(layer), weight)


def test_the_identity_agrees_with_bitsandbytes(load):
    """Whether or not the forward pass repacks the layer for this CPU: then the difference is bfloat16's."""
    layer = load("nf4").model.model.layers[0].self_attn.k_proj
    stored = weights.round_trip(load("fp16").model.model.layers[0].self_attn.k_proj.weight, "nf4", double=True)
    with torch.inference_mode():
        image = layer(torch.eye(layer.in_features)).T
    after = dequantize(layer)
    for weight in (image, after):
        assert weights.squared_error(weight, stored) < 2e-5 * weights.squared_size(stored)
    assert repacked(layer) == (layer.weight.quant_state.dtype == torch.bfloat16)


def test_own_error_is_the_error_of_every_weight(load):
    full, quantized = small(load("fp16").model), small(load("nf4").model)
    configuration = params.read_configuration("smollm2-135m", "nf4")
    own = weights.own_error(full, quantized, configuration)
    layers = linear_layers(full)
    pairs = [(m.weight.detach(), dequantize(quantized.get_submodule(name))) for name, m in layers.items()]
    flat = [torch.cat([pair[k].flatten() for pair in pairs]).double().numpy() for k in (0, 1)]
    expected = np.sum((flat[0] - flat[1]) ** 2) / np.sum(flat[0] ** 2)
    assert own["relative_squared_error"] == pytest.approx(expected, rel=1e-6)
    assert own["sqnr_db"] == pytest.approx(10 * math.log10(1 / expected))
    assert own["dtype"] == "uint8, two weights each"
    nothing = weights.own_error(full, full, configuration)
    assert nothing["relative_squared_error"] == 0 and nothing["sqnr_db"] is None


def test_formats_in_order(found):
    error = {name: row["relative_squared_error"] for name, row in found["formats"].items()}
    assert (
        error["int8"]
        < error["lloyd_max"]
        <= error["gaussian_lloyd_max"]
        < error["nf4"]
        < error["uniform"]
        < error["fp4"]
    )
    assert found["formats"]["int8"]["dtype"] == "int8"


def test_errors_against_numpy(found, two_layers):
    """The whole model's error is sums over sums, for the library's formats and for our own codebooks."""
    full = [m.weight.detach().double().numpy() for m in linear_layers(two_layers).values()]
    for name, levels in (("nf4", codebooks.library("nf4")), ("uniform", np.linspace(-1, 1, 16))):
        error = size = 0
        for w in full:
            blocks = w.reshape(-1, 64)
            absmax = np.abs(blocks).max(1, keepdims=True)
            levels_ = np.asarray(levels)
            nearest = levels_[np.abs((blocks / absmax)[..., None] - levels_).argmin(-1)] * absmax
            error, size = error + ((nearest - blocks) ** 2).sum(), size + (w**2).sum()
        assert found["formats"][name]["relative_squared_error"] == pytest.approx(error / size, rel=1e-3)


def test_larger_blocks_cost_more(found):
    rows = {(r["format"], r["block_size"]): r for r in found["block_sizes"]}
    for name in ("nf4", "fp4", "lloyd_max", "uniform"):
        errors = [rows[name, size]["relative_squared_error"] for size in (64, 128, 256)]
        assert errors[0] < errors[1] < errors[2] < 1.5 * errors[0]
    assert rows["nf4", 64]["bits_per_weight"] == 4.5


def test_shape_of_a_layer_against_scipy(found, two_layers):
    row = found["layers"][0]
    weight = two_layers.up_proj.weight.detach().double().numpy()
    blocks = weight.reshape(-1, 64)
    x = (blocks / np.abs(blocks).max(1, keepdims=True)).ravel()
    sample = np.random.default_rng(0).normal(size=(40_000, 64))
    sample = (sample / np.abs(sample).max(1, keepdims=True)).ravel()
    assert row["ks_distance"] == pytest.approx(scipy.stats.ks_2samp(x, sample).statistic, abs=2e-3)


def test_a_gaussian_layer_is_found_gaussian_and_a_uniform_one_is_not():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(3)
            self.a, self.b = torch.nn.Linear(512, 512, bias=False), torch.nn.Linear(512, 512, bias=False)
            self.a.weight.data = torch.randn(512, 512, generator=generator) * 0.02
            self.b.weight.data = torch.rand(512, 512, generator=generator) * 2 - 1

        def get_output_embeddings(self):
            return None

    gaussian, uniform = weights.analyse(Two(), [64])["layers"]
    assert gaussian["ks_distance"] < 0.004 and uniform["ks_distance"] > 0.03  # chance: 0.0017


def test_two_numbers_a_block_may_beat_the_best_codebook(found):
    """The embedded weights were rounded to an asymmetric grid before."""
    errors = {name: row["relative_squared_error"] for name, row in found["formats"].items()}
    assert errors["asymmetric"] < errors["lloyd_max"] < errors["nf4"] < errors["fp4"]


def test_histogram_is_a_density(found):
    for key in ("density", "gaussian_density"):
        widths = np.diff(found["histogram"]["edges"])
        assert np.sum(widths * found["histogram"][key]) == pytest.approx(1)


def test_no_layers_is_an_error():
    class Empty(torch.nn.Module):
        def get_output_embeddings(self):
            return None

    with pytest.raises(StudyError, match="no linear layers"):
        weights.analyse(Empty(), [64])
