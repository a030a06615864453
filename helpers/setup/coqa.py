"""Dialogues in CoQA's format (Reddy et al., 2019, https://stanfordnlp.github.io/coqa/): read, check, shape.

`read(source)` returns dialogues in the shape of the hub's EleutherAI/coqa, which lm-eval's `coqa` task expects: `id`, `source`,
`story`, `questions` and `answers` as columns, `additional_answers` as columns per annotator ("0", "1", "2").

Sources: `embedded` (the project's own dialogues, CC0), `embedded-held-out` (for calibration, never evaluated), a hub name, or a path to
a file: CoQA's official JSON, the same records as JSONL, or rows saved from the hub.

    python -m helpers.setup.coqa FILE        checks a file
"""

import json
import sys
from collections import Counter
from itertools import chain, zip_longest
from pathlib import Path

from helpers import ROOT, StudyError
from helpers.setup import hub

EMBEDDED = ROOT / "helpers" / "tasks" / "dialogues"
HELD_OUT = "held_out.json"
ANSWER_FIELDS = ("span_start", "span_end", "span_text", "input_text", "turn_id")


def read(
    source: str, dialogues: int | None = None, revision: str | None = None, split: str = "validation"
) -> list[dict]:
    """The first `dialogues` of a source (all by default). The embedded set alternates between its domains.

    Raises StudyError that names file, record and field if a file is malformed, or the remedy if the hub can't be reached.
    """
    if source == "embedded":
        files = [read_file(path) for path in sorted(EMBEDDED.glob("*.json")) if path.name != HELD_OUT]
        found = [d for d in chain.from_iterable(zip_longest(*files)) if d is not None]
    elif source == "embedded-held-out":
        found = read_file(EMBEDDED / HELD_OUT)
    elif source.endswith((".json", ".jsonl")):
        path = Path(source) if Path(source).is_absolute() else ROOT / source
        found = read_file(path)
    else:
        found = _from_hub(source, revision, split)
    if dialogues is not None and dialogues > len(found):
        raise StudyError(
            f"data.dialogues: {dialogues} asked for, but {source} has {len(found)}; ask for at most that many"
        )
    return found[:dialogues]


def describe(data) -> dict:
    """Counts of a study's dialogues (`study.data`): in all, and per source (domain) mean story length in words and turns."""
    found = read(data.source, data.dialogues, data.revision)
    turns = [len(d["questions"]["input_text"]) for d in found]
    sources: dict[str, dict] = {}
    for name in dict.fromkeys(d["source"] for d in found):
        mine = [d for d in found if d["source"] == name]
        sources[name] = {
            "dialogues": len(mine),
            "questions": sum(len(d["questions"]["input_text"]) for d in mine),
            "story_words_mean": round(sum(len(d["story"].split()) for d in mine) / len(mine), 1),
        }
    return {"source": data.source, "dialogues": len(found), "questions": sum(turns), "sources": sources}


def _from_hub(name: str, revision: str | None, split: str) -> list[dict]:
    """Rows of a data set of the hub, through helpers.hub (whose errors and offline cache hold), in the shape of `read`."""
    from datasets import load_dataset  # takes seconds, and only hub data needs it

    folder = hub.snapshot(name, revision, "dataset")
    where = f"data.source: {name} ({folder.name[:8]}), split '{split}'"
    try:
        rows = load_dataset(str(folder), split=split).to_list()
    except Exception as error:  # the library raises its own errors, pyarrow's and plain ValueErrors
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise StudyError(f"{where}: could not be read ({said}); name a data set in CoQA's format") from error
    return [_hub_row(row, f"{where}: record {number}") for number, row in enumerate(rows, 1)]


def _hub_row(row: dict, where: str) -> dict:
    """A row in the shape of `read`. Its spans are not checked: CoQA itself has some that do not lie in the story."""
    if missing := [f for f in ("id", "story", "questions", "answers") if not row.get(f)]:
        raise StudyError(f"{where}: field '{missing[0]}' is missing or empty; name a data set in CoQA's format")
    extra = (row.get("additional_answers") or {}).items()
    return {
        "id": str(row["id"]),
        "source": str(row.get("source", "")),
        "story": row["story"],
        "questions": _columns(row["questions"], ("input_text", "turn_id"), f"{where}: field 'questions'"),
        "answers": _columns(row["answers"], ANSWER_FIELDS, f"{where}: field 'answers'"),
        "additional_answers": {
            k: _columns(v, ANSWER_FIELDS, f"{where}: field 'additional_answers.{k}'") for k, v in extra if v
        },
    }


def read_file(path: Path) -> list[dict]:
    """All dialogues of one file, checked. Raises StudyError naming file, record and field."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(
            f"{path}: cannot be read as UTF-8 text ({error.__class__.__name__}); data.source names a CoQA file"
        ) from None
    records = _records(text, path)
    if not records:
        raise StudyError(f"{path}: holds no dialogue")
    found = [
        _dialogue(record, f"{path}: record {n} ({record.get('id', 'no id')})") for n, record in enumerate(records, 1)
    ]
    for what, count in Counter(d["id"] for d in found).items():
        if count > 1:
            raise StudyError(f"{path}: id '{what}' stands {count} times; every dialogue needs its own")
    for story, count in Counter(d["story"] for d in found).items():
        if count > 1 and Path(path).parent == EMBEDDED:
            raise StudyError(f"{path}: the story that begins '{story[:40]}' stands {count} times")
    return found


def _records(text: str, path) -> list[dict]:
    if str(path).endswith(".jsonl"):
        records = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise StudyError(f"{path}, line {number}: not JSON: {error.msg}") from None
    else:
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as error:
            raise StudyError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
        records = whole.get("data") if isinstance(whole, dict) else whole
        if not isinstance(records, list):
            raise StudyError(f"{path}: expected CoQA's {{'version': ..., 'data': [...]}} or a list of dialogues")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise StudyError(f"{path}: record {number}: expected an object, found {type(record).__name__}")
    return records


def _dialogue(record: dict, where: str) -> dict:
    for field in ("id", "story", "questions", "answers"):
        if not record.get(field):
            raise StudyError(f"{where}: field '{field}' is missing or empty")
    story = record["story"]
    if not isinstance(story, str):
        raise StudyError(f"{where}: field 'story': expected text, found {type(story).__name__}")
    questions = _columns(record["questions"], ("input_text", "turn_id"), f"{where}: field 'questions'")
    turns = len(questions["input_text"])
    sets = {"answers": record["answers"]}
    sets |= {f"additional_answers.{k}": v for k, v in sorted((record.get("additional_answers") or {}).items()) if v}
    columns = {}
    for name, answers in sets.items():
        columns[name] = _columns(answers, ANSWER_FIELDS, f"{where}: field '{name}'")
        if len(columns[name]["input_text"]) != turns:
            raise StudyError(
                f"{where}: field '{name}': {len(columns[name]['input_text'])} answers to {turns} questions"
            )
        _check_answers(columns[name], story, f"{where}: field '{name}'")
    return {
        "id": str(record["id"]),
        "source": str(record.get("source", "")),
        "story": story,
        "questions": questions,
        "answers": columns.pop("answers"),
        "additional_answers": {name.split(".")[1]: value for name, value in columns.items()},
    }


def _columns(value, fields: tuple[str, ...], where: str) -> dict[str, list]:
    """Rows (CoQA's own files) or columns (the hub's) as columns."""
    if isinstance(value, dict):
        missing = [f for f in fields if f not in value]
        if missing:
            raise StudyError(f"{where}: '{missing[0]}' is missing")
        return {f: list(value[f]) for f in fields}
    if not isinstance(value, list):
        raise StudyError(f"{where}: expected a list, found {type(value).__name__}")
    for turn, row in enumerate(value, 1):
        for field in fields:
            if not isinstance(row, dict) or field not in row:
                raise StudyError(f"{where}, turn {turn}: '{field}' is missing")
    return {f: [row[f] for row in value] for f in fields}


def _check_answers(columns: dict, story: str, where: str) -> None:
    for turn, (text, turn_id) in enumerate(zip(columns["input_text"], columns["turn_id"], strict=True), 1):
        if not isinstance(text, str):
            raise StudyError(f"{where}, turn {turn}: 'input_text': expected text, found {type(text).__name__}")
        if turn_id != turn:
            raise StudyError(f"{where}, turn {turn}: 'turn_id' is {turn_id!r}, expected {turn}")
        start, end = columns["span_start"][turn - 1], columns["span_end"][turn - 1]
        if start == -1:  # unanswerable
            continue
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(story)):
            raise StudyError(
                f"{where}, turn {turn}: 'span_start' {start!r} and 'span_end' {end!r} do not lie in the story"
            )


def check_embedded(path: Path) -> None:
    """What the project's own files promise beyond CoQA's format: every span is the story's text letter for letter, four answers to every
    question, 150 to 400 words, 8 to 15 turns, no question twice in a dialogue. Raises StudyError."""
    for d in read_file(path):
        where = f"{path}: {d['id']}"
        words, turns = len(d["story"].split()), len(d["questions"]["input_text"])
        if not 150 <= words <= 400:
            raise StudyError(f"{where}: the story has {words} words, expected 150 to 400")
        if not 8 <= turns <= 15:
            raise StudyError(f"{where}: {turns} turns, expected 8 to 15")
        if len({q.strip().lower() for q in d["questions"]["input_text"]}) != turns:
            raise StudyError(f"{where}: a question stands twice")
        if len(d["additional_answers"]) != 3:
            raise StudyError(f"{where}: {len(d['additional_answers'])} additional answer sets, expected 3")
        for columns in (d["answers"], *d["additional_answers"].values()):
            for turn, (start, end, span, text) in enumerate(
                zip(
                    columns["span_start"], columns["span_end"], columns["span_text"], columns["input_text"], strict=True
                ),
                1,
            ):
                if start == -1 and (span, text.lower()) != ("unknown", "unknown"):
                    raise StudyError(f"{where}, turn {turn}: no span, so the answer must be 'unknown', not '{text}'")
                if start != -1 and d["story"][start:end] != span:
                    raise StudyError(
                        f"{where}, turn {turn}: the story has '{d['story'][start:end]}' at the span, not '{span}'"
                    )


if __name__ == "__main__":
    try:
        for name in sys.argv[1:]:
            found = read_file(Path(name))
            print(f"{name}: {len(found)} dialogues, {sum(len(d['questions']['input_text']) for d in found)} questions")
    except StudyError as error:
        raise SystemExit(str(error)) from None
