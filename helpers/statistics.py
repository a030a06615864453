"""Differences between configurations, with what they are worth.

A question is answered by every configuration, so differences are paired by question. The questions of one dialogue share a story and
a history, so they are not independent: the dialogue (cluster) is what gets resampled, flipped and counted. In this file `values` is one
number per question (F1 or exact match in [0, 1], log-probabilities in nats), `clusters` the dialogue's id of each question, `weights`
(none: all ones) what a question counts for, such as its tokens. A mean is sum(weights * values) / sum(weights) over all questions, so
a long dialogue counts more than a short one, as in the score that lm-eval prints.

    interval    percentile interval of the cluster bootstrap, its tails widened from normal to Student's t (Hesterberg, "What Teachers
                Should Know About the Bootstrap", The American Statistician 69(4), 2015). The interval of a single mean is also corrected
                for skewness (BCa: Efron, JASA 82, 1987): a score that is rarely above zero is lopsided, and a difference less so.
                tests/bench_statistics.py compares both with the plain percentile interval and with bootstrap-t.
    p           two-sided sign-flip permutation test: under the null hypothesis the two configurations are exchangeable within a dialogue,
                so each dialogue's summed difference may as well have the other sign.
    detectable  difference that a two-sided 5% t test over this many dialogues finds with 80% power (noncentral t)
    p_holm      p after Holm's step-down adjustment over the family of rows

    >>> import numpy as np
    >>> full = np.tile([1.0, 0.0, 0.5, 1.0], 20)
    >>> quantized = np.where(np.arange(80) % 3 == 0, full / 2, full)
    >>> row = paired(full, quantized, clusters=np.repeat(np.arange(20), 4))
    >>> row["n_dialogues"], round(row["difference"], 3), row["ci_high"] < 0, row["p"] < 0.001
    (20, -0.109, True, True)

Nothing here reads or writes files. Wrong shapes and missing numbers raise StudyError.
"""

import functools
import itertools

import numpy as np
from scipy import optimize, stats

from helpers import StudyError

MIN_DIALOGUES = 10  # below this no interval is credible, and a permutation test has little to permute
MIN_NONZERO = 5  # dialogues that say anything; with fewer, a resample often holds none of them
RESAMPLES = 10_000
SEED = 1234
RANKED_AT_A_TIME = 64  # resamples, so that 8,000 questions stay in a processor's cache
MEASURES = ("n_questions", "n_dialogues", "mean_a", "mean_b", "difference", "ci_low", "ci_high", "p", "detectable")


def _array(values, what: str, n: int | None = None) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or array.size == 0:
        raise StudyError(f"{what}: expected one number per question, found an array of shape {array.shape}")
    if n is not None and array.size != n:
        raise StudyError(f"{what}: {array.size} numbers for {n} questions; compare runs of the same questions")
    if not np.isfinite(array).all():
        raise StudyError(
            f"{what}: {np.count_nonzero(~np.isfinite(array))} of {array.size} numbers are missing or not finite"
        )
    return array


def _groups(clusters, n: int) -> tuple[np.ndarray, int]:
    """Dialogue of each question as 0 .. G-1, and G."""
    ids = np.asarray(clusters)
    if ids.shape != (n,):
        raise StudyError(f"clusters: expected {n} dialogue ids, one per question, found an array of shape {ids.shape}")
    names, index = np.unique(ids, return_inverse=True)
    return index, len(names)


def _weights(weights, n: int) -> np.ndarray:
    if weights is None:
        return np.ones(n)
    array = _array(weights, "weights", n)
    if (array < 0).any() or array.sum() == 0:
        raise StudyError("weights: expected numbers of at least 0 that are not all 0")
    return array


def _totals(columns: np.ndarray, weights: np.ndarray, index: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Per dialogue: weighted sums (G, k) of `columns` (n, k), and sums of the weights (G, 1)."""
    sums = np.stack([np.bincount(index, weights * column, minlength=groups) for column in columns.T], axis=1)
    return sums, np.bincount(index, weights, minlength=groups)[:, None]


@functools.lru_cache(maxsize=2)
def resample_counts(groups: int, resamples: int, seed: int) -> np.ndarray:
    """How often each dialogue is in each resample (resamples, G). All comparisons share it: a resample is then one row of a matmul."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples).astype(float)
    counts.flags.writeable = False
    return counts


@functools.lru_cache(maxsize=1)
def _signs(groups: int, resamples: int, seed: int) -> np.ndarray:
    """Signs of each dialogue's difference (2^G or resamples, G): every pattern where that is no more than `resamples`."""
    if 2**groups <= resamples:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=groups)))
    else:
        signs = np.random.default_rng(seed).integers(0, 2, size=(resamples, groups)) * 2.0 - 1
    signs.flags.writeable = False
    return signs


def _tails(groups: int, confidence: float, skewness: float = 0.0) -> list[float]:
    """Probabilities of the resampled ratio at which the interval ends. `skewness`: BCa's acceleration, also its bias correction."""
    t = stats.t.ppf((1 + confidence) / 2, groups - 1) * np.sqrt(groups / (groups - 1))
    ends = skewness + np.array([-t, t])
    return stats.norm.cdf(skewness + ends / (1 - skewness * ends)).tolist()


def bootstrap_limits(
    sums: np.ndarray, sizes: np.ndarray, counts: np.ndarray, confidence: float = 0.95, skewed: bool = False
) -> np.ndarray:
    """Limits (2, k) of k ratios sum(sums) / sum(sizes) from per-dialogue totals (G, k) and (G, 1 or k), and counts (resamples, G)."""
    groups = len(sums)
    ratios = (counts @ sums) / (counts @ sizes)
    if not skewed:
        return np.quantile(ratios, _tails(groups, confidence), axis=0)
    residuals = sums - sums.sum(axis=0) / sizes.sum(axis=0) * sizes
    squares = (residuals**2).sum(axis=0)
    skewness = (residuals**3).sum(axis=0) / np.where(squares > 0, 6 * squares**1.5, 1)
    return np.stack([np.quantile(r, _tails(groups, confidence, s)) for r, s in zip(ratios.T, skewness)], axis=1)


def standard_error(sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Linearized cluster standard error (k,) of the ratios sum(sums) / sum(sizes)."""
    groups, ratio = len(sums), sums.sum(axis=0) / sizes.sum(axis=0)
    residuals = sums - ratio * sizes
    return np.sqrt(groups / (groups - 1) * (residuals**2).sum(axis=0)) / sizes.sum(axis=0)


def sign_flip_p(sums: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Two-sided p (k,) of summed differences per dialogue (G, k): exact where all 2^G sign patterns are no more than `resamples`."""
    signs = _signs(len(sums), resamples, seed)
    slack = 1e-9 * np.abs(sums).sum(
        axis=0
    )  # sums in another order differ in the last digits, and a tie counts as extreme
    extreme = (np.abs(signs @ sums) >= np.abs(sums.sum(axis=0)) - slack).sum(axis=0)
    return extreme / len(signs) if 2 ** len(sums) <= resamples else (1 + extreme) / (1 + len(signs))


def _noncentrality(df: int, alpha: float, power: float) -> float:
    """Difference over standard error at which a two-sided t test with df degrees of freedom has this power."""
    critical = stats.t.ppf(1 - alpha / 2, df)
    if df > 10_000:
        return float(stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power))
    # The lower tail is left out: it adds less than 1e-5 to a power of 80%.
    return optimize.brentq(
        lambda d: stats.nct.sf(critical, df, d) - power, 0.1, 1.5 * (critical + stats.t.ppf(power, df))
    )


def _why_no_interval(groups: int, nonzero: int, what: str) -> str | None:
    if groups < MIN_DIALOGUES:
        return f"no interval: {groups} dialogues are fewer than {MIN_DIALOGUES}"
    if nonzero < MIN_NONZERO:
        return f"no interval: only {nonzero} of {groups} dialogues {what}, fewer than {MIN_NONZERO}"
    return None


def _compare(differences, means_a, means_b, weights, index, groups, confidence, resamples, seed) -> list[dict]:
    """One row per column of differences (n, k)."""
    sums, sizes = _totals(differences, weights, index, groups)
    enough = groups >= MIN_DIALOGUES
    if enough:
        limits = bootstrap_limits(sums, sizes, resample_counts(groups, resamples, seed), confidence)
        p = sign_flip_p(sums, resamples, seed)
        detectable = _noncentrality(groups - 1, 0.05, 0.8) * standard_error(sums, sizes)
    rows = []
    for k, difference in enumerate(sums.sum(axis=0) / sizes.sum()):
        reason = _why_no_interval(groups, np.count_nonzero(sums[:, k]), "differ")
        rows.append(
            {
                "n_questions": len(differences),
                "n_dialogues": groups,
                "mean_a": float(means_a[k]),
                "mean_b": float(means_b[k]),
                "difference": float(difference),
                "ci_low": None if reason else float(limits[0, k]),
                "ci_high": None if reason else float(limits[1, k]),
                "p": float(p[k]) if enough else None,
                "detectable": None if reason else float(detectable[k]),
                "reason": reason,
            }
        )
    return rows


def paired(
    values_a, values_b, clusters, weights=None, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = SEED
) -> dict:
    """Mean of b minus mean of a over the same questions.

    Returns n_questions, n_dialogues, mean_a, mean_b, difference, ci_low, ci_high, p, detectable (all in the unit of the values) and
    reason: why there is no interval, else none. Raises StudyError if the arrays don't match or hold a missing number.
    """
    a = _array(values_a, "values_a")
    b = _array(values_b, "values_b", a.size)
    index, groups = _groups(clusters, a.size)
    w = _weights(weights, a.size)
    means = [np.average(a, weights=w)], [np.average(b, weights=w)]
    return _compare((b - a)[:, None], *means, w, index, groups, confidence, resamples, seed)[0]


def log_ppl_ratio(nll_a, nll_b, tokens, clusters, **options) -> dict:
    """ln(PPL_b / PPL_a) from each text's summed negative log-likelihood (nats) and its number of scored tokens.

    `paired` per token, so difference = ln(PPL_b / PPL_a) and mean_a, mean_b are nats per token; besides ppl_a, ppl_b, ppl_ratio,
    ppl_ratio_low and ppl_ratio_high (none where there is no interval).
    """
    n = _array(tokens, "tokens")
    if (n <= 0).any():
        raise StudyError("tokens: every text needs at least one scored token; leave out the empty ones")
    row = paired(_array(nll_a, "nll_a", n.size) / n, _array(nll_b, "nll_b", n.size) / n, clusters, weights=n, **options)

    def exp(key):
        return None if row[key] is None else float(np.exp(row[key]))

    ppl = {"ppl_a": exp("mean_a"), "ppl_b": exp("mean_b"), "ppl_ratio": exp("difference")}
    return row | ppl | {"ppl_ratio_low": exp("ci_low"), "ppl_ratio_high": exp("ci_high")}


def interval(
    values, clusters, weights=None, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = SEED
) -> dict:
    """One configuration's mean: n_questions, n_dialogues, mean, ci_low, ci_high, reason."""
    v = _array(values, "values")
    index, groups = _groups(clusters, v.size)
    w = _weights(weights, v.size)
    sums, sizes = _totals(v[:, None], w, index, groups)
    reason = _why_no_interval(groups, np.count_nonzero(sums), "are not zero")
    low, high = None, None
    if not reason:
        low, high = bootstrap_limits(sums, sizes, resample_counts(groups, resamples, seed), confidence, skewed=True)[
            :, 0
        ].tolist()
    mean = float(np.average(v, weights=w))
    return {
        "n_questions": v.size,
        "n_dialogues": groups,
        "mean": mean,
        "ci_low": low,
        "ci_high": high,
        "reason": reason,
    }


def needed(
    values_a, values_b, clusters, difference: float, weights=None, alpha: float = 0.05, power: float = 0.8
) -> dict:
    """How many dialogues like these a two-sided t test would need to find `difference` (in the unit of the values) with this power.

    Returns difference, n_dialogues, n_questions (none, with reason, below 10 dialogues or 5 that differ).
    """
    a = _array(values_a, "values_a")
    b = _array(values_b, "values_b", a.size)
    if difference == 0:
        raise StudyError(
            "difference: 0 cannot be found with any number of dialogues; give the smallest one that matters"
        )
    index, groups = _groups(clusters, a.size)
    sums, sizes = _totals((b - a)[:, None], _weights(weights, a.size), index, groups)
    reason = _why_no_interval(groups, np.count_nonzero(sums), "differ")
    if reason:
        return {
            "difference": difference,
            "n_dialogues": None,
            "n_questions": None,
            "reason": reason.replace("interval", "estimate"),
        }
    spread = float(standard_error(sums, sizes)[0]) * np.sqrt(groups)

    def enough(n: int) -> bool:
        return _noncentrality(n - 1, alpha, power) * spread / np.sqrt(n) <= abs(difference)

    high = 3
    while not enough(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if middle > 2 and enough(middle) else (middle, high)
    return {
        "difference": difference,
        "n_dialogues": high,
        "n_questions": int(np.ceil(high * a.size / groups)),
        "reason": None,
    }


def holm(p_values) -> np.ndarray:
    """Holm's step-down adjustment (Holm 1979) of p values (m,), in their order."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return adjusted


def adjust(rows: list[dict]) -> list[dict]:
    """Rows with p_holm: p adjusted over all rows that have a p, as one family. Join the rows of several calls first."""
    tested = [row for row in rows if row.get("p") is not None]
    adjusted = dict(zip((id(row) for row in tested), holm([row["p"] for row in tested]).tolist()))
    return [row | {"p_holm": adjusted.get(id(row))} for row in rows]


def compare_all(
    table: dict,
    clusters,
    metrics: list[str],
    weights: dict | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> list[dict]:
    """Every pair of configurations on every metric, Holm-adjusted as one family.

    table[configuration][metric] is an array over the same questions (n,); pairs are in the table's order. weights[metric] (n,) where a
    metric has some. Returns rows of metric, a, b, the keys of `paired` and p_holm. A pair of which one side was not measured has a row of
    None with the reason.
    """
    pairs = list(itertools.combinations(table, 2))
    n = len(np.asarray(clusters))
    index, groups = _groups(clusters, n)
    rows = []
    for metric in metrics:
        columns = {
            name: _array(t[metric], f"{name}, {metric}", n) for name, t in table.items() if t.get(metric) is not None
        }
        w = _weights((weights or {}).get(metric), n)
        measured = [(a, b) for a, b in pairs if a in columns and b in columns]
        done = {}
        if measured:
            mean = {name: float(np.average(column, weights=w)) for name, column in columns.items()}
            differences = np.stack([columns[b] - columns[a] for a, b in measured], axis=1)
            sides = [mean[a] for a, _ in measured], [mean[b] for _, b in measured]
            done = dict(zip(measured, _compare(differences, *sides, w, index, groups, confidence, resamples, seed)))
        for a, b in pairs:
            missing = " and ".join(name for name in (a, b) if name not in columns)
            empty = dict.fromkeys(MEASURES) | {"reason": f"{metric} was not measured for {missing}"}
            rows.append({"metric": metric, "a": a, "b": b} | done.get((a, b), empty))
    return adjust(rows)


def intervals_all(table: dict, clusters, metrics: list[str], weights: dict | None = None, **options) -> list[dict]:
    """`interval` of every configuration and metric that was measured: rows of metric, configuration and its keys."""
    return [
        {"metric": metric, "configuration": name}
        | interval(columns[metric], clusters, (weights or {}).get(metric), **options)
        for metric in metrics
        for name, columns in table.items()
        if columns.get(metric) is not None
    ]


def _ranking(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order that sorts the values (n,), where each run of equal values starts in it, and each value's run (n,)."""
    order = np.argsort(values, kind="stable")
    new = np.r_[True, np.diff(values[order]) > 0]
    run = np.empty(len(values), dtype=int)
    run[order] = np.cumsum(new) - 1
    return order, np.flatnonzero(new), run


def _centred_midranks(ranking, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mid-ranks minus their mean (n, R), and their sum of squares (R,), in resamples that hold question i counts[i, r] times."""
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


def correlation(x, y, clusters, confidence: float = 0.95, resamples: int = 2_000, seed: int = SEED) -> dict:
    """Spearman's rank correlation with a cluster-bootstrap interval, ties at mid-ranks in every resample.

    Returns n_questions, n_dialogues, rho, ci_low, ci_high, undefined_resamples (in which x or y did not vary; left out), reason.
    """
    x = _array(x, "x")
    y = _array(y, "y", x.size)
    index, groups = _groups(clusters, x.size)
    row = {
        "n_questions": x.size,
        "n_dialogues": groups,
        "rho": None,
        "ci_low": None,
        "ci_high": None,
        "undefined_resamples": 0,
    }
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return row | {
            "reason": f"no correlation: {'x' if np.ptp(x) == 0 else 'y'} is the same for all {x.size} questions"
        }
    rankings = _ranking(x), _ranking(y)
    row["rho"] = float(_spearman(*rankings, np.ones((x.size, 1)))[0])
    reason = _why_no_interval(groups, groups, "")
    if reason:
        return row | {"reason": reason}
    counts = resample_counts(groups, resamples, seed).T
    parts = range(0, resamples, RANKED_AT_A_TIME)
    drawn = np.concatenate([_spearman(*rankings, counts[:, i : i + RANKED_AT_A_TIME][index]) for i in parts])
    defined = drawn[np.isfinite(drawn)]
    row["undefined_resamples"] = int(resamples - defined.size)
    if defined.size < 0.95 * resamples:
        return row | {
            "reason": f"no interval: x or y does not vary in {row['undefined_resamples']} of {resamples} resamples"
        }
    row["ci_low"], row["ci_high"] = np.quantile(defined, _tails(groups, confidence)).tolist()
    return row | {"reason": None}
