"""What a quantized configuration keeps of another one's score: recovery, a gate on it, flips, the mean over data
sets.

Statistics as in helpers.statistics, from the same arrays; a is the configuration to compare with, b the quantized one.
"""

import math

import numpy as np
from scipy import stats
from statsmodels.stats.meta_analysis import combine_effects

from helpers import StudyError, statistics
from helpers.analysis import power

MIN_RATIO = 3  # standard errors between a denominator and zero; nearer, a ratio of means has no useful interval


def recovery(values_a, values_b, clusters, *, confidence: float, resamples: int, seed: int) -> dict:
    """Mean of b over mean of a, per cent: recovery, ci_low, ci_high, equal_low, equal_high (level 2 * confidence -
    1), n_questions, n_dialogues, reason. Undefined (None) where a's mean is within MIN_RATIO standard errors of
    0."""
    a = statistics.number_array(values_a, "values_a")
    both = np.stack([a, statistics.number_array(values_b, "values_b", a.size)], axis=1)
    sums, sizes = statistics.totals(both, clusters)
    groups = len(sums)
    row = dict.fromkeys(("recovery", "ci_low", "ci_high", "equal_low", "equal_high"))
    row |= {"n_questions": a.size, "n_dialogues": groups}
    mean = sums[:, 0].sum() / sizes.sum()
    if mean <= 0 or (groups > 1 and mean < MIN_RATIO * statistics.standard_error(sums[:, :1], sizes)[0]):
        return row | {"reason": f"no recovery: the mean to compare with, {mean:.3g}, is too near zero"}
    row["recovery"] = float(100 * sums[:, 1].sum() / sums[:, 0].sum())
    reason = statistics.why_no_interval(groups, np.count_nonzero(sums[:, 0] - sums[:, 1]), "differ")
    if not reason:
        counts = statistics.resample_counts(groups, resamples, seed)
        for name, level in (("ci", confidence), ("equal", 2 * confidence - 1)):
            ends = 100 * statistics.bootstrap_limits(sums[:, 1:], sums[:, :1], counts, level)[:, 0]
            row |= {f"{name}_low": float(ends[0]), f"{name}_high": float(ends[1])}
    return row | {"reason": reason}


def gate(
    values_a, values_b, clusters, least_recovery: float, largest_loss: float, *, confidence, resamples, seed
) -> dict:
    """May b take a's place? Both one-sided bounds at this confidence must agree: recovery (per cent) is no less than
    least_recovery, and the mean falls by no more than largest_loss (in the unit of the values).

    Returns gate ("pass", "fail", "too small"), recovery and difference with their one-sided bounds (`recovery_bound`,
    `difference_bound`), n_dialogues, and needed: dialogues for 80% power to pass if the estimates are the truth
    (infinite if they miss a threshold). "fail": an upper bound misses a threshold. Raises StudyError like `paired`.
    """
    options = {"confidence": confidence, "resamples": resamples, "seed": seed}
    share = recovery(values_a, values_b, clusters, **options)
    row = statistics.paired(values_a, values_b, clusters, **options)
    found = {"recovery": share["recovery"], "difference": row["difference"], "n_dialogues": row["n_dialogues"]}
    found |= {"recovery_bound": share["equal_low"], "difference_bound": row["equal_low"]}
    reason = row["reason"] or share["reason"]
    if reason:
        return found | {"gate": "too small", "needed": None, "reason": reason}
    passed = share["equal_low"] >= least_recovery and row["equal_low"] >= -largest_loss
    failed = share["equal_high"] < least_recovery or row["equal_high"] < -largest_loss
    # a loss of recovery by one point is a loss of 0.01 of a's mean
    room = row["difference"] + min(largest_loss, (1 - least_recovery / 100) * row["mean_a"])
    spread = row["standard_error"] * math.sqrt(row["n_dialogues"])
    many = power.sample_size(room, spread, 2 * (1 - confidence)) if room > 0 else math.inf
    return found | {"gate": "pass" if passed else "fail" if failed else "too small", "needed": many, "reason": None}


def flips(right_a, right_b, clusters, *, confidence: float, resamples: int, seed: int) -> dict:
    """Answers that change between right and wrong, in per cent: right_to_wrong, wrong_to_right (of all questions),
    lost (right_to_wrong of a's right answers); net (wrong_to_right less right_to_wrong) with ci_low, ci_high and a
    clustered sign-flip p; n_questions, n_dialogues, reason. What full precision itself flips at another batch size
    is the floor to show beside it."""
    a, b = statistics.number_array(right_a, "right_a") > 0, statistics.number_array(right_b, "right_b") > 0
    row = statistics.paired(100.0 * a, 100.0 * b, clusters, confidence=confidence, resamples=resamples, seed=seed)
    found = {"right_to_wrong": float(100 * (a & ~b).mean()), "wrong_to_right": float(100 * (~a & b).mean())}
    found |= {"lost": float(100 * (a & ~b).sum() / a.sum()) if a.any() else None, "net": row["difference"]}
    return found | {key: row[key] for key in ("n_questions", "n_dialogues", "ci_low", "ci_high", "p", "reason")}


def pooled(estimates, standard_errors, *, confidence: float) -> dict:
    """Random-effects mean over k data sets (Paule and Mandel 1982, interval of Hartung and Knapp): mean, ci_low,
    ci_high, q, q_p (Cochran's test that all share one value), i2 (per cent of the variance that is between data sets),
    tau (its standard deviation), data_sets. Raises StudyError for fewer than two."""
    effects = statistics.number_array(estimates, "estimates")
    errors = statistics.number_array(standard_errors, "standard_errors", effects.size)
    if effects.size < 2 or (errors <= 0).any():
        raise StudyError("pooled: at least two data sets with a standard error above 0 are needed")
    with np.errstate(divide="ignore"):  # I2 of equal estimates
        result = combine_effects(effects, errors**2, method_re="iterated", use_t=True)
    # never shorter than the fixed-effect error, as the plain Hartung-Knapp interval can be with few data sets
    error = max(result.sd_eff_w_re_hksj, result.sd_eff_w_re)
    half = stats.t.ppf((1 + confidence) / 2, effects.size - 1) * error
    found = {"mean": result.mean_effect_re, "ci_low": result.mean_effect_re - half}
    found |= {"ci_high": result.mean_effect_re + half, "q": result.q, "q_p": stats.chi2.sf(result.q, effects.size - 1)}
    found |= {"i2": max(0, 100 * result.i2) if result.q > 0 else 0, "tau": math.sqrt(max(0, result.tau2))}
    return {"data_sets": effects.size} | {key: float(value) for key, value in found.items()}
