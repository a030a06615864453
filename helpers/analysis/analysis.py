"""From result files to every number that the report and the README print.

`analyse(study)` reads what the configurations wrote, joins their answers question by question, and returns one JSON-able dict, which
04_analysis saves as executed/STUDY/analysis.json. Nothing is measured here.
"""

import json
from collections import Counter
from typing import NamedTuple

import numpy as np

from helpers import StudyError, params, results, statistics
from helpers.analysis import claims
from helpers.analysis.redraw import redraw
from helpers.params import Study

TASK = "coqa_turns"
METRICS = ("f1", "em")
DESIGN = 50  # questions in the paper


class Answers(NamedTuple):
    """The questions that every configuration answered. Arrays are in the same order throughout."""

    keys: list[tuple[str, int]]  # dialogue id, turn
    last: np.ndarray  # bool: the dialogue's last turn, which is what lm-eval's own task asks
    rows: dict[str, list[dict]]  # configuration -> lm-eval's samples
    scores: dict[str, dict[str, np.ndarray]]  # configuration -> metric -> (n,)

    @property
    def dialogues(self) -> list[str]:
        return [dialogue for dialogue, _ in self.keys]


def full_precision(found: dict) -> str | None:
    """The configuration that the others are compared with: the one that is not quantized."""
    for name, parts in found.items():
        for result in parts.values():
            if (result.provenance["configuration"] or {}).get("quantization", {}).get("method") == "none":
                return name
    return None


def labels(found: dict) -> dict[str, str]:
    """What tables and figures call each configuration."""
    return {name: next(iter(parts.values())).provenance["configuration"]["label"] for name, parts in found.items()}


def answers(study: Study, found: dict) -> Answers | None:
    """Join the samples of all finished evaluations; none if there is none. Raises StudyError if they have no question in common."""
    loaded = {}
    for name, parts in found.items():
        result = parts.get("evaluation")
        if result is None or result.status != "ok":
            continue
        file = result.data["tasks"][TASK]["samples"]
        rows = results.read_lines(results.folder(study) / name / file, result.data["files"][file])
        loaded[name] = {(str(row["doc"]["id"]), int(row["doc"]["turn"])): row for row in rows}
    if not loaded:
        return None
    first = next(iter(loaded.values()))
    keys = [key for key in first if all(key in rows for rows in loaded.values())]
    if not keys:
        raise StudyError(f"{', '.join(loaded)}: no question was answered by all; run make clean and make run-all again")
    rows = {name: [by_key[key] for key in keys] for name, by_key in loaded.items()}
    scores = {
        name: {m: np.array([row[m] for row in mine], dtype=float) for m in METRICS} for name, mine in rows.items()
    }
    return Answers(keys, np.array([row["doc"]["last_turn"] for row in rows[next(iter(rows))]]), rows, scores)


def prediction(row: dict) -> str:
    """What CoQA's metric reads of an answer: its first non-blank line."""
    return row["filtered_resps"][0].strip().split("\n")[0]


def _accuracy(study: Study, joined: Answers, full: str | None) -> dict:
    options = {"confidence": study.statistics.confidence, "resamples": study.statistics.resamples, "seed": study.seed}
    clusters = joined.dialogues
    means = statistics.intervals_all(joined.scores, clusters, list(METRICS), **options)
    comparisons = statistics.compare_all(joined.scores, clusters, list(METRICS), **options)
    last = {name: {m: v[joined.last] for m, v in scores.items()} for name, scores in joined.scores.items()}
    last_clusters = [c for c, is_last in zip(clusters, joined.last, strict=True) if is_last]
    return {
        "questions": len(joined.keys),
        "dialogues": len(set(clusters)),
        "means": means,
        "comparisons": comparisons,
        "last_turn": {
            "questions": len(last_clusters),
            "means": statistics.intervals_all(last, last_clusters, list(METRICS), **options),
            "comparisons": statistics.compare_all(last, last_clusters, list(METRICS), **options),
        },
        "flips": [_flips(joined, full, name) for name in joined.scores if full and name != full],
        "identical_answers": [_identical(joined, full, name) for name in joined.scores if full and name != full],
    }


def _flips(joined: Answers, full: str, name: str) -> dict:
    """Answers that are right (exact match above one half) on one side and wrong on the other."""
    before, after = joined.scores[full]["em"] > 0.5, joined.scores[name]["em"] > 0.5
    return {
        "configuration": name,
        "right_to_wrong": int((before & ~after).sum()),
        "wrong_to_right": int((~before & after).sum()),
        "questions": len(before),
    }


def _identical(joined: Answers, full: str, name: str) -> dict:
    same = sum(prediction(a) == prediction(b) for a, b in zip(joined.rows[full], joined.rows[name], strict=True))
    return {"configuration": name, "share": same / len(joined.keys)}


def _redraws(study: Study, joined: Answers, full: str | None, paper: dict) -> list[dict]:
    """The paper's 50-question design, drawn again from these results: last turns, and any turn of 50 dialogues."""
    if full is None or not {"nf4", "fp4"} <= set(joined.scores):
        return []
    reported = {k: v["coqa_f1"] for k, v in paper.items()}
    gain = round(reported["nf4"] - reported["fp16"], 4) if {"nf4", "fp16"} <= set(reported) else None
    lead = round(reported["nf4"] - reported["fp4"], 4) if {"nf4", "fp4"} <= set(reported) else None
    pairs = {
        (full, "nf4"): [gain] if gain else [],
        ("fp4", "nf4"): [lead] if lead else [],
        ("nf4", "fp4"): [],
        (full, "fp4"): [],
    }
    f1 = {name: scores["f1"] for name, scores in joined.scores.items()}
    options = {"order": ("nf4", full, "fp4"), "size": DESIGN, "draws": study.statistics.redraws, "seed": study.seed}
    last = {name: values[joined.last] for name, values in f1.items()}
    return [redraw(last, pairs, **options), redraw(f1, pairs, clusters=joined.dialogues, **options)]


def _needed(study: Study, joined: Answers, full: str | None) -> list[dict]:
    """How many dialogues would order each pair of formats, if the difference is what was measured here."""
    rows = []
    for a, b in ((full, "nf4"), (full, "fp4"), ("nf4", "fp4")):
        if a in joined.scores and b in joined.scores:
            x, y = joined.scores[a]["f1"], joined.scores[b]["f1"]
            if difference := float(y.mean() - x.mean()):
                rows.append({"a": a, "b": b} | statistics.needed(x, y, joined.dialogues, difference))
    return rows


def _kl_and_f1(study: Study, joined: Answers, found: dict, full: str | None) -> list[dict]:
    """Do the questions whose gold answer the weights' error disturbs most change their score most?"""
    rows = []
    for name, data in _ok(found, "fidelity").items():
        if name == full or name not in joined.scores or full not in joined.scores:
            continue
        kl = {(str(row["id"]), row["turn"]): row["kl"] for row in data["per_question"]}
        index = [i for i, key in enumerate(joined.keys) if key in kl]
        if len(index) < 2:
            continue
        change = np.abs(joined.scores[name]["f1"] - joined.scores[full]["f1"])[index]
        clusters = [joined.keys[i][0] for i in index]
        rows.append(
            {"configuration": name}
            | statistics.correlation([kl[joined.keys[i]] for i in index], change, clusters, seed=study.seed)
        )
    return rows


def _times(data: dict) -> dict:
    """A benchmark's times without their samples."""
    keys = (
        "mode",
        "tokens",
        "batch",
        *(f"{q}_{unit}" for unit in ("ms", "ms_per_token") for q in ("q25", "median", "q75")),
    )
    return {part: [{k: row[k] for k in keys if k in row} for row in data[part]] for part in ("prefill", "decode")}


def _failures(found: dict) -> list[dict]:
    return [
        {"configuration": name, "kind": kind, "status": result.status, "reason": result.reason}
        for name, parts in found.items()
        for kind, result in parts.items()
        if result.status != "ok"
    ]


def _ok(found: dict, kind: str) -> dict[str, dict]:
    return {name: parts[kind].data for name, parts in found.items() if kind in parts and parts[kind].status == "ok"}


def _examples(joined: Answers, full: str | None, limit: int = 8) -> list[dict]:
    """Questions whose exact match flips between full precision and another configuration, the largest changes of F1 first."""
    if full is None:
        return []
    rows = []
    for name, scores in joined.scores.items():
        change = scores["f1"] - joined.scores[full]["f1"]
        for i in np.argsort(-np.abs(change), kind="stable")[:limit] if name != full else []:
            if change[i] == 0:
                continue
            doc = joined.rows[full][i]["doc"]
            rows.append(
                {
                    "configuration": name,
                    "dialogue": joined.keys[i][0],
                    "turn": joined.keys[i][1],
                    "question": doc["question"],
                    "gold": doc["references"][0],
                    "full": prediction(joined.rows[full][i])[:200],
                    "quantized": prediction(joined.rows[name][i])[:200],
                    "change": float(change[i]),
                }
            )
    return rows


def _stock(study: Study) -> dict:
    """What bench-eval measured of stock lm-eval and hf-dialogue on every turn, by configuration; empty where it was not run."""
    path = results.folder(study) / "bench_eval.json"
    if not path.is_file():
        return {}
    try:
        tasks = {name: found["tasks"][TASK] for name, found in json.loads(path.read_text())["configurations"].items()}
        return {
            name: {
                "questions": row["stock"]["questions"],
                "stock_seconds_per_question": row["stock"]["seconds_per_question"],
                "ratio": row["ratio"],
                "identical": row["identical_share"],
            }
            for name, row in tasks.items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(
            f"{path}: not what bench-eval writes ({type(error).__name__}); run make bench-eval again, or delete it"
        ) from None


def analyse(study: Study) -> dict:
    """All numbers of the report, from the result files of `study`. Raises StudyError if there is none."""
    found, again = results.read_all(study), results.read_again(study)
    full = full_precision(found)
    paper = params.read_paper()
    numbers: dict = {
        "study": study.study,
        "title": study.title,
        "model": study.model.name,
        "already_quantized": study.model.already_quantized,
        "paper_model": paper["model"],
        "is_paper_model": study.study == paper["study"],
        "same_architecture": study.study.startswith(paper["study"]),
        "paper": paper["configurations"],
        "full": full,
        "labels": labels(found),
        "failures": _failures(found),
        "benchmark": _ok(found, "benchmark"),
        "again": {name: _times(result.data) for name, result in again.items() if result.status == "ok"},
        "fidelity": _ok(found, "fidelity"),
        "stock": _stock(study),
        "evaluation": {
            name: {k: v for k, v in data.items() if k != "files"} for name, data in _ok(found, "evaluation").items()
        },
        "provenance": [
            {"configuration": name, "kind": kind}
            | {k: v for k, v in result.provenance.items() if k not in ("study", "configuration")}
            for name, parts in found.items()
            for kind, result in (*parts.items(), *([("benchmark, again", again[name])] if name in again else []))
        ],
    }
    joined = answers(study, found)
    if joined is not None:
        numbers |= _accuracy(study, joined, full)
        numbers["redraw"] = _redraws(study, joined, full, paper["configurations"])
        numbers["needed"] = _needed(study, joined, full)
        numbers["kl_and_f1"] = _kl_and_f1(study, joined, found, full)
        numbers["examples"] = _examples(joined, full)
        numbers["answers"] = {
            name: Counter("empty" if not prediction(r) else "given" for r in rows) for name, rows in joined.rows.items()
        }
    numbers["claims"] = claims.judge(numbers)
    return numbers
