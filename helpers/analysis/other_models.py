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


def separated(rows: pd.DataFrame, among) -> set[tuple[str, str]]:
    """(better, worse) of every pair of `contrasts.table` whose F1 differs, among the given configurations."""
    rows = rows[rows.differs & rows.a.isin(among) & rows.b.isin(among)]
    return {(r.a, r.b) if r.difference < 0 else (r.b, r.a) for r in rows.itertuples()}


def order(f: Frames, rows: pd.DataFrame, other: Frames, others: pd.DataFrame) -> str:
    """In how many pairs of formats, of those that both have, both models agree; nothing where there is no pair."""
    both = set(f.samples.configuration) & set(other.samples.configuration) - {f.full, other.full}
    if len(both) < 2:
        return ""
    here, there = separated(rows, both), separated(others, both)
    level = style.percent(f.study.statistics.confidence, 0)
    turned = {(b, a) for a, b in here} & there
    only = sorted(f"{f.label(a)} above {f.label(b)}" for a, b in there - here - turned)
    further = f"; {len(only)} more {'are' if len(only) > 1 else 'is'} separated there: {sentences.listed(only)}"
    ways = f" ({sentences.listed(sorted(f'{f.label(a)} above {f.label(b)}' for a, b in turned))})" if turned else ""
    return (
        f"Pairs of formats, each at {level} by itself (exploratory): on {grid(f)}, F1 separates {len(here)} of "
        f"{math.comb(len(both), 2)} (n = {sentences.asked(f)}). On {grid(other)}, {len(here & there)} of these come "
        f"out the same way and {len(turned)} the other way round{ways}{further if only else ''}."
    )
