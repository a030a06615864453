"""The paper's claims, each decided by a function of the tables.

params/paper.yaml says what the paper claims and reports; accuracy_claims, hardware_claims and weight_claims decide, one
function per claim. `judged(facts)` returns a table, a row per claim: id, section, about, claim, reported (the paper's
numbers as text), verdict, direction, size, equality (the parts of a verdict that has them), all_turns and em (the same
question asked of all turns, and of exact match), evidence (a sentence with this study's numbers), kind and scope. What
is missing gives "cannot be decided" and says what was not measured.
"""

import pandas as pd

from helpers import StudyError
from helpers.analysis import accuracy_claims, contrasts, hardware_claims, sentences, weight_claims
from helpers.analysis.evidence import OPEN, Facts, NotMeasured, Verdict

CLAIMS = {
    name: rule
    for file in (accuracy_claims, hardware_claims, weight_claims)
    for name, rule in vars(file).items()
    if getattr(rule, "__module__", None) == file.__name__ and not name.startswith("_")
}


def kind(facts: Facts, about: str, measured: bool) -> str:
    """What a verdict is worth against the paper: claims of different kinds are counted apart."""
    if not measured:
        return "not testable here"
    if about == "library":
        return "checked on the library as used here"
    if about == "hardware":
        card = "another card" if facts.cards else "a CPU"
        card = "the paper's card" if facts.cards == [facts.paper["device"]] else card
        return f"tested on {'the same architecture' if facts.same_architecture else 'another model'} and {card}"
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
    if about == "accuracy":
        sets = [sentences.data_set(name) for name in f.samples.data_set.unique()]
        other = "" if any("coqa" in name.lower() for name in sets) else ", not CoQA"
        parts.append(f"last turns of {', '.join(sets)}{other}")
    if about == "hardware":
        parts.append(f"measured on {', '.join(facts.cards) or 'a CPU'}; the paper used an {paper['device']}")
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


def judged(facts: Facts) -> pd.DataFrame:
    """A row for each claim, in the paper's order. Raises StudyError if paper.yaml and the functions name other
    claims."""
    named = [entry["id"] for entry in facts.paper["claims"]]
    if sorted(named) != sorted(CLAIMS):
        odd = ", ".join(sorted(set(named) ^ set(CLAIMS))) or "an id twice"
        raise StudyError(f"paper.yaml and helpers/analysis differ in {odd}; give each claim one entry and one function")
    numbers, rows = reported_numbers(facts.paper), []
    for entry in facts.paper["claims"]:
        try:
            found, measured = CLAIMS[entry["id"]](facts), True
        except NotMeasured as missing:
            found, measured = Verdict(OPEN, str(missing)), False
        row = {key: entry[key] for key in ("id", "section", "about", "claim")} | found._asdict()
        row |= {"reported": entry["reported"].format(**numbers).replace("-", "\N{MINUS SIGN}")}
        row |= {"kind": kind(facts, entry["about"], measured)}
        rows.append(row | {"scope": scope(facts, entry["about"]) if measured else None})
    return pd.DataFrame(rows)
