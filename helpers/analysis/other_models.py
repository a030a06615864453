"""The same formats on another model: do they keep their order there? Study parameter `beside` names the studies."""

import math

import pandas as pd

from helpers import ROOT, results
from helpers.analysis import contrasts, frames, sentences, style
from helpers.analysis.frames import Frames


def load(f: Frames) -> list[Frames]:
    """The studies that `beside` names, of those whose results lie beside this study's."""
    folders = [results.folder(f.study).parent / name for name in f.study.beside]
    return [frames.load(str(folder.relative_to(ROOT))) for folder in folders if (folder / "setup.json").is_file()]


def grid(f: Frames) -> str:
    return f"{f.study.model.name}, from {(f.study.model.already_quantized or 'original weights').split(',')[0]}"


def recoveries(studies: list[tuple[Frames, pd.DataFrame]]) -> pd.DataFrame:
    """A row per format and a column per study, each given with its `contrasts.table`: the share of full precision's F1
    kept, with its interval, as text."""
    columns = {}
    for f, table in studies:
        rows = contrasts.vs_full(f, table)
        kept = style.with_interval(rows, "recovery", "recovery_low", "recovery_high", lambda v: style.number(v, 0))
        columns[grid(f)] = kept.rename(index=f.label)
    return pd.DataFrame(columns).rename_axis("F1 kept (%)").reset_index()


def separated(rows: pd.DataFrame) -> set[tuple[str, str]]:
    """(better, worse) of every pair of `contrasts.table` whose F1 differs; full precision's pairs left out."""
    rows = rows[rows.differs & ~(rows.primary & rows.recovery.notna())]
    return {(r.a, r.b) if r.difference < 0 else (r.b, r.a) for r in rows.itertuples()}


def order(f: Frames, rows: pd.DataFrame, other: Frames, others: pd.DataFrame) -> str:
    """In how many pairs of formats both models agree."""
    here, there = separated(rows), separated(others)
    pairs = math.comb(f.samples.configuration[f.samples.configuration != f.full].nunique(), 2)
    level = style.percent(f.study.statistics.confidence, 0)
    turned = sorted(f"{f.label(a)} and {f.label(b)}" for a, b in here if (b, a) in there)
    only = sorted(f"{f.label(a)} above {f.label(b)}" for a, b in there - here if {a, b} <= set(f.configurations.index))
    reversed_pairs = f" ({sentences.listed(turned)})" if turned else ""
    further = f"; it also puts {sentences.listed(only)}" if only else ""
    return (
        f"Exploratory, each pair at {level} by itself: F1 separates {len(here)} of {pairs} pairs of formats on "
        f"{grid(f)}, {sentences.counts(f).split(';')[0]}. On {grid(other)}, {len(here & there)} of them come out "
        f"the same way and {len(turned)} the other way round{reversed_pairs}{further}."
    )
