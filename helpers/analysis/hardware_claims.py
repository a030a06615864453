"""Claims about memory and times. A time is judged by durations.longer, in each mode by itself."""

import math

import numpy as np
import pandas as pd

from helpers.analysis import contrasts, durations, evidence
from helpers.analysis.evidence import BATCH, FAILS, HOLDS, OPEN, Facts, NotMeasured, Verdict, size_mb
from helpers.analysis.frames import LARGEST_MODES, MODES
from helpers.analysis.sentences import ratio
from helpers.analysis.style import number, percent, times


def equal_size(facts):
    both = {which: [size_mb(facts, n, which) for n in ("nf4", "fp4")] for which in ("reported", "tensors", "allocated")}
    apart = {which: abs(nf4 / fp4 - 1) for which, (nf4, fp4) in both.items()}
    same = abs(np.subtract(*both["reported"])) < 0.005 and apart["tensors"] < 0.001
    same = same and apart["allocated"] <= evidence.SAME_SIZE
    text = ", ".join(f"{which} {number(a)} and {number(b)} MB" for which, (a, b) in both.items())
    return Verdict(HOLDS if same else FAILS, f"NF4 and FP4: {text}")


def size_reduction(facts):
    """As exact as the claim: to the per cent. What is reported and what is allocated may round to different ones; how
    much of the model is linear layers says what another model would give."""
    reported, parts, right = facts.paper["size_reduction"], [], []
    for which in ("reported", "allocated"):
        before, after = (size_mb(facts, name, which) for name in (facts.f.full, "nf4"))
        right.append(percent(1 - after / before, 0) == percent(reported, 0))
        parts.append(f"{which} {number(before)} to {number(after)} MB, {percent(1 - after / before)} smaller")
    sizes = facts.f.sizes.reindex([facts.f.full, "nf4"])
    linear, state = (sizes.get(key, sizes.allocated * math.nan).to_numpy() for key in ("linear", "state"))
    if not math.isnan(linear.sum() + state.sum()):
        share = percent(linear[0] / sizes.allocated.iloc[0], 0)
        shrink = percent(1 - (linear[1] + state[1]) / linear[0], 0)
        parts.append(f"the linear layers, {share} of the model, get {shrink} smaller, the rest stays")
    verdict = HOLDS if all(right) else evidence.COUNTED if any(right) else FAILS
    return Verdict(verdict, "; ".join(parts), size=verdict)


def footprint_is_memory(facts):
    """Of tensors, since the allocator rounds up."""
    done = facts.f.runs[(facts.f.runs.kind == "benchmark") & (facts.f.runs.status == "ok")]
    if len(done) and done.gpu.isna().all():
        raise NotMeasured("the memory of a GPU was not measured: there was none")
    parts, equal = [], []
    for name in ("nf4", "fp4"):
        reported, tensors = (size_mb(facts, name, which) for which in ("reported", "tensors"))
        equal.append(abs(tensors / reported - 1) < 0.001)
        more = percent(tensors / reported - 1, signed=True)
        parts.append(
            f"{facts.f.label(name)} reports {number(reported)} MB and its tensors take {number(tensors)} ({more})"
        )
    return Verdict(HOLDS if all(equal) else FAILS, "; ".join(parts))


def _over(settings: list[list[str | None]], mixed: str) -> str:
    """ "Both formats take longer", from their verdicts (`durations.longer`) at each setting: one that does not refutes
    it there, whatever the other does."""
    found = []
    for signs in settings:
        no = durations.FASTER in signs or durations.EQUAL in signs
        found.append(FAILS if no else OPEN if None in signs else HOLDS)
    if HOLDS in found and FAILS in found:
        return mixed
    return FAILS if FAILS in found else OPEN if OPEN in found or not found else HOLDS


def _across_modes(verdicts: dict[str, str]) -> str:
    """The paper ran eager mode; where another mode decides otherwise, the claim depends on the mode."""
    main = verdicts.get("eager", OPEN)
    decided = {verdict for verdict in verdicts.values() if verdict != OPEN}
    return evidence.MODE if main != OPEN and len(decided) > 1 else main


def _time_claim(facts: Facts, phase: str, key: str, reported: str, mixed: str, least: int = 1) -> Verdict:
    """Do both 4-bit formats take longer, in each mode, at every setting that the paper reports? `least`: of so many."""
    ratios = facts.ratios[(facts.ratios.phase == phase) & facts.ratios.configuration.isin(["nf4", "fp4"])]
    wanted = {float(x) for row in facts.paper["configurations"].values() for x in row[reported]}
    settings = sorted(set(ratios[key]) & wanted) or sorted(set(ratios[key]))
    if absent := [facts.f.label(name) for name in ("nf4", "fp4") if name not in set(ratios.configuration)]:
        what = f"{' and '.join(absent)} beside full precision"
        raise NotMeasured(f"{phase} of {what} was not measured in this study")
    rows = ratios[ratios[key].isin(settings)].sort_values("tokens")
    rows = rows.drop_duplicates(["configuration", "mode", key])  # of several contexts the shortest
    verdicts, texts = {}, []
    for mode, part in rows.groupby("mode", sort=False):
        at_once = [[durations.longer(row) for row in same.to_dict("records")] for _, same in part.groupby(key)]
        at_once = [signs + [None] * (2 - len(signs)) for signs in at_once]  # a format without a time there
        verdicts[mode] = _over(at_once, mixed) if len(at_once) >= min(least, len(wanted)) else OPEN
        told = []
        for name in ("nf4", "fp4"):
            mine = part[part.configuration == name].sort_values(key)
            at = [f"{ratio(row)} at {_at(key, getattr(row, key))}" for row in mine.itertuples()]
            told += [f"{facts.f.label(name)} {', '.join(at)}"] if at else []
        texts.append(f"{MODES.get(mode, mode)} ({verdicts[mode]}): {', '.join(told)}")
    return Verdict(_across_modes(verdicts), f"time over full precision's; {'; '.join(texts)}{_few(ratios)}")


def _at(key: str, x: float) -> str:
    return f"{x:,.0f} tokens" if key == "tokens" else f"batch {x:,.0f}"


def _few(ratios: pd.DataFrame) -> str:
    most = int(ratios.processes.max())
    if most >= durations.LEAST_PROCESSES:
        return ""
    return f"; measured in {durations.counted(most)}, and fewer than {durations.LEAST_PROCESSES} decide nothing"


def prefill_slower(facts):
    return _time_claim(facts, "prefill", "tokens", "prefill_ms", evidence.LENGTH)


def decode_slower(facts):
    return _time_claim(facts, "decode", "batch", "decode_ms_per_token", BATCH)


def throughput_lower(facts):
    return _time_claim(facts, "decode", "batch", "throughput_tokens_per_second", BATCH, least=2)


def _mixed(found: list[str], mixed: str) -> str:
    decided = set(found) - {OPEN}
    return mixed if len(decided) > 1 else OPEN if OPEN in found or not found else found[0]


def dequantization_is_the_cause(facts):
    """Where NF4 is slower in eager mode: is half of the slowdown still there in a CUDA graph, which launches once?
    Where less is left and NF4 is slower there too, the cause depends on the mode."""
    ratios = facts.ratios[(facts.ratios.phase == "decode") & (facts.ratios.configuration == "nf4")]
    if not {"eager", "cuda_graph"} <= set(ratios["mode"]):
        raise NotMeasured("decode was not measured in a CUDA graph, where launches cost nothing: the cause shows there")
    modes = [contrasts.at(ratios, "decode", "batch", mode=mode) for mode in ("eager", "cuda_graph")]
    found, parts = [], []
    for batch, eager in modes[0].iterrows():
        if batch not in modes[1].index or durations.longer(eager) != durations.SLOWER:
            continue
        graph = modes[1].loc[batch]
        lost = [eager.low - eager.high_full, eager.high - eager.low_full]
        kept = [graph.low - graph.high_full, graph.high - graph.low_full]
        few = graph.processes < durations.LEAST_PROCESSES
        less = evidence.MODE if durations.longer(graph) == durations.SLOWER else FAILS
        found.append(OPEN if few else HOLDS if kept[0] >= lost[1] / 2 else less if kept[1] < lost[0] / 2 else OPEN)
        cost = [f"{number(row.ms - row.ms_full, signed=True)} ms" for row in (eager, graph)]
        text = f"batch {batch:,.0f}: {cost[0]} a step in eager mode, {cost[1]} in a CUDA graph"
        parts.append(f"{text} ({times(graph.ratio)})")
    if not found:
        return Verdict(OPEN, f"NF4 is not shown to be slower in eager mode{_few(ratios)}")
    told = "what is gone in a CUDA graph is the host's time, launches of NF4's own kernels included"
    return Verdict(_mixed(found, BATCH), f"NF4 costs; {'; '.join(parts)}; {told}")


def batch_recovers(facts):
    """Which model fits decides; which of two that fit is faster does not, for 02 looks for the largest batch in one
    process."""
    rows = facts.f.largest
    rows = rows[rows.batch.notna() | rows.tokens_per_second.notna()].assign(rate=rows.tokens_per_second.fillna(0.0))
    rates = rows.pivot_table(index="budget_gib", columns="configuration", values="rate", aggfunc="median")
    rates = rates.reindex(columns=["nf4", facts.f.full]).dropna()
    found, parts = [], []
    for gib, (mine, base) in zip(rates.index, rates.to_numpy()):
        if not base and not mine:
            continue
        ran = rows[rows.budget_gib == gib].drop_duplicates("configuration").set_index("configuration")["mode"]
        modes = [LARGEST_MODES.get(ran.get(name)) for name in ("nf4", facts.f.full)]
        pair = zip((mine, base), modes)
        texts = [f"{number(rate, 0)} tokens/s ({mode})" if rate else "does not fit" for rate, mode in pair]
        parts.append(f"{gib:g} GiB: NF4 {texts[0]}, full precision {texts[1]}")
        found.append(OPEN if base and mine else HOLDS if mine else FAILS)
    if not found:
        raise NotMeasured("the largest batch in a memory budget was not measured for both in this study")
    timed = f"timed in {durations.counted(rows.process.nunique())}, which decides nothing"
    note = f"; the largest batch is {timed}" if OPEN in found else ""
    return Verdict(_mixed(found, evidence.BUDGET), "; ".join(parts) + note)
