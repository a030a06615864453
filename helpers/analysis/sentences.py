"""Sentences of the report and the README, rendered from the tables: right for the opposite finding as well.

Each function returns sentences of plain text (a list, unless it says otherwise). What no table holds is not said.
"""

import numpy as np
import pandas as pd

from helpers.analysis import contrasts, durations
from helpers.analysis.evidence import FAILS, HOLDS, OPEN
from helpers.analysis.frames import MODES, Frames
from helpers.analysis.style import interval, number, percent, points, times

ANSWERS = {"below": "On this model not where accuracy counts.", "above": "On this model yes: it even scores higher."}
MANY_SETS = 10  # with fewer, a test between data sets finds next to nothing
SMALL_SHARE = 0.9  # of the linear weights: quantizing less than this is worth a warning


def listed(names) -> str:
    """A, B and C."""
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def device(f: Frames) -> str:
    """The hardware of the benchmarks, or of whatever was run."""
    runs = f.runs[f.runs.kind == "benchmark"] if (f.runs.kind == "benchmark").any() else f.runs
    gpus, cpu = runs.gpu.dropna().unique(), runs.iloc[0]
    return listed(gpus) if len(gpus) else f"{cpu.processor}, {cpu.cores} cores"


def data_set(name: str) -> str:
    return "this project's dialogues" if name == "embedded" else name


def recovered(rate: float, low: float, high: float) -> str:
    return f"{number(rate, 0)}% {interval(low, high, lambda v: number(v, 0))}".strip()


def differs(f: Frames, row) -> str:
    """One contrast: 'NF4 scores below FP16: −6.1 F1 points [−9.5, −2.8].'"""
    a, b = f.label(row.a), f.label(row.b)
    value = f"{points(row.difference)} F1 points {interval(row.low, row.high)}".strip()
    if row.reason:
        return f"{b} vs {a}: {value}; {row.reason}."
    if row.verdict in ("above", "below"):
        return f"{b} scores {row.verdict} {a}: {value}."
    if row.verdict.startswith("equal"):
        return f"{b} is {row.verdict} of {a}: {value}."
    power = f"; 80% power for {points(row.detectable, False)} points" if pd.notna(row.detectable) else ""
    return f"F1 does not separate {b} from {a}: {value}{power}."


def caveats(f: Frames, paper: dict) -> list[str]:
    """What the reader must know before any number."""
    said, names = [], f.configurations
    if f.study.model.name != paper["weights"]:
        said.append(f"Measured on {f.study.model.name}, not on the paper's {paper['model']}.")
    if f.study.model.already_quantized:
        said.append(
            f"Its weights are no original but {f.study.model.already_quantized}: full precision means what they hold "
            "after that, and formats with a similar grid may be flattered."
        )
    for status, word in (("skipped", "not run"), ("failed", "failed")):
        odd = f.runs[f.runs.status == status].drop_duplicates(["configuration", "reason"])
        for reason, rows in odd.groupby("reason", sort=False):
            who = dict.fromkeys(f.label(name) if isinstance(name, str) else "the study" for name in rows.configuration)
            said.append(f"{listed(who)}: {word}: {reason.rstrip('.')}.")
    for name, row in names[~names.full & (names.quantized_share.astype(float) < SMALL_SHARE)].iterrows():
        said.append(f"{f.label(name)} quantized only {percent(row.quantized_share)} of the linear weights.")
    n = f.engine.questions
    if len(f.samples) and n.nunique() > 1:
        said.append(
            f"{listed(map(f.label, n[n == n.min()].index))} answered {n.min():,.0f} questions, others up to "
            f"{n.max():,.0f}: only what all answered is compared."
        )
    for name, why in f.engine.tasks_failed.dropna().items():
        remedy = f"to ask again, delete {f.study.study}/{name}/evaluation.json and make run-all"
        said.append(f"{f.label(name)}: further tasks without scores: {why.rstrip('.')}; {remedy}.")
    parts = {"accuracy": f.samples, "fidelity": f.tokens, "memory and times": f.times, "weights": f.formats}
    if missing := [name for name, table in parts.items() if table.empty]:
        said.append(f"Not measured in this study, so empty below: {', '.join(missing)}.")
    return said


def asked(f: Frames) -> str:
    """597 questions in 50 dialogues."""
    one = f.samples[f.samples.configuration == f.samples.configuration.iloc[0]]
    return f"{len(one):,} questions in {len(one[['data_set', 'dialogue']].drop_duplicates()):,} dialogues"


def counts(f: Frames) -> str:
    """n, for captions."""
    if f.samples.empty:
        return ""
    return f"n = {asked(f)}; {f.study.statistics.confidence:.0%} intervals, clustered by dialogue."


def smaller(f: Frames, name: str) -> str:
    """ " Its weights take 42% of FP16's memory.", of the file where no memory was measured."""
    which = contrasts.measured_size(f)
    share = f.sizes[which].get(name, np.nan) / f.sizes[which].get(f.full, np.nan)
    takes, what = ("weights take", "memory") if which == "allocated" else ("file takes", "size on disk")
    return "" if pd.isna(share) else f" Its {takes} {percent(share, 0)} of {f.label(f.full)}'s {what}."


def abstract(f: Frames, all_turns, last_turns, ratios, paper: dict) -> list[str]:
    """Should I use NF4? What it costs and saves, the safest format, FP4 vs NF4, what 50 questions would have said."""
    mine, full, said = contrasts.vs_full(f, all_turns), f.label(f.full) if f.full else "full precision", []
    if "nf4" in f.configurations.index:
        said.append(f"Should I use NF4? {nf4(f, mine, full)}{speed(f, ratios)}")
    bounds = mine[mine.low.notna()].low.astype(float)
    worst = bounds.groupby(contrasts.formats(f).reindex(bounds.index)).idxmin()  # of several seeds
    if len(worst) > 1:
        name = bounds[worst].idxmax()
        loss, label = points(max(0.0, -bounds[name]), False), contrasts.formats(f)[name]
        said.append(
            f"Safest of {len(worst)} formats: {label}. It loses at most {loss} F1 points "
            f"({f.study.statistics.confidence:.0%}, adjusted for all contrasts).{smaller(f, name)}"
        )
    pair = all_turns[(all_turns.a == "nf4") & (all_turns.b == "fp4")]
    said += [told(f, row) for _, row in pair.iterrows()]
    said += by_chance(f, mine, contrasts.vs_full(f, last_turns))
    return said + ([counts(f)] if len(f.samples) else [])


def nf4(f: Frames, mine: pd.DataFrame, full: str) -> str:
    """What NF4 costs, after the answer that follows from it."""
    size, run = smaller(f, "nf4"), f.configurations.loc["nf4"]
    if "ok" not in (run.evaluation, run.benchmark, run.fidelity) and "nf4" not in set(f.times.configuration):
        why = f": {run.reason.rstrip('.')}" if isinstance(run.reason, str) else ""
        return f"It was not measured here{why}."
    if "nf4" not in mine.index:
        return f"What it does to answers was not measured here.{size}"
    row = mine.loc["nf4"]
    if pd.isna(row.low):
        return f"What it costs, these answers cannot say: {row.reason or 'no interval'}.{size}"
    margin = contrasts.margin(f)
    answer = ANSWERS.get(row.verdict, "n is too small to say what it costs.")
    if row.verdict.startswith("equal") or (row.verdict == "below" and row.low > -margin):
        answer = f"On this model yes: it loses less than {100 * margin:g} F1 points."
    keeps = recovered(row.recovery, row.recovery_low, row.recovery_high)
    value = f"{points(row.difference)} points {interval(row.low, row.high)}"
    return f"{answer} It keeps {keeps} of {full}'s F1 ({value}).{size}"


def by_data_set(f: Frames, row) -> list[str]:
    """One contrast data set by data set, and for data sets in general, as parts of a sentence; none for one data
    set."""
    if f.samples.data_set.nunique() < 2:
        return []
    rows = contrasts.groups(f, "data_set", [(row.a, row.b)])
    parts = [f"{data_set(r.group)} {points(r.difference)} {interval(r.low, r.high)}".strip() for r in rows.itertuples()]
    said = [f"By data set, each by itself: {', '.join(parts)}"]
    for mean in contrasts.pooled(f, rows).itertuples():
        whole = f"{points(mean.mean)} {interval(mean.ci_low, mean.ci_high)}".strip()
        said.append(f"for data sets in general (random effects) {whole}, I\N{SUPERSCRIPT TWO} {number(mean.i2, 0)}%")
    return said


def told(f: Frames, row) -> str:
    """`differs`, and `by_data_set` where there are several."""
    parts = "; ".join(by_data_set(f, row))
    return f"{differs(f, row)} {parts}." if parts else differs(f, row)


def widened(f: Frames) -> list[str]:
    """Formats that are widened before every multiplication: their times are not of arithmetic in so few bits."""
    kernels = f.configurations.kernel.dropna()
    found = kernels[kernels.str.contains("dequantized") & f.configurations.packed.eq(True)]
    return [f"{f.label(name)} here: {kernel}." for name, kernel in found.items()]


def by_chance(f: Frames, mine: pd.DataFrame, last: pd.DataFrame) -> list[str]:
    """What the paper's design would have reported here as a gain, where all turns show a loss."""
    odd = [n for n in last.index if last.difference[n] > 0 and mine.verdict[n] == "below"]
    odd = [n for n in odd if last.verdict[n] != "above"]
    if not odd:
        return []
    name = max(odd, key=lambda n: last.difference[n])
    row, label, full = last.loc[name], f.label(name), f.label(f.full)
    return [
        f"Last turns without an interval, the paper's design, would have put {label} {points(row.difference, False)} "
        f"points above {full} (n = {row.n_questions}), the largest such gain of {len(last)} formats. The interval is "
        f"{interval(row.low, row.high)}; over all turns {label} loses {points(-mine.difference[name], False)} points."
    ]


def speed(f: Frames, ratios: pd.DataFrame) -> str:
    """Decode with NF4 in the mode that repeats best, at the smallest and the largest batch."""
    mode = contrasts.steadiest_mode(ratios)
    rows = ratios[(ratios.configuration == "nf4") & (ratios["mode"] == mode)]
    rows = contrasts.at(rows, "decode", "batch").reset_index()
    if rows.empty:
        return ""
    ends = rows.iloc[[0, -1]] if len(rows) > 1 else rows
    few = int(rows.processes.min())
    words = durations.verdicts(ends) if few >= durations.LEAST_PROCESSES else [""] * len(ends)
    parts = [
        f"{ratio(row)} at batch {row.batch:.0f}{f', {word}' if word else ''}"
        for row, word in zip(ends.itertuples(), words)
    ]
    caution = "" if few >= durations.LEAST_PROCESSES else f" From {durations.counted(few)}: no verdict on speed."
    return f" A decode step takes {'; '.join(parts)} ({MODES[mode]}, {device(f)}).{caution}"


def compiled(f: Frames, ratios: pd.DataFrame) -> list[str]:
    """Formats that a CUDA graph alone shows at half their speed or less."""
    graph, fused = (contrasts.at(ratios, "decode", batch=1, mode=mode) for mode in ("cuda_graph", "compile"))
    most = ratios.batch[(ratios.phase == "decode") & (ratios["mode"] == "compile")].max()
    tall = [contrasts.at(ratios, "decode", batch=most, mode=mode).ratio for mode in ("compile", "cuda_graph")]
    return [
        f"{f.label(name)} wants torch.compile: {ratio(fused.loc[name])} of "
        f"{f.label(f.full)}'s time for a decode step at batch 1 when both are compiled, {times(graph.ratio[name])} "
        f"when neither is ({MODES['cuda_graph']}); at batch {most:,.0f} {times(tall[0].get(name))} and "
        f"{times(tall[1].get(name))}."
        for name in graph.index.intersection(fused.index)
        if graph.ratio[name] > 2 * fused.ratio[name]
    ]


def ratio(row) -> str:
    """A time over full precision's, and its range over processes: 0.94x [0.93, 0.95]."""
    spread = f" [{number(row.ratio_low)}, {number(row.ratio_high)}]" if row.processes > 1 else ""
    return f"{times(row.ratio)}{spread}"


def redraws(f: Frames, designs: list[dict]) -> list[str]:
    """How often the design would have given each direction, and how well that share is known."""
    said = []
    for design in designs:
        last = design["design"] == "last turns"
        kind = "the paper's design, the last turns" if last else "the same with any turn"
        parts = []
        for row in design["comparisons"]:
            share = percent(row["share_above"], 0)
            known = interval(row["share_above_low"], row["share_above_high"], lambda v: percent(v, 0))
            parts.append(f"{f.label(row['b'])} beats {f.label(row['a'])} in {share} {known}".strip())
        drawn_from = len(f.samples[["data_set", "dialogue"]].drop_duplicates())
        of = f"of {design['size']} dialogues, drawn from {drawn_from:,}"
        said.append(f"In {design['draws']:,} repeats of {kind} {of}: {'; '.join(parts)}.")
    return said


def heterogeneity(f: Frames, over: pd.DataFrame) -> list[str]:
    """Whose loss depends on the data (Cochran's test over data sets at the study's level), from contrasts.pooled."""
    if over.empty:
        return []
    level = 1 - f.study.statistics.confidence
    by_data = over[over.q_p < level].itertuples()
    depends = [f"{f.label(row.configuration)} (I\N{SUPERSCRIPT TWO} {number(row.i2, 0)}%)" for row in by_data]
    same = [f.label(name) for name in over[over.q_p >= level].configuration]
    sets = over.data_sets.max()
    said = [f"Between {sets} data sets the loss differs by more than chance for {listed(depends)}."] if depends else []
    few = f"For {listed(same)} {sets} data sets are too few to tell."
    if sets >= MANY_SETS:
        few = f"Between {sets} data sets no such difference shows for {listed(same)}."
    return said + ([few] if same else [])


def counted(n: int, verdict: str) -> str:
    """3 do not hold, 1 holds."""
    return f"{n} {verdict if n == 1 else {'holds': 'hold', 'does not hold': 'do not hold'}.get(verdict, verdict)}"


def claims(*judged: pd.DataFrame) -> list[str]:
    """How many of the paper's claims stand, by kind; of several runs the first that measured one counts, decided or
    not."""
    rows = pd.concat(judged)
    rows["missing"] = rows.kind == "not testable here"
    rows = rows.sort_values("missing", kind="stable").drop_duplicates("id")
    rows = rows.sort_values(
        "verdict", key=lambda said: said.map({HOLDS: 0, FAILS: 2, OPEN: 3}).fillna(1), kind="stable"
    )
    kinds = rows.groupby("kind").verdict.value_counts(sort=False).groupby(level=0)
    parts = {kind: [counted(n, word) for (_, word), n in part.items()] for kind, part in kinds}
    return [f"{kind[0].upper()}{kind[1:]}: {', '.join(words)}." for kind, words in parts.items()]
