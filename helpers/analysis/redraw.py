"""What would 50 questions have said?

The paper scored the last turn of the first 50 dialogues and read an order of three formats off it. `redraw` repeats
that design many times on a full result and counts how often it would have given each direction. Every draw takes the
same questions for all configurations, as one lm-eval run with one limit does. Dialogues are always drawn with
replacement: those at hand stand for the population that they came from.

Two designs:

    last turns  the paper's: `size` dialogues, the last turn of each
    any turn    (clusters given) `size` dialogues, one random turn of each

A share of draws is an estimate like any other: its interval comes from an outer bootstrap over dialogues, in which each
resample of the dialogues has its own share (tails as in helpers.statistics). From 50 dialogues such a share is loosely
known.

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
OUTER, INNER = 1_000, 1_000  # resamples of the dialogues, and draws from each: Monte Carlo error 1.6 points at most
TURNS = 8  # any turn: turns of each resampled dialogue that its inner draws choose from


def _outer(arrays: dict, starts, turns, size: int, rng) -> dict:
    """Means (INNER, OUTER) of each configuration: column o holds draws of `size` from resample o of the dialogues."""
    groups = len(turns)
    copies = TURNS if turns.max() > 1 else 1
    resampled = np.tile(rng.integers(0, groups, (groups, OUTER)), (copies, 1))
    # the turns of a dialogue in equal strata, so that few stand for all
    within = (np.repeat(np.arange(copies), groups)[:, None] + rng.random(resampled.shape)) / copies
    questions = starts[resampled] + (within * turns[resampled]).astype(int)
    cells = groups * copies
    counts = rng.multinomial(size, np.full(cells, 1 / cells), size=INNER).astype(np.float32)
    return {name: counts @ array[questions].astype(np.float32) / size for name, array in arrays.items()}


def _histogram(differences: np.ndarray, width: float) -> dict:
    """Counts in bins of `width` that have an edge at zero, so that a bar never mixes above and below."""
    low, high = np.floor((differences.min() - TIE) / width), np.ceil((differences.max() + TIE) / width)
    edges = np.arange(low, high + 1) * width
    return {"edges": edges.tolist(), "counts": np.histogram(differences, edges)[0].tolist()}


def _share(name: str, drawn: np.ndarray, outer: np.ndarray, ends) -> dict:
    """A share of draws (draws,) that are true, with its interval from outer (INNER, OUTER)."""
    low, high = (None, None) if ends is None else np.quantile(outer.mean(axis=0), ends).tolist()
    return {name: float(drawn.mean()), f"{name}_low": low, f"{name}_high": high}


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
    without order), reason (why shares have no interval, else None), and comparisons, a row per pair: a, b, difference
    (all questions), share_above (b > a), share_tied, share_below, at_least (rows of threshold, share), mean, sd,
    percentiles (text to value) and histogram (edges, counts) of the draws. Each share has _low and _high beside it.
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
    reason = statistics.why_no_interval(len(turns), len(turns), "")
    outer = {} if reason else _outer(used, starts, turns, size, rng)
    ends = None if reason else statistics.tails(len(turns), confidence)

    def shares(name: str, true) -> dict:
        """`true` takes the means of all configurations, drawn (draws,) or in the outer bootstrap (INNER, OUTER)."""
        return _share(name, true(means, TIE), None if reason else true(outer, 1e-6), ends)

    comparisons = []
    for (a, b), thresholds in pairs.items():
        d = means[b] - means[a]
        row = {"a": a, "b": b, "difference": float(arrays[b].mean() - arrays[a].mean())}
        row |= shares("share_above", lambda m, tie, a=a, b=b: m[b] - m[a] > tie)
        row |= shares("share_tied", lambda m, tie, a=a, b=b: abs(m[b] - m[a]) <= tie)
        row |= shares("share_below", lambda m, tie, a=a, b=b: m[b] - m[a] < -tie)
        row["at_least"] = [
            {"threshold": t} | shares("share", lambda m, tie, a=a, b=b, t=t: m[b] - m[a] >= t - tie) for t in thresholds
        ]
        row |= {"mean": float(d.mean()), "sd": float(d.std()), "histogram": _histogram(d, bin_width)}
        row["percentiles"] = dict(zip(map(str, PERCENTILES), np.percentile(d, PERCENTILES).tolist()))
        comparisons.append(row)
    found = {
        "design": "last turns" if clusters is None else "any turn",
        "dialogues": len(turns),
        "questions": n,
        "size": size,
        "draws": draws,
        "confidence": confidence,
        "reason": reason,
        "share_in_order": None,
        "comparisons": comparisons,
    }
    if order:
        steps = list(itertools.pairwise(order))
        in_order = shares(
            "share_in_order", lambda m, tie: np.all([m[better] - m[worse] > tie for better, worse in steps], axis=0)
        )
        found |= in_order
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
