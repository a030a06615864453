"""4-bit layers on torch's kernel: the product against the weights that the integers stand for, and what replaces
what."""

import pytest
import torch

from helpers.benchmark import decoder, generation
from helpers.setup import calibrated, layers, methods, models, packed
from helpers.setup.packed import Int4Linear
from tests.conftest import LLAMA, configuration
from tests.test_methods import TOKENS


def integers(out_features: int, in_features: int, group: int):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 16, (out_features, in_features), generator=generator)
    scale, zero = (torch.randn(out_features, in_features // group, generator=generator) for _ in range(2))
    return values, scale.abs() + 0.1, zero


def weight(values, scale, zero):
    group = values.shape[1] // scale.shape[1]
    return ((values.view(*scale.shape, group) - 8) * scale[..., None] + zero[..., None]).view(values.shape)


@pytest.mark.parametrize(
    ("out_features", "in_features", "group"), [(192, 576, 64), (32, 64, 32), (24, 128, 128), (16, 256, 256)]
)
@pytest.mark.parametrize("unpack_rows", [1, 100])
def test_product_is_that_of_the_weights(out_features, in_features, group, unpack_rows):
    values, scale, zero = integers(out_features, in_features, group)
    bias = torch.nn.Parameter(torch.randn(out_features), requires_grad=False)
    layer = Int4Linear(values, scale, zero, bias, torch.float32)
    layer.unpack_rows = unpack_rows
    x = torch.randn(2, 3, in_features)
    expected = torch.nn.functional.linear(x, weight(values, scale, zero), bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.unpacked(), weight(values, scale, zero))


def test_in_bfloat16_the_product_departs_by_rounding():
    values, scale, zero = (t if i == 0 else t.bfloat16() for i, t in enumerate(integers(64, 512, 64)))
    x = torch.randn(8, 512).bfloat16()
    expected = x.float() @ weight(values, scale.float(), zero.float()).T
    error = Int4Linear(values, scale, zero)(x).float() - expected
    assert error.norm() < 0.004 * expected.norm()


def test_the_layout_is_read_off_the_operator(monkeypatch):
    """A GPU's layout is one that nobody documents: here a tile's integers stand in a random order."""
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(1))

    def pack(values):
        rows, columns = values.shape[0] // 8, values.shape[1] // 128
        tiles = values.view(rows, 8, columns, 128).transpose(1, 2).reshape(rows, columns, 1024)[..., order]
        pairs = tiles.to(torch.uint8).view(rows, columns, 32, 16, 2)
        return (pairs[..., 0] | pairs[..., 1] << 4).contiguous().view(torch.int32)

    values, scale, zero = integers(24, 256, 64)
    layer = Int4Linear(
        torch.zeros(32, 256, dtype=torch.int), torch.ones(32, 4), torch.zeros(32, 4), None, torch.float32
    )
    monkeypatch.setattr(packed, "_pack", pack)
    layer.packed, layer.order, layer.out_features = pack(values), packed._order.__wrapped__(torch.device("cpu")), 24
    layer.scales_and_zeros = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous()
    layer.unpack_rows = 1
    torch.testing.assert_close(layer.unpacked(), weight(values, scale, zero))
    x = torch.randn(5, 256)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), x @ weight(values, scale, zero).T, rtol=1e-4, atol=1e-3)


def test_a_compiled_step_holds_packed_layers(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    config = models.AutoConfig.for_model(**LLAMA)
    model = models.AutoModelForCausalLM.from_config(config).eval()
    for name, module in list(layers.linear_layers(model).items()):
        grouped = module.weight.detach().view(module.out_features, -1, 32)
        scale = grouped.abs().amax(-1) / 7.5
        values = (grouped / scale[..., None]).round().clamp(-8, 7).int().view(module.weight.shape) + 8
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Int4Linear(values, scale, 0 * scale, None, torch.float32))
    counter, real = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options, **given: real(f, backend=counter, **given))
    ids = torch.arange(16).view(1, -1)
    running = decoder.Decoder(model, ids, 6, compiled=True)
    found = generation.agreement(model, ids, running, 6, "compile")
    assert found["identical"] == 6 or found["explained"]
    assert counter.frame_count == 4  # layer, last norm, rotary embedding, output head


def test_layers_count_what_is_stored():
    layer = torch.nn.Sequential(Int4Linear(*integers(64, 576, 64), dtype=torch.float32))
    stored = layers.stored_bytes(layer)
    assert stored == {"parameters_and_buffers": 64 * 640 // 2, "quantization_state": 64 * 10 * 2 * 4}
    assert layers.checkpoint_bytes(layer) == sum(stored.values())
    assert layers.is_quantized(layer[0]) and layers.parameter_count(layer) == 64 * 576
    assert layers.stored_dtype(layer[0]) == "int4"
    assert torch.equal(layers.dequantize(layer[0]), layer[0].unpacked())


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_calibrated_checkpoint_computes_the_same_packed(tiny, monkeypatch, method):
    pytest.importorskip("llmcompressor")
    wanted = configuration(method, group_size=32, calibration=TOKENS)
    unpacked = models.load(tiny, wanted)
    assert not unpacked.info["packed"] and unpacked.info["kernel"].startswith("no 4-bit kernel here (it needs a GPU)")
    with monkeypatch.context() as here:
        here.setattr(packed, "obstacle", lambda group_size, device, dtype: None)
        here.setattr(calibrated, "_quantize", lambda *arguments: pytest.fail("quantized a second time"))
        source = models.prepare(tiny)
        folder, _ = calibrated.quantized(tiny, wanted, source, None, torch.device("cpu"), torch.float32)
        config = methods.METHODS[method].config(wanted.quantization, torch.float32)
    model = models.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()
    assert packed.replace_layers(model) == 14
    layers.make_plain(model)
    assert len(layers.quantized_layers(model)) == 14 and not model._forward_pre_hooks
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        expected = unpacked.model(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    for name, layer in layers.linear_layers(model).items():
        torch.testing.assert_close(layer.unpacked(), layers.dequantize(unpacked.model.get_submodule(name)))
    assert layers.parameter_count(model) == layers.parameter_count(unpacked.model)
    assert sum(layers.stored_bytes(model).values()) < sum(layers.stored_bytes(unpacked.model).values())


def test_what_the_kernel_needs(monkeypatch):
    assert packed.obstacle(64, "cpu", "float32") == "it needs a GPU"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert packed.obstacle(64, "cuda", "bfloat16") == "it needs compute capability 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "group size of 32, 64" in packed.obstacle(16, "cuda", "bfloat16")
    assert "float16 is asked for" in packed.obstacle(64, "cuda", "float16")
    options = configuration("gptq").quantization
    assert methods.is_packed(options, "cuda", "bfloat16") and not methods.is_packed(options, "cuda", "float16")
    assert methods.kernel(options, "cuda", "bfloat16") == packed.KERNEL
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert methods.kernel_dtype(options) == "bfloat16"
    assert methods.kernel_dtype(configuration("bitsandbytes-int8").quantization) is None
