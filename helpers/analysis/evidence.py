"""What the functions that judge claims share: the tables they read, the verdicts they give."""

import math
from typing import NamedTuple

import pandas as pd

from helpers.analysis import contrasts
from helpers.analysis.frames import Frames

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be decided"
PARTLY, DIRECTION = "holds in part", "holds in direction alone"
BATCH, BUDGET, MODE = "depends on the batch", "depends on the budget", "depends on the mode"
LENGTH, COUNTED = "depends on the prompt length", "depends on what is counted"
SAME_SIZE = 0.01  # share: less is the allocator's rounding


class NotMeasured(Exception):
    """What a verdict would need and the results don't have."""


class Facts(NamedTuple):
    f: Frames
    paper: dict
    last: pd.DataFrame  # contrasts.table of F1 on last turns
    every: pd.DataFrame  # on all turns
    em: pd.DataFrame  # of exact match on last turns
    designs: list[dict]  # contrasts.designs
    ratios: pd.DataFrame  # Frames.ratios

    @property
    def cards(self) -> list[str]:
        """GPUs of the benchmarks; none: a CPU, or no benchmark."""
        return list(self.f.runs[self.f.runs.kind == "benchmark"].gpu.dropna().unique())

    @property
    def same_model(self) -> bool:
        return self.f.study.model.name == self.paper["weights"]

    @property
    def same_architecture(self) -> bool:
        return self.f.study.model.name in (self.paper["weights"], self.paper["same_shape"])


class Verdict(NamedTuple):
    verdict: str
    evidence: str  # its parts separated by "; "
    direction: str | None = None
    size: str | None = None
    equality: str | None = None
    all_turns: str | None = None
    em: str | None = None


def all_of(parts: list[str]) -> str:
    """One that fails refutes the whole, one that is open leaves it open."""
    return next((verdict for verdict in (FAILS, OPEN) if verdict in parts), HOLDS)


def facts(f: Frames, paper: dict, designs: list[dict] | None = None) -> Facts:
    tables = [contrasts.table(f, metric, last) for metric, last in (("f1", True), ("f1", False), ("em", True))]
    return Facts(f, paper, *tables, contrasts.designs(f, paper) if designs is None else designs, f.ratios())


def contrast(known: Facts, table: pd.DataFrame, a: str | None, b: str):
    """The row for b minus a. Raises NotMeasured where there is none, or no interval."""
    rows = table[(table.a == a) & (table.b == b)] if len(table) else table
    if not len(rows):
        names = known.f.label(b), known.f.label(a) if a else "full precision"
        raise NotMeasured(f"{names[0]} and {names[1]} were not compared in this study")
    if isinstance(rows.iloc[0].reason, str):
        raise NotMeasured(rows.iloc[0].reason)
    return rows.iloc[0]


def size_mb(known: Facts, name: str | None, which: str) -> float:
    """A column of Frames.sizes (MiB)."""
    value = known.f.sizes[which].get(name, math.nan)
    if pd.isna(value):
        label = known.f.label(name) if name else "full precision"
        raise NotMeasured(f"the memory of {label} ({which}) was not measured in this study")
    return float(value)
