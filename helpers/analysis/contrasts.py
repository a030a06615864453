"""Paired comparisons of a study's configurations, as tables.

The primary contrasts are named in advance: every format vs full precision, and FP4 vs NF4. They are adjusted together
(statistics.max_t). All other pairs are exploratory and stand alone. Shares are in [0, 1] unless said otherwise.
"""

import itertools

import numpy as np
import pandas as pd

from helpers import statistics
from helpers.analysis import power, recovery, redraw
from helpers.analysis.frames import Frames

METRICS = {"f1": "F1", "em": "exact match"}
TURNS = ((1, 3), (4, 6), (7, 9), (10, 12), (13, 10_000))


def options(f: Frames) -> dict:
    settings = f.study.statistics
    return {"confidence": settings.confidence, "resamples": settings.resamples, "seed": f.study.seed}


def margin(f: Frames) -> float:
    """What counts as equal: a difference of F1 or exact match within this share on either side."""
    return f.study.statistics.margin


def primary_pairs(f: Frames, names) -> list[tuple[str, str]]:
    pairs = [(f.full, name) for name in names if f.full in names and not f.configurations.full[name]]
    return pairs + ([("nf4", "fp4")] if {"nf4", "fp4"} <= set(names) else [])


def clusters(table: pd.DataFrame) -> list[str]:
    """The dialogue of each question of `Frames.wide`; ids of two data sets may be the same."""
    return ["/".join(map(str, key[:2])) for key in table.index]


def table(f: Frames, metric: str = "f1", last_turns: bool = False, data_set: str | None = None) -> pd.DataFrame:
    """A row per pair: statistics.compare's columns; primary; low and high (simultaneous if primary, else the pair's
    own); differs (bool); verdict; detectable; and vs full precision recovery, recovery_low, recovery_high (per
    cent)."""
    wide = f.wide(metric, last_turns, data_set)
    pairs = primary_pairs(f, wide.columns)
    others = [pair for pair in itertools.combinations(wide.columns, 2) if pair not in pairs and pair[::-1] not in pairs]
    groups = clusters(wide)
    rows = statistics.compare(wide, groups, pairs, family=True, **options(f))
    rows += statistics.compare(wide, groups, others, family=False, **options(f))
    for row in rows:
        side = "adjusted" if row["family"] == "primary" else "ci"
        row |= {"metric": metric, "primary": row["family"] == "primary"}
        row |= {"low": row[f"{side}_low"], "high": row[f"{side}_high"]}
        row |= {"detectable": power.detectable(row)}
        row |= {"differs": statistics.differs(row) is not None, "verdict": statistics.verdict(row, margin(f))}
        if row["a"] == f.full and row["primary"]:
            found = recovery.recovery(wide[row["a"]], wide[row["b"]], groups, **options(f))
            row |= {"recovery": found["recovery"], "recovery_low": found["ci_low"], "recovery_high": found["ci_high"]}
    table = pd.DataFrame(rows, columns=None if rows else ROW).astype({"primary": bool, "reason": object})
    return table.assign(reason=table.reason.where(table.reason.notna(), None))  # NaN would count as a reason


ROW = ["metric", "a", "b", "primary", "difference", "low", "high", "differs", "verdict", "recovery", "recovery_low"]
ROW += ["recovery_high", "p_adjusted", "detectable", "reason", "n_questions"]


def vs_full(f: Frames, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `table` that compare with full precision, by the other configuration."""
    return rows[rows.primary & (rows.a == f.full)].set_index("b")


def means(f: Frames) -> pd.DataFrame:
    """A row per configuration and metric: mean, low, high, standard_error (clustered), design_effect; over last
    turns with last_ before them."""
    rows = []
    for metric in METRICS:
        tables = {"": f.wide(metric), "last_": f.wide(metric, last_turns=True)}
        for name in tables[""]:
            row = {"configuration": name, "metric": metric}
            for prefix, wide in tables.items():
                found = statistics.interval(wide[name], clusters(wide), **options(f)) if len(wide) else {}
                row |= {prefix + key: found.get(of) for key, of in INTERVAL.items()}
            rows.append(row)
    numbers = [prefix + key for prefix in ("", "last_") for key in INTERVAL]
    return pd.DataFrame(rows, columns=["configuration", "metric", *numbers]).astype(dict.fromkeys(numbers, float))


INTERVAL = {
    "mean": "mean",
    "low": "ci_low",
    "high": "ci_high",
    "standard_error": "standard_error",
    "design_effect": "design_effect",
}


def groups(f: Frames, column: str) -> pd.DataFrame:
    """F1 lost per group of questions, vs full precision: group, questions, dialogues, full (its F1), and per format
    its difference, low, high. `column`: domain, data_set, or turn (in threes)."""
    rows = f.samples
    if rows.empty or f.full is None:
        return pd.DataFrame()
    if column == "turn":
        names = [f"{low} to {high}" if high < 10_000 else f"{low} and later" for low, high in TURNS]
        values = pd.cut(rows.turn, [0, *(high for _, high in TURNS)], labels=names)
    else:
        values = rows[column]
    found = []
    for group, part in rows.groupby(values, observed=True):
        wide = part.pivot(index=["data_set", "dialogue", "turn"], columns="configuration", values="f1")
        pairs = [(f.full, name) for name in f.configurations.index if name in wide and name != f.full]
        for row in statistics.compare(wide, clusters(wide), pairs, **options(f)):
            kept = {"low": row["ci_low"], "high": row["ci_high"], "full": row["mean_a"], "reason": row["reason"]}
            kept |= {"questions": row["n_questions"], "dialogues": row["n_dialogues"], "error": row["standard_error"]}
            found.append({"group": group, "configuration": row["b"], "difference": row["difference"]} | kept)
    return pd.DataFrame(found)


def pooled(f: Frames) -> pd.DataFrame:
    """Random-effects mean over data sets of the F1 difference from full precision (recovery.pooled), a row per format;
    empty for one data set."""
    rows = groups(f, "data_set")
    if rows.empty or rows.group.nunique() < 2:
        return pd.DataFrame()
    found = []
    for name, part in rows.dropna(subset=["error"]).groupby("configuration", sort=False):
        if len(part) > 1:
            mean = recovery.pooled(part.difference, part.error, confidence=f.study.statistics.confidence)
            found.append({"configuration": name} | mean)
    return pd.DataFrame(found)


def flips(f: Frames) -> pd.DataFrame:
    """Answers that change between right and wrong vs full precision, in per cent of the questions (recovery.flips),
    and the share of answers that stay the same text."""
    right, said = f.wide("right"), f.wide("prediction")
    rows = [
        {"configuration": name, "same_text": 100 * float((said[name] == said[f.full]).mean())}
        | recovery.flips(right[f.full].astype(float), right[name].astype(float), clusters(right), **options(f))
        for name in right
        if f.full in right and name != f.full
    ]
    return pd.DataFrame(rows)


def lengths(f: Frames) -> pd.DataFrame:
    """Answer length: mean tokens, ratio to full precision (per cent) with interval, share of answers at the limit."""
    if f.samples.answer_tokens.isna().all():
        return pd.DataFrame()
    wide, limit = f.wide("answer_tokens").astype(float), f.wide("hit_limit").astype(float)
    rows = []
    for name in wide:
        found = recovery.recovery(wide[f.full], wide[name], clusters(wide), **options(f)) if f.full in wide else {}
        rows.append(
            {
                "configuration": name,
                "tokens": wide[name].mean(),
                "ratio": found.get("recovery"),
                "low": found.get("ci_low"),
                "high": found.get("ci_high"),
                "at_limit": limit[name].mean(),
            }
        )
    return pd.DataFrame(rows)


def perplexities(f: Frames) -> pd.DataFrame:
    """Neighbours in order of perplexity: better, worse, ln_ratio, low, high, separated. Paired by dialogue."""
    sums = f.dialogues
    if sums.empty:
        return pd.DataFrame()
    nll = sums.pivot(index=["data_set", "dialogue"], columns="configuration", values="nll")
    tokens = sums.groupby(["data_set", "dialogue"]).tokens.first()
    order = (nll.sum() / tokens.sum()).sort_values().index
    rows = []
    for a, b in itertools.pairwise(order):
        row = statistics.log_ppl_ratio(nll[a], nll[b], tokens, clusters(nll), **options(f))
        rows.append(
            {"better": a, "worse": b, "ln_ratio": row["difference"], "low": row["ci_low"], "high": row["ci_high"]}
            | {"separated": statistics.differs(row) is not None}
        )
    return pd.DataFrame(rows)


def glance(f: Frames, rows: pd.DataFrame, ratios: pd.DataFrame) -> pd.DataFrame:
    """Everything vs full precision, a row per quantized configuration: memory, recovery, ppl and decode (batch 1),
    as ratios with _low and _high where there is an interval or a range of processes."""
    names = [name for name in f.configurations.index if not f.configurations.full[name]]
    found = pd.DataFrame(index=pd.Index(names, name="configuration"))
    size = f.sizes.allocated
    found["memory"] = found["memory_low"] = found["memory_high"] = (size / size.get(f.full, np.nan)).reindex(names)
    mine = vs_full(f, rows).reindex(names)
    for key in ("recovery", "recovery_low", "recovery_high"):
        found[key] = mine[key].astype(float)
    ppl = f.tokens[f.tokens.group == "all"].set_index("configuration").reindex(names)
    for key, of in (("ppl", "ln_ratio"), ("ppl_low", "ln_low"), ("ppl_high", "ln_high")):
        found[key] = np.exp(ppl[of].astype(float))
    decode = at(ratios, "decode", batch=1, mode=fastest_mode(f, ratios)).reindex(names)
    for key, of in (("decode", "ratio"), ("decode_low", "ratio_low"), ("decode_high", "ratio_high")):
        found[key] = decode[of]
    return found


def fastest_mode(f: Frames, ratios: pd.DataFrame) -> str:
    """The fastest mode that most formats ran: a CUDA graph repeats between processes, eager and compiled do less."""
    return "cuda_graph" if (ratios["mode"] == "cuda_graph").any() else "eager"


def at(ratios: pd.DataFrame, phase: str, **setting) -> pd.DataFrame:
    """Rows of `Frames.ratios` at one setting, by configuration; of several contexts the shortest."""
    rows = ratios[ratios.phase == phase]
    for key, value in setting.items():
        rows = rows[rows[key] == value]
    return rows.sort_values("tokens").drop_duplicates("configuration").set_index("configuration")


def reported(paper: dict, name: str, key: str):
    """What the paper reports for a configuration, or None."""
    return (paper["configurations"].get(name) or {}).get(key)


def reported_difference(paper: dict, a: str, b: str, key: str):
    """b minus a as the paper reports them, or None."""
    values = [reported(paper, "fp16" if name in ("bf16", "fp32") else name, key) for name in (a, b)]
    return None if None in values else values[1] - values[0]


def designs(f: Frames, paper: dict) -> list[dict]:
    """The paper's design and its variant over any turn, drawn again (redraw.redraw): NF4, FP4 and full precision."""
    names = [name for name in ("nf4", f.full, "fp4") if name in set(f.samples.configuration)]
    pairs = [(f.full, "nf4"), ("nf4", "fp4"), (f.full, "fp4")]
    thresholds = {}
    for a, b in pairs:
        theirs = reported_difference(paper, a, b, "coqa_f1")
        thresholds[a, b] = [round(theirs, 4)] if theirs and theirs > 0 else []
    if len(names) < 3:
        return []
    settings = f.study.statistics
    given = {
        "size": paper["questions"],
        "draws": settings.redraws,
        "confidence": settings.confidence,
        "seed": f.study.seed,
    }
    last, every = f.wide("f1", last_turns=True), f.wide("f1")
    drawn = [redraw.redraw(dict(last[names].items()), thresholds, order=tuple(names), **given)]
    return [*drawn, redraw.redraw(dict(every[names].items()), thresholds, clusters(every), order=tuple(names), **given)]
