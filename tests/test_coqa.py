"""Dialogue files: the project's own keep their promises, a user's are read in every shape or refused by record and
field."""

import copy
import json
from itertools import chain

import pytest

from helpers import StudyError
from helpers.setup import coqa

OFFICIAL = json.loads((coqa.EMBEDDED / "news.json").read_text())


def check_embedded(path) -> None:
    """What the project's own files promise beyond CoQA's format: every span is the story's text letter for letter, four
    answers to every question, 150 to 400 words, 8 to 15 turns, no question twice in a dialogue."""
    for record, d in zip(coqa._records(path), coqa.read_file(path), strict=True):
        where = f"{path}: {d['id']}"
        words, turns = len(d["story"].split()), len(d["questions"]["input_text"])
        if not 150 <= words <= 400:
            raise AssertionError(f"{where}: the story has {words} words, expected 150 to 400")
        if not 8 <= turns <= 15:
            raise AssertionError(f"{where}: {turns} turns, expected 8 to 15")
        if len({q.strip().lower() for q in d["questions"]["input_text"]}) != turns:
            raise AssertionError(f"{where}: a question stands twice")
        if len(d["additional_answers"]) != 3:
            raise AssertionError(f"{where}: {len(d['additional_answers'])} additional answer sets, expected 3")
        for turn, row in chain.from_iterable(
            enumerate(rows, 1) for rows in (record["answers"], *record["additional_answers"].values())
        ):
            start, end, span = row["span_start"], row["span_end"], row["span_text"]
            if start == -1 and (span, row["input_text"].lower()) != ("unknown", "unknown"):
                said = f"no span, so the answer must be 'unknown', not '{row['input_text']}'"
                raise AssertionError(f"{where}, turn {turn}: {said}")
            if start != -1 and d["story"][start:end] != span:
                said = f"the story has '{d['story'][start:end]}' at the span, not '{span}'"
                raise AssertionError(f"{where}, turn {turn}: {said}")


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
        check_embedded(path)
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
        (edit(["story"], True), "field 'story': expected text, found bool"),
        (edit(["questions", 2, "input_text"]), "field 'questions', turn 3: 'input_text' is missing"),
        (edit(["answers", 0]), "answers to"),
        (edit(["answers", 1, "turn_id"], 9), "field 'answers', turn 3: 'turn_id' is 3 after 9"),
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
        ("b.json", '{"rows": 3}', "field 'story' is missing"),
        ("c.jsonl", json.dumps(one) + "\n{oops\n", "line 2: not JSON"),
        ("d.json", "[]", "holds no dialogue"),
        ("e.json", "[3]", "record 1 (no id): expected an object"),
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
        (edit(["story"], one["story"][: one["answers"][0]["span_end"]]), "at the span|words"),
    ]:
        broken = copy.deepcopy(one)
        change(broken)
        with pytest.raises(AssertionError, match=said):
            check_embedded(save(tmp_path, [broken]))
