"""Fixtures shared by the tests: the embedded study, and a copy of the project to run make in."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from helpers import params
from helpers.setup import calibrated, models
from tests.faults import tiny as tiny_project

# Two tests that load a model side by side need no more threads than there are cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY, LLAMA = tiny_project.BENCHMARK, tiny_project.MODEL["architecture"]


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


@pytest.fixture
def project(tmp_path, study) -> Path:
    """The project as it stands, without results, with a study `tiny` of four dialogues; the weights' cache is
    shared.
    """
    models.prepare(study)
    return tiny_project.copy(tmp_path / "project")


@pytest.fixture
def make(project):
    """Run make in the copied project; returns the finished process, its output in stdout."""

    def run(*arguments: str, **options):
        command = [*tiny_project.command(), *arguments]
        return subprocess.run(
            command,
            cwd=project,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=tiny_project.environment(),
            **options,
        )

    return run
