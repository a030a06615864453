"""The report: rebuilt from the committed runs, read in a true browser, safe against what a model may say."""

import json
import shutil
import subprocess

import pandas as pd
import pytest

from helpers import ROOT, notebook, report, report_style, results

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
    assert "<script>" not in report_style.table(pd.DataFrame([{ATTACK: ATTACK}])) and "<script>" not in report_style.bullets([ATTACK])


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
        rows = [json.loads(line) for line in (target / name / "samples_coqa_turns.jsonl").read_text().split("\n") if line]
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
    assert "Title" in page and 'src="http' not in page and 'href="http' not in page.replace('href="https://creativecommons', "")
