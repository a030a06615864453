"""The paper's claims, each decided by a function of the tables.

params/paper.yaml says what the paper claims and reports; accuracy_claims, hardware_claims and weight_claims decide, one
function per claim. `judge(f)` returns a table, a row per claim: id, section, about, claim, reported (the paper's
numbers as text), verdict, direction, size, equality (the parts of a verdict that has them), all_turns and em (the same
question asked of all turns, and of exact match), evidence (a sentence with this study's numbers), kind and scope. What
is missing gives "cannot be decided" and says what was not measured.
"""

import pandas as pd

from helpers import StudyError, params
from helpers.analysis import accuracy_claims, contrasts, evidence, hardware_claims, weight_claims
from helpers.analysis.evidence import FAILS, HOLDS, OPEN, Facts, NotMeasured, Verdict
from helpers.analysis.frames import Frames

FILES = (accuracy_claims, hardware_claims, weight_claims)
CLAIMS = (
    "nf4_beats_full",
    "nf4_matches_full",
    "fp4_below_nf4",
    "fp4_below_full",
    "nf4_pareto",
    "fifty_give_direction",
    "equal_size",
    "size_reduction",
    "footprint_is_memory",
    "prefill_slower",
    "decode_slower",
    "throughput_lower",
    "dequantization_is_the_cause",
    "batch_recovers",
    "fp4_is_uniform",
    "nf4_is_optimal",
    "weights_are_normal",
    "noise_helps",
    "int8_cannot_run",
    "int8_is_fp8",
)


def rule(name: str):
    """The function that decides a claim."""
    return next(getattr(file, name) for file in FILES if hasattr(file, name))


def kind(facts: Facts, about: str, verdict: str, measured: bool) -> str:
    """What a verdict is worth against the paper: claims of different kinds are counted apart."""
    if not measured:
        return "not testable here"
    if about == "library":
        return {HOLDS: "confirmed", FAILS: "refuted"}.get(verdict, "open") + " whatever the model"
    if about == "hardware":
        return f"tested on {'the same architecture' if facts.same_architecture else 'another model'} and another card"
    return "tested on the paper's model" if facts.same_model else "tested on another model and data"


def scope(facts: Facts, about: str) -> str | None:
    """What to know beside a verdict: model, data and turns for accuracy, the card for hardware. None for the
    library."""
    f, paper = facts.f, facts.paper
    if about == "library":
        return None
    parts = []
    if not (facts.same_architecture if about == "hardware" else facts.same_model):
        parts.append(f"{f.study.model.name}, not the paper's {paper['model']}")
    if about != "hardware" and f.study.model.already_quantized:
        parts.append(f"full precision was quantized before ({f.study.model.already_quantized})")
    if about == "accuracy" and f.study.data and len(f.samples):
        sources = dict.fromkeys(source.source for source in f.study.sources)
        names = ["dialogues of this project, not CoQA" if name == "embedded" else name for name in sources]
        parts.append(f"last turns of {', '.join(names)}")
    if about == "hardware":
        cards = f.runs[f.runs.kind == "benchmark"].gpu.dropna().unique() if len(f.runs) else []
        parts.append(f"measured on {', '.join(cards) or 'a CPU'}; the paper used an {paper['device']}")
    return "; ".join(parts) or None


def reported_numbers(paper: dict) -> dict[str, float]:
    """What the templates in paper.yaml may name: differences of F1 in points, reductions in per cent, times as
    ratios."""
    rows = paper["configurations"]
    numbers = {f"{name}_f1": row["coqa_f1"] for name, row in rows.items()}
    numbers |= {f"{name}_mb": row["model_size_mb"] for name, row in rows.items()}
    times = {"prefill": ("prefill_ms", "128"), "decode": ("decode_ms_per_token", "1")}
    times |= {"throughput": ("throughput_tokens_per_second", "1")}
    numbers |= {f"nf4_{name}": rows["nf4"][key][at] / rows["fp16"][key][at] for name, (key, at) in times.items()}
    gains = {"nf4_gain": ("fp16", "nf4"), "fp4_to_nf4": ("nf4", "fp4"), "fp4_to_full": ("fp16", "fp4")}
    numbers |= {key: 100 * contrasts.reported_difference(paper, a, b, "coqa_f1") for key, (a, b) in gains.items()}
    return numbers | {"questions": paper["questions"], "reduction": 100 * paper["size_reduction"]}


def judge(f: Frames, paper: dict | None = None, designs: list[dict] | None = None) -> pd.DataFrame:
    """A row for each claim, in the paper's order. Raises StudyError if paper.yaml and this file name other claims."""
    paper = params.read_paper() if paper is None else paper
    named = [entry["id"] for entry in paper["claims"]]
    if sorted(named) != sorted(CLAIMS):
        odd = ", ".join(sorted(set(named) ^ set(CLAIMS))) or "an id twice"
        raise StudyError(
            f"paper.yaml and helpers/analysis/claims.py differ in {odd}; give each claim one entry and one function"
        )
    return judged(evidence.facts(f, paper, designs))


def judged(facts: Facts) -> pd.DataFrame:
    numbers, rows = reported_numbers(facts.paper), []
    for entry in facts.paper["claims"]:
        try:
            found, measured = rule(entry["id"])(facts), True
        except NotMeasured as missing:
            found, measured = Verdict(OPEN, str(missing)), False
        rows.append(
            {key: entry[key] for key in ("id", "section", "about", "claim")}
            | {"reported": entry["reported"].format(**numbers)}
            | found._asdict()
            | {"kind": kind(facts, entry["about"], found.verdict, measured), "scope": scope(facts, entry["about"])}
        )
    return pd.DataFrame(rows)
