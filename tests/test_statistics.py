"""Every statistic against an independent computation: scipy, statsmodels, a closed form, or brute force on a small
case."""

import importlib.util
import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from helpers import ROOT, StudyError, ranks, statistics
from helpers.analysis import power, recovery

OPTIONS = {"confidence": 0.95, "resamples": 10_000, "seed": 1234}


def study(seed=0, groups=30, effect=0.1):
    """F1-like values of two configurations and their dialogues, which differ in length."""
    rng = np.random.default_rng(seed)
    clusters = np.repeat([f"d{i}" for i in range(groups)], rng.integers(3, 9, groups))
    a = rng.choice([0, 0.4, 0.67, 1.0], len(clusters))
    b = np.where(rng.random(len(clusters)) < 0.4, np.clip(a - effect + rng.normal(0, 0.3, len(clusters)), 0, 1), a)
    return a, b, clusters


def paired(a, b, clusters, weights=None, **options):
    return statistics.paired(a, b, clusters, weights, **(OPTIONS | options))


def dialogue_sums(values, clusters):
    return np.array([values[clusters == c].sum() for c in np.unique(clusters)])


def row(low, high, family="exploratory", p_adjusted=None, **more):
    """What `compare` says of a difference, its 90% interval a sixth narrower on either side."""
    middle, half = (low + high) / 2, (high - low) / 2 * 0.84
    found = {"ci_low": low, "ci_high": high, "equal_low": middle - half, "equal_high": middle + half, "reason": None}
    return found | {"difference": middle, "family": family, "p_adjusted": p_adjusted, "confidence": 0.95} | more


# ---- intervals and tests ----


def test_interval_of_paired_against_resampling_dialogues_one_by_one():
    a, b, clusters = study(groups=12)
    found = paired(a, b, clusters, resamples=20_000)
    assert found["difference"] == pytest.approx(b.mean() - a.mean()) and found["mean_a"] == pytest.approx(a.mean())
    rng, members = np.random.default_rng(5), [np.flatnonzero(clusters == name) for name in np.unique(clusters)]
    drawn = [(b - a)[np.concatenate([members[i] for i in rng.integers(0, 12, 12)])].mean() for _ in range(4_000)]
    for confidence, names in ((0.95, ("ci_low", "ci_high")), (0.9, ("equal_low", "equal_high"))):
        # Hesterberg's widened tail, written out: Phi(-sqrt(n / (n - 1)) t)
        tail = stats.norm.cdf(-np.sqrt(12 / 11) * stats.t.ppf((1 + confidence) / 2, 11))
        assert [found[k] for k in names] == pytest.approx(np.quantile(drawn, [tail, 1 - tail]), abs=0.012)


def test_interval_of_a_mean_against_scipys_bca():
    """One question a dialogue: scipy's BCa, asked for the confidence that the widened tails stand for."""
    values, n = np.random.default_rng(2).gamma(0.5, size=200), 200
    wide = 1 - 2 * stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))
    theirs = stats.bootstrap((values,), np.mean, confidence_level=wide, n_resamples=20_000, method="BCa", rng=1)
    mine = statistics.interval(values, np.arange(n), **(OPTIONS | {"resamples": 20_000}))
    assert [mine["ci_low"], mine["ci_high"]] == pytest.approx([*theirs.confidence_interval], rel=0.02)
    assert mine["standard_error"] == pytest.approx(stats.sem(values)) and mine["design_effect"] == pytest.approx(1)


def test_design_effect_of_copies_is_their_number():
    values, clusters = np.random.default_rng(3).normal(size=60), np.repeat(np.arange(60), 4)
    found = statistics.interval(np.repeat(values, 4), clusters, **OPTIONS)
    assert found["design_effect"] == pytest.approx(4, rel=0.02) and found["standard_error"] == pytest.approx(
        stats.sem(values)
    )


def test_exact_sign_flip_against_scipy_and_brute_force():
    a, b, clusters = study(groups=11)
    sums = dialogue_sums(b - a, clusters)
    flips = itertools.product((-1, 1), repeat=11)
    brute = np.mean([abs(np.dot(signs, sums)) >= abs(sums.sum()) - 1e-12 for signs in flips])
    theirs = stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert paired(a, b, clusters)["p"] == pytest.approx(brute) == theirs


def test_random_sign_flip_agrees_with_the_exact_one_and_is_never_zero():
    a, b, clusters = study(groups=16, effect=0.2)
    exact, drawn = (paired(a, b, clusters, resamples=2**n)["p"] for n in (16, 15))
    assert drawn == pytest.approx(exact, abs=4 * np.sqrt(exact / 2**15) + 1e-4)
    assert paired(np.zeros(100), np.ones(100), np.arange(100), resamples=999)["p"] == pytest.approx(1 / 1000)


def test_standard_error_of_a_ratio_against_the_jackknife():
    a, b, clusters = study(groups=60)
    sums, sizes = dialogue_sums(b - a, clusters), dialogue_sums(np.ones(len(a)), clusters)
    left = np.array([(sums.sum() - s) / (sizes.sum() - n) for s, n in zip(sums, sizes, strict=True)])
    jackknife = np.sqrt(59 / 60 * ((left - left.mean()) ** 2).sum())
    assert statistics.standard_error(sums[:, None], sizes[:, None])[0] == pytest.approx(jackknife, rel=0.03)


def test_weights_equal_repeated_questions():
    a, b, clusters = study()
    times = np.random.default_rng(8).integers(1, 4, len(a))
    weighted = paired(a, b, clusters, times)
    repeated = paired(*(np.repeat(x, times) for x in (a, b, clusters)))
    for key in ("mean_a", "mean_b", "difference", "ci_low", "ci_high", "p", "standard_error"):
        assert weighted[key] == pytest.approx(repeated[key]), key


def test_log_ppl_ratio_against_perplexities():
    rng = np.random.default_rng(9)
    tokens, clusters = rng.integers(1, 50, 60), np.repeat(np.arange(20), 3)
    nll_a = rng.gamma(2, size=60) * tokens
    nll_b = nll_a + rng.gamma(0.2, size=60) * tokens
    found = statistics.log_ppl_ratio(nll_a, nll_b, tokens, clusters, **OPTIONS)
    ppl = [np.exp(nll.sum() / tokens.sum()) for nll in (nll_a, nll_b)]
    assert (found["ppl_a"], found["ppl_b"], found["ppl_ratio"]) == pytest.approx((*ppl, ppl[1] / ppl[0]))


# ---- families ----


def family(seed=1, groups=20, effects=(0.0, 0.02, 0.1, 0.2)):
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(groups), rng.integers(3, 9, groups))
    columns = {"full": rng.choice([0, 0.5, 1.0], len(clusters))}
    for i, effect in enumerate(effects):
        noise = rng.normal(-effect, 0.15, len(clusters))
        columns[f"q{i}"] = np.where(rng.random(len(clusters)) < 0.7, columns["full"] + noise, columns["full"])
    return columns, clusters, [("full", name) for name in list(columns)[1:]] + [("q0", "q1")]


def test_max_t_against_flipping_one_dialogue_at_a_time():
    columns, clusters, pairs = family(groups=11)
    differences = np.stack([columns[b] - columns[a] for a, b in pairs], axis=1)
    sums, sizes = statistics.totals(differences, clusters)
    found = statistics.max_t(sums, sizes, **OPTIONS)

    def p(reference):
        unit = reference / np.sqrt((reference**2).sum(axis=0))
        drawn = [np.abs(np.array(s) @ unit).max() for s in itertools.product((-1, 1), repeat=11)]
        z = np.abs(sums.sum(axis=0)) / np.sqrt((sums**2).sum(axis=0))
        return np.array([np.mean(np.array(drawn) >= value - 1e-9) for value in z])

    residuals = sums - differences.mean(axis=0) * sizes
    assert found["p_adjusted"] == pytest.approx(np.maximum(p(sums), p(residuals)))


@pytest.mark.parametrize("resamples", [999, 10_000])
@pytest.mark.parametrize("groups", [10, 12, 40])
def test_adjusted_p_and_simultaneous_interval_always_agree(groups, resamples):
    verdicts = set()
    for seed in range(10):
        columns, clusters, pairs = family(seed, groups)
        for found in statistics.compare(columns, clusters, pairs, True, **(OPTIONS | {"resamples": resamples})):
            excludes = found["adjusted_low"] > 0 or found["adjusted_high"] < 0
            assert excludes == (statistics.differs(found) is not None)
            assert found["p_adjusted"] >= found["p"] and found["level"] < 0.05
            verdicts.add(statistics.differs(found))
    assert verdicts == {None, "below"} or verdicts == {None, "below", "above"}


def test_a_family_of_one_is_students_interval():
    d = np.random.default_rng(3).normal(0.3, 1, 60)
    columns = {"a": np.zeros(60), "b": d}
    (found,) = statistics.compare(columns, np.arange(60), [("a", "b")], True, **OPTIONS)
    theirs = stats.t.interval(0.95, 59, d.mean(), stats.sem(d))
    assert [found["adjusted_low"], found["adjusted_high"]] == pytest.approx([*theirs], abs=0.012)


def test_an_exploratory_row_is_not_adjusted_and_detects_less_strictly():
    columns, clusters, pairs = family()
    primary = statistics.compare(columns, clusters, pairs, True, **OPTIONS)
    alone = statistics.compare(columns, clusters, pairs, False, **OPTIONS)
    for strict, loose in zip(primary, alone):
        assert loose["p_adjusted"] is None and loose["level"] == pytest.approx(0.05)
        assert power.detectable(strict) > power.detectable(loose) and strict["ci_low"] == loose["ci_low"]


def test_equality_is_adjusted_over_its_family():
    """One of eight is equal on its own; with the level shared by all eight its interval leaves the margin."""
    columns, clusters, pairs = family(groups=40, effects=(0.02,) * 7)
    primary, alone = (statistics.compare(columns, clusters, pairs, joint, **OPTIONS) for joint in (True, False))
    for strict, loose in zip(primary, alone):
        assert strict["equal_low"] < loose["equal_low"] < loose["equal_high"] < strict["equal_high"]
        assert strict["adjusted_low"] < strict["equal_low"] and strict["equal_high"] < strict["adjusted_high"]
    strict, loose = primary[0], alone[0]
    margin = (abs(strict["equal_low"]) + abs(loose["equal_low"])) / 2
    assert statistics.equivalent(loose, margin) and not statistics.equivalent(strict, margin)


# ---- rules ----

RULES = [
    (row(-0.08, -0.02), "below"),
    (row(0.02, 0.08), "above"),
    (row(-0.014, 0.012), "equal within 1.5 points"),
    (row(-0.017, 0.01), "equal within 1.5 points"),  # the 90% interval decides
    (row(-0.02, 0.012), "n too small to say"),
    (row(-0.009, -0.001), "below"),  # a small difference, but a clear one: a difference comes before equality
    (row(-0.08, -0.02, "primary", 0.2), "n too small to say"),  # its own interval excludes 0, the family's does not
    (row(-0.08, -0.02, "primary", 0.04), "below"),
    (row(-0.014, 0.012, "primary", 0.9), "equal within 1.5 points"),
    (row(0, 0) | {"ci_low": None, "equal_low": None, "equal_high": None}, "n too small to say"),
    (row(math.nan, math.nan), "n too small to say"),  # None out of a DataFrame
]


@pytest.mark.parametrize(("case", "words"), RULES)
def test_the_rules_give_one_word(case, words):
    assert statistics.verdict(case, 0.015) == words


def test_nine_dialogues_give_no_interval_but_the_reason():
    a, b, clusters = study(groups=9)
    found = paired(a, b, clusters)
    assert found["ci_low"] is found["p"] is power.detectable(found) is None
    assert found["reason"] == "no interval: 9 dialogues are fewer than 10"
    others = statistics.interval(a, clusters, **OPTIONS), recovery.recovery(a, b, clusters, **OPTIONS)
    others += (ranks.quantiles(a, clusters, [0.5], **OPTIONS)[0],)
    assert all(other["reason"] and other["ci_low"] is None for other in others)


def test_four_dialogues_that_differ_give_no_interval_and_five_do():
    a, clusters = np.ones(40), np.repeat(np.arange(20), 2)
    four, five = (paired(a, np.where(np.isin(clusters, range(n)), 0.5, 1), clusters) for n in (4, 5))
    assert four["ci_low"] is None and "4 of 20 dialogues differ" in four["reason"]
    assert four["p"] == pytest.approx(2 / 2**4, abs=0.02)  # only the four signs count
    assert five["ci_low"] is not None and five["reason"] is None


# ---- power and sample size ----


@pytest.mark.parametrize("groups", [10, 50, 500])
def test_detectable_is_found_in_four_of_five_studies(groups):
    rng = np.random.default_rng(6)
    d = rng.normal(size=groups)
    detectable = power.detectable(paired(np.zeros(groups), d, np.arange(groups), resamples=100))
    studies = rng.normal(detectable, d.std(ddof=1), size=(20_000, groups))
    assert (stats.ttest_1samp(studies, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.012)


def test_sample_size_is_two_more_than_the_normal_one():
    normal = ((1.959964 + 0.841621) / 0.3) ** 2
    assert normal < power.sample_size(0.6, 2, 0.05) < normal + 4  # Student's t
    assert power.sample_size(0.6, 2, 0.01) > power.sample_size(0.6, 2, 0.05)  # a family costs
    assert power.sample_size(0, 2, 0.05) == math.inf


def test_sample_size_of_a_tiny_effect_is_the_normal_one():
    assert power.sample_size(0.005, 1, 0.05) == math.ceil((2.8015852 / 0.005) ** 2)
    assert power.sample_size(0.0101, 1, 0.05) == pytest.approx((2.8015852 / 0.0101) ** 2, rel=1e-3)


# ---- recovery, gate, flips, pooled ----


def test_recovery_is_a_ratio_and_its_interval_holds_for_scaled_scores():
    a, b, clusters = study(groups=40)
    found = recovery.recovery(a, b, clusters, **OPTIONS)
    assert found["recovery"] == pytest.approx(100 * b.mean() / a.mean())
    assert found["ci_low"] < found["equal_low"] < found["recovery"] < found["equal_high"] < found["ci_high"]
    scaled = recovery.recovery(10 * a, 10 * b, clusters, **OPTIONS)
    assert [scaled[k] for k in ("recovery", "ci_low", "ci_high")] == pytest.approx(
        [found[k] for k in ("recovery", "ci_low", "ci_high")]
    )
    half = recovery.recovery(a, a / 2, clusters, **OPTIONS)
    assert (half["ci_low"], half["ci_high"]) == pytest.approx((50, 50))


def test_recovery_of_almost_nothing_is_undefined():
    a = np.zeros(80)
    a[:3] = 1
    for values in (a, np.zeros(80)):
        found = recovery.recovery(values, a[::-1], np.arange(80), **OPTIONS)
        assert found["recovery"] is None and "too near zero" in found["reason"]


@pytest.mark.parametrize(
    ("loss", "least", "largest", "words"),
    [(0.005, 95, 0.03, "pass"), (0.2, 95, 0.03, "fail"), (0.2, 50, 0.03, "fail"), (0.02, 95, 0.03, "too small")],
)
def test_gate(loss, least, largest, words):
    rng = np.random.default_rng(3)
    clusters, a = np.repeat(np.arange(60), 5), rng.uniform(0.4, 0.9, 300)
    noise = rng.normal(0, 0.3 if words == "too small" else 0.06, 300)
    b = a - loss + noise - noise.mean()
    found = recovery.gate(a, b, clusters, least, largest, **OPTIONS)
    assert found["gate"] == words
    assert (found["needed"] == math.inf) == (words == "fail")
    if words == "too small":
        assert found["needed"] > 60
    if words == "pass":
        assert found["needed"] < 60 and found["recovery_bound"] >= least


def test_flips_in_per_cent_with_the_net_tested_by_dialogue():
    clusters = np.repeat(np.arange(20), 5)
    a = np.arange(100) % 2 == 0
    b = a.copy()
    b[::10] = False  # one right answer of every second dialogue's five
    b[1] = True
    found = recovery.flips(a, b, clusters, **OPTIONS)
    assert (found["right_to_wrong"], found["wrong_to_right"], found["lost"]) == pytest.approx((10, 1, 20))
    assert found["net"] == pytest.approx(-9) and found["ci_high"] < 0 and found["p"] < 0.02
    assert recovery.flips(a * 0, b, clusters, **OPTIONS)["lost"] is None


def test_pooled_against_paule_and_mandel_by_hand():
    effects, errors = np.array([-0.10, -0.02, -0.05, 0.03]), np.array([0.02, 0.03, 0.02, 0.04])
    found = recovery.pooled(effects, errors, confidence=0.95)
    w = 1 / errors**2
    q = (w * (effects - np.average(effects, weights=w)) ** 2).sum()
    v = 1 / (errors**2 + found["tau"] ** 2)
    mean = np.average(effects, weights=v)
    spread = (v * (effects - mean) ** 2).sum()
    assert spread == pytest.approx(3, abs=1e-3)  # what tau is chosen for
    assert (found["q"], found["mean"]) == pytest.approx((q, mean))
    assert found["i2"] == pytest.approx(100 * (q - 3) / q) and found["q_p"] == pytest.approx(stats.chi2.sf(q, 3))
    assert found["ci_low"] == pytest.approx(mean - stats.t.ppf(0.975, 3) * np.sqrt(spread / 3 / v.sum()), rel=1e-4)
    alike = recovery.pooled([0.1, 0.1, 0.11], [0.05, 0.05, 0.05], confidence=0.95)
    assert alike["tau"] == alike["i2"] == 0 and alike["ci_low"] < 0.1 < alike["ci_high"]


# ---- quantiles ----


def test_quantiles_of_independent_values_against_the_binomial_interval():
    values = np.random.default_rng(4).gamma(0.5, size=400)
    found = ranks.quantiles(values, np.arange(400), [0.5, 0.9], **OPTIONS)
    for p, mine in zip((0.5, 0.9), found):
        ordered, ranked = np.sort(values), stats.binom.ppf([0.025, 0.975], 400, p).astype(int)
        assert mine["quantile"] == np.quantile(values, p, method="inverted_cdf")
        assert ordered[ranked[0] - 4] <= mine["ci_low"] <= ordered[ranked[0] + 4]
        assert ordered[ranked[1] - 4] <= mine["ci_high"] <= ordered[ranked[1] + 4]


def test_a_quantile_that_few_dialogues_reach_beyond_has_no_interval():
    (found,) = ranks.quantiles(np.arange(200), np.repeat(np.arange(20), 10), [0.9], **OPTIONS)
    assert found["ci_low"] is None and "2 of 20 dialogues reach beyond the quantile 0.9" in found["reason"]


def test_the_simulation_has_run_for_every_rule_and_missed_no_target():
    spec = importlib.util.spec_from_file_location("bench", ROOT / "tests/bench_statistics.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    written = json.loads(bench.TARGET.read_text())
    assert {row["rule"] for row in written["rows"]} == set(bench.RULES)
    assert written["missed"] == [row["rule"] for row in written["rows"] if bench.missed(row)] == []


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    a, b, clusters = study()
    assert paired(a, b, clusters, seed=1) == paired(a, b, clusters, seed=1)
    assert paired(a, b, clusters, seed=1)["ci_low"] != paired(a, b, clusters, seed=2)["ci_low"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: paired([1, 2], [1, 2, 3], [0, 1]), "3 numbers for 2 questions"),
        (lambda: paired([1, np.nan], [1, 2], [0, 1]), "1 of 2 numbers are missing"),
        (lambda: paired([1, 2], [1, 2], [0]), "expected 2 dialogue ids"),
        (lambda: paired([1, 2], [1, 2], [0, 1], weights=[0, 0]), "not all 0"),
        (lambda: statistics.interval([], [], **OPTIONS), "shape"),
        (lambda: statistics.log_ppl_ratio([1], [1], [0], [0], **OPTIONS), "at least one scored token"),
        (lambda: recovery.pooled([0.1], [0.1], confidence=0.95), "at least two data sets"),
    ],
)
def test_wrong_input_is_one_sentence(call, words):
    with pytest.raises(StudyError, match=words):
        call()


def test_dialogues_of_too_unequal_length_give_a_reason_and_no_infinite_interval():
    clusters = np.repeat(np.arange(12), [400] + [2] * 11)
    a = np.random.default_rng(0).random(len(clusters))
    columns = {"a": a, "b": a + np.random.default_rng(1).normal(0.05, 0.1, len(a))}
    (row,) = statistics.compare(columns, clusters, [("a", "b")], True, **OPTIONS)
    assert row["reason"] == "no interval: the dialogues are of too unequal length"
    assert row["adjusted_low"] is None and row["ci_low"] is None and statistics.differs(row) is None
