"""Do the rules that give verdicts keep their level? A simulation on made-up dialogues with the shape of ours.

Run by `make bench-statistics`, minutes on 2 cores; writes executed/reference/bench_statistics.json and exits with 1 if
a target is missed. Dialogues of 3 to 25 turns; a turn's score is a step function of a normal latent score, so that it
is often 0 or 1 and else between them, like F1; a dialogue's turns share an offset, in the score and in the difference
between configurations. True means and quantiles are known in closed form.

A row per rule and number n of dialogues (of data sets for the pooled mean, of processes for times): percent (of
simulated studies) beside nominal. Targets: coverage within 2 points of nominal; a wrong verdict (level) in no more than
nominal plus 2 points; 80% power within 5 points from 20 dialogues on. Rows where fewer than half of the studies get an
interval are held to nothing.
"""

import json
import os
import sys
import time
from multiprocessing import Pool
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # two processes share two cores

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from scipy import stats  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from helpers import ranks, statistics  # noqa: E402
from helpers.analysis import durations, power, recovery  # noqa: E402
from helpers.analysis.redraw import redraw  # noqa: E402

TARGET = ROOT / "executed" / "reference" / "bench_statistics.json"
DIALOGUES = (10, 20, 50, 500)
CONFIDENCE, RESAMPLES, BATCH = 0.95, 2_000, 200
LEVELS = np.array([0, 0.25, 0.4, 0.5, 0.67, 0.8, 1.0])
CUTS = np.array([0, 0.08, 0.14, 0.22, 0.3, 0.38])  # latent scores where the next level begins
DIALOGUE_SD = 0.5  # of the latent score; a turn's own is 1
MEAN = -0.1  # latent

# shift: b's latent mean minus a's; flips: sd of b's own noise; offset: sd of a dialogue's own difference
MANY = {"shift": -0.2, "flips": 0.6, "offset": 0.15}
FEW = {"shift": -0.02, "flips": 0.03, "offset": 0.02}
# redraws are slow: fewer studies
STUDIES = {"redraw": 300, "pooled": 1_000, "quantile": 1_000}


def expected(mean: float, sd: float) -> float:
    return float((np.diff(LEVELS) * stats.norm.sf((CUTS - mean) / sd)).sum())


def score(latent):
    return LEVELS[np.searchsorted(CUTS, latent)]


def turns_of(groups: int, rng) -> np.ndarray:
    return np.repeat(np.arange(groups), rng.integers(3, 26, size=groups))


def latent(index, groups: int, studies: int, rng, mean=MEAN) -> np.ndarray:
    return mean + rng.normal(0, DIALOGUE_SD, (groups, studies))[index] + rng.normal(size=(len(index), studies))


def two(groups: int, studies: int, rng, shift, flips, offset):
    """Dialogue of each turn, scores of a and b (n, studies), and their true means."""
    index = turns_of(groups, rng)
    base = latent(index, groups, studies, rng)
    own = rng.normal(0, offset, (groups, studies))[index] + rng.normal(0, flips, base.shape)
    sd = np.hypot(DIALOGUE_SD, 1)
    return (
        index,
        score(base),
        score(base + shift + own),
        expected(MEAN, sd),
        expected(MEAN + shift, np.sqrt(sd**2 + flips**2 + offset**2)),
    )


def sums_of(index, values, groups):
    starts = np.searchsorted(index, np.arange(groups))
    sizes = np.diff(np.r_[starts, len(index)])[:, None].astype(float)
    return np.add.reduceat(values, starts), sizes


def batches(studies: int):
    return [BATCH] * (studies // BATCH)


def seed_of(rng) -> int:
    return int(rng.integers(2**31))


def shares(found: list, given: list) -> tuple[float, float]:
    found, given = np.concatenate(found), np.concatenate(given)
    return (100 * float(found[given].mean()) if given.any() else float("nan")), 100 * float(given.mean())


# ---- a function per rule: (groups, studies, rng) -> (percent of studies, percent that get an interval) ----


def mean_interval(groups, studies, rng, mean=MEAN):
    found, given = [], []
    for many in batches(studies):
        index = turns_of(groups, rng)
        sums, sizes = sums_of(index, score(latent(index, groups, many, rng, mean)), groups)
        counts = statistics.resample_counts(groups, RESAMPLES, seed_of(rng))
        low, high = statistics.bootstrap_limits(sums, sizes, counts, CONFIDENCE, skewed=True)
        truth = expected(mean, np.hypot(DIALOGUE_SD, 1))
        found.append((low <= truth) & (truth <= high))
        given.append(np.count_nonzero(sums, axis=0) >= statistics.MIN_NONZERO)
    return shares(found, given)


def rare_mean(groups, studies, rng):
    return mean_interval(groups, studies, rng, mean=-1.9)


def difference(groups, studies, rng, scenario=MANY, what="coverage"):
    """Coverage of the interval; level of equality at a true difference of the margin; level of a gate at its largest
    loss."""
    found, given = [], []
    for many in batches(studies):
        index, a, b, mean_a, mean_b = two(groups, many, rng, **scenario)
        sums, sizes = sums_of(index, b - a, groups)
        counts, truth = statistics.resample_counts(groups, RESAMPLES, seed_of(rng)), mean_b - mean_a
        given.append(np.count_nonzero(sums, axis=0) >= statistics.MIN_NONZERO)
        if what == "coverage":
            low, high = statistics.bootstrap_limits(sums, sizes, counts, CONFIDENCE)
            found.append((low <= truth) & (truth <= high))
            continue
        low, high = statistics.bootstrap_limits(sums, sizes, counts, 2 * CONFIDENCE - 1)
        margin = abs(truth)
        found.append((low > -margin) & (high < margin) if what == "equality" else low >= -margin)
    return shares(found, given)


def few_change(groups, studies, rng):
    return difference(groups, studies, rng, FEW)


def equality(groups, studies, rng):
    return difference(groups, studies, rng, what="equality")


def gate(groups, studies, rng):
    return difference(groups, studies, rng, what="gate")


def recovered(groups, studies, rng):
    found, given = [], []
    for many in batches(studies):
        index, a, b, mean_a, mean_b = two(groups, many, rng, **MANY)
        (sums_a, sizes), (sums_b, _) = sums_of(index, a, groups), sums_of(index, b, groups)
        counts, truth = statistics.resample_counts(groups, RESAMPLES, seed_of(rng)), mean_b / mean_a
        low, high = statistics.bootstrap_limits(sums_b, sums_a, counts, CONFIDENCE)
        found.append((low <= truth) & (truth <= high))
        error = statistics.standard_error(sums_a, sizes)
        given.append(sums_a.sum(axis=0) / sizes.sum() >= recovery.MIN_RATIO * error)
    return shares(found, given)


def sign_flip(groups, studies, rng, shift=0.0):
    """Exchangeable configurations: both have their own noise and offset."""
    found = []
    for many in batches(studies):
        index = turns_of(groups, rng)
        base = latent(index, groups, many, rng)
        a, b = (
            score(base + rng.normal(0, 0.15, (groups, many))[index] + rng.normal(0, 0.6, base.shape)) for _ in range(2)
        )
        sums, sizes = sums_of(index, b - a, groups)
        found.append(statistics.sign_flip_p(sums + shift * sizes, resamples=RESAMPLES, seed=seed_of(rng)) < 0.05)
    return 100 * float(np.concatenate(found).mean()), 100.0


def powered(groups, studies, rng):
    """Rejections at a true difference of `detectable`, taken from the studies' root mean square error."""
    index = turns_of(groups, rng)
    base = latent(index, groups, BATCH, rng)
    a, b = (score(base + rng.normal(0, 0.15, (groups, BATCH))[index] + rng.normal(0, 0.6, base.shape)) for _ in "ab")
    error = float(np.sqrt((statistics.standard_error(*sums_of(index, b - a, groups)) ** 2).mean()))
    row = {"reason": None, "n_dialogues": groups, "level": 0.05, "standard_error": error}
    return sign_flip(groups, studies, rng, power.detectable(row))


def family(groups, studies, rng, shifted=(), what="level"):
    """Seven formats against full precision, and one pair of them. Level: any null contrast found; coverage: all eight
    held; equality: any of those at the margin called equal."""
    shift, total = -0.3, np.sqrt(DIALOGUE_SD**2 + 1 + 0.4**2 + 0.15**2)
    step = expected(MEAN + shift, total) - expected(MEAN, total)
    effect = np.array([step if k in shifted else 0.0 for k in range(1, 8)])
    truth, found = np.r_[effect, effect[1] - effect[0]], []
    for k in range(studies):
        if k % 50 == 0:
            seed = seed_of(rng)
        index = turns_of(groups, rng)
        base = latent(index, groups, 1, rng)
        own = rng.normal(0, 0.15, (groups, 8))[index] + rng.normal(0, 0.4, (len(index), 8))
        scores = score(base + own + [shift if k in shifted else 0.0 for k in range(8)])
        d = np.c_[scores[:, 1:] - scores[:, :1], scores[:, 2] - scores[:, 1]]
        sums, sizes = sums_of(index, d, groups)
        row = statistics.max_t(sums, sizes, confidence=CONFIDENCE, resamples=RESAMPLES, seed=seed)
        if what == "equality":
            equal = (row["equal_low"] > -abs(step)) & (row["equal_high"] < abs(step))
            found.append(equal[np.abs(truth) > 0].any())
        elif what == "level":
            found.append((row["p_adjusted"][truth == 0] < 1 - CONFIDENCE).any())
        else:
            found.append(((row["adjusted_low"] <= truth) & (truth <= row["adjusted_high"])).all())
    return 100 * float(np.mean(found)), 100.0


def family_some(groups, studies, rng):
    return family(groups, studies, rng, shifted=(4, 5, 6, 7))


def family_equality(groups, studies, rng):
    return family(groups, studies, rng, shifted=range(1, 8), what="equality")


def same_times(processes, studies, rng):
    """Two times whose processes come from one distribution, as wide as eager mode's: called slower?"""
    ms = np.exp(rng.normal(0, 0.3, (2, studies, processes)))
    mine, full = ((np.median(x, axis=1), x.min(axis=1), x.max(axis=1)) for x in ms)
    rows = {"ratio": mine[0] / full[0], "ratio_low": mine[1] / full[2], "ratio_high": mine[2] / full[1]}
    longer = [durations.longer(row) for row in pd.DataFrame(rows).assign(processes=processes).to_dict("records")]
    return 100 * float(np.mean([word == durations.SLOWER for word in longer])), 100.0


def simultaneous(groups, studies, rng):
    return family(groups, studies, rng, shifted=(4, 5, 6, 7), what="coverage")


def redrawn(groups, studies, rng, any_turn=False):
    """The share of 50-question draws that put b above a; the truth from 200,000 draws out of the population."""
    scenario = {"shift": -0.15, "flips": 0.6, "offset": 0.15}

    def pairs(dialogues, turns):
        base = MEAN + rng.normal(0, DIALOGUE_SD, dialogues)[..., None] + rng.normal(size=(*dialogues, turns))
        own = rng.normal(0, scenario["offset"], dialogues)[..., None] + rng.normal(0, scenario["flips"], base.shape)
        return score(base + scenario["shift"] + own) - score(base)

    truth = float(np.mean([(pairs((10_000, 50), 1).mean(axis=(1, 2)) > 1e-9).mean() for _ in range(20)]))
    found, given = [], []
    for _ in range(studies):
        if any_turn:
            index, a, b, *_ = two(groups, 1, rng, **scenario)
            a, b = a[:, 0], b[:, 0]
        else:
            index, a, b = None, np.zeros(groups), pairs((groups,), 1)[:, 0]
        options = {"size": 50, "draws": 1_000, "confidence": CONFIDENCE, "seed": seed_of(rng)}
        result = redraw({"a": a, "b": b}, [("a", "b")], clusters=index, **options)
        row = result["comparisons"][0]
        given.append(row["reason"] is None)
        found.append(given[-1] and row["share_above_low"] <= truth <= row["share_above_high"])
    return shares([np.array(found)], [np.array(given)])


def redrawn_any(groups, studies, rng):
    return redrawn(groups, studies, rng, any_turn=True)


def quantile(groups, studies, rng, probability=0.5):
    """Log-normal divergences, 20 to 200 tokens a dialogue, a tenth of the logarithm's variance between dialogues."""
    truth, found, given = float(np.exp(2 * stats.norm.ppf(probability))), [], []
    for k in range(studies):
        if k % 50 == 0:
            options = {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": seed_of(rng)}
        index = np.repeat(np.arange(groups), rng.integers(20, 201, groups))
        values = np.exp(rng.normal(0, np.sqrt(0.4), groups)[index] + rng.normal(0, np.sqrt(3.6), len(index)))
        (row,) = ranks.quantiles(values, index, [probability], **options)
        given.append(row["ci_low"] is not None)
        found.append(given[-1] and row["ci_low"] <= truth <= (np.inf if row["ci_high"] is None else row["ci_high"]))
    return shares([np.array(found)], [np.array(given)])


def quantile_95(groups, studies, rng):
    return quantile(groups, studies, rng, 0.95)


def quantile_99(groups, studies, rng):
    return quantile(groups, studies, rng, 0.99)


def pooled(sets, studies, rng):
    """Data sets of unlike size whose true differences vary with a standard deviation of 3 points around -5."""
    errors, found = np.linspace(0.01, 0.05, sets), []
    for _ in range(studies):
        row = recovery.pooled(rng.normal(rng.normal(-0.05, 0.03, sets), errors), errors, confidence=CONFIDENCE)
        found.append(row["ci_low"] <= -0.05 <= row["ci_high"])
    return 100 * float(np.mean(found)), 100.0


COVERAGE, LEVEL, POWER = ("coverage", 95), ("level", 5), ("power", 80)
RULES = {
    "interval of a mean": (mean_interval, COVERAGE),
    "interval of a rare success": (rare_mean, COVERAGE),
    "interval of a difference, many answers change": (difference, COVERAGE),
    "interval of a difference, few answers change": (few_change, COVERAGE),
    "equality at the margin": (equality, LEVEL),
    "gate at its threshold": (gate, LEVEL),
    "recovery": (recovered, COVERAGE),
    "sign flips": (sign_flip, LEVEL),
    "power at detectable": (powered, POWER),
    "family of eight, none differs": (family, LEVEL),
    "family of eight, some differ": (family_some, LEVEL),
    "family of eight, equality at the margin": (family_equality, LEVEL),
    "simultaneous intervals": (simultaneous, COVERAGE),
    "redraw last turns": (redrawn, COVERAGE),
    "redraw any turn": (redrawn_any, COVERAGE),
    "quantile 0.5": (quantile, COVERAGE),
    "quantile 0.95": (quantile_95, COVERAGE),
    "quantile 0.99": (quantile_99, COVERAGE),
    "pooled": (pooled, COVERAGE),
    "slower, same times": (same_times, LEVEL),
}
COUNTS = {"pooled": (4, 8), "slower, same times": (3, 5)}  # data sets; processes


def cell(task: tuple[str, int]) -> dict:
    name, groups = task
    rule, (kind, nominal) = RULES[name]
    studies = next((n for part, n in STUDIES.items() if name.startswith(part)), 2_000)
    start = time.perf_counter()
    percent, given = rule(groups, studies, np.random.default_rng([20261, sorted(RULES).index(name), groups]))
    row = {"rule": name, "n": groups, "kind": kind, "nominal": nominal}
    row["percent"] = None if np.isnan(percent) else round(percent, 2)
    seconds = round(time.perf_counter() - start, 1)
    return row | {"given_percent": round(given, 1), "studies": studies, "seconds": seconds}


def missed(row: dict) -> bool:
    if row["given_percent"] < 50 or (row["kind"] == "power" and row["n"] < 20):
        return False
    off = row["percent"] - row["nominal"]
    return {"coverage": abs(off) > 2, "level": off > 2, "power": abs(off) > 5}[row["kind"]]


def main(only: list[str]) -> int:
    start = time.perf_counter()
    names = [name for name in RULES if not only or any(part in name for part in only)]
    tasks = [(name, n) for name in names for n in (COUNTS.get(name, DIALOGUES))]
    with Pool(2) as pool:
        rows = []
        for row in pool.imap(cell, tasks):
            print(row | ({"missed": True} if missed(row) else {}), flush=True)
            rows.append(row)
    bad = [f"{row['rule']}, n = {row['n']}: {row['percent']}%" for row in rows if missed(row)]
    result = {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seconds": round(time.perf_counter() - start)}
    if not only:
        TARGET.write_text(json.dumps(result | {"rows": rows, "missed": bad}, indent=1) + "\n", encoding="utf-8")
        print(f"{TARGET.relative_to(ROOT)} written")
    print(f"{result['seconds']} s; missed: {bad or 'nothing'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
