"""Every statistic against an independent computation: scipy, a closed form, or brute force on a small case."""

import itertools

import numpy as np
import pytest
from scipy import stats

from helpers import StudyError, statistics
from helpers.analysis.redraw import redraw


def study(seed=0, groups=30, effect=0.1):
    """F1-like values of two configurations and their dialogues; dialogues differ in length."""
    rng = np.random.default_rng(seed)
    clusters = np.repeat([f"d{i}" for i in range(groups)], rng.integers(3, 9, groups))
    a = rng.choice([0, 0.4, 0.67, 1.0], len(clusters))
    b = np.where(rng.random(len(clusters)) < 0.4, np.clip(a - effect + rng.normal(0, 0.3, len(clusters)), 0, 1), a)
    return a, b, clusters


def dialogue_sums(values, clusters):
    return np.array([values[clusters == c].sum() for c in np.unique(clusters)])


def test_paired_means_and_difference():
    a, b, clusters = study()
    row = statistics.paired(a, b, clusters)
    assert (row["n_questions"], row["n_dialogues"]) == (len(a), 30)
    assert (row["mean_a"], row["mean_b"]) == pytest.approx((a.mean(), b.mean()))
    assert row["difference"] == pytest.approx(b.mean() - a.mean())
    assert row["ci_low"] < row["difference"] < row["ci_high"] and row["reason"] is None


def test_interval_of_paired_against_resampling_dialogues_one_by_one():
    a, b, clusters = study(groups=12)
    row = statistics.paired(a, b, clusters, resamples=20_000)
    rng, names = np.random.default_rng(5), np.unique(clusters)
    members = [np.flatnonzero(clusters == name) for name in names]
    drawn = []
    for _ in range(4_000):
        index = np.concatenate([members[i] for i in rng.integers(0, 12, 12)])
        drawn.append((b - a)[index].mean())
    # Hesterberg's widened tail, written out: Phi(-sqrt(n / (n - 1)) t)
    tail = stats.norm.cdf(-np.sqrt(12 / 11) * stats.t.ppf(0.975, 11))
    assert [row["ci_low"], row["ci_high"]] == pytest.approx(np.quantile(drawn, [tail, 1 - tail]), abs=0.012)


def test_interval_of_a_mean_against_scipys_bca():
    """One question a dialogue: scipy's BCa, asked for the confidence that the widened tails stand for."""
    rng = np.random.default_rng(2)
    values, n = rng.gamma(0.5, size=200), 200
    wide = 1 - 2 * stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))
    theirs = stats.bootstrap(
        (values,), np.mean, confidence_level=wide, n_resamples=20_000, method="BCa", rng=1
    ).confidence_interval
    mine = statistics.interval(values, np.arange(n), resamples=20_000)
    assert mine["mean"] == pytest.approx(values.mean())
    assert [mine["ci_low"], mine["ci_high"]] == pytest.approx([*theirs], rel=0.02)


def test_interval_of_a_normal_mean_is_students():
    values = np.random.default_rng(3).normal(5, 1, 40)
    row = statistics.interval(values, np.arange(40), resamples=40_000)
    theirs = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    assert [row["ci_low"], row["ci_high"]] == pytest.approx([*theirs], abs=0.03)


def test_exact_sign_flip_against_scipy_and_brute_force():
    a, b, clusters = study(groups=11)
    sums = dialogue_sums(b - a, clusters)
    brute = np.mean(
        [abs(np.dot(signs, sums)) >= abs(sums.sum()) - 1e-12 for signs in itertools.product((-1, 1), repeat=11)]
    )
    theirs = stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert statistics.paired(a, b, clusters)["p"] == pytest.approx(brute)
    assert brute == pytest.approx(theirs)


def test_random_sign_flip_agrees_with_the_exact_one():
    a, b, clusters = study(groups=16, effect=0.2)
    exact = statistics.paired(a, b, clusters, resamples=2**16)["p"]
    drawn = statistics.paired(a, b, clusters, resamples=2**15)["p"]
    assert drawn == pytest.approx(exact, abs=4 * np.sqrt(exact / 2**15) + 1e-4)


def test_p_is_never_zero():
    a = np.zeros(100)
    assert statistics.paired(a, a + 1, np.arange(100), resamples=999)["p"] == pytest.approx(1 / 1000)


def test_standard_error_is_the_classical_one_without_clusters():
    d = np.random.default_rng(4).normal(size=50)
    assert statistics.standard_error(d[:, None], np.ones((50, 1)))[0] == pytest.approx(stats.sem(d))


def test_standard_error_of_a_ratio_against_the_jackknife():
    a, b, clusters = study(groups=60)
    sums, sizes = dialogue_sums(b - a, clusters), dialogue_sums(np.ones(len(a)), clusters)
    left = np.array([(sums.sum() - s) / (sizes.sum() - n) for s, n in zip(sums, sizes, strict=True)])
    jackknife = np.sqrt(59 / 60 * ((left - left.mean()) ** 2).sum())
    assert statistics.standard_error(sums[:, None], sizes[:, None])[0] == pytest.approx(jackknife, rel=0.03)


@pytest.mark.parametrize("groups", [10, 50, 500])
def test_detectable_is_found_in_four_of_five_studies(groups):
    rng = np.random.default_rng(6)
    a = rng.normal(size=groups)
    d = rng.normal(size=groups)
    detectable = statistics.paired(a, a + d, np.arange(groups), resamples=100)["detectable"]
    spread = d.std(ddof=1)
    studies = rng.normal(detectable, spread, size=(20_000, groups))
    assert (stats.ttest_1samp(studies, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.012)


def test_detectable_of_many_dialogues_is_the_normal_closed_form():
    rng = np.random.default_rng(7)
    a, d = rng.normal(size=20_000), rng.normal(size=20_000)
    row = statistics.paired(a, a + d, np.arange(20_000), resamples=20)
    assert row["detectable"] == pytest.approx((1.959964 + 0.841621) * stats.sem(d), rel=1e-4)


@pytest.mark.parametrize("difference", [0.02, -0.1])
def test_needed_against_the_closed_form_and_detectable(difference):
    a, b, clusters = study(groups=40)
    row = statistics.needed(a, b, clusters, difference)
    sums, sizes = dialogue_sums(b - a, clusters)[:, None], dialogue_sums(np.ones(len(a)), clusters)[:, None]
    spread = statistics.standard_error(sums, sizes)[0] * np.sqrt(40)
    normal = ((1.959964 + 0.841621) * spread / difference) ** 2
    assert normal < row["n_dialogues"] < normal + 4  # Student's t costs about two more
    assert row["n_questions"] == pytest.approx(row["n_dialogues"] * len(a) / 40, abs=1)
    detectable = statistics.paired(a, b, clusters)["detectable"]
    assert statistics.needed(a, b, clusters, detectable * 1.0001)["n_dialogues"] == 40


def test_weights_equal_repeated_questions():
    a, b, clusters = study()
    times = np.random.default_rng(8).integers(1, 4, len(a))
    weighted = statistics.paired(a, b, clusters, weights=times)
    repeated = statistics.paired(np.repeat(a, times), np.repeat(b, times), np.repeat(clusters, times))
    for key in ("mean_a", "mean_b", "difference", "ci_low", "ci_high", "p", "detectable"):
        assert weighted[key] == pytest.approx(repeated[key]), key


def test_log_ppl_ratio_against_perplexities():
    rng = np.random.default_rng(9)
    tokens, clusters = rng.integers(1, 50, 60), np.repeat(np.arange(20), 3)
    nll_a = rng.gamma(2, size=60) * tokens
    nll_b = nll_a + rng.gamma(0.2, size=60) * tokens
    row = statistics.log_ppl_ratio(nll_a, nll_b, tokens, clusters)
    ppl = [np.exp(nll.sum() / tokens.sum()) for nll in (nll_a, nll_b)]
    assert (row["ppl_a"], row["ppl_b"]) == pytest.approx(tuple(ppl))
    assert row["difference"] == pytest.approx(np.log(ppl[1] / ppl[0])) and row["ppl_ratio"] == pytest.approx(
        ppl[1] / ppl[0]
    )
    assert (row["ppl_ratio_low"], row["ppl_ratio_high"]) == pytest.approx(
        (np.exp(row["ci_low"]), np.exp(row["ci_high"]))
    )


def test_holm_by_hand():
    # 0.01 x 4, 0.02 x 3, then 0.03 x 2 = 0.06 and 0.04 x 1, which may not be less than the one before
    assert statistics.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == pytest.approx([1, 1])


def test_holm_by_its_definition():
    p = np.random.default_rng(10).random(9) ** 3
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for step, i in enumerate(np.argsort(p)):
            if p[i] > level / (9 - step):
                break
            rejected.add(int(i))
        assert set(np.flatnonzero(statistics.holm(p) <= level).tolist()) == rejected


def table():
    a, b, clusters = study()
    c = np.clip(b + 0.05, 0, 1)
    return {"fp16": {"f1": a, "em": (a == 1) * 1.0}, "nf4": {"f1": b, "em": (b == 1) * 1.0}, "fp4": {"f1": c}}, clusters


def test_compare_all_is_paired_for_every_pair():
    values, clusters = table()
    rows = statistics.compare_all(values, clusters, ["f1", "em"])
    assert [(r["metric"], r["a"], r["b"]) for r in rows] == [
        (m, a, b) for m in ("f1", "em") for a, b in (("fp16", "nf4"), ("fp16", "fp4"), ("nf4", "fp4"))
    ]
    for row in rows[:4]:
        alone = statistics.paired(values[row["a"]][row["metric"]], values[row["b"]][row["metric"]], clusters)
        assert {k: row[k] for k in alone} == pytest.approx(alone)
    tested = [row for row in rows if row["p"] is not None]
    assert [row["p_holm"] for row in tested] == pytest.approx(statistics.holm([row["p"] for row in tested]).tolist())
    assert len(tested) == 4 and rows[4]["reason"] == "em was not measured for fp4" and rows[4]["p_holm"] is None


def test_adjust_takes_several_calls_as_one_family():
    values, clusters = table()
    rows = statistics.compare_all(values, clusters, ["f1"])
    joined = statistics.adjust(rows + rows)
    assert [r["p_holm"] for r in joined] == pytest.approx(statistics.holm([r["p"] for r in rows] * 2).tolist())
    assert joined[0]["p_holm"] > rows[0]["p_holm"]


def test_intervals_all_is_interval():
    values, clusters = table()
    rows = statistics.intervals_all(values, clusters, ["f1", "em"])
    assert [(r["metric"], r["configuration"]) for r in rows][:4] == [
        ("f1", "fp16"),
        ("f1", "nf4"),
        ("f1", "fp4"),
        ("em", "fp16"),
    ]
    assert rows[1] == {"metric": "f1", "configuration": "nf4"} | statistics.interval(values["nf4"]["f1"], clusters)


def test_nine_dialogues_give_no_interval_but_the_reason():
    a, b, clusters = study(groups=9)
    row = statistics.paired(a, b, clusters)
    assert row["difference"] == pytest.approx((b - a).mean())
    assert row["ci_low"] is row["ci_high"] is row["p"] is row["detectable"] is None
    assert row["reason"] == "no interval: 9 dialogues are fewer than 10"
    assert statistics.interval(a, clusters)["reason"] and statistics.correlation(a, b, clusters)["reason"]
    assert statistics.needed(a, b, clusters, 0.1)["n_dialogues"] is None


def test_four_dialogues_that_differ_give_no_interval_and_five_do():
    a, clusters = np.ones(40), np.repeat(np.arange(20), 2)
    four = statistics.paired(a, np.where(np.isin(clusters, range(4)), 0.5, 1), clusters)
    five = statistics.paired(a, np.where(np.isin(clusters, range(5)), 0.5, 1), clusters)
    assert four["ci_low"] is None and "4 of 20 dialogues differ" in four["reason"]
    assert four["p"] == pytest.approx(2 / 2**4, abs=0.02)  # only the four signs count
    assert five["ci_low"] is not None and five["reason"] is None


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    a, b, clusters = study()
    assert statistics.paired(a, b, clusters, seed=1) == statistics.paired(a, b, clusters, seed=1)
    assert statistics.paired(a, b, clusters, seed=1)["ci_low"] != statistics.paired(a, b, clusters, seed=2)["ci_low"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: statistics.paired([1, 2], [1, 2, 3], [0, 1]), "3 numbers for 2 questions"),
        (lambda: statistics.paired([1, np.nan], [1, 2], [0, 1]), "1 of 2 numbers are missing"),
        (lambda: statistics.paired([1, 2], [1, 2], [0]), "expected 2 dialogue ids"),
        (lambda: statistics.paired([1, 2], [1, 2], [0, 1], weights=[0, 0]), "not all 0"),
        (lambda: statistics.interval([], []), "shape"),
        (lambda: statistics.needed([1, 2], [1, 2], [0, 1], 0), "difference: 0"),
        (lambda: statistics.log_ppl_ratio([1], [1], [0], [0]), "at least one scored token"),
        (lambda: redraw({"a": [1, 0]}, {("a", "b"): []}), "no values for b"),
        (lambda: redraw({"a": [1, 0], "b": [1]}, {("a", "b"): []}), "same questions"),
        (lambda: redraw({"a": [1, 0], "b": [1, np.nan]}, {("a", "b"): []}), "missing"),
    ],
)
def test_wrong_input_is_one_sentence(call, words):
    with pytest.raises(StudyError, match=words):
        call()


def test_correlation_is_scipys_with_ties():
    rng = np.random.default_rng(11)
    clusters = np.repeat(np.arange(25), 8)
    flips = rng.integers(0, 2, 200)
    kl = np.round(rng.gamma(0.5, size=200) + 0.4 * flips, 1)
    row = statistics.correlation(flips, kl, clusters, resamples=300)
    assert row["rho"] == pytest.approx(stats.spearmanr(flips, kl).statistic)


def test_correlation_interval_against_scipy_on_written_out_resamples():
    rng = np.random.default_rng(12)
    clusters, x = np.repeat(np.arange(15), 6), np.round(rng.gamma(0.5, size=90), 1)
    y = np.round(x + rng.normal(0, 1, 90), 1)
    row = statistics.correlation(x, y, clusters, resamples=200, seed=3)
    rhos = []
    for counts in statistics.resample_counts(15, 200, 3).astype(int):
        index = np.repeat(np.arange(90), counts[clusters])
        rhos.append(stats.spearmanr(x[index], y[index]).statistic)
    tail = stats.norm.cdf(-np.sqrt(15 / 14) * stats.t.ppf(0.975, 14))
    assert [row["ci_low"], row["ci_high"]] == pytest.approx(np.quantile(rhos, [tail, 1 - tail]))


def test_correlation_without_flips_has_a_reason():
    row = statistics.correlation(np.zeros(40), np.arange(40), np.repeat(np.arange(20), 2))
    assert row["rho"] is None and "x is the same for all 40 questions" in row["reason"]
    rare = statistics.correlation(np.arange(40) == 3, np.arange(40), np.repeat(np.arange(20), 2))
    assert rare["rho"] is not None and rare["ci_low"] is None and rare["undefined_resamples"] > 100


def share_by_formula(d, size):
    """P(sum of `size` of d > 0) when d holds +1 and -1 only and is drawn without replacement: hypergeometric."""
    ups = int((d > 0).sum())
    return stats.hypergeom.sf(size // 2, len(d), ups, size)


def test_redraw_without_replacement_is_hypergeometric():
    d = np.where(np.arange(200) < 90, 1.0, -1.0)
    result = redraw({"a": np.zeros(200), "b": d}, {("a", "b"): [0.2]}, size=50, draws=20_000)
    (row,) = result["comparisons"]
    assert (
        result["replacement"] is False
        and result["population"] == 200
        and "without replacement, from 200" in result["design"]
    )
    assert row["share_better"] == pytest.approx(share_by_formula(d, 50), abs=0.012)
    assert row["share_tied"] == pytest.approx(stats.hypergeom.pmf(25, 200, 90, 50), abs=0.012)
    assert row["share_better"] + row["share_tied"] + row["share_worse"] == pytest.approx(1)
    # a mean of 0.2 is 30 ups of 50
    assert row["at_least"] == [
        {"threshold": 0.2, "share": pytest.approx(stats.hypergeom.sf(29, 200, 90, 50), abs=0.01)}
    ]
    assert row["first"] == 1.0 and row["difference"] == pytest.approx(d.mean())


def test_redraw_with_replacement_is_binomial():
    d = np.where(np.arange(60) < 27, 1.0, -1.0)
    result = redraw({"a": np.zeros(60), "b": d}, {("a", "b"): []}, size=50, draws=20_000)
    (row,) = result["comparisons"]
    assert result["replacement"] is True and "with replacement, from 60" in result["design"]
    assert row["share_better"] == pytest.approx(stats.binom.sf(25, 50, 27 / 60), abs=0.012)
    assert row["sd"] == pytest.approx(d.std() / np.sqrt(50), rel=0.02)


def test_redraw_any_turn_takes_each_dialogue_once():
    """Two dialogues of two turns: the four draws can be listed."""
    values = {"a": np.zeros(4), "b": np.array([1.0, 0.0, -1.0, 0.0])}
    result = redraw(values, {("a", "b"): []}, clusters=["x", "x", "y", "y"], size=2, draws=20_000)
    (row,) = result["comparisons"]
    assert result["size"] == 2 and "all 2 dialogues" in result["design"]
    assert (row["share_better"], row["share_tied"], row["share_worse"]) == pytest.approx((0.25, 0.5, 0.25), abs=0.015)
    assert row["first"] is None


def test_redraw_any_turn_of_few_dialogues_still_asks_as_many_questions():
    """Every draw of a question is better with probability 1/4: binomial."""
    values = {"a": np.zeros(8), "b": np.array([1.0, 0.0, 0.0, 0.0] * 2)}
    result = redraw(values, {("a", "b"): []}, clusters=["x"] * 4 + ["y"] * 4, size=50, draws=20_000)
    (row,) = result["comparisons"]
    assert (
        result["size"] == 50
        and result["replacement"]
        and "50 dialogues, drawn with replacement from 2" in result["design"]
    )
    assert row["mean"] == pytest.approx(0.25, abs=0.003) and row["sd"] == pytest.approx(
        (0.25 * 0.75 / 50) ** 0.5, rel=0.03
    )


def test_redraw_any_turn_draws_different_dialogues():
    clusters = np.repeat(np.arange(100), 3)
    # Drawing a dialogue twice would give sums other than 0 or 1, as only dialogue 0 counts.
    values = {"a": np.zeros(300), "b": (clusters == 0) * 1.0}
    (row,) = redraw(values, {("a", "b"): []}, clusters=clusters, size=50, draws=20_000)["comparisons"]
    assert row["share_better"] == pytest.approx(0.5, abs=0.015) and max(
        map(float, row["percentiles"].values())
    ) == pytest.approx(1 / 50)


def test_redraw_order_histogram_and_percentiles():
    rng = np.random.default_rng(13)
    values = {name: rng.random(500) for name in ("nf4", "fp16", "fp4")}
    result = redraw(values, {("fp16", "nf4"): [0.051]}, order=("nf4", "fp16", "fp4"), draws=6_000)
    (row,) = result["comparisons"]
    assert result["share_in_order"] == pytest.approx(
        redraw(values, {}, order=("nf4", "fp16", "fp4"), draws=6_000, seed=5)["share_in_order"], abs=0.03
    )
    edges, counts = np.array(row["histogram"]["edges"]), np.array(row["histogram"]["counts"])
    assert counts.sum() == 6_000 and np.abs(edges).min() == pytest.approx(0, abs=1e-12)
    assert counts[edges[:-1] > -1e-12].sum() / 6_000 == pytest.approx(row["share_better"] + row["share_tied"])
    assert row["percentiles"]["50"] == pytest.approx(row["mean"], abs=0.01)
    assert row["percentiles"]["97.5"] - row["percentiles"]["2.5"] == pytest.approx(2 * 1.96 * row["sd"], rel=0.08)


def test_redraw_is_the_same_for_the_same_seed():
    values = {"a": np.arange(200) % 2, "b": np.arange(200) % 3}
    assert redraw(values, {("a", "b"): [0.1]}, draws=500, seed=4) == redraw(
        values, {("a", "b"): [0.1]}, draws=500, seed=4
    )
