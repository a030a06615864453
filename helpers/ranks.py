"""Quantiles of clustered values, with an interval.

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


def quantiles(values, clusters, probabilities, *, confidence: float, resamples: int, seed: int) -> list[dict]:
    """Quantiles of clustered values: a row per probability with quantile, ci_low, ci_high, reason.

    The interval of the share of values beyond the quantile, read back through the ordered values (Woodruff, JASA 47,
    1952). That share's interval is Clopper and Pearson's at the effective number of values (Korn and Graubard, Survey
    Methodology 24, 1998): a bootstrap's is too short where few values are beyond. An end beyond the largest value is
    None.
    """
    v = statistics.number_array(values, "values")
    ordered, reached = np.sort(v, kind="stable"), np.arange(1, v.size + 1) / v.size

    def at(share: float) -> float:
        return float(ordered[min(np.searchsorted(reached, share * (1 - statistics.SLACK)), v.size - 1)])

    found = [at(p) for p in probabilities]
    sums, sizes = statistics.totals(np.stack([v <= q for q in found], axis=1).astype(float), clusters)
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
            ends = _share_limits(beyond[:, None], sizes, 1 - p, confidence)
            low, high = at(1 - ends[1]), at(1 - ends[0]) if 1 - ends[0] < reached[-2] else None
        rows.append({"probability": p, "quantile": q, "ci_low": low, "ci_high": high, "reason": reason})
    return rows


def _share_limits(sums, sizes, share: float, confidence: float) -> tuple[float, float]:
    """Limits of a clustered share."""
    groups, clustered = len(sums), float(statistics.standard_error(sums, sizes)[0])
    independent = np.sqrt(share * (1 - share) / sizes.sum())
    shorter = stats.norm.ppf((1 + confidence) / 2) / stats.t.ppf((1 + confidence) / 2, groups - 1)
    n = shorter**2 * sizes.sum() / max(1.0, (clustered / independent) ** 2)
    tail = (1 - confidence) / 2
    return stats.beta.ppf(tail, share * n, n - share * n + 1), stats.beta.isf(tail, share * n + 1, n - share * n)
