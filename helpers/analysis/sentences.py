"""Sentences of the report and the README, rendered from the tables: right for the opposite finding as well.

Each function returns sentences of plain text (a list, unless it says otherwise). What no table holds is not said.
"""

import numpy as np
import pandas as pd

from helpers.analysis import contrasts, durations
from helpers.analysis import power as sample
from helpers.analysis.frames import MODES, Frames
from helpers.analysis.style import interval, number, percent, points, times

COSTS = {"below": "costs accuracy", "above": "gains accuracy"}


def listed(names) -> str:
    """A, B and C."""
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def device(f: Frames) -> str:
    """The hardware of the benchmarks, or of whatever was run."""
    gpus = f.runs.gpu.dropna().unique()
    if len(gpus):
        return listed(gpus)
    cpu = f.runs.iloc[0]
    return f"{cpu.processor}, {cpu.cores} cores"


def recovered(rate: float, low: float, high: float) -> str:
    return f"{number(rate, 0)}% {interval(low, high, lambda v: number(v, 0))}".strip()


def differs(f: Frames, row, metric: str = "F1") -> str:
    """One contrast: 'NF4 scores below FP16: −6.1 F1 points [−9.5, −2.8].'"""
    a, b = f.label(row.a), f.label(row.b)
    value = f"{points(row.difference)} {metric} points {interval(row.low, row.high)}".strip()
    if row.reason:
        return f"{b} vs {a}: {value}; {row.reason}."
    if row.verdict in ("above", "below"):
        return f"{b} scores {row.verdict} {a}: {value}."
    power = f"; 80% power for {points(row.detectable, False)} points" if pd.notna(row.detectable) else ""
    if row.verdict.startswith("equal"):
        return f"{b} is {row.verdict} of {a}: {value}."
    return f"{metric} does not separate {b} from {a}: {value}{power}."


def caveats(f: Frames, paper: dict) -> list[str]:
    """What the reader must know before any number."""
    said = []
    if f.study.study != paper["study"]:
        said.append(
            f"This study measures {f.study.model.name}, not the paper's {paper['model']}: it tests the paper's "
            "reasoning, not its numbers."
        )
    if f.study.model.already_quantized:
        said.append(
            f"The weights are not an original: {f.study.model.already_quantized}. Full precision means what they hold "
            "after that, and formats with a similar grid may be flattered."
        )
    for status, word in (("skipped", "not run"), ("failed", "failed")):
        odd = f.runs[f.runs.status == status].drop_duplicates(["configuration", "reason"])
        for reason, rows in odd.groupby("reason", sort=False):
            names = listed(dict.fromkeys(f.label(name) if name else "the study" for name in rows.configuration))
            said.append(f"{names}: {word}: {reason.rstrip('.')}.")
    return said


def setup(f: Frames) -> list[str]:
    said = [f"Model: {f.study.model.name} ({f.study.model.source})."]
    if len(f.samples):
        one = f.samples[f.samples.configuration == f.samples.configuration.iloc[0]]
        sets = one.groupby("data_set").agg(dialogues=("dialogue", "nunique"), questions=("turn", "size"))
        for name, row in sets.iterrows():
            said.append(f"Data: {name}, {row.questions:,} questions in {row.dialogues:,} dialogues.")
    names = f.configurations
    said.append(f"Configurations: {listed(names.label)}.")
    for dtype, rows in names.groupby("dtype", sort=False):
        said.append(f"Computed in {dtype}: {listed(rows.label)}.")
    processes = f.times.groupby("configuration").process.nunique() if len(f.times) else pd.Series(dtype=int)
    if len(processes):
        several = " to ".join(dict.fromkeys([str(processes.min()), str(processes.max())]))
        said.append(f"Times: {device(f)}; processes per configuration: {several}.")
    unpacked = names[names.same_kernels]
    if len(unpacked):
        said.append(
            f"{listed(unpacked.label)}: no 4-bit kernel here. The weights were unpacked when loaded, so speed and "
            "memory are full precision's and are not shown again."
        )
    partly = names[~names.full & (names.quantized_share.astype(float) < 0.9)]
    for name, row in partly.iterrows():
        said.append(f"{f.label(name)} quantized only {percent(row.quantized_share)} of the linear weights.")
    return said


def needs(f: Frames, name: str) -> str:
    """What a format asks of whoever uses it, in a few words."""
    row = f.configurations.loc[name]
    if row.evaluation != "ok" and row.benchmark != "ok":
        return f"not run: {row.reason}"
    parts = ["calibration text"] if row.method in ("gptq", "awq") else []
    parts += ["no 4-bit kernel here"] if row.same_kernels else []
    return ", ".join(parts) or "nothing else"


def noise_kind(kind: str) -> str:
    """What a row of `noise` did to the weights."""
    return NOISE.get(kind, kind.replace("_", " "))


NOISE = {
    "nf4": "NF4 itself",
    "block": "Gaussian noise, matched block by block",
    "layer": "Gaussian noise, matched layer by layer",
    "signs": "NF4's own errors, random signs",
    "permuted": "NF4's own errors, permuted in their block",
}


def limitations(f: Frames, paper: dict) -> list[str]:
    """What these results cannot say."""
    said = [f"One model ({f.study.model.name}); other sizes and families may keep more or less."]
    if len(f.samples):
        sets = f.samples.data_set.nunique()
        said.append(f"{sets} data set{'s' if sets > 1 else ''}; formats can swap places on others.")
        references = f.samples.references.dropna().map(len)
        if len(references) and f.study.data is not None:
            said.append(
                "Greedy answers scored by word overlap with references; a right answer in other words counts little."
            )
    few = f.times.groupby("configuration").process.nunique() if len(f.times) else pd.Series(dtype=int)
    if len(few) and few.min() < durations.LEAST_PROCESSES:
        said.append(f"Times from {few.min()} process{'es' if few.min() > 1 else ''} at the least: they order nothing.")
    if len(f.times):
        said.append(
            f"Times of {device(f)}; the paper used an {paper['device']}. Kernels of other libraries may be faster."
        )
    return said


def counts(f: Frames) -> str:
    """n, for captions."""
    if f.samples.empty:
        return ""
    one = f.samples[f.samples.configuration == f.samples.configuration.iloc[0]]
    dialogues = len(one[["data_set", "dialogue"]].drop_duplicates())
    return (
        f"n = {len(one):,} questions in {dialogues:,} dialogues; {f.study.statistics.confidence:.0%} intervals, "
        "clustered by dialogue."
    )


def abstract(f: Frames, all_turns, last_turns, ratios, paper: dict) -> list[str]:
    """Five sentences: what was asked, what NF4 keeps, NF4 vs FP4, what 50 questions would have said, speed."""
    said = []
    mine, last = contrasts.vs_full(f, all_turns), contrasts.vs_full(f, last_turns)
    if len(f.samples):
        n = f.samples.groupby("configuration").size().iloc[0]
        said.append(f"{listed(f.configurations.label)} answered {n:,} questions each. {reach(f)}")
    if "nf4" in mine.index:
        row = mine.loc["nf4"]
        keeps = recovered(row.recovery, row.recovery_low, row.recovery_high)
        said.append(
            f"NF4 keeps {keeps} of {f.label(f.full)}'s F1{smaller(f, 'nf4')}. {differs(f, row.rename('nf4').pipe(_b))}"
        )
    pair = all_turns[(all_turns.a == "nf4") & (all_turns.b == "fp4")]
    if len(pair):
        said.append(differs(f, pair.iloc[0]))
    said += by_chance(f, mine, last)
    said += speed(f, ratios)
    return said


def _b(row):
    """A row of `contrasts.vs_full` with its configuration back as column b."""
    return row.copy().__class__({**row.to_dict(), "b": row.name})


def reach(f: Frames) -> str:
    return f"Every turn of every dialogue is asked ({listed(f.samples.data_set.unique())})."


def smaller(f: Frames, name: str) -> str:
    size = f.sizes.allocated
    if f.full not in size or name not in size or pd.isna(size[name]):
        return ""
    megabytes = f"{number(size[name], 0)} vs {number(size[f.full], 0)} MB"
    return f" in {percent(size[name] / size[f.full])} of its memory ({megabytes})"


def by_chance(f: Frames, mine: pd.DataFrame, last: pd.DataFrame) -> list[str]:
    """What the paper's design would have reported here, where it contradicts all turns."""
    odd = [n for n in last.index if last.difference[n] > 0 and mine.difference[n] < 0] if len(last) else []
    if not odd:
        return []
    shown = sorted(odd, key=lambda n: -last.difference[n])[:2]
    parts = [
        f"{f.label(n)} {points(last.difference[n], False)} points above {f.label(f.full)} (all turns: "
        f"{points(mine.difference[n])})"
        for n in shown
    ]
    n = int(last.n_questions.iloc[0])
    return [f"The paper's design, {n} last turns and no interval, would have reported {listed(parts)}: noise as gain."]


def speed(f: Frames, ratios: pd.DataFrame) -> list[str]:
    """Decode with NF4 in the mode that repeats best, at the smallest and the largest batch."""
    mode = contrasts.fastest_mode(f, ratios)
    rows = ratios[(ratios.phase == "decode") & (ratios["mode"] == mode) & (ratios.configuration == "nf4")]
    rows = rows.sort_values(["batch", "tokens"]).drop_duplicates("batch")
    if rows.empty:
        return []
    ends = rows.iloc[[0, -1]] if len(rows) > 1 else rows
    parts = [f"{times(row.ratio)} {spread(row)} at batch {row.batch}" for row in ends.itertuples()]
    few = int(rows.processes.min())
    caution = f" From {few} process{'es' * (few > 1)}: no verdict on speed."
    if few >= durations.LEAST_PROCESSES:
        judged = [f"{verdict} at batch {batch}" for verdict, batch in zip(durations.verdicts(ends), ends.batch)]
        caution = f" Verdict: {listed(judged)}."
    return [
        f"One decode step with NF4 takes {listed(parts)} of {f.label(f.full)}'s time "
        f"({MODES[mode]}, {device(f)}).{caution}"
    ]


def spread(row) -> str:
    """The range over processes of a ratio."""
    return f"[{number(row.ratio_low)}, {number(row.ratio_high)}]" if row.processes > 1 else ""


def recommendation(f: Frames, all_turns) -> list[str]:
    """Should I use NF4? Whether it costs accuracy here, and which format certainly keeps most."""
    mine = contrasts.vs_full(f, all_turns)
    said = []
    if "nf4" in mine.index and pd.notna(mine.recovery_low["nf4"]):
        row = mine.loc["nf4"]
        verdict = COSTS.get(row.verdict, "costs no accuracy" if row.verdict.startswith("equal") else None)
        said.append(f"Should I use NF4? Here it {verdict or 'may or may not cost accuracy: n is too small to say'}.")
    best = mine[mine.recovery_low.notna()].sort_values("recovery_low", ascending=False)
    if len(best):
        name = best.index[0]
        least = number(best.recovery_low[name], 0)
        said.append(f"Safest format by the interval's lower end: {f.label(name)}, at least {least}%{smaller(f, name)}.")
    return said


def power(f: Frames, rows: pd.DataFrame) -> list[str]:
    """Dialogues that would settle what this n does not."""
    said = []
    for row in rows[rows.primary].to_dict("records") if len(rows) else []:
        if row["verdict"] != "n too small to say" or row["reason"]:
            continue
        need = sample.needed(row)
        most = "infinity" if np.isinf(need["most"]) else f"{need['most']:,.0f}"
        said.append(
            f"{f.label(row['b'])} vs {f.label(row['a'])}: 80% power for {points(row['detectable'], False)} points at "
            f"this n. A true difference of {points(row['difference'])} would take about {need['n_dialogues']:,.0f} "
            f"dialogues ({need['fewest']:,.0f} to {most} over the interval)."
        )
    return said


def disagreements(f: Frames, all_turns, last_turns) -> list[str]:
    """Where last turns, the paper's estimand, and all turns say different things."""
    if last_turns.empty:
        return []
    both = all_turns[all_turns.primary].merge(last_turns[last_turns.primary], on=["a", "b"], suffixes=("", "_last"))
    odd = both[both.verdict != both.verdict_last]
    said = [
        f"{f.label(r.b)} vs {f.label(r.a)}: all turns say {r.verdict} ({points(r.difference)}), last turns "
        f"{r.verdict_last} ({points(r.difference_last)})."
        for r in odd.itertuples()
    ]
    return said or ["All turns and last turns give the same verdicts."]


def flips(f: Frames, table: pd.DataFrame) -> list[str]:
    """How many right answers each 4-bit format loses."""
    said = []
    for row in (
        table[table.lost.notna()].sort_values("lost", ascending=False).head(2).itertuples() if len(table) else []
    ):
        said.append(
            f"{f.label(row.configuration)} loses {number(row.lost, 0)}% of the answers {f.label(f.full)} got right, "
            f"and turns {number(row.wrong_to_right, 1)}% of all questions from wrong to right."
        )
    return said


def redraws(f: Frames, designs: list[dict]) -> list[str]:
    """How often the design would have given each direction, and how well that share is known."""
    said = []
    for design in designs:
        kind = "the paper's design, last turns" if design["design"] == "last turns" else "the same with any turn"
        parts = []
        for row in design["comparisons"]:
            share = percent(row["share_above"], 0)
            known = interval(row["share_above_low"], row["share_above_high"], lambda v: percent(v, 0))
            parts.append(f"{f.label(row['b'])} beats {f.label(row['a'])} in {share} {known}".strip())
        said.append(f"In {design['draws']:,} repeats of {kind} ({design['size']} dialogues): {'; '.join(parts)}.")
    return said


def perplexities(f: Frames, neighbours: pd.DataFrame) -> list[str]:
    """The order of perplexities, with the neighbours that it does not separate."""
    if neighbours.empty:
        return []
    ppl = f.tokens[f.tokens.group == "all"].set_index("configuration").ppl
    order = [neighbours.better.iloc[0], *neighbours.worse]
    same = [f"{f.label(r.better)} and {f.label(r.worse)}" for r in neighbours[~neighbours.separated].itertuples()]
    said = [f"Perplexity, best first: {', '.join(f'{f.label(name)} {number(ppl[name])}' for name in order)}."]
    return said + ([f"Not separated by paired intervals: {'; '.join(same)}."] if same else [])


def heterogeneity(f: Frames) -> list[str]:
    """Whose loss depends on the data (Cochran's test over data sets at the study's level)."""
    over = contrasts.pooled(f)
    if over.empty:
        return []
    level = 1 - f.study.statistics.confidence
    depends = [f"{f.label(row.configuration)} (I2 {number(row.i2, 0)}%)" for row in over[over.q_p < level].itertuples()]
    same = [f.label(name) for name in over[over.q_p >= level].configuration]
    said = [f"The loss depends on the data for {listed(depends)}."] if depends else []
    return said + ([f"No sign that it does for {listed(same)}, over {over.data_sets.max()} data sets."] if same else [])


def chance(f: Frames, all_turns, last_turns, paper: dict) -> list[str]:
    """What the paper's own design would have said here."""
    said = by_chance(f, contrasts.vs_full(f, all_turns), contrasts.vs_full(f, last_turns))
    return said + redraws(f, contrasts.designs(f, paper)[:1])


def counted(n: int, verdict: str) -> str:
    """3 do not hold, 1 holds."""
    return f"{n} {verdict if n == 1 else {'holds': 'hold', 'does not hold': 'do not hold'}.get(verdict, verdict)}"


def claims(*judged: pd.DataFrame) -> list[str]:
    """How many of the paper's claims stand, by kind; of several runs the first that decides one counts."""
    rows = pd.concat(judged)
    rows["open"] = rows.verdict == "cannot be decided"
    rows = rows.sort_values("open", kind="stable").drop_duplicates("id")
    said = []
    for kind, part in rows.groupby("kind", sort=True):
        by = part.verdict.value_counts()
        said.append(f"{kind[0].upper()}{kind[1:]}: {', '.join(counted(n, verdict) for verdict, n in by.items())}.")
    return said
