"""README.md says what the committed runs say, and nothing else."""

import ast
import re

import nbformat
import pytest
import yaml

from helpers import ROOT, StudyError, params
from helpers.analysis import contrasts, frames, readme, sentences

TYPED = re.compile(r"(?<!\w)\d[\d.,]*(?:x\b|%| (?:points?|MB|MiB|ms|dialogues|questions|tokens/s|GB/s)\b)")


def test_readme_is_rendered_from_the_committed_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.rendered(text) == text, "run make readme"


def test_no_result_is_typed_outside_the_rendered_part():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(readme.MARKS[0])
    typed = before + rest.split(readme.MARKS[1])[1]
    assert not re.findall(r"\d+\.\d+x|[−-]\d+\.\d+ F1|\d+% \[", typed)


def test_a_dash_for_decode_has_its_reason():
    hardware = frames.load("executed/reference/hopper/llama-3.2-1b-random")
    assert readme.reasons(hardware, "int8", "cuda_graph")[0].startswith("LLM.int8() cannot be graph-captured")
    assert readme.reasons(hardware, "int8", "eager") == []


def test_seeds_of_one_format_are_not_counted_as_formats():
    f = frames.load("executed/reference/hopper/smollm2-135m-calibration")
    rows = contrasts.table(f)
    said = " ".join(sentences.abstract(f, rows, rows, f.ratios(), params.read_paper()))
    assert "Safest of 2 formats: GPTQ. It loses at most 6.9 F1 points" in said  # by its worst seed


def test_marks_that_are_gone_are_named():
    with pytest.raises(StudyError, match="found: rendered by make readme"):
        readme.rendered("# A README without marks")


def test_every_file_that_readme_names_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#h][^)]*)\)", text):
        assert (ROOT / link).exists(), link


def test_the_study_file_that_readme_shows_is_one():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"\n    (formats: .*?)\n\n", text, re.S)
    shown = yaml.safe_load(re.sub(r"\n    ", "\n", block))
    assert set(shown["formats"]) <= {path.stem for path in (ROOT / "params/formats").glob("*.yaml")}
    study = params.check(
        shown | {"study": "s", "title": "S", "model": {"source": "hub", "name": "a/b"}}, "README"
    ).study
    assert [source.name for source in study.sources] == ["mine", "embedded"] and study.fidelity.text == "mine.txt"


def test_no_result_is_typed_in_the_report():
    """Rules of this project may stand in 04's text (3%, 50 questions); a measured value may not."""
    rules = {"3%", "80%", "99%", "50 dialogues", "50 questions"}
    for cell in nbformat.read(ROOT / "notebooks/04_analysis.ipynb", 4).cells:
        texts = [cell.source]
        if cell.cell_type == "code":
            nodes = ast.walk(ast.parse(cell.source))
            texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        found = {typed for text in texts for typed in TYPED.findall(text)}
        assert found <= rules, cell.source
