"""Differences between configurations, and how much the data can say about them.

Every configuration answers every question, so differences are paired by question. The questions of a dialogue share a
story and a history, so the dialogue (cluster) is what gets resampled, flipped and counted. `values` is one number per
question (F1 or exact match in [0, 1], log-probabilities in nats), `clusters` the dialogue id of each question,
`weights` what a question counts for (tokens; default: all ones). A mean is sum(weights * values) / sum(weights), as in
the score that lm-eval prints: long dialogues count more. Every function takes `confidence`, `resamples` and `seed` from
its caller (params.Statistics) as keyword arguments.

    ci          percentile interval of the cluster bootstrap, its tails widened from normal to Student's t (Hesterberg,
                The American Statistician 69(4), 2015). The interval of a single mean is also corrected for skewness
                (BCa: Efron, JASA 82, 1987).
    p           two-sided sign-flip test: under the null hypothesis two configurations are exchangeable within a
                dialogue, so each dialogue's summed difference may as well have the other sign
    p_adjusted  the same, adjusted over a family by the maximum statistic (`max_t`), with simultaneous intervals
                adjusted_low, adjusted_high
    equal       confidence interval of level 2 * confidence - 1, the one that two one-sided tests of equality use
                (Schuirmann 1987); simultaneous in a family, so that equality is adjusted as well

Two rules give verdicts, everywhere: `differs` and `equivalent`. tests/bench_statistics.py simulates what they promise.

    >>> import numpy as np
    >>> full = np.tile([1.0, 0.0, 0.5, 1.0], 20)
    >>> quantized = np.where(np.arange(80) % 3 == 0, full / 2, full)
    >>> row = paired(full, quantized, np.repeat(np.arange(20), 4), confidence=0.95, resamples=10_000, seed=1)
    >>> row["n_dialogues"], round(row["difference"], 3), differs(row), equivalent(row, 0.015)
    (20, -0.109, 'below', False)

Nothing here reads or writes files. Wrong shapes and missing numbers raise StudyError.
"""

import functools
import itertools
import math

import numpy as np
from scipy import stats

from helpers import StudyError

RIGHT = 0.5  # exact match is a mean over references: an answer is right if at least half of them match
MIN_DIALOGUES = 10  # below this no interval keeps its level (bench_statistics)
MIN_NONZERO = 5  # dialogues that say anything; with fewer, a resample often holds none of them
SLACK = 1e-9  # relative: the same sum in another order differs in its last digits, and a tie counts as extreme


def number_array(values, what: str, n: int | None = None) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or array.size == 0:
        raise StudyError(f"{what}: expected one number per question, found an array of shape {array.shape}")
    if n is not None and array.size != n:
        raise StudyError(f"{what}: {array.size} numbers for {n} questions; compare runs of the same questions")
    if missing := np.count_nonzero(~np.isfinite(array)):
        raise StudyError(f"{what}: {missing} of {array.size} numbers are missing or not finite; evaluate those first")
    return array


def dialogue_index(clusters, n: int) -> tuple[np.ndarray, int]:
    """Dialogue of each question as 0 .. G-1, and G."""
    ids = np.asarray(clusters)
    if ids.shape != (n,):
        raise StudyError(f"clusters: expected {n} dialogue ids, one per question, found an array of shape {ids.shape}")
    names, index = np.unique(ids, return_inverse=True)
    return index, len(names)


def totals(columns: np.ndarray, clusters, weights=None) -> tuple[np.ndarray, np.ndarray]:
    """Per dialogue: weighted sums (G, k) of `columns` (n, k), and sums of the weights (G, 1)."""
    index, groups = dialogue_index(clusters, len(columns))
    w = np.ones(len(columns)) if weights is None else number_array(weights, "weights", len(columns))
    if (w < 0).any() or w.sum() == 0:
        raise StudyError("weights: expected numbers of at least 0 that are not all 0")
    sums = np.stack([np.bincount(index, w * column, minlength=groups) for column in columns.T], axis=1)
    return sums, np.bincount(index, w, minlength=groups)[:, None]


@functools.lru_cache(maxsize=8)
def resample_counts(groups: int, resamples: int, seed: int) -> np.ndarray:
    """How often each dialogue is in each resample (resamples, G). All comparisons share it."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples).astype(float)
    counts.flags.writeable = False
    return counts


@functools.lru_cache(maxsize=4)
def _signs(groups: int, resamples: int, seed: int) -> np.ndarray:
    """Signs of each dialogue's difference (2^G or resamples, G): every pattern where that is no more than
    `resamples`."""
    if 2**groups <= resamples:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=groups)))
    else:
        signs = np.random.default_rng(seed).integers(0, 2, size=(resamples, groups)) * 2.0 - 1
    signs.flags.writeable = False
    return signs


def tails(groups: int, confidence: float, skewness: float = 0.0) -> np.ndarray:
    """Probabilities (2,) of the resampled statistic at which an interval ends. `skewness`: BCa's acceleration, also its
    bias correction."""
    t = stats.t.ppf((1 + confidence) / 2, groups - 1) * np.sqrt(groups / (groups - 1))
    ends = skewness + np.array([-t, t])
    return stats.norm.cdf(skewness + ends / (1 - skewness * ends))


def bootstrap_limits(sums, sizes, counts, confidence: float, skewed: bool = False) -> np.ndarray:
    """Limits (2, k) of k ratios sum(sums) / sum(sizes) from per-dialogue totals (G, k) and (G, 1 or k), and counts
    (resamples, G)."""
    groups = len(sums)
    ratios = (counts @ sums) / (counts @ sizes)
    if not skewed:
        return np.quantile(ratios, tails(groups, confidence), axis=0)
    residuals = sums - sums.sum(axis=0) / sizes.sum(axis=0) * sizes
    squares = (residuals**2).sum(axis=0)
    skewness = (residuals**3).sum(axis=0) / np.where(squares > 0, 6 * squares**1.5, 1)
    return np.stack([np.quantile(r, tails(groups, confidence, s)) for r, s in zip(ratios.T, skewness)], axis=1)


def standard_error(sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Linearized cluster standard error (k,) of the ratios sum(sums) / sum(sizes)."""
    groups, ratio = len(sums), sums.sum(axis=0) / sizes.sum(axis=0)
    residuals = sums - ratio * sizes
    return np.sqrt(groups / (groups - 1) * (residuals**2).sum(axis=0)) / sizes.sum(axis=0)


def _share_as_extreme(drawn: np.ndarray, groups: int, observed: np.ndarray) -> np.ndarray:
    """p (k,) of observed statistics among drawn ones (B,) or (B, k); random patterns count the observed one as drawn
    too."""
    exact = len(drawn) == 2**groups
    drawn = drawn if drawn.ndim == 2 else drawn[:, None]
    extreme = (drawn >= observed * (1 - SLACK)).sum(axis=0)
    return extreme / len(drawn) if exact else (1 + extreme) / (1 + len(drawn))


def sign_flip_p(sums: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Two-sided p (k,) of summed differences per dialogue (G, k): exact where all 2^G sign patterns are no more than
    `resamples`."""
    drawn = np.abs(_signs(len(sums), resamples, seed) @ sums)
    return _share_as_extreme(drawn, len(sums), np.abs(sums.sum(axis=0)))


def _unit(columns: np.ndarray) -> np.ndarray:
    norms = np.sqrt((columns**2).sum(axis=0))
    return columns / np.where(norms > 0, norms, 1)


def max_t(sums: np.ndarray, sizes: np.ndarray, *, confidence: float, resamples: int, seed: int) -> dict:
    """Joint adjustment of k differences over their family, from per-dialogue totals (G, k) and (G, 1).

    Westfall and Young's single-step maximum (1993). The statistic of a difference d is
    z(d) = |sum(S - d n)| / sqrt(sum((S - d n)^2)) over the dialogues' sums S and sizes n: a monotone function of
    Student's t that no sign flip rescales. One matrix of signs flips all k columns at once, which keeps their
    correlation. Two reference distributions of the maximum over k: the sums themselves flipped (exact if no
    configuration differs) and their residuals flipped (keeps the level of the others where some do differ).
    p_adjusted is the larger p of the two, and the critical value the larger one. The interval is every d
    with z(d) <= critical, a quadratic in d: it excludes 0 exactly if p_adjusted < 1 - confidence.

    Returns p_adjusted, adjusted_low, adjusted_high, equal_low, equal_high (k,) (limits are infinite where dialogues are
    too few or too unequal), and level: the two-sided level of a single t test that is as strict.
    """
    groups, signs = len(sums), _signs(len(sums), resamples, seed)
    observed = np.abs(_unit(sums).sum(axis=0))
    residuals = sums - sums.sum(axis=0) / sizes.sum() * sizes
    drawn = [np.sort(np.abs(signs @ _unit(columns)).max(axis=1)) for columns in (sums, residuals)]
    found = {"p_adjusted": np.maximum(*(_share_as_extreme(d, groups, observed) for d in drawn))}
    criticals = [max(_critical(d, groups, c) for d in drawn) for c in (confidence, 2 * confidence - 1)]
    for name, critical in zip(("adjusted", "equal"), criticals):
        found[f"{name}_low"], found[f"{name}_high"] = _inverted(sums, sizes, critical)
    c2 = criticals[0] ** 2
    t = math.sqrt(c2 * (groups - 1) / (groups - c2)) if c2 < groups else math.inf
    return found | {"level": float(2 * stats.t.sf(t, groups - 1))}


def _critical(drawn: np.ndarray, groups: int, confidence: float) -> float:
    """The sorted maximum (B,) at the fewest at least as extreme for which p is no less than 1 - confidence."""
    extra = 0 if len(drawn) == 2**groups else 1
    rank = max(0, math.floor((1 - confidence) * len(drawn)) - 2)
    while (extra + rank) / (extra + len(drawn)) < 1 - confidence:
        rank += 1
    return drawn[-rank] * (1 + SLACK) if rank else math.inf


def _inverted(sums: np.ndarray, sizes: np.ndarray, critical: float) -> tuple[np.ndarray, np.ndarray]:
    """Ends (k,) of the differences whose statistic is no more than `critical`."""
    c2, total, n = critical**2, sums.sum(axis=0), sizes.sum()
    a = n**2 - c2 * (sizes**2).sum()
    if not np.isfinite(a) or a <= 0 or c2 >= len(sums):
        return np.full(len(total), -math.inf), np.full(len(total), math.inf)
    b = total * n - c2 * (sums * sizes).sum(axis=0)
    root = np.sqrt(np.maximum(0, b**2 - a * (total**2 - c2 * (sums**2).sum(axis=0))))
    return (b - root) / a, (b + root) / a


def why_no_interval(groups: int, nonzero: int, what: str) -> str | None:
    if groups < MIN_DIALOGUES:
        return f"no interval: {groups} dialogues are fewer than {MIN_DIALOGUES}"
    if nonzero < MIN_NONZERO:
        return f"no interval: only {nonzero} of {groups} dialogues {what}, fewer than {MIN_NONZERO}"
    return None


def compare(
    columns, clusters, pairs, family=False, weights=None, *, confidence: float, resamples: int, seed: int
) -> list[dict]:
    """A row for each pair (a, b) of columns (mapping or DataFrame of arrays (n,) over the same questions): b minus a.

    Rows have a, b, n_questions, n_dialogues, mean_a, mean_b, difference, standard_error, ci_low, ci_high, equal_low,
    equal_high, p, p_adjusted, adjusted_low, adjusted_high, level (of a single t test as strict as the row's),
    confidence, family ("primary" or "exploratory") and reason (why there is no interval, else None). family: the pairs
    are fixed by rule and adjusted together (`max_t`); otherwise each row stands alone, p_adjusted and its
    interval are None. Raises StudyError if the arrays don't match or hold a missing number.
    """
    if not pairs:
        return []
    n = len(np.asarray(clusters))
    arrays = {name: number_array(columns[name], str(name), n) for name in dict.fromkeys(itertools.chain(*pairs))}
    sums, sizes = totals(np.stack([arrays[b] - arrays[a] for a, b in pairs], axis=1), clusters, weights)
    groups, enough = len(sums), len(sums) >= MIN_DIALOGUES
    options = {"resamples": resamples, "seed": seed}
    if enough:
        counts = resample_counts(groups, **options)
        own = {"standard_error": standard_error(sums, sizes)}
        for name, level in (("ci", confidence), ("equal", 2 * confidence - 1)):
            own[f"{name}_low"], own[f"{name}_high"] = bootstrap_limits(sums, sizes, counts, level)
        p, level = sign_flip_p(sums, **options), 1 - confidence
        if family:
            own |= max_t(sums, sizes, confidence=confidence, **options)
            level = own.pop("level")
    rows = []
    for k, (a, b) in enumerate(pairs):
        reason = why_no_interval(groups, np.count_nonzero(sums[:, k]), "differ")
        if enough and not reason and not all(np.isfinite(values[k]) for values in own.values()):
            reason = "no interval: the dialogues are of too unequal length"
        rows.append(
            {"a": a, "b": b, "n_questions": n, "n_dialogues": groups}
            | {f"mean_{side}": float(np.average(arrays[x], weights=weights)) for side, x in (("a", a), ("b", b))}
            | {"difference": float(sums[:, k].sum() / sizes.sum())}
            | dict.fromkeys(LIMITS.split())
            | ({} if reason else {key: float(values[k]) for key, values in own.items()})
            | {"p": float(p[k]) if enough else None, "level": level if enough else None}
            | {"confidence": confidence, "family": "primary" if family else "exploratory", "reason": reason}
        )
    return rows


LIMITS = "standard_error ci_low ci_high equal_low equal_high p_adjusted adjusted_low adjusted_high"


def paired(values_a, values_b, clusters, weights=None, *, confidence: float, resamples: int, seed: int) -> dict:
    """`compare` of one pair, named a and b, on its own."""
    a = number_array(values_a, "values_a")
    columns = {"a": a, "b": number_array(values_b, "values_b", a.size)}
    dialogue_index(clusters, a.size)
    options = {"confidence": confidence, "resamples": resamples, "seed": seed}
    return compare(columns, clusters, [("a", "b")], False, weights, **options)[0]


def differs(row) -> str | None:
    """The one rule for "differs", in tables, figures and claims: "below", "above" (b against a), or None.

    A primary row: p_adjusted < 1 - confidence, which is the same as: the simultaneous interval excludes 0 (`max_t`
    makes them agree). An exploratory row has no adjustment: its own interval excludes 0, and whoever shows it says that
    it is exploratory.
    """
    if row["ci_low"] is None or row["ci_low"] != row["ci_low"]:  # a DataFrame turns None into NaN
        return None
    clear = row["ci_low"] > 0 or row["ci_high"] < 0
    if row["family"] == "primary":
        clear = row["p_adjusted"] < 1 - row["confidence"]
    return ("above" if row["difference"] > 0 else "below") if clear else None


def equivalent(row, margin: float) -> bool:
    """Two one-sided tests: does the interval of level 2 * confidence - 1 lie within the margin on either side of 0?"""
    low, high = row["equal_low"], row["equal_high"]
    return low is not None and bool(-margin < low and high < margin)


def verdict(row, margin: float) -> str:
    """ "below", "above", "equal within M points" (margin is in [0, 1]) or "n too small to say"; a difference comes
    before equality."""
    otherwise = f"equal within {100 * margin:g} points" if equivalent(row, margin) else "n too small to say"
    return differs(row) or otherwise


def log_ppl_ratio(nll_a, nll_b, tokens, clusters, *, confidence: float, resamples: int, seed: int) -> dict:
    """ln(PPL_b / PPL_a) from each text's summed negative log-likelihood (nats) and its number of scored tokens.

    `paired` per token, so difference = ln(PPL_b / PPL_a) and mean_a, mean_b are nats per token; besides ppl_a, ppl_b
    and ppl_ratio.
    """
    n = number_array(tokens, "tokens")
    if (n <= 0).any():
        raise StudyError("tokens: every text needs at least one scored token; leave out the empty ones")
    a, b = number_array(nll_a, "nll_a", n.size) / n, number_array(nll_b, "nll_b", n.size) / n
    row = paired(a, b, clusters, weights=n, confidence=confidence, resamples=resamples, seed=seed)
    named = {"ppl_a": "mean_a", "ppl_b": "mean_b", "ppl_ratio": "difference"}
    return row | {key: math.exp(row[of]) for key, of in named.items()}


def interval(values, clusters, *, confidence: float, resamples: int, seed: int) -> dict:
    """One configuration's mean: n_questions, n_dialogues, mean, standard_error (clustered), question_error (as if
    questions were independent), design_effect (the square of their ratio), ci_low, ci_high, reason."""
    v = number_array(values, "values")
    sums, sizes = totals(v[:, None], clusters)
    groups, reason = len(sums), why_no_interval(len(sums), np.count_nonzero(sums), "are not zero")
    mine, question, low, high = None, None, None, None
    if groups > 1:
        each = v[:, None], np.ones((v.size, 1))
        mine, question = (float(standard_error(*p)[0]) for p in ((sums, sizes), each))
    if not reason:
        counts = resample_counts(groups, resamples, seed)
        low, high = bootstrap_limits(sums, sizes, counts, confidence, skewed=True)[:, 0].tolist()
    row = {"n_questions": v.size, "n_dialogues": groups, "mean": float(v.mean())}
    row |= {"standard_error": mine, "question_error": question, "ci_low": low, "ci_high": high, "reason": reason}
    return row | {"design_effect": (mine / question) ** 2 if question else None}
