"""A message that names a remedy keeps its word: the file as it was is refused with that sentence, and the file as the
sentence wants it is accepted. Remedies that need a run are applied by `make faults`, test_makefile and test_models.
"""

import json
import shutil

import pytest

from helpers import ROOT, StudyError, checked_yaml, params
from helpers.setup import coqa

STUDY = (ROOT / "params/smollm2-135m/study.yaml").read_bytes()
YAML = [  # the words of the remedy, what is wrong, what the remedy makes of it
    ("remove one", b"seed: 1\nseed: 2\n", b"seed: 2\n"),
    ("write the value again", b"a: &x 1\nb: *x\n", b"a: 1\nb: 1\n"),
    ("or the text in quotes", b"title: yes\n", b'title: "yes"\n'),
    ("put the text in quotes", b"title: 2026-11-27\n", b'title: "2026-11-27"\n'),
    ("write one", b"seed: 0256\n", b"seed: 256\n"),
    ("write one, such as 0.5", b"statistics: {confidence: .95}\n", b"statistics: {confidence: 0.95}\n"),
    ("null says none", b"data:\n", b"data: null\n"),
    ("put it in quotes", b"1: a\n", b'"1": a\n'),
    ("save it as UTF-8", "title: Größe\n".encode("latin-1"), "title: Größe\n".encode()),
]


@pytest.mark.parametrize(("remedy", "wrong", "right"), YAML)
def test_of_a_parameter_file(tmp_path, remedy, wrong, right):
    path = tmp_path / "study.yaml"
    path.write_bytes(wrong)
    with pytest.raises(StudyError, match=remedy):
        checked_yaml.read(path)
    path.write_bytes(right)
    assert checked_yaml.read(path)


SHIPPED, MINE = {"source": "embedded"}, {"source": "hub", "name": "../m"}
VALUES = [
    ("give each its own `name`", {"data": [SHIPPED, SHIPPED]}, {"data": [SHIPPED, SHIPPED | {"name": "b"}]}),
    ("name one under executed/", {"folder": "../elsewhere"}, {"folder": "executed/elsewhere"}),
    ("a folder is source: path", {"model": MINE}, {"model": MINE | {"source": "path"}}),
]


@pytest.mark.parametrize(("remedy", "wrong", "right"), VALUES)
def test_of_a_value_in_a_study(remedy, wrong, right):
    given = checked_yaml.read(ROOT / "params/smollm2-135m/study.yaml")
    with pytest.raises(StudyError, match=remedy):
        params.check(given | wrong, "study.yaml")
    assert params.check(given | right, "study.yaml")


def test_of_a_file_name(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "params", tmp_path / "params")
    monkeypatch.setattr(params, "PARAMS", tmp_path / "params")
    wrong = tmp_path / "params/smollm2-135m/nf4 mine.yml"
    wrong.write_text("seed: 1\n")
    with pytest.raises(StudyError, match="rename it to letters, digits, dots, hyphens and underscores, ending in"):
        params.configurations("smollm2-135m")
    wrong.rename(wrong.with_name("nf4-mine.yaml"))
    assert "nf4-mine" in params.configurations("smollm2-135m")


def _dialogue(**changes) -> dict:
    turns = [{"input_text": "Who?", "turn_id": 1}, {"input_text": "Where?", "turn_id": 2}]
    return {"id": "a", "story": "A cat sat.", "questions": turns, "answers": turns} | changes


DIALOGUES = [
    ("write the turns in order", _dialogue(questions=_dialogue()["questions"][::-1]), _dialogue()),
    ("save the text again as UTF-8", _dialogue(story="A \ud83d cat."), _dialogue(story="A \ud83d\ude00 cat.")),
]


@pytest.mark.parametrize(("remedy", "wrong", "right"), DIALOGUES)
def test_of_dialogues(tmp_path, remedy, wrong, right):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"data": [wrong]}))
    with pytest.raises(StudyError, match=remedy):
        coqa.read_file(path)
    path.write_text(json.dumps({"data": [right]}))
    assert len(coqa.read_file(path)) == 1


def test_of_a_converted_file_that_is_there(tmp_path):
    source, target = tmp_path / "mine.csv", tmp_path / "mine.json"
    source.write_text("story,question,answer\nA cat sat.,Who?,A cat\n")
    target.write_text("{}")
    with pytest.raises(StudyError, match="name another file, or remove it first"):
        coqa.convert(source, target)
    for named in (tmp_path / "another.json", target):
        target.unlink(missing_ok=True)
        coqa.convert(source, named)
        assert len(coqa.read_file(named)) == 1
