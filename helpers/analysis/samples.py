"""What the models said: samples.html, and the same as JSON for Google PAIR's LLM Comparator.

    python -m helpers.analysis.samples executed/STUDY                  -> executed/STUDY/samples.html
    python -m helpers.analysis.samples executed/STUDY --pair fp16 nf4  -> executed/STUDY/llm_comparator_fp16_nf4.json

samples.html needs no network. The part after # chooses what it opens with, so that a report can link to one answer:
    samples.html#a=fp16&b=nf4&flip=lost            right with A, wrong with B (also gained, both, neither, text)
    samples.html#a=fp16&b=nf4&q=DATA_SET/DIALOGUE/TURN
"""

import argparse
import json
import math
from pathlib import Path

import jinja2
import markupsafe

from helpers import ROOT, StudyError, results
from helpers.analysis import frames
from helpers.analysis.frames import KEYS, Frames

TEMPLATES = ROOT / "notebooks" / "template"


def environment() -> jinja2.Environment:
    """Jinja over notebooks/template: values are escaped, `raw(name)` is a file's own text (CSS, JavaScript)."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    made.globals["raw"] = lambda name: markupsafe.Markup((TEMPLATES / name).read_text(encoding="utf-8"))
    return made


def in_script(value) -> markupsafe.Markup:
    """JSON that may stand in a script element: without `<` nothing can end it."""
    return markupsafe.Markup(json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"))


def _text(value) -> str | None:
    return value if isinstance(value, str) else None  # pandas keeps None in a column of text as NaN


def _finite(values) -> list:
    return [None if v is None or not math.isfinite(v) else round(float(v), 4) for v in values]


def stories(f: Frames) -> dict:
    """(data set, dialogue) -> its story, read from one configuration's samples; empty if the results hold no texts."""
    name = next(iter(f.samples.configuration), None)
    source = results.folder(f.study) / str(name)
    if name is None:
        return {}
    data = results.read(source / "evaluation.json").data
    file = data["tasks"][frames.TASK]["samples"]
    found = {}
    for row in results.read_lines(source / file, data["files"][file]):
        doc = row["doc"]
        key = doc.get("data_set", "dialogues"), str(doc["id"])
        text, question = doc.get("text"), doc.get("question")
        if text and question and int(doc["turn"]) == 1:  # nothing but the story stands before its first question
            found[key] = text.split(f"\n\nQ: {question}")[0]
    return found


def collect(f: Frames, texts: dict | None = None) -> dict:
    """What samples.html reads.

    study; configurations ({name, label}), in order; full (index, or None); dialogues ({set, id, domain, story});
    questions ({d: index of its dialogue, turn, last, question, references, and lists over configurations: said, f1,
    right, kl}). What is missing is None. Raises StudyError if no configuration has answers.
    """
    if f.samples.empty:
        raise StudyError(f"{f.study.study}: this study has no answers to show; run make run-all with a data set first")
    texts = stories(f) if texts is None else texts
    columns = {c: f.wide(c) for c in ("prediction", "f1", "right", "kl")}
    names = list(columns["f1"])
    one = f.samples[f.samples.configuration == names[0]].set_index(KEYS)
    if one.question.isna().all():  # results without texts: two answers are the same, or they are not
        columns["prediction"] = columns["prediction"].map(lambda answer: f"#{str(answer)[:6]}")
    first = one.groupby(level=["data_set", "dialogue"], sort=False).domain.first()
    place = {key: i for i, key in enumerate(first.index)}
    dialogues = [
        {"set": key[0], "id": key[1], "domain": _text(domain), "story": texts.get(key)} for key, domain in first.items()
    ]
    rows = zip(one.itertuples(), *(table.loc[one.index].to_numpy() for table in columns.values()))
    questions = [
        {"d": place[row.Index[:2]], "turn": int(row.Index[2]), "last": bool(row.last_turn)}
        | {"question": _text(row.question), "said": [_text(text) for text in said], "f1": _finite(f1)}
        | {"references": row.references if isinstance(row.references, list) else None}
        | {"right": [bool(v) for v in right], "kl": _finite(kl)}
        for row, said, f1, right, kl in rows
    ]
    head = {"study": f.study.title, "configurations": [{"name": name, "label": f.label(name)} for name in names]}
    head |= {"full": names.index(f.full) if f.full in names else None}
    return head | {"dialogues": dialogues, "questions": questions}


def page(data: dict) -> str:
    """samples.html of what `collect` gives."""
    texts = any(q["question"] for q in data["questions"])
    return environment().get_template("samples.html.j2").render(study=data["study"], data=in_script(data), texts=texts)


def comparator(data: dict, a: str, b: str) -> dict:
    """The file format of https://github.com/PAIR-code/llm-comparator (README, JSON Data Format).

    Its score runs from 1.5 (A is better) to -1.5: here F1 of A minus F1 of B, times 1.5. Raises StudyError for a
    configuration without answers or results without texts.
    """
    names = [c["name"] for c in data["configurations"]]
    if missing := [name for name in (a, b) if name not in names]:
        raise StudyError(f"{missing[0]}: has no answers in this study; choose A and B from {', '.join(names)}")
    if not any(q["question"] for q in data["questions"]):
        raise StudyError(f"{data['study']}: these results hold no texts; evaluate again to compare answers")
    pair = [names.index(a), names.index(b)]
    fields = {"f1": "per_model_number", "right": "per_model_boolean", "kl_from_full": "per_model_number"}
    fields |= {"references": "text", "turn": "number", "last_turn": "category", "data_set": "category", "id": "string"}
    examples = []
    for q in data["questions"]:
        dialogue = data["dialogues"][q["d"]]
        f1, kl = ([q[key][i] for i in pair] for key in ("f1", "kl"))
        own = {"f1": f1, "right": [q["right"][i] for i in pair], "kl_from_full": kl}
        own |= {"references": "\n".join(q["references"] or []), "turn": q["turn"]}
        own |= {"last_turn": "last" if q["last"] else "earlier", "data_set": dialogue["set"]}
        own |= {"id": f"{dialogue['set']}/{dialogue['id']}/{q['turn']}"}
        said = {f"output_text_{side}": q["said"][i] or "" for side, i in zip("ab", pair)}
        said |= {"input_text": "\n\n".join(filter(None, (dialogue["story"], f"Q: {q['question']}")))}
        said |= {"tags": [dialogue["domain"]] if dialogue["domain"] else [], "individual_rater_scores": []}
        examples.append(said | {"score": round(1.5 * (f1[0] - f1[1]), 4), "custom_fields": own})
    schema = [{"name": name, "type": kind} for name, kind in fields.items()]
    models = [{"name": data["configurations"][i]["label"]} for i in pair]
    metadata = {"source_path": data["study"], "custom_fields_schema": schema}
    return {"metadata": metadata, "models": models, "examples": examples}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m helpers.analysis.samples")
    parser.add_argument("folder")
    parser.add_argument("--pair", nargs=2, metavar=("A", "B"))
    given = parser.parse_args()
    try:
        f = frames.load(given.folder)
        data, target = collect(f), Path(given.folder)
        if given.pair:
            target /= f"llm_comparator_{'_'.join(given.pair)}.json"
            results.write_json(target, comparator(data, *given.pair))
        else:
            target /= "samples.html"
            results.write_text(target, page(data))
    except StudyError as error:
        raise SystemExit(str(error)) from None
    print(target)


if __name__ == "__main__":
    main()
