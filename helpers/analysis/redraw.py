"""What would 50 questions have said?

The paper scored the last turn of the first 50 dialogues and read an order of three formats off it. `redraw` repeats that design many
times on a full result and counts how often it would have said so. Every draw takes the same questions for all configurations, as one
lm-eval run with one limit does.

Two designs, named in the result:

    last turns   `size` last turns. From twice as many or more they are drawn without replacement; from fewer, with replacement: the
                 dialogues at hand then stand for the population that they came from.
    any turn     (clusters given) `size` different dialogues and one random turn of each; of exactly `size` dialogues all of them in every
                 draw, so that only the turn varies; from fewer, dialogues are drawn with replacement.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> full = rng.random(500)
    >>> result = redraw({"fp16": full, "nf4": full - rng.normal(0.02, 0.2, 500)}, {("fp16", "nf4"): [0.051]})
    >>> result["replacement"], result["comparisons"][0]["difference"] < 0 < result["comparisons"][0]["share_better"]
    (False, True)
"""

import itertools

import numpy as np

from helpers import StudyError

PERCENTILES = (0.5, 2.5, 5, 25, 50, 75, 95, 97.5, 99.5)
TIE = 1e-9  # two means of the same questions that differ by less differ in rounding only
CHUNK = 1_000_000


def _last_turns(population: int, size: int, draws: int, rng) -> tuple[np.ndarray, str, bool]:
    """Indices (draws, size) into the questions."""
    if population < 2 * size:
        text = f"{size} last turns, with replacement, from {population}"
        return rng.integers(0, population, size=(draws, size)), text, True
    step = max(1, CHUNK // population)
    parts = [
        np.argpartition(rng.random((min(step, draws - i), population)), size, axis=1)[:, :size]
        for i in range(0, draws, step)
    ]
    return np.concatenate(parts), f"{size} last turns, without replacement, from {population}", False


def _any_turn(clusters, size: int, draws: int, rng) -> tuple[np.ndarray, str, bool]:
    """Indices (draws, size) into the questions: each row from different dialogues, as long as there are enough."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    order = np.argsort(index, kind="stable")
    turns = np.bincount(index)
    starts, groups = np.cumsum(turns) - turns, len(turns)
    again = groups < size
    dialogues = (
        rng.integers(0, groups, (draws, size)) if again else np.argsort(rng.random((draws, groups)), axis=1)[:, :size]
    )
    chosen = order[starts[dialogues] + (rng.random((draws, size)) * turns[dialogues]).astype(int)]
    which = f"{size} different dialogues of {groups}" if groups > size else f"all {groups} dialogues"
    if again:
        which = f"{size} dialogues, drawn with replacement from {groups}"
    return chosen, f"one random turn of each of {which}", again


def _histogram(differences: np.ndarray, width: float) -> dict:
    """Counts in bins of `width` that have an edge at zero, so that a bar never mixes better and worse."""
    low, high = np.floor((differences.min() - TIE) / width), np.ceil((differences.max() + TIE) / width)
    edges = np.arange(low, high + 1) * width
    return {"edges": edges.tolist(), "counts": np.histogram(differences, edges)[0].tolist()}


def redraw(
    values: dict,
    pairs: dict,
    clusters=None,
    order: tuple = (),
    size: int = 50,
    draws: int = 10_000,
    seed: int = 1234,
    bin_width: float = 0.01,
) -> dict:
    """Repeat a design of `size` questions on the full result.

    values[configuration] is an array over the same questions (n,): last turns, in the data's order, or all turns with their dialogues'
    ids in clusters (n,). pairs[(a, b)] lists thresholds of b's mean minus a's. order: configurations, best first; the share of draws
    with exactly this order is counted.

    Returns design (a phrase), replacement, population, size, draws, share_in_order (none without order), and comparisons, a row a pair:
    a, b, difference (all questions), first (the first `size` questions, which lm-eval's limit takes; none with clusters), share_better
    (b > a), share_tied, share_worse, at_least (rows of threshold, share), mean, sd, percentiles (text to value) and histogram
    (edges, counts).
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
    rng = np.random.default_rng(seed)
    draw = _last_turns(n, size, draws, rng) if clusters is None else _any_turn(clusters, size, draws, rng)
    index, design, replacement = draw
    means = {name: array[index].mean(axis=1) for name, array in arrays.items()}
    comparisons = []
    for (a, b), thresholds in pairs.items():
        d = means[b] - means[a]
        comparisons.append(
            {
                "a": a,
                "b": b,
                "difference": float(arrays[b].mean() - arrays[a].mean()),
                "first": None if clusters is not None else float((arrays[b] - arrays[a])[:size].mean()),
                "share_better": float((d > TIE).mean()),
                "share_tied": float((np.abs(d) <= TIE).mean()),
                "share_worse": float((d < -TIE).mean()),
                "at_least": [{"threshold": t, "share": float((d >= t - TIE).mean())} for t in thresholds],
                "mean": float(d.mean()),
                "sd": float(d.std()),
                "percentiles": dict(zip(map(str, PERCENTILES), np.percentile(d, PERCENTILES).tolist())),
                "histogram": _histogram(d, bin_width),
            }
        )
    ordered = [means[better] - means[worse] > TIE for better, worse in itertools.pairwise(order)]
    return {
        "design": design,
        "replacement": replacement,
        "population": n,
        "size": index.shape[1],
        "draws": draws,
        "share_in_order": float(np.all(ordered, axis=0).mean()) if ordered else None,
        "comparisons": comparisons,
    }
