"""When is a time longer than full precision's? The one rule, for tables, figures, sentences and claims."""

import numpy as np
import pandas as pd

LEAST_PROCESSES = 3  # a time is one draw of a process: fewer decide nothing
SAME_TIME = 0.03  # share: within it times count as equal
SLOWER, FASTER, EQUAL = "slower", "faster", f"equal within {SAME_TIME:.0%}"


def counted(processes: int) -> str:
    """1 process, 2 processes."""
    return f"{processes:.0f} process{'es' * (processes > 1)}"


def longer(row) -> str | None:
    """A row of Frames.ratios (processes, ratio, ratio_low, ratio_high): "slower", "faster", "equal within 3%" or
    None.

    A time is the median of the processes' medians. It is longer if the ranges of the processes do not overlap and the
    medians differ by more than 3%, equal if any two processes are within 3%; fewer than three on either side decide
    nothing.
    """
    if not row["processes"] >= LEAST_PROCESSES:
        return None
    if row["ratio_low"] > 1 and row["ratio"] > 1 + SAME_TIME:
        return SLOWER
    if row["ratio_high"] < 1 and row["ratio"] < 1 / (1 + SAME_TIME):
        return FASTER
    return EQUAL if row["ratio_low"] > 1 - SAME_TIME and row["ratio_high"] < 1 + SAME_TIME else None


def verdicts(ratios: pd.DataFrame) -> pd.Series:
    """`longer` of every row in words: also "not separated" and "fewer than 3 processes"."""
    words = [longer(row) or "not separated" for _, row in ratios.iterrows()]
    few = ratios.processes < LEAST_PROCESSES
    return pd.Series(np.where(few, f"fewer than {LEAST_PROCESSES} processes", words), index=ratios.index, dtype=object)
