"""Studies as folders of YAML: those that ship with the project, and `make new-study`."""

import json
import re

import pytest
import yaml

from helpers import ROOT, StudyError, new_study, params
from helpers.setup import models
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
    "tie_word_embeddings": True,
}
SMALL = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": b"0" * 8, "tokenizer.json": b"{}"}


@pytest.mark.parametrize("study", SHIPPED)
def test_shipped_study(study):
    """Valid; full precision first and the three bitsandbytes configurations there; whatever comes from the hub pinned to a commit."""
    read = params.read_study(study)
    names = params.configurations(study)
    assert names[0] == "fp16" and {"nf4", "fp4", "int8"} <= set(names)
    found = [params.read_configuration(study, name) for name in names]
    assert len({c.label for c in found}) == len(found)
    if read.model.source == "hub":
        assert COMMIT.fullmatch(read.model.revision)
    pinned = [read.data] if read.data else []
    pinned += [c.quantization.calibration for c in found if hasattr(c.quantization, "calibration")]
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
    for name in (new_study.TEMPLATE, new_study.PAPER):
        (tmp_path / "params" / name).mkdir(parents=True)
        for file in (ROOT / "params" / name).glob("*.yaml"):
            (tmp_path / "params" / name / file.name).write_text(file.read_text())
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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized already"),
        ({"model_type": "never-heard-of"}, "does not know this architecture"),
        ({"model_type": "vit"}, "not a decoder"),
    ],
)
def test_model_that_can_not_be_studied_is_refused(empty, change, message):
    folder = empty / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    (folder / "model.safetensors").write_bytes(b"0")
    with pytest.raises(StudyError, match=message):
        new_study.write(str(folder), "mine")
    assert not (params.PARAMS / "mine").exists() and not list(params.PARAMS.glob(".new-*"))


@pytest.mark.parametrize(
    "model, study, message", [("/nowhere", "mine", "no config.json"), ("a/b", "../mine", "lower-case letters")]
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
    assert (
        max(read["open"].benchmark.cuda.prefill_tokens) == 1024
        and max(read["later"].benchmark.cuda.prefill_tokens) == 4096
    )
    assert read["open"].data == params.read_study(new_study.PAPER).data
    assert not (params.PARAMS / "typo").exists()
    text = (params.PARAMS / "open/study.yaml").read_text()
    assert yaml.safe_load(text)["study"] == "open" and text.startswith("# Written by make new-study MODEL=tiny/qwen")
