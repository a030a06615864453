"""Power and sample size of a row of helpers.statistics.compare: what a two-sided paired t test over dialogues would
find.

The level is the row's own: adjusted within a family, so that a primary contrast needs more than an exploratory one.
"""

import math

from scipy import stats
from statsmodels.stats.power import TTestPower

POWER = 0.8


def detectable(row) -> float | None:
    """The difference (in the unit of the values) that these dialogues find with 80% power; None without an
    interval."""
    if row["reason"]:
        return None
    n = row["n_dialogues"]
    if row["level"] == 0:
        return math.inf
    return row["standard_error"] * math.sqrt(n) * TTestPower().solve_power(nobs=n, alpha=row["level"], power=POWER)


def needed(row) -> dict:
    """How many dialogues like these a t test at the row's level needs for 80% power, if the difference is the
    estimated one.

    Returns n_dialogues, and fewest and most: the same for the interval's far and near end (infinite if the interval
    holds 0). None, with the reason, where the row of `compare` has no interval.
    """
    if row["reason"]:
        return dict.fromkeys(("n_dialogues", "fewest", "most")) | {
            "reason": row["reason"].replace("interval", "estimate")
        }
    spread = row["standard_error"] * math.sqrt(row["n_dialogues"])
    ends = sorted((abs(row["ci_low"]), abs(row["ci_high"])))
    near = 0.0 if row["ci_low"] <= 0 <= row["ci_high"] else ends[0]
    found = {"n_dialogues": abs(row["difference"]), "fewest": ends[1], "most": near}
    return {key: sample_size(d, spread, row["level"]) for key, d in found.items()} | {"reason": None}


def sample_size(difference: float, spread: float, level: float) -> float:
    """Dialogues (a whole number, or infinity) for a paired t test."""
    if difference == 0 or level == 0:
        return math.inf
    effect = difference / spread
    if effect < 0.01:  # Student's t is normal at such numbers, and the solver loses its way
        return math.ceil(((stats.norm.isf(level / 2) + stats.norm.ppf(POWER)) / effect) ** 2)
    low, high = 2, 3
    while TTestPower().power(effect, high, level) < POWER:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if TTestPower().power(effect, middle, level) >= POWER else (middle, high)
    return high
