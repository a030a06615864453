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
