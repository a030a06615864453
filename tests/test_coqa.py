"""Dialogue files: the project's own keep their promises, a user's are read in every shape or refused by record and field."""

import copy
import json

import pytest

from helpers import StudyError
from helpers.setup import coqa

OFFICIAL = json.loads((coqa.EMBEDDED / "news.json").read_text())


@pytest.fixture
def one() -> dict:
    return copy.deepcopy(OFFICIAL["data"][0])


def save(tmp_path, records, name="mine.json"):
    path = tmp_path / name
    text = (
        "\n".join(json.dumps(r) for r in records)
        if name.endswith("l")
        else json.dumps({"version": "1.0", "data": records})
    )
    path.write_text(text)
    return path


def test_embedded_dialogues_keep_their_promises():
    for path in coqa.EMBEDDED.glob("*.json"):
        coqa.check_embedded(path)
    found = coqa.read("embedded")
    assert len(found) == 50 and len({d["story"] for d in found}) == 50
    assert {d["source"] for d in found[:5]} == {"childrens_stories", "literature", "school", "news", "encyclopaedia"}
    assert sum(len(d["questions"]["input_text"]) for d in found) >= 500


def test_held_out_dialogues_are_not_evaluated():
    evaluated, held_out = coqa.read("embedded"), coqa.read("embedded-held-out")
    assert len(held_out) == 20
    assert not {d["id"] for d in evaluated} & {d["id"] for d in held_out}
    assert not {d["story"] for d in evaluated} & {d["story"] for d in held_out}


def test_the_same_dialogue_in_every_shape(tmp_path, one):
    official = coqa.read(str(save(tmp_path, [one])))
    lines = coqa.read(str(save(tmp_path, [one], "mine.jsonl")))
    hub = coqa.read(str(save(tmp_path, official, "hub.jsonl")))  # columns, as the hub's rows have
    assert official == lines == hub
    assert official[0]["answers"]["input_text"] == [a["input_text"] for a in one["answers"]]


def test_training_files_without_additional_answers_are_read(tmp_path, one):
    del one["additional_answers"]
    assert coqa.read(str(save(tmp_path, [one])))[0]["additional_answers"] == {}


def edit(path, value=None):
    def change(record):
        *parents, last = path
        for key in parents:
            record = record[key]
        if value is None:
            del record[last]
        else:
            record[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edit(["story"]), "field 'story' is missing"),
        (edit(["story"], 7), "field 'story': expected text"),
        (edit(["questions", 2, "input_text"]), "field 'questions', turn 3: 'input_text' is missing"),
        (edit(["answers", 0]), "answers to"),
        (edit(["answers", 1, "turn_id"], 9), "field 'answers', turn 2: 'turn_id' is 9, expected 2"),
        (edit(["answers", 1, "span_end"], 99999), "field 'answers', turn 2: 'span_start'"),
        (
            edit(["additional_answers", "1", 3, "input_text"]),
            "field 'additional_answers.1', turn 4: 'input_text' is missing",
        ),
        (edit(["questions"], "what?"), "field 'questions': expected a list, found str"),
    ],
)
def test_a_malformed_record_is_named_with_its_field(tmp_path, one, change, said):
    change(one)
    path = save(tmp_path, [OFFICIAL["data"][1], one])
    with pytest.raises(StudyError) as error:
        coqa.read(str(path))
    assert f"{path}: record 2 (news-01): " in str(error.value) and said in str(error.value)


def test_a_file_that_is_not_dialogues_is_refused(tmp_path, one):
    for name, text, said in [
        ("a.json", '{"data": [', "line 1: not JSON"),
        ("b.json", '{"rows": 3}', "expected CoQA's"),
        ("c.jsonl", json.dumps(one) + "\n{oops\n", "line 2: not JSON"),
        ("d.json", "[]", "holds no dialogue"),
        ("e.json", "[3]", "record 1: expected an object"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(StudyError, match=name) as error:
            coqa.read(str(tmp_path / name))
        assert said in str(error.value)
    with pytest.raises(StudyError, match=r"none\.json: cannot be read"):
        coqa.read(str(tmp_path / "none.json"))
    with pytest.raises(StudyError, match="id 'news-01' stands 2 times"):
        coqa.read(str(save(tmp_path, [one, one])))
    with pytest.raises(StudyError, match=r"data\.dialogues: 51 asked for, but embedded has 50"):
        coqa.read("embedded", 51)


def test_the_project_s_promises_are_really_checked(tmp_path, one):
    for change, said in [
        (edit(["answers", 0, "span_text"], "not there"), "at the span, not 'not there'"),
        (edit(["additional_answers", "2"]), "2 additional answer sets"),
        (edit(["story"], one["story"][: one["answers"][0]["span_end"]]), "do not lie in the story|words"),
    ]:
        broken = copy.deepcopy(one)
        change(broken)
        with pytest.raises(StudyError, match=said):
            coqa.check_embedded(save(tmp_path, [broken]))
