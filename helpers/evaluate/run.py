"""One configuration's answers: lm-eval over every turn of every dialogue, and over any further tasks of lm-eval's.

    found = run.evaluate(study, loaded)
    run.save(study, configuration, loaded, found)

The stock `coqa` score is the last-turn subset of the same samples; it is reported beside the score of all turns.
"""

import hashlib
import math
import time

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from helpers import ROOT, StudyError, results
from helpers.evaluate.hf_dialogue import CPU_CONTEXTS, HFDialogue
from helpers.params import Configuration, Study
from helpers.setup.models import Loaded
from helpers.statistics import RIGHT

TASKS = ROOT / "helpers" / "tasks"
DIALOGUES = "coqa_turns"
LAST_TURNS = "coqa_last_turns"
PARTS = ("results", "samples", "configs", "versions", "n-shot", "higher_is_better")


def model(study: Study, loaded: Loaded) -> HFDialogue:
    """The loaded model as lm-eval sees it. CoQA's metric reads one line, so a row may stop at the end of its line."""
    settings = study.evaluation
    batch = (
        {"batch_size": settings.batch_size, "max_slots": settings.batch_size}
        if settings.batch_size
        else {"contexts": CPU_CONTEXTS}
    )
    return HFDialogue(pretrained=loaded.model, tokenizer=loaded.tokenizer, answer_line=True, **batch)


def evaluate(study: Study, loaded: Loaded) -> dict:
    """Put every question to the model. Returns lm-eval's results with `samples`, `seconds` (without loading)
    and `engine` (hf-dialogue's report on the dialogues, and under `tasks` on all further tasks, with
    `failed`: task -> why it has no scores).

    Raises StudyError if a further task's name is unknown to lm-eval, before anything is asked.
    """
    lm = model(study, loaded)
    metadata = {"sources": [data.model_dump() for data in study.sources]}
    own = study.evaluation.include_path
    paths = [str(TASKS), *([str(ROOT / own)] if own else [])]  # a relative one is of the project, as all paths are
    manager = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
    if set(study.evaluation.tasks) - set(manager.all_tasks):  # lm-eval's own are 10,000 files to look through
        manager = TaskManager(include_path=paths, metadata=metadata)
    if unknown := [name for name in study.evaluation.tasks if name not in set(manager.all_tasks)]:
        remedy = "`python -m lm_eval ls tasks` lists them"
        raise StudyError(f"evaluation.tasks: lm-eval has no task '{unknown[0]}'; {remedy}")
    common = {
        "model": lm,
        "task_manager": manager,
        "log_samples": True,
        "bootstrap_iters": 0,
        "random_seed": study.seed,
        "metadata": metadata,
    }
    start = time.perf_counter()
    found = simple_evaluate(tasks=[DIALOGUES], gen_kwargs={"max_gen_toks": study.evaluation.max_gen_toks}, **common)
    seconds, engine = time.perf_counter() - start, lm.report()
    if study.evaluation.tasks:
        lm.reset_report()
        lm.answer_line = False  # their metrics may read beyond the first line
        options, failed = common | {"metadata": None, "limit": study.evaluation.limit}, {}
        for task in study.evaluation.tasks:
            more = results.or_reason(simple_evaluate, tasks=[task], **options)
            if "results" not in more:
                failed[task] = more["reason"]
                continue
            for part in PARTS:
                found[part] |= more[part]
        engine["tasks"] = lm.report() | ({"failed": failed} if failed else {})
    return found | {"seconds": seconds, "engine": engine}


def floor(study: Study, loaded: Loaded, found: dict) -> dict:
    """What sharing a batch changes by itself: the same dialogues again, one at a time. Shares of the questions
    (same_text, right_to_wrong, wrong_to_right) and the mean change of F1 (f1_difference, 0 to 1).
    """
    alone = study.evaluation.model_copy(update={"batch_size": 1, "tasks": []})
    again = evaluate(study.model_copy(update={"evaluation": alone}), loaded)["samples"][DIALOGUES]
    second = {row["doc_id"]: row for row in again}
    pairs = [(row, second[row["doc_id"]]) for row in found["samples"][DIALOGUES]]
    right = [(a["em"] >= RIGHT, b["em"] >= RIGHT) for a, b in pairs]
    return {
        "same_text": sum(a["filtered_resps"] == b["filtered_resps"] for a, b in pairs) / len(pairs),
        "right_to_wrong": right.count((True, False)) / len(pairs),
        "wrong_to_right": right.count((False, True)) / len(pairs),
        "f1_difference": mean(again, "f1") - mean(found["samples"][DIALOGUES], "f1"),
    }


def last_turns(samples: list[dict]) -> list[dict]:
    """The questions that lm-eval's own CoQA task asks."""
    return [row for row in samples if row["doc"]["last_turn"]]


def measure_answers(samples: list[dict], tokenizer, limit: int) -> None:
    """Add to each sample answer_tokens (of its first line, which is scored) and hit_limit (no end within `limit`)."""
    for row in samples:
        answer = row["resps"][0][0]
        row["answer_tokens"] = len(tokenizer(answer, add_special_tokens=False).input_ids)
        row["hit_limit"] = row["answer_tokens"] >= limit


def slim(row: dict) -> dict:
    """A sample without its prompt: lm-eval's `arguments` and `doc.text` both hold it, longer with every turn, and three
    hashes speak of it; `target` is `doc.references` again. A dialogue's first row keeps `doc.text`, which is the story.
    """
    doc = {k: v for k, v in row["doc"].items() if k != "text" or row["doc"].get("turn", 1) == 1}
    left_out = ("arguments", "doc_hash", "prompt_hash", "target_hash", "target")
    return {key: value for key, value in row.items() if key not in left_out} | {"doc": doc}


def without_texts(row: dict) -> dict:
    """A sample for results that may not hold their data's texts: ids, scores, lengths, part of the answer's hash."""
    doc = {key: row["doc"].get(key) for key in ("id", "data_set", "source", "turn", "last_turn")}
    kept = {key: value for key, value in row.items() if isinstance(value, (bool, int, float))}
    answer = row["filtered_resps"][0]
    line = answer.strip().split("\n")[0] if isinstance(answer, str) else str(answer)  # multiple choice: scores
    return kept | {"doc": doc, "answer_sha256": hashlib.sha256(line.encode()).hexdigest()[:16]}


def mean(samples: list[dict], metric: str) -> float:
    return sum(row[metric] for row in samples) / len(samples)


def _scores(values: dict) -> dict:
    """lm-eval's `f1,none` and `f1_stderr,none` as f1 and f1_stderr; what is no finite number (an alias, N/A) left
    out."""
    finite = {k: v for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}
    return {key.split(",")[0]: value for key, value in finite.items() if "," in key}


def _finite(value):
    """JSON has no NaN: its name stands there instead."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def save(study: Study, configuration: Configuration, loaded: Loaded, found: dict) -> results.Result:
    """Write samples and results in lm-eval's formats, and this project's evaluation.json."""
    folder = results.path(study, configuration, "evaluation").parent
    tasks, files = {}, {}
    measure_answers(found["samples"][DIALOGUES], loaded.tokenizer, study.evaluation.max_gen_toks)
    for name, samples in found["samples"].items():
        file = f"samples_{name}.jsonl"
        kept = list(map(slim if study.evaluation.samples_text else without_texts, samples))
        files[file] = results.write_lines(folder / file, kept)
        tasks[name] = _scores(found["results"][name]) | {"samples": file, "questions": len(samples)}
    samples = found["samples"][DIALOGUES]
    last = last_turns(samples)
    tasks[LAST_TURNS] = {metric: mean(last, metric) for metric in ("f1", "em")} | {
        "questions": len(last),
        "of": DIALOGUES,
    }
    kept = {k: found[k] for k in PARTS if k != "samples"}
    kept["results"] = {name: {k: _finite(v) for k, v in row.items()} for name, row in kept["results"].items()}
    results.write_json(folder / "lm_eval.json", kept, paths=False)  # lm-eval notes where a task's file lies
    data = {
        "tasks": tasks,
        "files": files,
        "questions": len(samples),
        "dialogues": len({row["doc"]["id"] for row in samples}),
        "seconds": found["seconds"],
        "engine": found["engine"],
        "floor": found.get("floor"),
        "loading": loaded.info,
    }
    return results.write(study, configuration, "evaluation", data)
