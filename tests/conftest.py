"""Fixtures shared by the tests: the embedded study, and a copy of the project to run make in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from helpers import CACHE, ROOT, params
from helpers.setup import calibrated, models

# Two tests that load a model side by side need no more threads than there are cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TINY = {
    "prefill_tokens": [16, 32],
    "batch_sizes": [1, 2],
    "prompt_tokens": 16,
    "contexts": [24],
    "decode_tokens": 4,
    "repeats": 3,
    "warmup": 1,
}


# Two layers of the embedded model's family.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def configuration(method: str, dtype: str = "auto", **options) -> params.Configuration:
    return params.Configuration(configuration="c", label="C", dtype=dtype, quantization={"method": method, **options})


@pytest.fixture(scope="session")
def embedded(study) -> Path:
    """The folder of the embedded model's full-precision weights and tokenizer."""
    return Path(models.prepare(study))


@pytest.fixture
def tiny(study, tmp_path, monkeypatch) -> params.Study:
    """A two-layer llama with random weights, an empty cache, and a folder of its own for results."""
    monkeypatch.setattr(models, "CACHE", tmp_path)
    monkeypatch.setattr(calibrated, "CACHE", tmp_path)
    random = params.Model(source="random", name="tiny", architecture=LLAMA)
    return study.model_copy(update={"model": random, "data": None, "folder": str(tmp_path / "results")})


@pytest.fixture(scope="session")
def study() -> params.Study:
    return params.read_study("smollm2-135m")


@pytest.fixture(scope="session")
def load(study):
    """The embedded model in a configuration, loaded once a session."""
    cache = {}

    def get(name: str) -> models.Loaded:
        if name not in cache:
            cache[name] = models.load(study, params.read_configuration("smollm2-135m", name))
        return cache[name]

    return get


@pytest.fixture(scope="session")
def three_blocks(embedded, tmp_path_factory) -> Path:
    """A folder with the embedded model's first three blocks and its tokenizer: seconds a notebook, not minutes."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(embedded, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(embedded)
    del model.model.layers[3:]
    model.config.num_hidden_layers = 3
    model.config.layer_types = None
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def project(tmp_path, three_blocks) -> Path:
    """The project as it stands, without results, with a study `tiny` of three blocks and four dialogues; the cache is
    shared.
    """
    root = tmp_path / "project"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("executed/", "figures/")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    (root / ".cache").symlink_to(CACHE)
    tiny = yaml.safe_load((ROOT / "params/smollm2-135m/study.yaml").read_text())
    shutil.copytree(three_blocks, root / "models/tiny")
    tiny["model"] = {"source": "path", "name": "models/tiny"}
    tiny |= {"study": "tiny", "title": "Tiny", "statistics": {"resamples": 200, "redraws": 200}}
    tiny["data"] |= {"dialogues": 5, "dialogues_on_cpu": 4}
    tiny["formats"] = ["fp16", "nf4"]
    tiny["benchmark"] = {"cpu": TINY}
    tiny["evaluation"] = {"max_gen_toks": 16}  # three blocks do not know when to stop
    tiny["fidelity"] = {"dialogues": 2, "noise_seeds": [0], "block_sizes": [64]}
    (root / "params/tiny").mkdir()
    (root / "params/tiny/study.yaml").write_text(yaml.safe_dump(tiny, sort_keys=False))
    return root


@pytest.fixture
def make(project):
    """Run make in the copied project; returns the finished process, its output in stdout."""

    def run(*arguments: str, **options):
        command = ["make", f"PYTHON={sys.executable}", "STUDY=tiny", *arguments]
        environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
        return subprocess.run(
            command,
            cwd=project,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            **options,
        )

    return run
