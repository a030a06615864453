"""The paper's design, drawn again: shares against binomial probabilities, their intervals against those of a rate."""

import numpy as np
import pytest
from scipy import stats

from helpers import StudyError, statistics
from helpers.analysis.redraw import redraw

DRAWS = {"size": 50, "draws": 20_000, "confidence": 0.95, "seed": 1}


def test_redraw_of_last_turns_is_binomial_however_many_there_are():
    d = np.where(np.arange(200) < 90, 1.0, -1.0)
    result = redraw({"a": np.zeros(200), "b": d}, [("a", "b")], **DRAWS)
    (found,) = result["comparisons"]
    assert (result["design"], result["dialogues"]) == ("last turns", 200)
    shares = stats.binom.sf(25, 50, 0.45), stats.binom.pmf(25, 50, 0.45), stats.binom.cdf(24, 50, 0.45)
    assert [found[f"share_{k}"] for k in ("above", "tied", "below")] == pytest.approx(shares, abs=0.012)
    edges, counts = (np.array(found["histogram"][key]) for key in ("edges", "counts"))
    assert counts.sum() == 20_000 and np.isclose(edges, 0).any()
    above = counts[edges[:-1] > 0.195].sum() / 20_000  # 30 ups of 50
    assert above == pytest.approx(stats.binom.sf(29, 50, 0.45), abs=0.01)


def test_the_interval_of_a_share_is_the_one_of_its_rate():
    """Ups and downs only: a share is a function of the rate of ups, and so are the ends of its interval."""
    d = np.where(np.arange(200) < 90, 1.0, -1.0)
    (found,) = redraw({"a": np.zeros(200), "b": d}, [("a", "b")], **DRAWS)["comparisons"]
    rates = stats.binom.ppf(statistics.tails(200, 0.95), 200, 0.45) / 200
    ends = stats.binom.sf(25, 50, rates)
    assert [found["share_above_low"], found["share_above_high"]] == pytest.approx(ends, abs=0.04)


def test_redraw_of_any_turn_draws_dialogues_then_turns():
    """Two of three turns are up in the short dialogues, none in the long ones: a third of the questions drawn are
    up."""
    clusters = np.r_[np.repeat(np.arange(10), 3), np.repeat(np.arange(10, 20), 12)]
    b = np.r_[np.tile([1.0, 1.0, 0.0], 10), np.zeros(120)]
    shuffled = np.random.default_rng(1).permutation(150)
    values = {"a": np.full(150, 0.5), "b": b}
    result = redraw({k: v[shuffled] for k, v in values.items()}, [("a", "b")], clusters=clusters[shuffled], **DRAWS)
    (found,) = result["comparisons"]
    assert result["design"] == "any turn" and found["share_above"] == pytest.approx(
        stats.binom.sf(25, 50, 1 / 3), abs=0.012
    )
    assert found["share_above_low"] <= found["share_above"] < found["share_above_high"]


def test_few_dialogues_give_no_interval_but_the_reason():
    rng = np.random.default_rng(13)
    (found,) = redraw({name: rng.random(9) for name in "ab"}, [("a", "b")], **DRAWS)["comparisons"]
    assert found["share_above_low"] is None and "9 dialogues are fewer" in found["reason"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"a": [1, 0]}, "no values for b"),
        ({"a": [1, 0], "b": [1]}, "same questions"),
        ({"a": [1, 0], "b": [1, np.nan]}, "missing"),
    ],
)
def test_wrong_input_is_one_sentence(values, words):
    with pytest.raises(StudyError, match=words):
        redraw(values, [("a", "b")], **DRAWS)
