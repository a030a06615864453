"""Notebooks run headlessly: what a failed, stopped or doubled run leaves behind. Real kernels, cells of a line."""

import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest
import torch

from helpers import ROOT, StudyError, notebook, results

FILES = ["params/smollm2-135m/study.yaml"]
TOKEN = "hf_plantedTokenThatNoFileMayHold"


def write(path, code: str) -> None:
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata=kernel), path)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run one cell as 03_weights; returns what was said. Its result would be tmp/smollm2-135m/weights.json."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(results, "EXECUTED", tmp_path)
    monkeypatch.setattr(notebook, "CACHE", tmp_path / "cache")

    def go(code: str) -> str:
        write(tmp_path / "03_weights.ipynb", code)
        try:
            notebook.run(tmp_path / "03_weights.ipynb", tmp_path / "smollm2-135m/03_weights.ipynb", FILES, [])
        except SystemExit as stop:
            return str(stop)
        return "done"

    return go


def test_a_failure_is_a_result_and_no_token_is_kept_or_shown(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert run(f"print('{TOKEN}'); raise RuntimeError('401 for {TOKEN}')") == "1"
    result = results.read(tmp_path / "smollm2-135m/weights.json")
    assert (result.status, result.reason) == ("failed", "RuntimeError: 401 for hf_***")
    assert (tmp_path / "smollm2-135m/03_weights.failed.ipynb").exists()
    own = tmp_path / "03_weights.ipynb"  # the cell's source, which this test wrote
    held = [p for p in tmp_path.rglob("*") if p.is_file() and p != own and TOKEN in p.read_text()]
    assert not held and TOKEN not in capsys.readouterr().out


def test_parts_that_were_written_before_a_failure_are_kept(run, tmp_path):
    part = tmp_path / "smollm2-135m/weights.json"
    assert run(f"open({str(part)!r}, 'w').write('a part'); raise RuntimeError('no room for the rest')") == "1"
    assert part.read_text() == "a part"
    assert run("import os; os.kill(os.getpid(), 9)") == "1"  # an older part does not stand for this run
    assert "killed, most likely for lack of memory" in results.read(part).reason


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_no_failure_and_leaves_the_older_result(tmp_path, kind):
    source, ready = tmp_path / "04_analysis.ipynb", tmp_path / "ready"
    write(source, f"open({str(ready)!r}, 'w').close()\nimport time; time.sleep(60)")
    target = tmp_path / "out/04_analysis.ipynb"
    target.parent.mkdir()
    target.write_text("older")
    command = [sys.executable, "-m", "helpers.notebook", "run", str(source), str(target), "-f", *FILES]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not ready.exists() and running.poll() is None:
        time.sleep(0.05)
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 1 and "another run makes it now; wait for that one" in second.stderr
    running.send_signal(kind)
    said = running.communicate(timeout=30)[0]
    assert running.returncode == 128 + kind and "FAILED" not in said
    assert target.read_text() == "older" and not list(target.parent.glob("*.[0-9]*.ipynb"))


def test_scraps_of_killed_runs_go_after_an_hour(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notebook, "ROOT", tmp_path)
    folder = tmp_path / "executed/smollm2-135m/nf4"
    folder.mkdir(parents=True)
    old, new = ["01_evaluate.123.ipynb", ".77.evaluation.json"], ["02_benchmark.9.ipynb"]
    for name in (*old, *new):
        (folder / name).write_text("half")
    for name in old:
        os.utime(folder / name, (time.time() - 4000, time.time() - 4000))
    notebook.check("smollm2-135m", ["nf4"])
    assert [path.name for path in folder.iterdir()] == new
    assert capsys.readouterr().out.count("half-written by a run that was killed") == 2


def test_a_heading_whose_cells_show_nothing_says_so(tmp_path):
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

    shown = new_output("display_data", {"text/html": "<p>seen</p>"})
    cells = [new_markdown_cell("## Full"), new_code_cell("1"), new_code_cell("2", outputs=[shown])]
    unseen = [new_output("stream", text="progress"), new_output("display_data", {"text/html": "<p> </p>"})]
    cells += [new_markdown_cell("## Empty"), new_code_cell("3", outputs=unseen)]
    cells += [new_markdown_cell("## Parent"), new_markdown_cell("### Child"), new_code_cell("4", outputs=[shown])]
    nbformat.write(new_notebook(cells=cells), tmp_path / "report.ipynb")
    notebook.render(tmp_path / "report.ipynb", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("Not measured in this study.") == 1
    assert page.rindex("Empty") < page.index("Not measured in this study.") < page.rindex("Parent")


def test_a_render_that_fails_says_so_and_keeps_the_older_report(tmp_path):
    cut, report = tmp_path / "04_analysis.ipynb", tmp_path / "report.html"
    cut.write_text('{"cells": [')
    report.write_text("older")
    command = [sys.executable, "-m", "helpers.notebook", "render", str(cut), str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and report.read_text() == "older"
    assert "04_analysis.ipynb: not a whole notebook; delete it and run make report again" in done.stderr


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "GiB; free the GPU of other programs",
        ),
        (
            RuntimeError("CUDA error: no kernel image is available for execution"),
            "; install a PyTorch that was built for",
        ),
        (StudyError("notes.txt is out of memory of what it was."), "of what it was."),
    ],
)
def test_an_error_of_cudas_says_what_to_do(error, advice):
    assert advice in notebook._reason(error) and notebook._reason(error).count(";") == advice.count(";")
