"""The whole pipeline through make and papermill, on the embedded model with few questions."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat


def result(project, name, kind):
    return json.loads((project / f"executed/tiny/{name}/{kind}.json").read_text())


def test_run_all_resumes_repeats_nothing_and_keeps_good_configurations_beside_a_failing_one(project, make):
    bad = (
        (project / "params/formats/nf4.yaml")
        .read_text()
        .replace("configuration: nf4", "configuration: bad")
        .replace("label: NF4", "label: Bad")
    )
    (project / "params/tiny/bad.yaml").write_text(bad)
    notebook = nbformat.read(project / "notebooks/01_evaluate.ipynb", 4)
    where = next(i for i, cell in enumerate(notebook.cells) if cell.source.startswith("loaded ="))
    notebook.cells[where].source = (
        "if case.configuration.configuration == 'bad': raise RuntimeError('no such kernel <b>here</b>')\n"
        + notebook.cells[where].source
    )
    nbformat.write(notebook, project / "notebooks/01_evaluate.ipynb")

    done = make("run-all")
    assert done.returncode != 0 and "no such kernel" in done.stdout
    assert (project / "executed/tiny/bad/01_evaluate.failed.ipynb").exists() and not (
        project / "executed/tiny/bad/01_evaluate.ipynb"
    ).exists()
    assert result(project, "bad", "evaluation")["reason"] == "RuntimeError: no such kernel <b>here</b>"
    for name in ("fp16", "nf4"):
        assert [result(project, name, kind)["status"] for kind in ("evaluation", "benchmark", "fidelity")] == ["ok"] * 3
    written = [path for kind in ("*.json*", "*.html") for path in (project / "executed/tiny").rglob(kind)]
    assert len(written) > 10 and not [path.name for path in written if str(project) in path.read_text()]
    weights = json.loads((project / "executed/tiny/weights.json").read_text())["data"]
    assert not any("reason" in weights[part] for part in ("weights", "noise"))
    report = (project / "executed/tiny/report.html").read_text()
    assert "no such kernel &lt;b&gt;here&lt;/b&gt;" in report and "<b>here</b>" not in report
    assert "fewer than 10" in report  # four dialogues: no interval, and the reason
    assert (project / "figures/tiny/fig2_bar_comparison.svg").exists() and (
        project / "figures/tiny/fig2_bar_comparison.png"
    ).exists()
    assert "failed" in make("status").stdout

    (project / "params/tiny/bad.yaml").unlink()
    shutil.rmtree(project / "executed/tiny/bad")
    assert make("run-all").returncode == 0
    start = time.monotonic()
    again = make("run-all")
    assert again.returncode == 0 and "started" not in again.stdout
    assert time.monotonic() - start < 10  # 2 s on a quiet machine: make bench-pipeline records it

    first = result(project, "fp16", "benchmark")
    assert make("again", "CONFIGS=fp16").returncode == 0
    assert result(project, "fp16", "benchmark") == first and result(project, "fp16", "benchmark_2")["status"] == "ok"

    (project / "executed/tiny/nf4/evaluation.json").unlink()
    repaired = make("measure")
    assert repaired.returncode == 0 and "nf4/01_evaluate" in repaired.stdout and "fp16/" not in repaired.stdout
    assert result(project, "nf4", "evaluation")["status"] == "ok"

    shutil.copy(project / "params/formats/nf4.yaml", project / "params/tiny/nf4.yaml")
    planned = make("-n", "measure").stdout
    assert "nf4/01_evaluate" in planned and "fp16/" not in planned


def test_a_killed_run_leaves_nothing_that_looks_done(project):
    command = ["make", f"PYTHON={sys.executable}", "STUDY=tiny", "executed/tiny/fp16/01_evaluate.ipynb"]
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    running = subprocess.Popen(
        command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, env=environment
    )
    deadline = time.monotonic() + 120
    while not (project / "executed/tiny/fp16").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(2)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert (project / "executed/tiny/00_setup.ipynb").exists()
    assert not (project / "executed/tiny/fp16/01_evaluate.ipynb").exists()
    again = subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stdout
    assert "00_setup" not in again.stdout  # that part was kept
    assert result(project, "fp16", "evaluation")["status"] == "ok"


def test_a_wrong_parameter_stops_before_anything_is_computed(project, make):
    path = project / "params/formats/nf4.yaml"
    path.write_text(path.read_text().replace("double_quant", "double_qaunt"))
    done = make("run-all")
    assert done.returncode != 0
    assert (
        "params/formats/nf4.yaml: unknown key 'quantization.double_qaunt'; did you mean 'double_quant'?" in done.stdout
    )
    assert not list((project / "executed").rglob("*.json"))


def test_what_was_cut_off_is_made_again(project):
    cut, whole = project / "executed/tiny/04_analysis.ipynb", project / "executed/tiny/nf4/01_evaluate.ipynb"
    for path, text in ((cut, '{"cells": ['), (whole, '{"cells": []}')):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "helpers.notebook", "check", "tiny"], cwd=project, capture_output=True, text=True
    )
    assert done.returncode == 0 and "was cut off" in done.stdout and not cut.exists() and whole.exists()
