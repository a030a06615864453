"""Do the intervals cover 95% and does the test keep 5%? A simulation on made-up dialogues with the shape of ours.

Run by `make bench-statistics`, about three minutes on 2 cores; writes executed/reference/bench_statistics.json and exits with 1 if a target
is missed. Dialogues of 8 to 15 turns; a turn's score is a step function of a normal latent score, so that it is often 0 or 1 and
else between them, like F1; a dialogue's turns share an offset, in the score and in the difference between configurations. The true
mean is then known in closed form.

Targets: coverage within 2 points of 95%; rejections of a true null hypothesis no more than 5% plus three standard errors of the simulation;
power at `detectable` from 75% to 85%, from 20 dialogues on. Cells where less than half of the simulated studies get an interval at all (too
few dialogues that say anything) are listed and held to nothing.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from helpers import statistics  # noqa: E402
from helpers.analysis.redraw import redraw  # noqa: E402

TARGET = ROOT / "executed" / "reference" / "bench_statistics.json"
DIALOGUES = (10, 20, 50, 100, 500)
STUDIES, BATCH, RESAMPLES = 8_000, 200, 2_000
LEVELS = np.array([0, 0.25, 0.4, 0.5, 0.67, 0.8, 1.0])
CUTS = np.array([0, 0.08, 0.14, 0.22, 0.3, 0.38])  # latent scores where the next level begins
DIALOGUE_SD = 0.5  # of the latent score; a turn's own is 1

# mean: latent mean; shift: b's minus a's; flips: sd of a configuration's own noise; offset: sd of a dialogue's own difference
SCENARIOS = {
    "mean F1": {"mean": -0.1},
    "mean of a rare success": {"mean": -1.9},
    "difference, many answers change": {"mean": -0.1, "shift": -0.2, "flips": 0.6, "offset": 0.15},
    "difference, few answers change": {"mean": -0.1, "shift": -0.02, "flips": 0.03, "offset": 0.02},
}


def expected_score(mean: float, sd: float) -> float:
    return float((np.diff(LEVELS) * stats.norm.sf((CUTS - mean) / sd)).sum())


def make(scenario: dict, groups: int, studies: int, rng):
    """Dialogue of each turn, scores or differences (n, studies), weights (n, 1 or studies), and the true (weighted) mean."""
    index = np.repeat(np.arange(groups), rng.integers(8, 16, size=groups))
    n = len(index)
    mean, flips, offset = scenario["mean"], scenario.get("flips", 0), scenario.get("offset", 0)
    common = mean + rng.normal(0, DIALOGUE_SD, (groups, studies))[index] + rng.normal(size=(n, studies))
    if "shift" not in scenario:
        return (
            index,
            LEVELS[np.searchsorted(CUTS, common)],
            np.ones((n, 1)),
            expected_score(mean, np.hypot(DIALOGUE_SD, 1)),
        )

    def scores(shift, flips, offset):
        latent = common + shift + rng.normal(0, offset, (groups, studies))[index] + rng.normal(0, flips, (n, studies))
        sd = np.sqrt(DIALOGUE_SD**2 + 1 + offset**2 + flips**2)
        return LEVELS[np.searchsorted(CUTS, latent)], expected_score(mean + shift, sd)

    # With exchangeable configurations both have their own noise and offset, and the null hypothesis of the test holds exactly.
    a, true_a = scores(0, flips, offset) if scenario["shift"] == 0 else scores(0, 0, 0)
    b, true_b = scores(scenario["shift"], flips, offset)
    return index, b - a, np.ones((n, 1)), true_b - true_a


def make_log_probabilities(groups: int, studies: int, rng):
    """Differences of nats per token, skewed, weighted by the tokens of an answer."""
    index = np.repeat(np.arange(groups), rng.integers(8, 16, size=groups))
    tokens = rng.geometric(0.35, size=(len(index), studies)).astype(float)
    skewed = (rng.gamma(0.5, 1.0, tokens.shape) - 0.5) / np.sqrt(tokens)
    return index, 0.1 + rng.normal(0, 0.15, (groups, studies))[index] + skewed, tokens, 0.1


def totals(index, values, weights, groups):
    starts = np.searchsorted(index, np.arange(groups))
    return np.add.reduceat(values * weights, starts), np.add.reduceat(np.broadcast_to(weights, values.shape), starts)


def other_limits(sums, sizes, counts):
    """The intervals that were not chosen: plain percentile, and bootstrap-t."""
    groups, ratio, error = len(sums), sums.sum(axis=0) / sizes.sum(axis=0), statistics.standard_error(sums, sizes)
    drawn_sizes = counts @ sizes
    drawn = (counts @ sums) / drawn_sizes
    squares = counts @ sums**2 - 2 * drawn * (counts @ (sums * sizes)) + drawn**2 * (counts @ sizes**2)
    errors = np.sqrt(np.maximum(squares, 0) * groups / (groups - 1)) / drawn_sizes
    studentized = (drawn - ratio) / np.maximum(errors, 1e-9)
    low, high = np.quantile(studentized, [0.025, 0.975], axis=0)
    return {
        "percentile": np.quantile(drawn, [0.025, 0.975], axis=0),
        "bootstrap-t": np.stack([ratio - high * error, ratio - low * error]),
    }


def coverage(groups: int, maker, rng, skewed: bool) -> dict:
    """Per cent of simulated studies whose interval holds the true value, by kind of interval, among those that get an interval."""
    held = {}
    given = []
    for _ in range(STUDIES // BATCH):
        index, values, weights, truth = maker(groups, BATCH, rng)
        sums, sizes = totals(index, values, weights, groups)
        counts = statistics.resample_counts(groups, RESAMPLES, int(rng.integers(2**31)))
        given.append(np.count_nonzero(sums, axis=0) >= statistics.MIN_NONZERO)
        chosen = statistics.bootstrap_limits(sums, sizes, counts, skewed=skewed)
        for kind, (low, high) in ({"chosen": chosen} | other_limits(sums, sizes, counts)).items():
            held.setdefault(kind, []).append((low <= truth) & (truth <= high))
    given = np.concatenate(given)
    percent = {
        kind: round(100 * float(np.concatenate(parts)[given].mean()), 2) if given.any() else None
        for kind, parts in held.items()
    }
    return {"dialogues": groups, "given_percent": round(100 * float(given.mean()), 1), "coverage_percent": percent}


def level(groups: int, scenario: dict, rng) -> dict:
    """Per cent of simulated studies without a true difference in which p <= 0.05."""
    rejected = []
    for _ in range(STUDIES // BATCH):
        index, values, weights, truth = make(scenario, groups, BATCH, rng)
        sums, _ = totals(index, values - truth, weights, groups)
        rejected.append(statistics.sign_flip_p(sums, RESAMPLES, int(rng.integers(2**31))) <= 0.05)
    return {"dialogues": groups, "rejected_percent": round(100 * float(np.concatenate(rejected).mean()), 2)}


def power(groups: int, rng) -> dict:
    """Per cent of simulated studies with a true difference of `detectable` (at the studies' root mean square error) in which p <= 0.05."""
    scenario = SCENARIOS["difference, many answers change"]
    batches = [make(scenario, groups, BATCH, rng) for _ in range(STUDIES // BATCH)]
    sums = [totals(index, values - truth, weights, groups) for index, values, weights, truth in batches]
    errors = np.concatenate([statistics.standard_error(*pair) for pair in sums])
    detectable = statistics._noncentrality(groups - 1, 0.05, 0.8) * float(np.sqrt((errors**2).mean()))
    p = [statistics.sign_flip_p(s + detectable * sizes, RESAMPLES, int(rng.integers(2**31))) for s, sizes in sums]
    rejected = np.concatenate(p) <= 0.05
    return {
        "dialogues": groups,
        "detectable": round(detectable, 4),
        "rejected_percent": round(100 * float(rejected.mean()), 2),
    }


def rank_coverage(groups: int, rng, studies: int = 1_000) -> dict:
    """Spearman of two clustered normals with Pearson correlation r, whose true value is 6/pi asin(r/2)."""
    r = 0.5
    truth = 6 / np.pi * np.arcsin(r / 2)
    held = 0
    for study in range(studies):
        index = np.repeat(np.arange(groups), rng.integers(8, 16, size=groups))
        x, z = (
            np.sqrt(0.2) * rng.normal(size=groups)[index] + np.sqrt(0.8) * rng.normal(size=len(index)) for _ in range(2)
        )
        row = statistics.correlation(x, r * x + np.sqrt(1 - r**2) * z, index, resamples=500, seed=study)
        held += row["ci_low"] <= truth <= row["ci_high"]
    return {"dialogues": groups, "studies": studies, "coverage_percent": round(100 * float(held) / studies, 2)}


def full_size(rng) -> dict:
    """Seconds and peak memory of all statistics for 8,000 questions, seven configurations and six metrics."""
    n, groups = 8_000, 500
    clusters = np.repeat(np.arange(groups), 16)
    metrics = ["f1", "em", "logprob", "f1_last", "tokens", "kl"]
    names = ["fp16", "nf4", "fp4", "int8", "fp8", "gptq", "awq"]
    table = {name: {metric: LEVELS[np.searchsorted(CUTS, rng.normal(size=n))] for metric in metrics} for name in names}
    seconds = {}

    def timed(what, call):
        start = time.perf_counter()
        result = call()
        seconds[what] = round(time.perf_counter() - start, 2)
        return result

    rows = timed("compare_all", lambda: statistics.compare_all(table, clusters, metrics))
    timed("intervals_all", lambda: statistics.intervals_all(table, clusters, metrics))
    kl = rng.gamma(0.5, size=n)
    timed("correlation", lambda: [statistics.correlation(table[name]["f1"], kl, clusters) for name in names[1:]])
    f1 = {name: table[name]["f1"] for name in names}
    pairs = {(row["a"], row["b"]): [0.051, 0.089] for row in rows if row["metric"] == "f1"}
    timed("redraw", lambda: redraw({name: values[15::16] for name, values in f1.items()}, pairs))
    timed("redraw, any turn", lambda: redraw(f1, pairs, clusters=clusters))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "comparisons": len(rows),
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 2),
        "peak_gib": round(peak, 2),
    }


def main() -> int:
    rng = np.random.default_rng(20261)
    result = {
        "studies": STUDIES,
        "resamples": RESAMPLES,
        "full_size": full_size(rng),
        "coverage": {},
        "level": {},
        "missed": [],
    }
    print(f"8,000 questions, 7 configurations: {result['full_size']}")
    if result["full_size"]["total_seconds"] > 20 or result["full_size"]["peak_gib"] > 6:
        result["missed"].append("full size: more than 20 s or 6 GiB")
    makers = {name: lambda *args, s=scenario: make(s, *args) for name, scenario in SCENARIOS.items()}
    makers["ln(PPL ratio)"] = make_log_probabilities
    for name, maker in makers.items():
        result["coverage"][name] = [coverage(groups, maker, rng, name.startswith("mean")) for groups in DIALOGUES]
        for row in result["coverage"][name]:
            print(f"coverage, {name}: {row}")
            if row["given_percent"] >= 50 and abs(row["coverage_percent"]["chosen"] - 95) > 2:
                result["missed"].append(
                    f"coverage, {name}, {row['dialogues']} dialogues: {row['coverage_percent']['chosen']}%"
                )
    result["coverage"]["Spearman"] = [rank_coverage(groups, rng) for groups in (10, 50, 100)]
    for row in result["coverage"]["Spearman"]:
        print(f"coverage, Spearman: {row}")
        if abs(row["coverage_percent"] - 95) > 2:
            result["missed"].append(f"coverage, Spearman, {row['dialogues']} dialogues: {row['coverage_percent']}%")
    nulls = {
        "exchangeable, many answers change": SCENARIOS["difference, many answers change"] | {"shift": 0},
        "exchangeable, few answers change": SCENARIOS["difference, few answers change"] | {"shift": 0},
        "equal means, different spread": SCENARIOS["difference, many answers change"],
    }
    limit = 5 + 3 * 100 * np.sqrt(0.05 * 0.95 / STUDIES)
    for name, scenario in nulls.items():
        result["level"][name] = [level(groups, scenario, rng) for groups in DIALOGUES]
        for row in result["level"][name]:
            print(f"level, {name}: {row}")
            if row["rejected_percent"] > limit:
                result["missed"].append(f"level, {name}, {row['dialogues']} dialogues: {row['rejected_percent']}%")
    result["power"] = [power(groups, rng) for groups in DIALOGUES]
    for row in result["power"]:
        print(f"power at the detectable difference: {row}")
        if row["dialogues"] >= 20 and not 75 <= row["rejected_percent"] <= 85:
            result["missed"].append(f"power, {row['dialogues']} dialogues: {row['rejected_percent']}%")
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)} written; missed: {result['missed'] or 'nothing'}")
    return 1 if result["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
