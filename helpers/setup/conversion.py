"""Questions about stories in other layouts, as records of CoQA's format; `python -m helpers.setup.coqa convert`
writes them.

| layout | what is read |
|---|---|
| CSV (commas, semicolons, tabs) | columns by name: story, context or passage; question; answer, answer1, answer2 ... |
| FairytaleQA's X-questions.csv, or a folder of them | its columns, and X-story.csv beside it or in section-stories/ |
| SQuAD's JSON, nested or flat | context, question, answers; without an answer it is "unknown", CoQA's word |
| FriendsQA's JSON | utterances with their speakers as the story |

Questions that share a story become one dialogue. A question with fewer answers than another of its dialogue repeats its
first: lm-eval counts equal references once.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from helpers import StudyError

STORY = ("story", "context", "passage", "story_section", "paragraph", "article", "document", "text")
QUESTION = ("question", "question_text", "input_text", "query")
ANSWER = r"((correct|gold|reference)[_ ])?answers?([_ ]?text)?[_ -]?\d*"
NAMES = ("story_id", "story_name", "title")


def from_table(path: Path) -> tuple[list[dict], int]:
    """Records of a CSV file, or of all X-questions.csv in a folder, and how many rows lacked a story, question or
    answer.

    Raises StudyError if a column is missing, naming those that are there."""
    tables = sorted(path.rglob("*-questions.csv")) if path.is_dir() else [path]
    return _dialogues((row for table in tables for row in _rows(table)), path)


def from_json(records: list, path: Path) -> tuple[list[dict], int]:
    """Records of SQuAD-like JSON that was read from `path`, and how many questions were left out, as in
    `from_table`."""
    try:
        return _dialogues(_squad(records, path), path)
    except (AttributeError, KeyError, TypeError) as error:
        raise StudyError(f"{path}: neither SQuAD's layout nor FriendsQA's ({type(error).__name__}: {error})") from None


def _dialogues(rows: Iterable[tuple], path: Path) -> tuple[list[dict], int]:
    """(name, story, question, answers) grouped by story."""
    stories: dict[str, dict] = {}
    skipped = 0
    for name, story, question, answers in rows:
        answers = list(dict.fromkeys(a.strip() for a in answers if isinstance(a, str) and a.strip()))
        if not (answers and all(isinstance(text, str) and text.strip() for text in (story, question))):
            skipped += 1
            continue
        one = stories.setdefault(story, {"name": str(name or path.stem), "questions": [], "answers": []})
        one["questions"].append(question.strip())
        one["answers"].append(answers)
    if not stories:
        raise StudyError(f"{path}: no question with a story and an answer was found")
    names: Counter = Counter()
    records = []
    for story, one in stories.items():
        names[one["name"]] += 1
        number = "" if names[one["name"]] == 1 else f"-{names[one['name']]}"
        most = max(map(len, one["answers"]))
        first, *others = ([a[k] if k < len(a) else a[0] for a in one["answers"]] for k in range(most))
        turns = [
            [{"input_text": text, "turn_id": turn} for turn, text in enumerate(texts, 1)]
            for texts in (one["questions"], first, *others)
        ]
        record = {"id": one["name"] + number, "source": path.stem, "story": story}
        record |= {"questions": turns[0], "answers": turns[1]}
        records.append(record | {"additional_answers": {str(k): rows for k, rows in enumerate(turns[2:])}})
    return records, skipped


def _csv(path: Path) -> tuple[dict[str, str], list[dict]]:
    """Column names by their lower-case form, and rows."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read as UTF-8 text ({type(error).__name__})") from None
    csv.field_size_limit(2**31 - 1)  # a story may be long
    header = text.partition("\n")[0]
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    return {(name or "").strip().lower(): name for name in rows.fieldnames or []}, list(rows)


def _rows(path: Path) -> Iterable[tuple]:
    """(name, story, question, answers) of every row of a CSV file."""
    columns, rows = _csv(path)
    story, question, name = (
        next((columns[c] for c in wanted if c in columns), None) for wanted in (STORY, QUESTION, NAMES)
    )
    answers = [given for column, given in columns.items() if re.fullmatch(ANSWER, column)]
    sections = _sections(path) if "cor_section" in columns and not story else None
    wanted = {"story": (story or sections, STORY), "question": (question, QUESTION), "answer": (answers, ("answer",))}
    for what, (there, names) in wanted.items():
        if not there:
            said = f"no column for the {what}; call it {' or '.join(names[:3])} (there are: {', '.join(columns)})"
            raise StudyError(f"{path}: {said}")
    for row in rows:
        text, label = row.get(story), row.get(name)
        if sections is not None:
            numbers = [n.strip() for n in (row[columns["cor_section"]] or "").split(",")]
            text = "\n".join(sections.get(n, "") for n in numbers)
            label = path.name.removesuffix("-questions.csv") + "-" + "-".join(numbers)
        yield label, text, row.get(question), [row.get(a) for a in answers]


def _sections(path: Path) -> dict[str, str]:
    """The sections of a story of FairytaleQA, by number."""
    name = path.name.replace("-questions.csv", "-story.csv")
    places = [path.with_name(name), Path(str(path.parent).replace("/questions", "/section-stories")) / name]
    there = next((p for p in places if p.is_file()), None)
    if there is None:
        raise StudyError(f"{path}: its story is missing; put {name} beside it")
    return {row["section"].strip(): row["text"] for row in _csv(there)[1]}


def _squad(records: list, path: Path) -> Iterable[tuple]:
    """(name, story, question, answers) of every question of SQuAD's JSON, nested or flat, or of FriendsQA's."""
    for record in records:
        if "questions" in record and "story" in record:
            raise StudyError(f"{path}: in CoQA's format already; use it as it is")
        for part in record.get("paragraphs", [record]):
            story = next((part[key] for key in STORY if key in part), None)
            lines = part.get("utterances:") or part.get("utterances") or []  # FriendsQA's key has a colon
            story = story or "\n".join(f"{', '.join(one['speakers'])}: {one['utterance']}" for one in lines)
            for asked in part.get("qas", [part]):
                given = asked.get("answers", asked.get("answer"))
                given = given.get("text", []) if isinstance(given, dict) else given
                given = given if isinstance(given, list) else [given] if given is not None else []
                texts = [a.get("text", a.get("answer_text")) if isinstance(a, dict) else a for a in given]
                yield record.get("title"), story, asked["question"], texts or ["unknown"]
