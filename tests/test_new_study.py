"""Studies as folders of YAML: those that ship with the project, and `make new-study`."""

import json
import re

import pytest
import yaml

from helpers import ROOT, StudyError, new_study, params
from helpers.setup import hub, models
from tests.hub_server import Hub, Repository
from tests.test_hub import python

SHIPPED = sorted(p.parent.name for p in (ROOT / "params").glob("*/study.yaml"))
COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
}
CONFIG |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "eos_token_id": 0,
    "tie_word_embeddings": True,
}
TOKENIZER = {"tokenizer.json": b"{}"}
SMALL = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": b"0" * 8} | TOKENIZER


@pytest.mark.parametrize("study", SHIPPED)
def test_shipped_study(study):
    """Valid; full precision first and what is compared there (bitsandbytes' three, or the seeds of a method); whatever
    comes from the hub pinned to a commit."""
    read = params.read_study(study)
    names = params.configurations(study)
    compared = {"gptq-seed0", "gptq-seed1", "gptq-seed2"} if "calibration" in study else {"nf4", "fp4", "int8"}
    assert names[0] == "fp16" and compared <= set(names)
    found = [params.read_configuration(study, name) for name in names]
    assert len({c.label for c in found}) == len(found)
    if read.model.source == "hub":
        assert COMMIT.fullmatch(read.model.revision)
    pinned = [*read.sources]
    pinned += [c.quantization.calibration.resolved(read) for c in found if hasattr(c.quantization, "calibration")]
    for data in pinned:
        assert data.source != "EleutherAI/coqa" or COMMIT.fullmatch(data.revision)


def test_random_study_has_the_papers_sizes():
    """Parameters and footprint of the paper's FP16 model, from the architecture alone: 2357.13 MB."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    study = params.read_study("llama-3.2-1b-random")
    architecture = dict(study.model.architecture)
    config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    paper = params.read_paper()
    assert sum(p.numel() for p in model.parameters()) == 1_235_814_400
    assert round(model.get_memory_footprint() / 2**20, 2) == paper["configurations"]["fp16"]["model_size_mb"]
    assert config.rope_parameters["rope_type"] == "llama3" and study.data is None and "random" in study.title


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A params folder with nothing in it but what new_study copies from."""
    (tmp_path / "params" / new_study.PAPER).mkdir(parents=True)
    name = f"params/{new_study.PAPER}/study.yaml"
    (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(params, "PARAMS", tmp_path / "params")
    return tmp_path


def test_local_model_becomes_a_study_that_loads(empty, study, capsys):
    folder = models.prepare(study)
    new_study.main([folder, "mine"])
    said = capsys.readouterr().out
    assert "134,515,008 parameters" in said and "next: make run-all STUDY=mine" in said
    written = params.read_study("mine")
    assert params.configurations("mine") == ["fp16", "fp4", "int8", "nf4"]
    assert all(params.read_configuration("mine", name) for name in params.configurations("mine"))
    assert (written.model.source, written.model.name, written.data.source) == ("path", folder, "embedded")
    assert models.prepare(written) == folder
    with pytest.raises(SystemExit, match="is there already"):
        new_study.main([folder, "mine"])


def save(folder, change=None, without=()):
    """A model's small files in `folder`; `change` replaces keys of config.json."""
    files = SMALL | {"config.json": json.dumps(CONFIG | (change or {})).encode()}
    folder.mkdir(parents=True)
    for name in files.keys() - set(without):
        (folder / name).write_bytes(files[name])
    return str(folder)


AUTO_MAP = {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized already"),
        ({"model_type": "never-heard-of"}, "does not know this architecture"),
        ({"model_type": "never-heard-of"} | AUTO_MAP, "the model's own code is not run"),
        ({"model_type": "vit"}, "not a decoder"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "not a decoder that writes text"),
        ({"max_position_embeddings": 256}, r"its context of 256 tokens has no room .* answer of 256 tokens"),
        ({"eos_token_id": None}, r"no eos_token_id.*generation_config\.json"),
        ({"hidden_size": -1}, "does not know this architecture|not a decoder"),
    ],
)
def test_model_that_can_not_be_studied_is_refused(empty, change, message):
    with pytest.raises(StudyError, match=message):
        new_study.write(save(empty / "model", change), "mine")
    assert not (params.PARAMS / "mine").exists() and not list(params.PARAMS.glob(".new-*"))


def test_code_of_a_model_is_not_run_nor_asked_for(empty, monkeypatch):
    """A type that transformers knows is studied with transformers' own class."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = save(empty / "model", AUTO_MAP)
    (empty / "model/own.py").write_text("raise SystemExit('the model ran its code')")
    assert new_study.write(folder, "mine").folder.is_dir()


@pytest.mark.parametrize(
    "without, message",
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no safetensors weights"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_files_that_a_model_lacks(empty, without, message):
    with pytest.raises(StudyError, match=message):
        new_study.write(save(empty / "model", without=[without]), "mine")


def test_the_end_of_a_text_may_stand_in_generation_config(empty):
    folder = save(empty / "model", {"eos_token_id": None})
    with pytest.raises(StudyError, match="generation_config"):
        new_study.write(folder, "mine")
    (empty / "model/generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    assert new_study.write(folder, "mine").folder.is_dir()


def test_sizes_fit_a_short_context(empty):
    new_study.write(save(empty / "model", {"max_position_embeddings": 400}), "mine")
    sizes = params.read_study("mine").benchmark
    fitted = [getattr(sizes, kind).fitted(400, kind).prefill_tokens for kind in ("cpu", "cuda")]
    assert fitted == [[128], [128, 256]]
    text = (params.PARAMS / "mine/study.yaml").read_text()
    assert "benchmark" not in text and [p.name for p in (params.PARAMS / "mine").iterdir()] == ["study.yaml"]


def test_a_mistyped_path_is_no_name_of_the_hub(empty, monkeypatch):
    save(empty / "models/llama")
    monkeypatch.chdir(empty)
    assert new_study.write("models/llama", "right").folder.is_dir()
    monkeypatch.setattr(hub, "ROOT", empty)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StudyError, match=r"there is a folder models/ here, but no lama in it; correct the path"):
        new_study.write("models/lama", "wrong")
    assert "not looked up: HF_HUB_OFFLINE is set" in new_study.write("owner/lama", "later").facts[0]


@pytest.mark.parametrize(
    "model, study, message",
    [
        ("/nowhere", "mine", "no config.json"),
        ("a/b", "../mine", "lower-case letters"),
        ("a/b", "reference", "lower-case letters"),
        ("a/b", "two words", "lower-case letters"),
    ],
)
def test_wrong_arguments(empty, model, study, message):
    with pytest.raises(StudyError, match=message):
        new_study.write(model, study)


def test_hub_model_is_pinned_and_its_sizes_fit_its_context(empty):
    """Over HTTP: an open model, a gated one without access, a name that does not exist, and no hub at all."""
    repositories = [Repository("tiny/qwen", SMALL), Repository("tiny/gated", SMALL, gated=True)]
    code = f"""
import pathlib, sys
from helpers import new_study, params
params.PARAMS = pathlib.Path({str(params.PARAMS)!r})
new_study.main(sys.argv[1:])
"""
    with Hub(repositories) as server:
        where = {"url": server.url, "home": empty / "cache"}
        said = python(code, "tiny/qwen", "open", **where)
        assert (
            f"commit {repositories[0].commit[:8]}" in said
            and "context 1,024 tokens" in said
            and "its context is short" in said
        )
        said = python(code, "tiny/gated", "gated", **where)
        assert "not looked up: tiny/gated is gated" in said and "auth login" in said
        missing = code.replace(
            "new_study.main(sys.argv[1:])", "\ntry: new_study.main(sys.argv[1:])\nexcept SystemExit as e: print(e)"
        )
        assert "no model tiny/typo" in python(missing, "tiny/typo", "typo", **where)
    assert "can't be reached" in python(code, "tiny/later", "later", **where)
    read = {name: params.read_study(name) for name in ("open", "gated", "later")}
    assert read["open"].model.revision == repositories[0].commit
    assert read["gated"].model.revision == repositories[1].commit
    assert read["later"].model.revision is None
    assert (read["open"].benchmark, read["later"].benchmark.cuda.contexts) == (params.Benchmark(), [4096])
    assert read["open"].data == params.read_study(new_study.PAPER).data
    assert not (params.PARAMS / "typo").exists()
    text = (params.PARAMS / "open/study.yaml").read_text()
    assert yaml.safe_load(text)["study"] == "open" and text.startswith("# Written by make new-study MODEL=tiny/qwen")
