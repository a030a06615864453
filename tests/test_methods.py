"""The registry of quantization methods, calibration that never sees an evaluated dialogue, and the cache of
calibrated weights.
"""

import json
import shutil
from typing import get_args

import pytest
import torch

from helpers import NotHere, StudyError, params
from helpers.setup import calibrated, coqa, methods, models
from helpers.setup.layers import dequantize, quantized_layers, stored_bytes
from tests.conftest import LLAMA, configuration

TOKENS = {"source": "random-tokens", "samples": 4, "sequence_length": 32}


def without(monkeypatch, *packages: str) -> None:
    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda name: None if name in packages else object())


def gpu(monkeypatch, capability: tuple[int, int] | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU X")


# ---- registry ----


def test_every_method_of_the_schema_has_an_entry():
    tags = {get_args(kind.model_fields["method"].annotation)[0] for kind in get_args(get_args(params.Quantization)[0])}
    assert tags == set(methods.METHODS)


def test_shipped_configurations_cover_every_method():
    used = {
        params.read_configuration("smollm2-135m", p.stem).quantization.method for p in params.FORMATS.glob("*.yaml")
    }
    assert used == set(methods.METHODS)


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("gptq", "llmcompressor"),
        ("awq", "llmcompressor"),
        ("gptq", "compressed_tensors"),
        ("torchao-float8", "torchao"),
    ],
)
def test_missing_package_is_said_before_any_work(study, monkeypatch, method, package):
    without(monkeypatch, package)
    monkeypatch.setattr(models, "prepare", lambda study: pytest.fail("work was started"))
    with pytest.raises(NotHere, match=f"^c: {package} not installed here; run `make setup METHODS=all`$"):
        models.load(study, configuration(method))


@pytest.mark.parametrize(
    ("method", "options", "least"), [("torchao-float8", {"activations": "dynamic"}, "8.9"), ("torchao-int4", {}, "8.0")]
)
def test_gpu_that_a_method_needs(monkeypatch, method, options, least):
    without(monkeypatch)
    wanted = configuration(method, dtype="bfloat16", **options)
    gpu(monkeypatch, None)
    with pytest.raises(NotHere, match=f"capability {least} or more, and there is no GPU here"):
        methods.require(wanted)
    gpu(monkeypatch, (7, 5))
    with pytest.raises(NotHere, match=f"capability {least} or more, and GPU X has 7.5"):
        methods.require(wanted)
    gpu(monkeypatch, (9, 0))
    methods.require(wanted)


def test_weight_only_float8_needs_no_gpu(monkeypatch):
    without(monkeypatch)
    gpu(monkeypatch, None)
    methods.require(configuration("torchao-float8"))


def test_kernel_without_the_wanted_type(monkeypatch):
    without(monkeypatch)
    gpu(monkeypatch, (9, 0))
    with pytest.raises(StudyError, match="dtype is auto, but torchao-int4 has a kernel for bfloat16 alone"):
        methods.require(configuration("torchao-int4"))


def test_unpacked_methods_claim_no_kernel(load):
    for name in ("gptq", "awq"):
        options = configuration(name).quantization
        assert not methods.is_packed(options, "cpu", "float32")
        assert methods.kernel(options, "cpu", "float32").startswith("no 4-bit kernel here")
    info = load("nf4").info
    assert info["packed"] and info["quantized_layers"] == 210 and "nf4" in info["kernel"]
    assert load("fp16").info["quantized_layers"] == 0 and not load("fp16").info["packed"]


@pytest.mark.parametrize("name, differs", [("int8", True), ("fp16", False)])
def test_only_int8s_answer_depends_on_its_neighbours(load, name, differs):
    """What the report says of LLM.int8(): an outlier in one row takes its column to 16 bits in all rows."""
    layer = load(name).model.model.layers[0].mlp.up_proj
    row = torch.randn(1, 1, layer.in_features, generator=torch.Generator().manual_seed(0))
    outlier = row.index_fill(-1, torch.tensor([7]), 50.0)
    with torch.inference_mode():
        beside_itself, beside_outlier = (layer(torch.cat((row, other), 1))[0, 0] for other in (row, outlier))
    assert (not torch.equal(beside_itself, beside_outlier)) == differs


# ---- calibration ----


def test_text_is_lm_evals_prompt():
    from lm_eval.tasks.coqa.utils import doc_to_text

    dialogue = coqa.read("embedded-held-out")[0]
    prompt, last = doc_to_text(dialogue), dialogue["answers"]["input_text"][-1]
    assert calibrated.text(dialogue) == f"{prompt} {last}\n\n"


def test_shipped_calibration_never_sees_an_evaluated_dialogue(study):
    evaluated = coqa.read(study.data.source)  # all that ship, not only those that this study asks
    ids, stories = {d["id"] for d in evaluated}, {" ".join(d["story"].lower().split()) for d in evaluated}
    for name in ("gptq", "awq"):
        wanted = params.read_configuration("smollm2-135m", name).quantization.calibration.resolved(study)
        chosen = calibrated._dialogues(study, wanted)
        assert len(chosen) == 16 == len({d["id"] for d in chosen})
        assert not ids & {d["id"] for d in chosen}
        assert not stories & {" ".join(d["story"].lower().split()) for d in chosen}


def test_calibrating_on_the_evaluated_set_is_refused(study):
    with pytest.raises(StudyError, match="is also evaluated in this study"):
        calibrated.samples(study, params.Calibration(source="embedded", samples=2), tokenizer=str.split, vocabulary=10)


def test_stories_tell_a_leak_and_ids_do_not(study):
    dialogue, other = coqa.read(study.data.source, 1)[0], coqa.read("embedded-held-out")[0]
    upper = "\n ".join(dialogue["story"].upper().split(" "))
    with pytest.raises(StudyError, match="dialogue new is also evaluated"):
        calibrated.check_unseen([other, dialogue | {"id": "new", "story": upper}], study)
    calibrated.check_unseen([other | {"id": dialogue["id"]}], study)


def test_samples_are_cut_and_recorded(study, load):
    wanted = params.Calibration(samples=3, sequence_length=40)
    ids, record = calibrated.samples(study, wanted, load("fp16").tokenizer, 0)
    assert [len(i) for i in ids] == [40] * 3 and record["tokens"] == 120
    texts = [calibrated.text(d) for d in coqa.read("embedded-held-out")]
    assert all(any(load("fp16").tokenizer.decode(i) in text for text in texts) for i in ids)
    assert (
        calibrated.samples(study, wanted.model_copy(update={"samples": 2}), load("fp16").tokenizer, 0)[1]["sha256"]
        != record["sha256"]
    )


def test_seed_draws_the_samples(study):
    drawn = [
        [d["id"] for d in calibrated._dialogues(study, params.Calibration(samples=16, seed=seed).resolved(study))]
        for seed in (0, 0, 1, 2)
    ]
    assert drawn[0] == drawn[1] and len({frozenset(ids) for ids in drawn}) == 3


def test_too_many_samples(study):
    with pytest.raises(StudyError, match=r"calibration\.samples: 21 asked for, but embedded-held-out has 20"):
        calibrated.samples(study, params.Calibration(samples=21), str.split, 10)


def test_random_tokens_come_from_the_seed(tiny):
    wanted = params.Calibration(**TOKENS)
    ids, record = calibrated.samples(tiny, wanted, None, 256)
    assert len(ids) == 4 and {len(i) for i in ids} == {32} and min(map(min, ids)) >= 0 and max(map(max, ids)) < 256
    assert calibrated.samples(tiny, wanted, None, 256)[0] == ids
    assert calibrated.samples(tiny.model_copy(update={"seed": 5}), wanted, None, 256)[1]["sha256"] != record["sha256"]


def test_text_for_a_model_without_a_tokenizer(tiny):
    with pytest.raises(StudyError, match="no tokenizer to read embedded-held-out with; write random-tokens"):
        calibrated.samples(tiny, params.Calibration(source="embedded-held-out"), None, 256)


# ---- group size ----


def test_group_size_that_does_not_divide(study):
    architecture = models.AutoConfig.from_pretrained(models.prepare(study))
    with pytest.raises(
        StudyError, match=r"group_size: 128 does not divide the 576 inputs of model\.layers.*; write 64 or 32"
    ):
        calibrated.check_group_size(architecture, 128)
    calibrated.check_group_size(architecture, 64)


# ---- cache ----

PARTS = {
    "weights": "w",
    "recipe": {"method": "gptq", "group_size": 64},
    "calibration": "c",
    "computed_in": "torch.float32 on cpu",
    "stored_in": "torch.float16",
    "versions": {"torch": "1", "llmcompressor": "2"},
}


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "v"},
        {"recipe": {"method": "gptq", "group_size": 32}},
        {"calibration": "d"},
        {"computed_in": "torch.float16 on cuda"},
        {"stored_in": "torch.bfloat16"},
        {"versions": {"torch": "1", "llmcompressor": "3"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_key_changes_with_each_ingredient(change):
    assert calibrated.key(PARTS | change) != calibrated.key(PARTS)
    assert calibrated.key(dict(reversed(PARTS.items()))) == calibrated.key(PARTS)


def test_ingredients_hold_what_the_weights_depend_on(monkeypatch):
    monkeypatch.setattr(calibrated.metadata, "version", lambda package: f"{package} 1")
    wanted = configuration("awq", grid_points=7)
    parts = calibrated.ingredients(wanted, "w", {"sha256": "c"}, torch.device("cpu"), torch.float32)
    assert (
        set(parts) == set(PARTS)
        and parts["recipe"]["grid_points"] == 7
        and parts["versions"]["llmcompressor"] == "llmcompressor 1"
    )


def test_awq_searches_in_float32_and_what_it_leaves_is_stored_in_16_bits(monkeypatch):
    monkeypatch.setattr(calibrated.metadata, "version", lambda package: "1")
    found = calibrated.ingredients(configuration("awq"), "w", {"sha256": "c"}, torch.device("cuda"), torch.bfloat16)
    assert found["computed_in"] == "torch.float32 on cuda" and found["stored_in"] == "torch.bfloat16"
    found = calibrated.ingredients(configuration("gptq"), "w", {"sha256": "c"}, torch.device("cuda"), torch.float16)
    assert found["computed_in"] == "torch.float16 on cuda"


def test_weights_key_is_the_commit_or_the_content(tmp_path):
    assert calibrated.weights_key(tmp_path / ("a" * 40)) == "a" * 40
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = calibrated.weights_key(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert calibrated.weights_key(tmp_path) != first


def _quantized(tiny, wanted):
    return calibrated.quantized(tiny, wanted, models.prepare(tiny), None, torch.device("cpu"), torch.float32)


def test_quantized_once(tiny, monkeypatch):
    calls = []

    def quantize(source, target, options, ids, dtype):
        calls.append(options.group_size)
        target.mkdir()
        (target / "model.safetensors").write_bytes(bytes(7))
        return 2.5

    monkeypatch.setattr(calibrated.metadata, "version", lambda package: "1")
    monkeypatch.setattr(calibrated, "_quantize", quantize)
    first, record = _quantized(tiny, configuration("gptq", group_size=32, calibration=TOKENS))
    assert not record["from_cache"] and record["quantize_seconds"] == 2.5 and record["checkpoint_bytes"] == 7
    second, again = _quantized(tiny, configuration("gptq", group_size=32, calibration=TOKENS))
    assert second == first and again == record | {"from_cache": True} and calls == [32]
    assert json.loads((first / "record.json").read_text())["calibration"]["samples"] == 4
    other, _ = _quantized(tiny, configuration("gptq", group_size=64, calibration=TOKENS))
    assert other != first and calls == [32, 64]


def test_failed_quantization_leaves_nothing(tiny, monkeypatch, tmp_path):
    def quantize(source, target, *_):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(calibrated.metadata, "version", lambda package: "1")
    monkeypatch.setattr(calibrated, "_quantize", quantize)
    with pytest.raises(StudyError, match=r"could not be written \(No space left on device\); free some disk space"):
        _quantized(tiny, configuration("gptq", group_size=32, calibration=TOKENS))
    assert list((tmp_path / "quantized").iterdir()) == []


# ---- the real thing, where the packages are ----


def _levels(weight: torch.Tensor, group_size: int) -> int:
    """Most distinct values in one group of a weight (out, in)."""
    groups = weight.reshape(-1, group_size)
    return max(len(torch.unique(row)) for row in groups)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated(tiny, monkeypatch, method):
    pytest.importorskip("llmcompressor")
    if method == "awq":  # GPTQ has shown the process of its own
        monkeypatch.setattr(calibrated, "_quantize", calibrated._oneshot)
    wanted = configuration(method, group_size=32, calibration=TOKENS)
    full, loaded = models.load(tiny, configuration("none")), models.load(tiny, wanted)
    info = loaded.info
    assert info["quantize_seconds"] > 0 and not info["from_cache"] and not info["packed"]
    assert info["quantized_layers"] == 14 == len(quantized_layers(loaded.model))
    # Two bytes for each of the 256 x 64 embeddings, half of one for each other weight, and their scales.
    assert info["checkpoint_bytes"] < full.info["checkpoint_bytes"] / 2
    layer = loaded.model.model.layers[0].mlp.down_proj
    assert type(layer).forward is torch.nn.Linear.forward and "forward" not in vars(layer)
    # Nothing of the packages' own stands between a caller and the weights.
    assert all("forward" not in vars(m) and type(m._parameters) is dict for m in loaded.model.modules())
    compiled = torch.compile(lambda x: layer(x), backend="eager", fullgraph=True)
    assert compiled(torch.ones(1, layer.in_features)).shape == (1, layer.out_features)
    assert _levels(layer.weight, 32) <= 16 < _levels(full.model.model.layers[0].mlp.down_proj.weight, 32)
    assert torch.equal(dequantize(layer), layer.weight)
    # Unpacked: as large as full precision, not a quarter of it.
    assert stored_bytes(loaded.model) == stored_bytes(full.model)
    ids = torch.arange(32, device=full.model.device)[None]
    with torch.inference_mode():
        expected, got = full.model(ids).logits, loaded.model(ids).logits
    assert 0 < (got - expected).norm() / expected.norm() < 0.3
    # 4 bits, a 16-bit scale for each 32 weights, a zero point of 4 bits for AWQ's, and the shape of each layer.
    assert info["quantized_share"] == 1 and 4.5 <= info["bits_per_weight"] < 4.8
    again = models.load(tiny, wanted)
    assert again.info["from_cache"] and again.info["quantize_seconds"] == info["quantize_seconds"]
    with torch.inference_mode():
        assert torch.equal(again.model(ids).logits, got)


def test_pinning_is_left_out_only_without_a_gpu_and_only_for_a_while():
    cache = pytest.importorskip("llmcompressor.pipelines.cache").IntermediatesCache
    before = cache.pin_memory
    with calibrated._without_pinning():
        assert (cache.pin_memory is before) == torch.cuda.is_available()
    assert cache.pin_memory is before


def test_float8(tiny):
    pytest.importorskip("torchao")
    full, loaded = models.load(tiny, configuration("none")), models.load(tiny, configuration("torchao-float8"))
    assert loaded.info["quantized_layers"] == 14 and loaded.info["packed"]
    layer, original = loaded.model.model.layers[0].mlp.down_proj, full.model.model.layers[0].mlp.down_proj
    error = (dequantize(layer) - original.weight).norm() / original.weight.norm()
    # e4m3 has 3 bits after the leading one: a relative error of up to 1/16, evenly spread.
    assert 0.01 < error < 1 / 16
    stored, plain = stored_bytes(loaded.model), stored_bytes(full.model)
    numbers = sum(m.weight.numel() for m in quantized_layers(loaded.model).values())
    saved = numbers * (full.model.dtype.itemsize - 1)
    assert stored["parameters_and_buffers"] == plain["parameters_and_buffers"] - saved
    assert stored["quantization_state"] == 4 * sum(m.out_features for m in quantized_layers(loaded.model).values())
    assert loaded.info["checkpoint_bytes"] < full.info["checkpoint_bytes"]


def test_int8_of_weights_only(tiny):
    pytest.importorskip("torchao")
    full, loaded = models.load(tiny, configuration("none")), models.load(tiny, configuration("torchao-int8"))
    assert loaded.info["quantized_layers"] == 14 and 8 < loaded.info["bits_per_weight"] < 9
    for name, layer in quantized_layers(loaded.model).items():
        original = full.model.get_submodule(name).weight
        step = original.abs().amax(1, keepdim=True) / 127.5
        assert ((dequantize(layer) - original).abs() <= step * 0.51).all()


def test_quantizing_that_fails_in_its_own_process(tiny, monkeypatch, capfd):
    """The child's last line is the sentence; a killed child is said to be one."""
    monkeypatch.setattr(calibrated.metadata, "version", lambda package: "1")
    wanted = configuration("gptq", group_size=32, calibration=TOKENS)
    run = calibrated.subprocess.run
    for end, words in (
        ("print('E: no layer'); sys.exit(1)", r"failed \(E: no layer\)"),
        ("os.kill(os.getpid(), 9)", "signal 9"),
    ):
        script = f"import os, sys; {end}"
        monkeypatch.setattr(
            calibrated.subprocess, "run", lambda command, script=script, **k: run([command[0], "-c", script], **k)
        )
        with pytest.raises(StudyError, match=words):
            _quantized(tiny, wanted)


def test_load_in_4bit_on_lm_evals_command_line(embedded, tmp_path, tiny):
    """As users type it in --model_args, with bitsandbytes' own keys."""
    from helpers.evaluate.hf_dialogue import HFDialogue

    shutil.copytree(embedded, tmp_path / "mine", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    architecture = models.AutoConfig.for_model(**LLAMA | {"vocab_size": 49152})
    models.AutoModelForCausalLM.from_config(architecture).save_pretrained(tmp_path / "mine")
    text = f"pretrained={tmp_path / 'mine'},load_in_4bit=True,bnb_4bit_quant_type=nf4,bnb_4bit_compute_dtype=float32"
    model = HFDialogue.create_from_arg_string(text, {"device": "cpu", "batch_size": 1}).model
    states = [layer.weight.quant_state for layer in quantized_layers(model).values()]
    assert len(states) == 14 and {(s.quant_type, s.dtype) for s in states} == {("nf4", torch.float32)}
    assert methods.quantization_arguments({"dtype": "auto", "load_in_4bit": False}) == {"dtype": "auto"}
    assert methods.quantization_arguments({"load_in_8bit": True})["quantization_config"].load_in_8bit
