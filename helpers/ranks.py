"""Statistics that go by order: quantiles and rank correlation of clustered values, with the intervals of
helpers.statistics.

    >>> import numpy as np
    >>> values, clusters = np.arange(400) % 100, np.arange(400) % 37
    >>> (row,) = quantiles(values, clusters, [0.9], confidence=0.95, resamples=2_000, seed=1)
    >>> row["quantile"], row["ci_low"] <= 89 <= row["ci_high"]
    (89.0, True)
"""

import numpy as np
from scipy import stats

from helpers import statistics

MIN_BEYOND = 40  # values beyond a quantile; with fewer, the interval covers 92% instead of 95% (bench_statistics)
RANKED_AT_A_TIME = 64  # resamples, so that 8,000 questions stay in a processor's cache


def quantiles(
    values, clusters, probabilities, weights=None, *, confidence: float, resamples: int, seed: int
) -> list[dict]:
    """Quantiles of clustered values: a row per probability with quantile, ci_low, ci_high, reason.

    The interval of the share of values beyond the quantile, read back through the ordered values (Woodruff, JASA 47,
    1952). That share's interval is Clopper and Pearson's at the effective number of values (Korn and Graubard, Survey
    Methodology 24, 1998): a bootstrap's is too short where few values are beyond. An end beyond the largest value is
    None.
    """
    v = statistics.number_array(values, "values")
    order = np.argsort(v, kind="stable")
    w = np.ones(v.size) if weights is None else np.asarray(weights, dtype=float)
    ordered, reached = v[order], np.cumsum(w[order]) / w.sum()

    def at(share: float) -> float:
        return float(ordered[min(np.searchsorted(reached, share * (1 - statistics.SLACK)), v.size - 1)])

    found = [at(p) for p in probabilities]
    sums, sizes = statistics.totals(np.stack([v <= q for q in found], axis=1).astype(float), clusters, weights)
    groups, rows = len(sums), []
    for k, (p, q) in enumerate(zip(probabilities, found)):
        beyond = sizes[:, 0] - sums[:, k]
        reason = statistics.why_no_interval(groups, np.count_nonzero(beyond), f"reach beyond the quantile {p:g}")
        if np.count_nonzero(v > q) < MIN_BEYOND:
            reason = (
                reason or f"no interval: {np.count_nonzero(v > q)} values beyond the quantile {p:g}, not {MIN_BEYOND}"
            )
        low, high = None, None
        if not reason:
            ends = _share_limits(beyond[:, None], sizes, 1 - p, (w**2).sum() / w.sum() ** 2, confidence)
            low, high = at(1 - ends[1]), at(1 - ends[0]) if 1 - ends[0] < reached[-2] else None
        rows.append({"probability": p, "quantile": q, "ci_low": low, "ci_high": high, "reason": reason})
    return rows


def _share_limits(sums, sizes, share: float, concentration: float, confidence: float) -> tuple[float, float]:
    """Limits of a clustered share. concentration: 1 / n for n values of equal weight."""
    groups, clustered = len(sums), float(statistics.standard_error(sums, sizes)[0])
    independent = np.sqrt(share * (1 - share) * concentration)
    shorter = stats.norm.ppf((1 + confidence) / 2) / stats.t.ppf((1 + confidence) / 2, groups - 1)
    n = shorter**2 / concentration / max(1.0, (clustered / independent) ** 2)
    tail = (1 - confidence) / 2
    return stats.beta.ppf(tail, share * n, n - share * n + 1), stats.beta.isf(tail, share * n + 1, n - share * n)


def _ranking(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order that sorts the values (n,), where each run of equal values starts in it, and each value's run (n,)."""
    order = np.argsort(values, kind="stable")
    new = np.r_[True, np.diff(values[order]) > 0]
    run = np.empty(len(values), dtype=int)
    run[order] = np.cumsum(new) - 1
    return order, np.flatnonzero(new), run


def _centred_midranks(ranking, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mid-ranks minus their mean (n, R), and their sum of squares (R,), in resamples that hold question i counts[i, r]
    times."""
    order, starts, run = ranking
    runs = np.add.reduceat(counts[order], starts, axis=0)
    middle = np.cumsum(runs, axis=0) - runs / 2 - counts.sum(axis=0) / 2
    return middle[run], (runs * middle**2).sum(axis=0)


def _spearman(ranking_x, ranking_y, counts: np.ndarray) -> np.ndarray:
    """Spearman's rho (R,) of the resamples; nan where x or y does not vary."""
    x, xx = _centred_midranks(ranking_x, counts)
    y, yy = _centred_midranks(ranking_y, counts)
    varies = (xx > 1e-9) & (yy > 1e-9)
    return np.where(varies, np.einsum("nr,nr,nr->r", counts, x, y) / np.sqrt(np.where(varies, xx * yy, 1)), np.nan)


def correlation(x, y, clusters, *, confidence: float, resamples: int, seed: int) -> dict:
    """Spearman's rank correlation with a cluster-bootstrap interval, ties at mid-ranks in every resample.

    Returns n_questions, n_dialogues, rho, ci_low, ci_high, undefined_resamples (in which x or y did not vary; left
    out), reason.
    """
    x = statistics.number_array(x, "x")
    y = statistics.number_array(y, "y", x.size)
    index, groups = statistics.dialogue_index(clusters, x.size)
    row = {"n_questions": x.size, "n_dialogues": groups, "rho": None, "ci_low": None, "ci_high": None}
    row["undefined_resamples"] = 0
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        constant = "x" if np.ptp(x) == 0 else "y"
        return row | {"reason": f"no correlation: {constant} is the same for all {x.size} questions"}
    rankings = _ranking(x), _ranking(y)
    row["rho"] = float(_spearman(*rankings, np.ones((x.size, 1)))[0])
    reason = statistics.why_no_interval(groups, groups, "")
    if reason:
        return row | {"reason": reason}
    counts = statistics.resample_counts(groups, resamples, seed).T
    parts = range(0, resamples, RANKED_AT_A_TIME)
    drawn = np.concatenate([_spearman(*rankings, counts[:, i : i + RANKED_AT_A_TIME][index]) for i in parts])
    defined = drawn[np.isfinite(drawn)]
    missing = row["undefined_resamples"] = int(resamples - defined.size)
    if defined.size < 0.95 * resamples:
        return row | {"reason": f"no interval: x or y does not vary in {missing} of {resamples} resamples"}
    row["ci_low"], row["ci_high"] = np.quantile(defined, statistics.tails(groups, confidence)).tolist()
    return row | {"reason": None}
