"""The launcher for Modal is imported and its jobs are planned; the package itself only where it is installed."""

import importlib
import subprocess
import sys
from unittest.mock import MagicMock

import pytest

from helpers import ROOT


@pytest.fixture
def cloud(monkeypatch):
    try:
        import modal  # noqa: F401
    except ImportError:  # not among the requirements: decorators that leave functions as they are
        stand_in = MagicMock()
        stand_in.App().function.return_value = stand_in.App().local_entrypoint.return_value = lambda function: function
        monkeypatch.setitem(sys.modules, "modal", stand_in)
    monkeypatch.delitem(sys.modules, "helpers.cloud", raising=False)
    yield importlib.import_module("helpers.cloud")
    sys.modules.pop("helpers.cloud", None)


def test_every_notebook_of_a_study_is_in_one_container_and_make_knows_it(cloud):
    planned = cloud.jobs("smollm2-135m")
    assert planned[0][1] == "fp16" and "executed/smollm2-135m/03_weights.ipynb" in planned[0][2]
    assert sum("03_weights" in target for _, _, targets in planned for target in targets) == 1
    study, name, targets = planned[1]
    command = ["make", "-nB", f"STUDY={study}", f"CONFIGS={name}", f"PYTHON={sys.executable}", "PROCESSES=3", *targets]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    runs = [line.split('"')[1].split("/", 2)[2] for line in lines if "notebook run" in line]
    hardware = [f"{name}/02_benchmark{n}.ipynb" for n in ("", "_2", "_3")]
    assert sorted(runs) == sorted(
        ["00_setup.ipynb", *hardware, f"{name}/01_evaluate.ipynb", f"{name}/03_fidelity.ipynb"]
    )
    assert cloud.jobs("llama-3.2-1b-random")[0] == ("llama-3.2-1b-random", "fp16", ["hardware"])
