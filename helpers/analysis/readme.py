"""README.md's findings, rendered from the committed runs: `make readme`.

Between the two marks stand a table of a few rows, the sentences beside it, and the paper's claims by kind. Nothing
there is typed; everything else in README.md is.
"""

import json

from helpers import ROOT, StudyError, params, results
from helpers.analysis import claims, contrasts, evidence, frames, other_models, sentences
from helpers.analysis.style import NONE, number, percent, points, times

MARKS = ("<!-- found: rendered by make readme from executed/reference -->", "<!-- end of found -->")
# three data sets, the claims, the hardware, another model
STUDIES = ("smollm2-135m-public", "smollm2-135m", "llama-3.2-1b-random", "gemma3-270m")
SHOWN = ("nf4", "fp4", "gptq", "int8", "fp8")
PROMPT = 512  # tokens
LEAST_CHANGE = 0.005  # of F1 between two batchings: less is a tie here and there


def answer(f: frames.Frames, rows, hardware: frames.Frames, other: frames.Frames, others) -> list[str]:
    """The table: what a format keeps of F1 on two models, the memory of its weights, its prefill time, and its decode
    time at the smallest and the largest batch."""
    others = contrasts.vs_full(other, others)
    rows, ratios, size = contrasts.vs_full(f, rows), hardware.ratios(), hardware.sizes.allocated
    mode = contrasts.steadiest_mode(ratios)
    batches = ratios.batch[(ratios.phase == "decode") & (ratios["mode"] == mode)]
    ends = int(batches.min()), int(batches.max())
    timed = [contrasts.at(ratios, "prefill", tokens=PROMPT, mode=mode).ratio]
    timed += [contrasts.at(ratios, "decode", batch=b, mode=mode).ratio for b in ends]
    models = (
        f"F1 kept, {f.study.model.name}, {f.samples.data_set.nunique()} data sets | F1 kept, {other.study.model.name}"
    )
    lines = [
        f"| | {models} | weights in memory | prefill, {PROMPT} tokens | decode, batch {ends[0]} | batch {ends[1]} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (name for name in SHOWN if name in rows.index):
        found = [part.loc[name] for part in (rows, others)]
        kept = [sentences.recovered(row.recovery, row.recovery_low, row.recovery_high) for row in found]
        memory = percent(size.get(name) / size.get(hardware.full), 0) if name in size else NONE
        cells = [f"**{f.label(name)}**", *kept, memory, *(times(column.get(name)) for column in timed)]
        lines.append(f"| {' | '.join(cells)} |")
    where = f"Memory and time: Llama-3.2-1B's shape, {frames.MODES[mode]}, {sentences.device(hardware)}."
    dashes = [name for name in SHOWN if name in rows.index and name not in timed[-1]]
    where += "".join(f" {NONE}: {why}." for name in dashes for why in reasons(hardware, name, mode))
    n = []
    for study in (f, other):
        score = points(contrasts.means(study, "f1")["mean"][study.full], False)
        n.append(f"{study.study.model.name}, {sentences.counts(study).split(';')[0]}, full precision's F1 {score}")
    notes = [f"All vs full precision; {sentences.counts(f).split('; ')[1]}", f"F1: {'; '.join(n)}.", where]
    notes += [*sentences.widened(hardware), *grouped((f, other, hardware)), *elsewhere(hardware, ratios, mode)]
    said = lead(rows, others, f, hardware, ratios, mode, ends)
    return [said, "", *lines, "", "\n\n".join(notes)]


def lead(rows, others, f: frames.Frames, hardware: frames.Frames, ratios, mode: str, ends) -> str:
    """The answer in two sentences: what 4 and 8 bits keep, take in memory, and cost in time."""
    bits, size = f.configurations.bits_per_weight, hardware.sizes.allocated
    kept, memory, names = [], [], {}
    for low, high, word in ((0, 5, "4-bit formats"), (5, 9, "8-bit ones")):
        names[word] = [n for n in SHOWN if n in rows.index and n in others.index and low < bits[n] <= high]
        found = [part.recovery[n] for n in names[word] for part in (rows, others)]
        kept.append(f"{word} keep {number(min(found), 0)} to {number(max(found), 0)}%")
        shares = [size[n] / size[hardware.full] for n in names[word] if n in size]
        memory.append(sentences.listed(dict.fromkeys(percent(share, 0) for share in shares)))
    steps = []
    for batch in ends:
        column = contrasts.at(ratios, "decode", batch=batch, mode=mode).ratio.reindex(names["4-bit formats"]).dropna()
        steps.append(f"{times(column.min())} to {times(column.max())}")
    return (
        f"**On two small models {kept[0]} of full precision's F1, {kept[1]}. At Llama-3.2-1B's shape the weights take "
        f"{' and '.join(memory)} of the memory. A 4-bit decode step takes {steps[0]} of full precision's time at batch "
        f"{ends[0]} and {steps[1]} at batch {ends[1]} ({frames.MODES[mode]}).**"
    )


def grouped(studies) -> list[str]:
    """Formats whose weights share a scale in groups of another size in another study."""
    sizes = {study.study.study: study.configurations.group_size.dropna() for study in studies}
    said = []
    for name in SHOWN:
        found = {study: column[name] for study, column in sizes.items() if name in column}
        if len(set(found.values())) > 1:
            where = ", ".join(f"{size:.0f} in {study}" for study, size in found.items())
            said.append(f"{studies[0].label(name)}'s weights share a scale in groups of {where}.")
    return said


def batching(own: frames.Frames, wide: frames.Frames) -> list[str]:
    """Formats that score otherwise on the same questions where other data sets share their batches."""
    alone, beside = own.wide("f1"), wide.wide("f1")
    # With several data sets a dialogue's id begins with its data set's name.
    beside.index = [
        (data_set, dialogue.removeprefix(f"{data_set}/"), turn) for data_set, dialogue, turn in beside.index
    ]
    same = alone.index.intersection(beside.index)
    alone, beside, said = alone.loc[same], beside.loc[same], []
    for name in alone.columns.intersection(beside.columns) if len(same) else []:
        odd = int((alone[name] - beside[name]).abs().gt(1e-9).sum())
        if abs(beside[name].mean() - alone[name].mean()) > LEAST_CHANGE:
            scores = [points(table[name].mean(), False) for table in (alone, beside)]
            said.append(
                f"{own.label(name)} depends on the batch: the same {len(alone):,} questions give F1 {scores[0]} alone "
                f"and {scores[1]} among other data ({odd} answers score otherwise), which no interval here holds."
            )
    return said


def elsewhere(f: frames.Frames, ratios, shown: str) -> list[str]:
    """Decode at batch 1 in the modes that the table does not show."""
    parts = []
    for mode in (mode for mode in frames.MODES if mode != shown and (ratios["mode"] == mode).any()):
        rows = contrasts.at(ratios, "decode", batch=1, mode=mode)
        rows = rows.reindex([name for name in SHOWN if name in rows.index])
        found = [f"{f.label(row.Index)} {times(row.ratio)} {sentences.spread(row)}" for row in rows.itertuples()]
        parts.append(f"{frames.MODES[mode]}: {', '.join(found)}")
    return [f"Decode at batch 1 in other modes, range of processes. {'. '.join(p[0].upper() + p[1:] for p in parts)}."]


def reasons(f: frames.Frames, name: str, mode: str) -> list[str]:
    """Why a format has no decode time in a mode, once each."""
    rows = results.read_all(f.study)[name]["benchmark"].data["left_out"]
    whys = [row["reason"] for row in rows if row["reason"].startswith(f"{mode}: ")]
    return list(dict.fromkeys(why.removeprefix(f"{mode}: ") for why in whys))


def pipeline(measured: dict) -> str:
    """What bench-pipeline measured: a run from nothing, a second run, the tests."""
    parts = []
    for what, run in (("run-all", measured["runs"]["run-all"]), ("test", measured["runs"]["test"])):
        text = f"`make {what}` {number(run['seconds'] / 60, 0)} minutes and {number(run['peak_mib'] / 1024, 1)} GiB"
        parts.append(f"{text} (it failed)" if run["exit"] else text)
    return f"On {measured['provenance']['cores']} cores without a GPU, without downloads: {', '.join(parts)}."


def rendered(text: str) -> str:
    """README.md's text with its findings rendered again. Raises StudyError if the marks are gone."""
    if any(text.count(mark) != 1 for mark in MARKS):
        raise StudyError(f"README.md: the lines {MARKS[0]!r} and {MARKS[1]!r} must each stand there once")
    wide, own, hardware, other = (frames.load(f"executed/reference/hopper/{name}") for name in STUDIES)
    paper, rows, others = params.read_paper(), contrasts.table(wide), contrasts.table(other)
    # Of a claim that several studies measured the largest one's verdict counts.
    facts, shape, largest = (evidence.facts(f, paper) for f in (own, hardware, wide))
    pair = rows[(rows.a == "nf4") & (rows.b == "fp4")]
    found = [sentences.differs(wide, row) + sentences.by_data_set(wide, row) for _, row in pair.iterrows()]
    found += sentences.heterogeneity(wide, contrasts.pooled(wide, contrasts.groups(wide, "data_set")))
    found += [other_models.order(own, facts.every, other, others)]
    found += [*batching(own, wide), *sentences.compiled(hardware, shape.ratios)]
    found += sentences.by_chance(own, contrasts.vs_full(own, facts.every), contrasts.vs_full(own, facts.last))
    found += sentences.redraws(wide, largest.designs[:1])
    lines = [*answer(wide, rows, hardware, other, others), "", *(f"- {text}" for text in found)]
    lines += ["", f"Of the paper's {len(paper['claims'])} claims:", ""]
    lines += [f"- {text}" for text in sentences.claims(*(claims.judged(study) for study in (shape, largest, facts)))]
    lines += ["", pipeline(json.loads((ROOT / "executed/reference/bench_pipeline.json").read_text())), ""]
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n" + "\n".join(lines) + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    results.write_text(path, rendered(path.read_text(encoding="utf-8")))
