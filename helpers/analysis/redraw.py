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
    >>> result = redraw(scores, [("fp16", "nf4")], size=50, draws=2_000, confidence=0.95, seed=1)
    >>> (row,) = result["comparisons"]
    >>> row["difference"] < 0 < row["share_above_low"] < row["share_above"] < row["share_above_high"] < 0.9
    True
"""

import itertools

import numpy as np

from helpers import StudyError, statistics

TIE = 1e-9  # two means of the same questions that differ by less differ in rounding only
OUTER, INNER = 1_000, 1_000  # resamples of the dialogues, and draws that each of them moves


def _histogram(differences: np.ndarray, width: float) -> dict:
    """Counts in bins of `width` that have an edge at zero, so that a bar never mixes above and below."""
    low, high = np.floor((differences.min() - TIE) / width), np.ceil((differences.max() + TIE) / width)
    edges = np.arange(low, high + 1) * width
    return {"edges": edges.tolist(), "counts": np.histogram(differences, edges)[0].tolist()}


def redraw(values, pairs: list[tuple], clusters=None, *, size: int, draws: int, confidence: float, seed: int) -> dict:
    """Repeat a design of `size` questions on the full result.

    values[configuration] is an array over the same questions (n,): last turns, in the data's order, or all turns with
    their dialogues' ids in clusters (n,).

    Returns design ("last turns" or "any turn"), dialogues, size, draws, confidence and comparisons, a row per pair: a,
    b, difference (all questions), reason (why its shares have no interval, else None), share_above (b > a), share_below
    (each with _low and _high), share_tied, and histogram (edges, counts) of the draws. Raises StudyError for unknown
    configurations or arrays that don't match.
    """
    used = list(dict.fromkeys(itertools.chain(*pairs)))
    if unknown := [name for name in used if name not in values]:
        raise StudyError(f"redraw: no values for {', '.join(unknown)}; there are {', '.join(values)}")
    arrays = {name: np.asarray(values[name], dtype=float) for name in used}
    n = len(arrays[used[0]])
    if any(array.shape != (n,) for array in arrays.values()) or (clusters is not None and len(clusters) != n):
        raise StudyError(f"redraw: expected {n} questions of every configuration; compare runs of the same questions")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise StudyError("redraw: some values are missing or not finite; evaluate those questions first")
    _, index = np.unique(np.arange(n) if clusters is None else np.asarray(clusters), return_inverse=True)
    turns, by_dialogue = np.bincount(index), np.argsort(index, kind="stable")
    groups, starts = len(turns), np.cumsum(turns) - turns
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, groups, (draws, size))
    questions = by_dialogue[starts[chosen] + (rng.random(chosen.shape) * turns[chosen]).astype(int)]
    counts = rng.multinomial(groups, np.full(groups, 1 / groups), size=OUTER) / groups
    comparisons = []
    for a, b in pairs:
        question = arrays[b] - arrays[a]
        drawn, dialogue = question[questions].mean(axis=1), np.bincount(index, question) / turns
        reason = statistics.why_no_interval(groups, np.count_nonzero(np.abs(dialogue) > TIE), "differ")
        row = {"a": a, "b": b, "difference": float(question.mean()), "reason": reason}
        tied = row["share_tied"] = float((np.abs(drawn) <= TIE).mean())
        # column o is centred where resample o of the dialogues puts it
        moved = None if reason else (drawn[:INNER] - drawn[:INNER].mean()) * np.sqrt(groups / (groups - 1))
        for side, sign in (("above", 1), ("below", -1)):
            ends = (None, None)
            if not reason:  # moved draws never tie: half of the ties fall on either side, and are taken off again
                shares = (sign * (moved[:, None] + counts @ dialogue) > TIE).mean(axis=0)
                ends = np.maximum(0, np.quantile(shares, statistics.tails(groups, confidence)) - tied / 2).tolist()
            row |= {f"share_{side}": float((sign * drawn > TIE).mean())}
            row |= {f"share_{side}_low": ends[0], f"share_{side}_high": ends[1]}
        comparisons.append(row | {"histogram": _histogram(drawn, 0.01)})
    design = {"design": "last turns" if clusters is None else "any turn", "dialogues": groups, "size": size}
    return design | {"draws": draws, "confidence": confidence, "comparisons": comparisons}
