"""Dialogues in CoQA's format (Reddy et al., 2019, https://stanfordnlp.github.io/coqa/): read, check, convert.

    dialogues = coqa.read_all(study)           # of all the study's sources
    python -m helpers.setup.coqa FILE          # what is right and what is wrong with a file
    python -m helpers.setup.coqa convert FILE OUT.json       # from CSV or SQuAD-like JSON

A dialogue gets the shape of the hub's EleutherAI/coqa: `id`, `source` (its domain), `story`, `questions` and `answers`
as columns `input_text` and `turn_id` (from 1), `additional_answers` as such columns by annotator. A file needs story,
questions and answers, as rows, columns or plain strings: CoQA's JSON, a list of records, one alone or one a line.

Sources: `embedded` (the project's own dialogues, CC0), `embedded-held-out` (for calibration, never evaluated), a data
set of the hub (OWNER/NAME), or a path.
"""

import json
import math
import re
import sys
from collections import Counter
from itertools import chain, zip_longest
from pathlib import Path
from statistics import mean

from helpers import ROOT, StudyError, results
from helpers.params import Data, Study
from helpers.setup import conversion, hub

EMBEDDED = ROOT / "helpers" / "tasks" / "dialogues"
HELD_OUT = "held_out.json"
CONVERT = "`python -m helpers.setup.coqa convert FILE OUT.json` makes one from CSV or SQuAD-like JSON"
SHOWN = 12  # problems that the check of a file lists


def read(source: str, dialogues: int | None = None, revision: str | None = None, split="validation") -> list[dict]:
    """The first `dialogues` of a source (none: all); embedded ones alternate between domains. Raises StudyError that
    names file, record and field, or what the hub wants."""
    if source == "embedded":
        files = [read_file(path) for path in sorted(EMBEDDED.glob("*.json")) if path.name != HELD_OUT]
        found = [d for d in chain.from_iterable(zip_longest(*files)) if d is not None]
    elif source == "embedded-held-out":
        found = read_file(EMBEDDED / HELD_OUT)
    elif hub.is_hub_data(source):
        found = _from_hub(source, revision, split)
    else:
        found = read_file(ROOT / Path(source).expanduser())
    if dialogues is not None and dialogues > len(found):
        said = f"{dialogues} asked for, but {source} has {len(found)}; ask for at most that many"
        raise StudyError(f"data.dialogues: {said}")
    return found[:dialogues]


def read_sources(sources: list[Data], at_most: int | None = None) -> list[dict]:
    """The dialogues of several sources, `at_most` so many of each, with `data_set`, the source's name, which begins
    every id where there are several. Raises StudyError, as `read` does."""
    found = []
    for data in sources:
        prefix = f"{data.name}/" if len(sources) > 1 else ""
        for dialogue in read(data.source, data.dialogues, data.revision)[:at_most]:
            found.append(dialogue | {"data_set": data.name, "id": prefix + dialogue["id"]})
    return found


def read_all(study: Study, at_most: int | None = None) -> list[dict]:
    """The dialogues of all sources of a study (`read_sources`); empty for a study of hardware only."""
    return read_sources(study.sources, at_most)


def describe(study: Study) -> dict | None:
    """What a study asks: dialogues, questions, and `data_sets`, a row per domain of each source: name, source (a file
    without its folder), revision, licence, domain, dialogues, questions, story_words_mean. None: hardware only."""
    groups: dict[tuple, list] = {}
    for dialogue in read_all(study):
        groups.setdefault((dialogue["data_set"], dialogue["source"]), []).append(dialogue)
    rows, sources = [], {data.name: data for data in study.sources}
    for (name, domain), mine in groups.items():
        data = sources[name]
        source = data.source if hub.is_hub_data(data.source) else Path(data.source).name
        row = {"name": name, "source": source, "revision": data.revision}
        row |= {"licence": data.licence or ("CC0 1.0" if source == "embedded" else None), "domain": domain}
        row |= {"dialogues": len(mine), "questions": sum(len(d["questions"]["input_text"]) for d in mine)}
        rows.append(row | {"story_words_mean": round(mean(len(d["story"].split()) for d in mine), 1)})
    total = {key: sum(row[key] for row in rows) for key in ("dialogues", "questions")}
    return total | {"data_sets": rows} if rows else None


# ---- reading ----


def _from_hub(name: str, revision: str | None, split: str) -> list[dict]:
    from datasets import load_dataset  # takes seconds, and only hub data needs it

    folder = hub.snapshot(name, revision, "dataset")
    where, remedy = f"data.source: {name} ({folder.name[:8]}), split '{split}'", "name a data set in CoQA's format"
    try:
        rows = load_dataset(str(folder), split=split).to_list()
    except Exception as error:  # the library raises its own errors, pyarrow's and plain ValueErrors
        raise StudyError(f"{where}: could not be read ({results.first_line(error)}); {remedy}") from error
    return _sound(*_dialogues(rows, where, name.rpartition("/")[2]), remedy)


def read_file(path: Path) -> list[dict]:
    """All dialogues of one file, checked. Raises StudyError naming file, record and field."""
    more = f"`python -m helpers.setup.coqa {path}` lists all that is wrong"
    return _sound(*_dialogues(_records(path), str(path), Path(path).stem), more)


def _sound(found: list[dict], problems: list[str], more: str) -> list[dict]:
    if problems:
        raise StudyError(problems[0] + (f" (and {len(problems) - 1} more; {more})" if len(problems) > 1 else ""))
    return found


def _records(path: Path) -> list:
    """The records of a JSON or JSONL file, told apart by what they hold."""
    values, decode, blank = [], json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n]*")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        end = blank.match(text).end()
        while not values or end < len(text):  # not by lines: JSON strings may hold Unicode's other line separators
            value, end = decode(text, end)
            values.append(value)
            end = blank.match(text, end).end()
    except OSError as error:
        said = f"cannot be read ({error.strerror}); data.source is embedded, OWNER/NAME of the hub, or a file"
        raise StudyError(f"{path}: {said}") from None
    except UnicodeDecodeError:
        raise StudyError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise StudyError(f"{path}, line {error.lineno}: not JSON: {error.msg}; {CONVERT}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits; thousands of brackets
        raise StudyError(f"{path}: not JSON that can be read: a number too long, or brackets too deep") from None
    records = values[0] if len(values) == 1 else values
    if isinstance(records, dict):
        records = records["data"] if isinstance(records.get("data"), list) else [records]
    if not isinstance(records, list) or not records:
        raise StudyError(
            f"{path}: holds no dialogue; expected CoQA's {{'data': [...]}}, a list of records, or one a line"
        )
    return records


def _dialogues(records: list, where: str, name: str) -> tuple[list[dict], list[str]]:
    """What can be read of the records, and a sentence for each that cannot."""
    found, problems = [], []
    for number, record in enumerate(records, 1):
        given = record.get("id") if isinstance(record, dict) else None
        label = "no id" if given is None else str(given)[:60] if str(given).isprintable() else repr(given)[:60]
        try:
            found.append(_dialogue(record, f"{name}-{number}", name))
        except StudyError as error:
            problems.append(f"{where}: record {number} ({label}): {error}")
    for what, count in Counter(d["id"] for d in found).items():
        if count > 1:
            problems.append(f"{where}: id '{what}' stands {count} times; every dialogue needs its own, or none")
    return found, problems


def _dialogue(record, number: str, name: str) -> dict:
    """One record in the shape of this module. Raises StudyError naming the field and turn."""
    if not isinstance(record, dict):
        raise StudyError(f"expected an object, found {type(record).__name__}")
    for field in ("story", "questions", "answers"):
        if record.get(field) in (None, "", [], {}):
            squad = (
                f"; it looks like SQuAD's layout: {CONVERT}" if {"paragraphs", "context", "qas"} & set(record) else ""
            )
            raise StudyError(f"field '{field}' is missing or empty{squad}")
    questions, ids = _turns(record["questions"], "field 'questions'")
    sets = {"answers": record["answers"]}
    sets |= {f"additional_answers.{k}": v for k, v in _annotators(record.get("additional_answers")).items()}
    numbers, columns = list(range(1, len(questions) + 1)), {}
    for field, given in sets.items():
        texts, turn_ids = _turns(given, f"field '{field}'")
        if len(texts) != len(questions):
            raise StudyError(f"field '{field}': {len(texts)} answers to {len(questions)} questions")
        if ids and turn_ids and [i - ids[0] for i in ids] != [i - turn_ids[0] for i in turn_ids]:
            raise StudyError(f"field '{field}': its turn_ids are not those of the questions")
        columns[field.partition(".")[2]] = {"input_text": texts, "turn_id": numbers}
    given = record.get("id")
    return {
        "id": number if given in (None, "") else _label(given, "field 'id'"),
        "source": _label(record.get("source") or name, "field 'source'"),
        "story": _text(record["story"], "field 'story'"),
        "questions": {"input_text": questions, "turn_id": numbers},
        "answers": columns.pop(""),
        "additional_answers": columns,
    }


def _annotators(given) -> dict:
    """Further answers by annotator: an object of them, a list of them, or one annotator's alone."""
    if isinstance(given, dict):
        given = {"0": given} if "input_text" in given else given
    elif isinstance(given, list):
        several = all(not one or isinstance(one, list) or (isinstance(one, dict) and _is_column(one)) for one in given)
        given = {str(n): one for n, one in enumerate(given)} if several else {"0": given}
    elif given is not None:
        raise StudyError(f"field 'additional_answers': expected an object of annotators, found {type(given).__name__}")
    return {k: v for k, v in (given or {}).items() if v and not (isinstance(v, dict) and not v.get("input_text", 1))}


def _is_column(given: dict) -> bool:
    return isinstance(given.get("input_text"), list)


def _turns(given, where: str) -> tuple[list[str], list[int] | None]:
    """Texts and turn_ids (None if there are none) of rows (CoQA's files), columns (the hub's) or plain strings."""
    if isinstance(given, dict):
        if not _is_column(given):
            raise StudyError(f"{where}: 'input_text' is missing or no list")
        texts, ids = given["input_text"], given.get("turn_id") or [None] * len(given["input_text"])
        if not isinstance(ids, list) or len(ids) != len(texts):
            raise StudyError(f"{where}: columns of unequal length")
    elif isinstance(given, list):
        rows = [row if isinstance(row, dict) else {"input_text": row} for row in given]
        for turn, row in enumerate(rows, 1):
            if "input_text" not in row:
                raise StudyError(f"{where}, turn {turn}: 'input_text' is missing")
        texts, ids = [row["input_text"] for row in rows], [row.get("turn_id") for row in rows]
    else:
        raise StudyError(f"{where}: expected a list, found {type(given).__name__}")
    texts = [_text(text, f"{where}, turn {turn}") for turn, text in enumerate(texts, 1)]
    if all(i is None for i in ids):
        return texts, None
    before = -math.inf
    for turn, turn_id in enumerate(ids, 1):
        if isinstance(turn_id, bool) or not re.fullmatch(r"\d{1,9}", str(turn_id), re.ASCII):
            raise StudyError(f"{where}, turn {turn}: 'turn_id' is {turn_id!r}, expected a number")
        if int(turn_id) <= before:
            raise StudyError(f"{where}, turn {turn}: 'turn_id' is {turn_id} after {before}; write the turns in order")
        before = int(turn_id)
    return texts, [int(i) for i in ids]


def _text(given, where: str) -> str:
    if isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given):
        given = str(given)
    if not isinstance(given, str):
        raise StudyError(f"{where}: expected text, found {'null' if given is None else type(given).__name__}")
    if re.search("[\ud800-\udfff]", given):
        raise StudyError(f"{where}: holds half of a character (a lone surrogate); save the text again as UTF-8")
    return given


def _label(given, where: str) -> str:
    """Text of one line: it goes into tables and onto terminals."""
    text = _text(given, where)
    if not text.isprintable():
        raise StudyError(f"{where}: {text!r} holds control characters")
    return text


# ---- the command line ----


def report(path: Path) -> bool:
    """Print what is right and wrong with a file; true if it can be used. Raises StudyError if it can't be read."""
    found, problems = _dialogues(_records(path), str(path), Path(path).stem)
    if found:
        turns = [len(d["questions"]["input_text"]) for d in found]
        words = [len(d["story"].split()) for d in found]
        references = [1 + len(d["additional_answers"]) for d in found]
        print(f"{path}: {len(found):,} dialogues, {sum(turns):,} questions")
        print(f"  questions in a dialogue {min(turns)} to {max(turns)}; words in a story {min(words)} to {max(words)}")
        print(f"  answers to a question {min(references)} to {max(references)}; one or more are needed")
        domains = Counter(d["source"] for d in found)
        print(f"  domains: {', '.join(f'{name} {count}' for name, count in domains.most_common(8))}")
        for what, columns in {"questions": "questions", "first answers": "answers"}.items():
            if empty := sum(not text.strip() for d in found for text in d[columns]["input_text"]):
                print(f"  {empty} empty {what}")
        same = len(found) - len({d["story"] for d in found})
        print(f"  {same} dialogues share a story with another" if same else "  every story stands once")
    for problem in problems[:SHOWN]:
        print(f"WRONG: {problem}")
    if len(problems) > SHOWN:
        print(f"WRONG: and {len(problems) - SHOWN} more")
    print("it cannot be used yet" if problems else f"use it: data: {{source: {path}}}")
    return not problems


def convert(source: Path, target: Path) -> None:
    """Write CoQA's JSON from what `conversion` knows. Raises StudyError if it can't, or if `target` is there."""
    if target.exists():
        raise StudyError(f"{target} is there already; name another file, or remove it first")
    given = _records(source) if source.suffix.lower() in (".json", ".jsonl", ".ndjson") else None
    records, skipped = conversion.from_table(source) if given is None else conversion.from_json(given, source)
    _sound(*_dialogues(records, str(source), source.stem), "put these right first")
    target.write_text(json.dumps({"version": "1.0", "data": records}, ensure_ascii=False, indent=1), encoding="utf-8")
    if skipped:
        print(f"{skipped} questions left out: no story, no question or no answer")


def main(argv: list[str]) -> None:
    if not argv or (argv[0] == "convert" and len(argv) != 3):
        raise SystemExit("usage: python -m helpers.setup.coqa FILE ...   or   convert FILE OUT.json")
    try:
        if argv[0] == "convert":
            convert(Path(argv[1]), Path(argv[2]))
            argv = argv[2:]
        usable = [report(Path(name)) for name in argv]
    except StudyError as error:
        raise SystemExit(str(error)) from None
    raise SystemExit(not all(usable))


if __name__ == "__main__":
    main(sys.argv[1:])
