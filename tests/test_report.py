"""The report: rebuilt from the committed runs, read in a true browser, safe against what a model may say."""

import json
import shutil
import subprocess

import pandas as pd
import pytest

from helpers import ROOT, notebook, results
from helpers.analysis import report, report_hardware, report_style

REFERENCE = ROOT / "executed/reference/h100"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ATTACK = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def test_numbers_with_true_signs():
    assert report_style.number(-1.234, 1, signed=True) == "−1.2" and report_style.number(0.001, 1, signed=True) == "0.0"
    assert report_style.number(None) == "–" and report_style.points(0.1234) == "12.3"
    assert report_style.p_value(0.0004) == "< 0.001"


def test_a_verdict_needs_an_interval_that_excludes_zero():
    assert report_style.says({"ci_low": 0.01, "ci_high": 0.02}) == "above"
    assert report_style.says({"ci_low": -0.02, "ci_high": -0.01}) == "below"
    assert report_style.says({"ci_low": -0.02, "ci_high": 0.01}) == "not told apart"
    assert report_style.says({"ci_low": None, "ci_high": None}) is None


def test_every_cell_is_escaped():
    assert "<script>" not in report_style.table(
        pd.DataFrame([{ATTACK: ATTACK}])
    ) and "<script>" not in report_style.bullets([ATTACK])


def timed(mode, batch, median):
    return {"mode": mode, "batch": batch} | {
        f"{q}_ms_per_token": median * f for q, f in (("q25", 0.99), ("median", 1), ("q75", 1.01))
    }


@pytest.fixture
def twice():
    """Two runs of two formats: the graph's medians repeat, one of eager's doubles."""
    first = {
        "fp16": [timed("eager", 1, 10.0), timed("cuda_graph", 1, 2.0)],
        "nf4": [timed("eager", 1, 15.0), timed("cuda_graph", 1, 3.0)],
    }
    second = {
        "fp16": [timed("eager", 1, 20.0), timed("cuda_graph", 1, 2.02)],
        "nf4": [timed("eager", 1, 15.4), timed("cuda_graph", 1, 3.0)],
    }
    runs = {"benchmark": first, "again": second}
    made = {
        run: {name: {"device": "cuda", "prefill": [], "decode": rows} for name, rows in of.items()}
        for run, of in runs.items()
    }
    return {"full": "fp16", "labels": {"fp16": "FP16", "nf4": "NF4"}} | made


def test_how_far_two_runs_are_apart(twice):
    eager, graph = report_hardware.repeat_table(twice).to_dict("records")
    assert (eager["Mode"], graph["Mode"], eager["Medians measured twice"]) == ("eager", "cuda_graph", 2)
    assert eager["Largest"] == "100.0 % (FP16, batch 1)" and eager["Half are no more apart than"] == "51.3 %"
    assert graph["Largest"] == "1.0 % (FP16, batch 1)" and (eager["Within 3 %"], graph["Within 3 %"]) == (
        "50 %",
        "100 %",
    )


def test_a_ratio_of_times_is_said_of_both_runs(twice):
    eager, graph = report_hardware.speed_sentences(twice)
    assert "(1.50 times; 0.77 times in a second run)" in eager and "(1.50 times; 1.49 times in a second run)" in graph
    (fastest,) = report_hardware.fastest_sentence(twice)
    assert "FP16 2.00 and 2.02 ms (cuda_graph), NF4 3.00 ms (cuda_graph)" in fastest


def test_from_which_batch_on_a_format_is_slower(twice):
    def crossover(*nf4, again=None):
        for run, medians in (("benchmark", nf4), ("again", again or nf4)):
            for name, values in (("fp16", (10.0, 10.0, 10.0)), ("nf4", medians)):
                twice[run][name]["decode"] = [timed("cuda_graph", b, v) for b, v in zip((1, 4, 8), values, strict=True)]
        (row,) = report_hardware.crossover_table(twice).to_dict("records")
        return row["cuda_graph"]

    assert crossover(9.0, 10.1, 12.0) == "slower from batch 8, faster at batch 1"
    assert crossover(12.0, 12.0, 12.0) == "slower from batch 1"
    assert crossover(12.0, 12.0, 10.0) == "not clearly slower at batch 8"
    assert crossover(12.0, 12.0, 12.0, again=(12.0, 9.0, 12.0)) == "slower from batch 8"  # the runs must agree


def test_what_freed_memory_buys(twice):
    assert report_hardware.capacity_sentence(twice) == []
    for name, rates in (("fp16", {4.0: None, 8.0: (100, 1000.0)}), ("nf4", {4.0: (80, 900.0), 8.0: (300, 1100.0)})):
        rows = [{"budget_gib": g, "batch": (r or [0])[0], "tokens_per_second": r and r[1]} for g, r in rates.items()]
        twice["benchmark"][name]["largest_batch"] = [
            row | {"predicted_batch": 9, "allocated_before_mb": 1.0} for row in rows
        ]
    (said,) = report_hardware.capacity_sentence(twice)
    assert (
        said.endswith("in 8 GiB 1,100 tokens per second (300 rows) against 1,000 (100 rows), 1.10 times.")
        and "4 GiB" not in said
    )


def test_without_a_second_run_nothing_is_said_of_one(twice):
    del twice["again"]
    assert report_hardware.repeat_table(twice).empty and "make again" in report_hardware.repeat_note(twice)
    assert not any("second run" in said for said in report_hardware.speed_sentences(twice))
    assert "two runs" not in report_hardware.fastest_sentence(twice)[0]


def test_readme_says_what_the_committed_runs_say():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.readme(text) == text, "run make readme"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_report_rebuilds_from_committed_results_and_a_browser_runs_nothing_that_a_model_wrote(project, make):
    source, target = REFERENCE / "smollm2-135m", project / "executed/reference/h100/smollm2-135m"
    for path in source.rglob("*.json*"):
        if path.name != "analysis.json":
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / path.relative_to(source))
    for name in ("nf4", "fp4", "int8"):  # a hostile model: every answer is markup
        rows = [
            json.loads(line) for line in (target / name / "samples_coqa_turns.jsonl").read_text().split("\n") if line
        ]
        for row in rows:
            row["filtered_resps"] = [ATTACK]
        written = results.write_lines(target / name / "samples_coqa_turns.jsonl", rows)
        envelope = json.loads((target / name / "evaluation.json").read_text())
        envelope["data"]["files"]["samples_coqa_turns.jsonl"] = written
        (target / name / "evaluation.json").write_text(json.dumps(envelope))
    done = make("report", "STUDY=smollm2-135m", "RESULTS=executed/reference/h100/smollm2-135m")
    assert done.returncode == 0, done.stdout
    page = target / "report.html"
    assert "src=&quot;" in page.read_text() or "&lt;script&gt;document.title" in page.read_text()
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--virtual-time-budget=5000",
    ]
    command = [CHROMIUM, *options, f"--user-data-dir={project / 'browser'}", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "<title>smollm2-135m: report</title>" in dom and "owned</title>" not in dom
    assert "What was found" in dom and dom.count("<figure") >= 8
    assert 'src="http' not in dom  # nothing is fetched


def test_a_report_needs_nothing_from_the_network(tmp_path):
    import nbformat

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title")])
    nbformat.write(book, tmp_path / "one.ipynb")
    notebook.render(tmp_path / "one.ipynb", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert (
        "Title" in page
        and 'src="http' not in page
        and 'href="http' not in page.replace('href="https://creativecommons', "")
    )
