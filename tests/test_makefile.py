"""What make would do, on a copy of the Makefile with made-up results: nothing is computed here."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from helpers import ROOT
from tests.faults import tiny

NOTEBOOK = json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}) + "\n"
WRITES = {
    "00_setup": "setup",
    "02_benchmark": "benchmark",
    "01_evaluate": "evaluation",
    "03_fidelity": "fidelity",
    "03_weights": "weights",
}


@pytest.fixture
def tree(tmp_path):
    """A project with a finished study `small` of two formats, every file newer than what it is made from."""
    for name in ("Makefile", "helpers", "notebooks", "params"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "params/small").mkdir()
    study = yaml.safe_load((ROOT / "params/smollm2-135m/study.yaml").read_text()) | {"study": "small"}
    study = yaml.safe_dump(study | {"formats": ["fp16", "nf4"]}, sort_keys=False)
    (tmp_path / "params/small/study.yaml").write_text(study)
    out = tmp_path / "executed/small"
    for name in ("00_setup", "fp16/01_evaluate", "nf4/01_evaluate", "fp16/02_benchmark", "nf4/02_benchmark",
                 "fp16/03_fidelity", "nf4/03_fidelity", "03_weights", "04_analysis", "05_figures"):  # fmt: skip
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.ipynb").write_text(NOTEBOOK)
        if kind := WRITES.get(name.split("/")[-1]):
            (out / name).with_name(f"{kind}.json").write_text("{}")
    (out / "report.html").write_text("<html>")
    for path in tmp_path.rglob("*"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    order = ("00*", "*.json", "*/*", "03*", "04*", "05*", "report.html")
    for age, pattern in enumerate(order):
        for path in out.glob(pattern):
            os.utime(path, (1_700_000_000 + age, 1_700_000_000 + age))
    return tmp_path


@pytest.fixture
def make(tree):
    def run(*arguments):
        command = ["make", f"PYTHON={sys.executable}", *arguments]
        if not any(a.startswith("STUDY=") for a in arguments):
            command.append("STUDY=small")
        if not any(a.startswith("PROCESSES=") for a in arguments) and "again" not in arguments:
            command.append("PROCESSES=1")
        return subprocess.run(command, cwd=tree, text=True, env=tiny.environment(), capture_output=True)

    return run


def test_weights_are_made_again_and_setup_alone_makes_nothing_else_stale(tree, make):
    (tree / "executed/small/weights.json").unlink()
    assert planned(make) - ANALYSIS == {"03_weights.ipynb"}
    (tree / "executed/small/setup.json").unlink()
    assert planned(make) - ANALYSIS == {"03_weights.ipynb", "00_setup.ipynb"}
    study = tree / "params/small/study.yaml"
    when = study.stat().st_mtime
    study.write_text(study.read_text().replace("source: package", "source: path"))
    os.utime(study, (when, when))
    assert "nf4/01_evaluate.ipynb" in planned(make)  # a folder may hold another model now


def planned(make, *arguments) -> set[str]:
    """The notebooks of executed/small that would be run or rendered."""
    done = make("-n", "measure", "report", "figures", *arguments)
    assert done.returncode == 0, done.stderr
    return {
        word.strip('"').removeprefix("executed/small/")
        for line in done.stdout.splitlines()
        for word in line.split(" -f ")[0].split()[-1:]
        if "helpers.notebook" in line
    }


ANALYSIS = {"04_analysis.ipynb", "05_figures.ipynb", "report.html"}


def test_a_finished_study_is_not_run_again(make):
    assert planned(make) == set()


@pytest.mark.parametrize("kind", ["evaluation", "benchmark", "fidelity"])
def test_a_deleted_result_is_made_again_and_nothing_else(tree, make, kind):
    (tree / f"executed/small/nf4/{kind}.json").unlink()
    notebook = next(name for name, written in WRITES.items() if written == kind)
    assert planned(make) - ANALYSIS == {f"nf4/{notebook}.ipynb"}


@pytest.mark.parametrize("left", ["", NOTEBOOK[:30]])
@pytest.mark.parametrize("name", ["nf4/01_evaluate", "04_analysis", "03_weights"])
def test_an_empty_or_truncated_notebook_is_made_again(tree, make, name, left):
    path = tree / f"executed/small/{name}.ipynb"
    path.write_text(left)
    assert "was cut off; it is made again" in make("check").stdout
    assert f"{name}.ipynb" in planned(make)
    assert "fp16/01_evaluate.ipynb" not in planned(make)


def test_code_that_a_notebook_does_not_use_reruns_nothing_of_it(tree, make):
    os.utime(tree / "helpers/evaluate/run.py")
    now = planned(make)
    assert "nf4/01_evaluate.ipynb" in now and "nf4/02_benchmark.ipynb" not in now
    os.utime(tree / "params/formats/nf4.yaml")
    assert {"nf4/02_benchmark.ipynb", "nf4/03_fidelity.ipynb"} <= planned(make)
    assert not any(name.startswith("fp16/02") for name in planned(make))


def test_again_adds_one_process_and_leaves_those_that_are_there(tree, make):
    assert planned(make, "PROCESSES=2") >= {"fp16/02_benchmark_2.ipynb", "nf4/02_benchmark_2.ipynb"}
    assert not any("02_benchmark.ipynb" in name for name in planned(make, "PROCESSES=2"))
    (tree / "executed/small/nf4/02_benchmark_2.failed.ipynb").write_text(NOTEBOOK)  # a failed one does not count
    assert "02_benchmark_2.ipynb" in make("-n", "again").stdout
    assert "02_benchmark_3.ipynb" not in make("-n", "again").stdout


def test_every_notebook_is_started_through_run(tree, make):
    shutil.rmtree(tree / "executed")
    lines = make("-n", "measure", "report", "figures", "RUN=srun --gpus=1").stdout.splitlines()
    runs = [line for line in lines if "helpers.notebook run" in line]
    assert len(runs) == 10 and all(line.startswith("srun --gpus=1 ") for line in runs)
    lines = make("-n", "measure", "report", "figures", "PROFILE=slurm").stdout.splitlines()
    gpus = {line.split('"')[1] if '"' in line else line: "--gpus=1" in line for line in lines if "notebook run" in line}
    assert len(gpus) == 10 and sum(gpus.values()) == 8 and all(line.startswith("srun") for line in lines[:8])


NOOP = ROOT / "tests/slurm/noop.py"


def test_a_failed_result_is_kept_and_no_report_tries_again(tree, make, monkeypatch):
    shutil.rmtree(tree / "executed")
    monkeypatch.setenv("NOOP_FAIL", "nf4/02_benchmark")
    done = make("run-all", f"PYTHON={NOOP}")
    assert done.returncode == 2 and done.stderr.count("nf4/02_benchmark.ipynb] Error 1") == 1
    assert (tree / "executed/small/nf4/benchmark.json").read_text() == "failed"
    assert (tree / "executed/small/04_analysis.ipynb").exists()
    monkeypatch.delenv("NOOP_FAIL")
    assert planned(make) - ANALYSIS == {"nf4/02_benchmark.ipynb"}
    os.utime(tree / "helpers/results.py")
    assert "02_benchmark" not in make("-n", "report").stdout  # it reads what is there


def test_an_interrupted_run_leaves_the_older_result(tree, make):
    os.utime(tree / "params/formats/nf4.yaml")
    environment = tiny.environment(NOOP_SECONDS="30")
    command = ["make", f"PYTHON={NOOP}", "STUDY=small", "executed/small/nf4/evaluation.json"]
    running = subprocess.Popen(command, cwd=tree, env=environment, start_new_session=True, stderr=subprocess.PIPE)
    time.sleep(0.7)
    (tree / "executed/small/nf4/evaluation.json").write_text("new")
    os.killpg(running.pid, signal.SIGINT)
    assert b"Deleting" not in running.communicate(timeout=10)[1]
    assert (tree / "executed/small/nf4/evaluation.json").read_text() == "new"


def test_status_asks_make_once(tree, make):
    os.utime(tree / "params/formats/nf4.yaml")
    (tree / "executed/small/fp16/02_benchmark.ipynb").unlink()
    start = time.monotonic()
    lines = [line.split() for line in make("status").stdout.splitlines()]
    assert time.monotonic() - start < 5
    assert ["01_evaluate", "fresh", "stale"] in lines and ["02_benchmark", "missing", "stale"] in lines
    assert ["00_setup", "fresh"] in lines and ["report", "stale"] in lines


NOT_NAMES = ("STUDY=", "STUDY=reference", "STUDY=reference/", "STUDY=../params", "STUDY=.", "STUDY=a b", "STUDY=-rf")


@pytest.mark.parametrize("wrong", [*NOT_NAMES, "STUDY=x;touch y", "RESULTS=../params", "CONFIGS=fp16;nf4"])
def test_what_is_no_name_is_refused_before_any_recipe(tree, make, wrong):
    before = sorted(tree.rglob("*"))
    for target in ("clean", "run-all", "status"):
        done = make(target, wrong)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "give" in done.stderr
    assert sorted(tree.rglob("*")) == before


@pytest.mark.parametrize("name", ["`touch run`.yaml", "my format.yaml", "$(shell touch run).yaml"])
def test_a_parameter_file_with_another_name_is_refused_and_never_run(tree, make, name):
    (tree / "params/small" / name).write_text("{}")
    done = make("measure")
    assert done.returncode == 2 and "rename it" in done.stderr and not (tree / "run").exists()
    (tree / "params/small" / name).unlink()
    assert planned(make) == set()


def test_clean_deletes_what_a_run_wrote_and_nothing_else(tree, make):
    kept = [tree / name for name in ("executed/reference/hopper/setup.json", "executed/other/setup.json",
                                     "executed/small/my notes.md")]  # fmt: skip
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    assert make("clean", "RESULTS=executed/reference/hopper").returncode != 0
    assert make("clean", "STUDY=other").returncode != 0  # it has no params/other/study.yaml
    assert (tree / "executed/small/nf4/evaluation.json").exists()
    done = make("clean")
    assert done.returncode == 0 and "is kept" in done.stdout
    assert all(path.read_text() == "mine" for path in kept)
    assert [path.name for path in (tree / "executed/small").rglob("*")] == ["my notes.md"]


def test_an_installation_shows_what_it_downloads_in_short_lines():
    lines = [
        "Collecting torch",
        f"  Downloading torch-2.13.0{'x' * 200}.whl (500 MB)",
        "Installing collected packages: a",
    ]
    rule = "show: ; @printf '%s\\n' " + " ".join(f"'{line}'" for line in lines) + " | $(PIP_LINES)"
    done = subprocess.run(["make", "-s", f"--eval={rule}", "show"], cwd=ROOT, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("  Downloading torch-2.13.0xx") and len(first) < 120 and second == lines[2]
