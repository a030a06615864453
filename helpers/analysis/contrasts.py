"""Paired comparisons of a study's configurations, as tables.

The primary contrasts are fixed by rule: every format vs full precision, and FP4 vs NF4. They are adjusted together
(statistics.max_t). All other pairs are exploratory and stand alone. Shares are in [0, 1] unless said otherwise.
"""

import itertools

import pandas as pd

from helpers import statistics
from helpers.analysis import power, recovery, redraw
from helpers.analysis.frames import KEYS, Frames

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


def formats(f: Frames) -> pd.Series:
    """Configuration -> its format's label: seeds of one format are the same format."""
    return f.configurations.label.str.replace(r", seed \d+$", "", regex=True)


def clusters(table: pd.DataFrame) -> list[str]:
    """The dialogue of each question of `Frames.wide`; ids of two data sets may be the same."""
    return ["/".join(map(str, key[:2])) for key in table.index]


ROW = "metric a b primary difference low high differs verdict recovery recovery_low recovery_high p_adjusted detectable"
ROW += " reason n_questions"
NUMBERS = "low high recovery recovery_low recovery_high p_adjusted detectable"  # NaN where there is no interval


def table(f: Frames, metric: str = "f1", last_turns: bool = False) -> pd.DataFrame:
    """A row per pair: statistics.compare's columns; primary; low and high (simultaneous if primary, else the pair's
    own); differs (bool); verdict; detectable; and vs full precision recovery, recovery_low, recovery_high (per
    cent)."""
    wide = f.wide(metric, last_turns)
    pairs = primary_pairs(f, wide.columns)
    others = [pair for pair in itertools.combinations(wide.columns, 2) if pair not in pairs and pair[::-1] not in pairs]
    groups, rows = clusters(wide), []
    for primary, some in ((True, pairs), (False, others)):
        side = "adjusted" if primary else "ci"
        for row in statistics.compare(wide, groups, some, primary, **options(f)):
            row |= {"metric": metric, "primary": primary, "low": row[f"{side}_low"], "high": row[f"{side}_high"]}
            row |= {"differs": statistics.differs(row) is not None, "verdict": statistics.verdict(row, margin(f))}
            if row["a"] == f.full and primary:
                found = recovery.recovery(wide[row["a"]], wide[row["b"]], groups, **options(f))
                row |= {"recovery": found["recovery"]} | {f"recovery_{s}": found[f"ci_{s}"] for s in ("low", "high")}
            rows.append(row | {"detectable": power.detectable(row)})
    known = dict.fromkeys(key for row in [*rows, dict.fromkeys(ROW.split())] for key in row)
    table = pd.DataFrame(rows, columns=list(known)).astype({"primary": bool, "reason": object})
    table = table.astype({name: float for name in table if name in NUMBERS.split()})
    return table.assign(reason=table.reason.where(table.reason.notna(), None))  # NaN would count as a reason


def vs_full(f: Frames, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `table` that compare with full precision, by the other configuration."""
    return rows[rows.primary & (rows.a == f.full)].set_index("b", drop=False)


def means(f: Frames, metric: str, last_turns: bool = False) -> pd.DataFrame:
    """statistics.interval of each configuration's score, a row each."""
    wide = f.wide(metric, last_turns)
    rows = {name: statistics.interval(wide[name], clusters(wide), **options(f)) for name in wide}
    return pd.DataFrame.from_dict(rows, orient="index", columns=MEAN.split()).astype(float)


MEAN = "mean ci_low ci_high standard_error design_effect"


def groups(f: Frames, column: str, pairs: list | None = None) -> pd.DataFrame:
    """F1 lost per group of questions, each format (configuration, b) vs full precision or in the given pairs (a, b):
    group, questions, dialogues, full (a's F1), difference, low, high, error. `column`: domain, data_set, or turn (in
    threes)."""
    rows = f.samples
    if pairs is None:
        known = set(rows.configuration) if len(rows) else set()
        pairs = [(f.full, name) for name in f.configurations.index if name in known - {f.full} and f.full in known]
    if not pairs:
        return pd.DataFrame()
    values = rows[column]
    if column == "turn":
        names = [f"{low} to {high}" if high < 10_000 else f"{low} and later" for low, high in TURNS]
        values = pd.cut(rows.turn, [0, *(high for _, high in TURNS)], labels=names)
    found = []
    kept = {"low": "ci_low", "high": "ci_high", "full": "mean_a", "questions": "n_questions", "error": "standard_error"}
    kept |= {"dialogues": "n_dialogues", "configuration": "b", "difference": "difference", "reason": "reason"}
    for group, part in rows.groupby(values, observed=True):
        wide = part.pivot(index=KEYS, columns="configuration", values="f1")
        for row in statistics.compare(wide, clusters(wide), pairs, **options(f)):
            found.append({"group": group} | {key: row[of] for key, of in kept.items()})
    return pd.DataFrame(found)


def pooled(f: Frames, rows: pd.DataFrame) -> pd.DataFrame:
    """Random-effects mean over data sets of the F1 difference (recovery.pooled), a row per format, from `groups` by
    data set; empty for one."""
    found = []
    if len(rows):
        for name, part in rows.dropna(subset=["error"]).groupby("configuration", sort=False):
            if len(part) > 1:
                mean = recovery.pooled(part.difference, part.error, confidence=f.study.statistics.confidence)
                found.append({"configuration": name} | mean)
    return pd.DataFrame(found)


def perplexities(f: Frames, pairs: list | None = None) -> pd.DataFrame:
    """ln perplexity, b minus a, paired by dialogue, each vs full precision in its own dtype, adjusted over the pairs:
    statistics.compare's columns, low, high, verdict. pairs: the given ones, else neighbours, best first."""
    if f.dialogues.empty:
        return pd.DataFrame()
    excess = f.dialogues.assign(value=(f.dialogues.nll - f.dialogues.nll_full) / f.dialogues.tokens)
    wide = excess.pivot(index=KEYS[:2], columns="configuration", values="value").dropna(axis=1)
    tokens = f.dialogues.groupby(KEYS[:2]).tokens.first().loc[wide.index]
    if pairs is None:
        pairs = list(itertools.pairwise(wide.mul(tokens, axis=0).sum().sort_values().index))
    pairs = [pair for pair in pairs if set(pair) <= set(wide)]
    rows = statistics.compare(wide, clusters(wide), pairs, family=True, weights=tokens, **options(f))
    for row in rows:
        row |= {"low": row["adjusted_low"], "high": row["adjusted_high"], "primary": True}
        row["verdict"] = statistics.differs(row) or "n too small to say"
    return pd.DataFrame(rows)


def measured_size(f: Frames) -> str:
    """The column of `sizes` that compares formats: memory, or the file where no memory was measured."""
    return "allocated" if f.sizes.allocated.notna().any() else "checkpoint"


def steadiest_mode(ratios: pd.DataFrame) -> str:
    """The mode that repeats best between processes: a CUDA graph where any format ran in one, else eager."""
    return "cuda_graph" if (ratios["mode"] == "cuda_graph").any() else "eager"


def at(ratios: pd.DataFrame, phase: str, index: str = "configuration", **setting) -> pd.DataFrame:
    """Rows of `Frames.ratios` at one setting, by `index`; of several contexts the shortest."""
    rows = ratios[ratios.phase == phase]
    for key, value in setting.items():
        rows = rows[rows[key] == value]
    return rows.sort_values([index, "tokens"]).drop_duplicates(index).set_index(index)


def reported(paper: dict, name: str, key: str):
    """What the paper reports for a configuration, or None."""
    return (paper["configurations"].get(name) or {}).get(key)


def reported_difference(paper: dict, a: str, b: str, key: str):
    """b minus a as the paper reports them, or None."""
    values = [reported(paper, "fp16" if name in ("bf16", "fp32") else name, key) for name in (a, b)]
    return None if None in values else values[1] - values[0]


def designs(f: Frames, paper: dict) -> list[dict]:
    """The paper's design and its variant over any turn, drawn again (redraw.redraw): NF4, FP4 and full precision."""
    last, every, settings = f.wide("f1", last_turns=True), f.wide("f1"), f.study.statistics
    if not {"nf4", "fp4", f.full} <= set(every):
        return []
    pairs = [(f.full, "nf4"), ("nf4", "fp4"), (f.full, "fp4")]
    given = {"size": paper["questions"], "draws": settings.redraws, "confidence": settings.confidence}
    drawn = ((last, None), (every, clusters(every)))
    return [redraw.redraw(wide, pairs, groups, **given, seed=f.study.seed) for wide, groups in drawn]
