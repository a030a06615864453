"""README.md says what the committed runs say, and nothing else."""

import re

import pytest

from helpers import ROOT, StudyError
from helpers.analysis import readme


def test_readme_is_rendered_from_the_committed_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.rendered(text) == text, "run make readme"


def test_no_result_is_typed_outside_the_rendered_part():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(readme.MARKS[0])
    typed = before + rest.split(readme.MARKS[1])[1]
    assert not re.findall(r"\d+\.\d+x|[−-]\d+\.\d+ F1|\d+% \[", typed)


def test_marks_that_are_gone_are_named():
    with pytest.raises(StudyError, match="found: rendered by make readme"):
        readme.rendered("# A README without marks")


def test_every_file_that_readme_names_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#h][^)]*)\)", text):
        assert (ROOT / link).exists(), link
