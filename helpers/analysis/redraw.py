"""What would 50 questions have said?

The paper scored the last turn of the first 50 dialogues and read an order of three formats off it. `redraw` repeats
that design many times on a full result and counts how often it would have given each direction. Every draw takes the
same questions for all configurations, as one lm-eval run with one limit does. Dialogues are always drawn with
replacement: those at hand stand for the population that they came from.

Two designs:

    last turns  the paper's: `size` dialogues, the last turn of each
    any turn    (clusters given) `size` dialogues, one random turn of each

A share of draws is an estimate like any other: its interval comes from an outer bootstrap over dialogues (tails widened
as in helpers.statistics). A resample moves the centre of the draws; their spread stays, enlarged by sqrt(G / (G - 1))
for G dialogues. Resampling the spread as well covered 68% instead of 95% from 10 dialogues, 92% from 50. The share of
ties has no interval.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> full = rng.random(500)
    >>> scores = {"fp16": full, "nf4": full - rng.normal(0.02, 0.2, 500)}
    >>> result = redraw(scores, {("fp16", "nf4"): [0.051]}, size=50, draws=2_000, confidence=0.95, seed=1)
    >>> (row,) = result["comparisons"]
    >>> row["difference"] < 0 < row["share_above_low"] < row["share_above"] < row["share_above_high"] < 0.9
    True
"""

import itertools

import numpy as np

from helpers import StudyError, statistics

PERCENTILES = (0.5, 2.5, 5, 25, 50, 75, 95, 97.5, 99.5)
TIE = 1e-9  # two means of the same questions that differ by less differ in rounding only
OUTER, INNER = 1_000, 1_000  # resamples of the dialogues, and draws that each of them moves


def _moved(means: dict, dialogue_means: dict, groups: int, rng) -> dict:
    """Each configuration's draws (INNER, OUTER): column o is centred where resample o of the dialogues puts it."""
    counts = rng.multinomial(groups, np.full(groups, 1 / groups), size=OUTER) / groups
    enlarged = np.sqrt(groups / (groups - 1))
    return {
        name: (enlarged * (drawn[:INNER] - drawn[:INNER].mean()))[:, None] + counts @ dialogue_means[name]
        for name, drawn in means.items()
    }


def _histogram(differences: np.ndarray, width: float) -> dict:
    """Counts in bins of `width` that have an edge at zero, so that a bar never mixes above and below."""
    low, high = np.floor((differences.min() - TIE) / width), np.ceil((differences.max() + TIE) / width)
    edges = np.arange(low, high + 1) * width
    return {"edges": edges.tolist(), "counts": np.histogram(differences, edges)[0].tolist()}


def redraw(
    values: dict,
    pairs: dict,
    clusters=None,
    order: tuple = (),
    *,
    size: int,
    draws: int,
    confidence: float,
    seed: int,
    bin_width: float = 0.01,
) -> dict:
    """Repeat a design of `size` questions on the full result.

    values[configuration] is an array over the same questions (n,): last turns, in the data's order, or all turns with
    their dialogues' ids in clusters (n,). pairs[(a, b)] lists thresholds of b's mean minus a's. order: configurations,
    best first; the share of draws with exactly this order is counted.

    Returns design ("last turns" or "any turn"), dialogues, questions, size, draws, confidence, share_in_order (None
    without order) and comparisons, a row per pair: a, b, difference (all questions), reason (why its shares have no
    interval, else None), share_above (b > a), share_tied, share_below, at_least (rows of threshold, share), mean, sd,
    percentiles (text to value) and histogram (edges, counts) of the draws. Each share but ties has _low and _high.
    Raises StudyError for unknown configurations or arrays that don't match.
    """
    unknown = [name for name in {*order, *(name for pair in pairs for name in pair)} if name not in values]
    if unknown:
        raise StudyError(f"redraw: no values for {', '.join(sorted(unknown))}; there are {', '.join(values)}")
    arrays = {name: np.asarray(array, dtype=float) for name, array in values.items()}
    n = len(next(iter(arrays.values())))
    if any(array.shape != (n,) for array in arrays.values()) or (clusters is not None and len(clusters) != n):
        raise StudyError(f"redraw: expected {n} questions of every configuration; compare runs of the same questions")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise StudyError("redraw: some values are missing or not finite; evaluate those questions first")
    _, index = np.unique(np.arange(n) if clusters is None else np.asarray(clusters), return_inverse=True)
    turns = np.bincount(index)
    starts = np.cumsum(turns) - turns
    by_dialogue = {name: array[np.argsort(index, kind="stable")] for name, array in arrays.items()}
    used = {name: by_dialogue[name] for name in dict.fromkeys([*order, *itertools.chain(*pairs)])}
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(turns), (draws, size))
    questions = starts[chosen] + (rng.random(chosen.shape) * turns[chosen]).astype(int)
    means = {name: array[questions].mean(axis=1) for name, array in used.items()}
    groups = len(turns)
    dialogue_means = {name: np.add.reduceat(array, starts) / turns for name, array in used.items()}
    outer = _moved(means, dialogue_means, groups, rng) if groups >= statistics.MIN_DIALOGUES else {}

    def why_not(a: str, b: str) -> str | None:
        differ = np.count_nonzero(np.abs(dialogue_means[b] - dialogue_means[a]) > TIE)
        return statistics.why_no_interval(groups, differ, "differ")

    def share(name: str, reason: str | None, true, tied: float = 0.0) -> dict:
        """`true` takes the means of all configurations, drawn (draws,) or moved (INNER, OUTER). Moved draws never
        tie: half of the ties fall on either side, and are taken off again."""
        low, high = (None, None)
        if not reason:
            ends = np.quantile(true(outer).mean(axis=0), statistics.tails(groups, confidence))
            low, high = np.maximum(0, ends - tied / 2).tolist()
        return {name: float(true(means).mean()), f"{name}_low": low, f"{name}_high": high}

    comparisons = []
    for (a, b), thresholds in pairs.items():
        d = means[b] - means[a]
        reason = why_not(a, b)
        row = {"a": a, "b": b, "difference": float(arrays[b].mean() - arrays[a].mean()), "reason": reason}
        tied = row["share_tied"] = float((np.abs(d) <= TIE).mean())
        row |= share("share_above", reason, lambda m, a=a, b=b: m[b] - m[a] > TIE, tied)
        row |= share("share_below", reason, lambda m, a=a, b=b: m[b] - m[a] < -TIE, tied)
        row["at_least"] = [
            {"threshold": t} | share("share", reason, lambda m, a=a, b=b, t=t: m[b] - m[a] >= t - TIE)
            for t in thresholds
        ]
        row |= {"mean": float(d.mean()), "sd": float(d.std()), "histogram": _histogram(d, bin_width)}
        row["percentiles"] = dict(zip(map(str, PERCENTILES), np.percentile(d, PERCENTILES).tolist()))
        comparisons.append(row)
    found = {
        "design": "last turns" if clusters is None else "any turn",
        "dialogues": groups,
        "questions": n,
        "size": size,
        "draws": draws,
        "confidence": confidence,
        "share_in_order": None,
        "comparisons": comparisons,
    }
    steps = list(itertools.pairwise(order))
    if steps:
        reason = next((why for why in (why_not(*step) for step in steps) if why), None)
        found |= share("share_in_order", reason, lambda m: np.all([m[x] - m[y] > TIE for x, y in steps], axis=0))
    return found


def reported(values: dict, full: str, size: int) -> list[dict]:
    """What one run of the design itself gives: the first `size` last turns (all where there are fewer), as lm-eval's
    limit takes them.

    values[configuration] (n,): last turns in the data's order. A row per configuration: configuration, questions, mean,
    difference (from full precision's, None for its own row), difference_all (the same over all n last turns).
    """
    return [
        {
            "configuration": name,
            "questions": len(array[:size]),
            "mean": float(np.mean(array[:size])),
            "difference": None if name == full else float(np.mean(array[:size]) - np.mean(values[full][:size])),
            "difference_all": None if name == full else float(np.mean(array) - np.mean(values[full])),
        }
        for name, array in ((name, np.asarray(array, dtype=float)) for name, array in values.items())
    ]
