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
SHOWN = ("fp8", "int8", "gptq", "awq", "nf4", "fp4")
HOW = {"eager": "eager", "cuda_graph": "in a CUDA graph", "compile": "compiled"}
PROMPT = 512  # tokens
LEAST_CHANGE = 0.005  # of F1 between two batchings: less is a tie here and there


def fastest_mode(f: frames.Frames, phase: str) -> str:
    """The mode in which full precision takes least, one row at a time."""
    rows = f.medians().query("phase == @phase and batch == 1 and configuration == @f.full")
    return rows.groupby("mode").ms.min().idxmin()


def cell(table, name: str) -> str:
    """A time over full precision's, and its range over processes."""
    return sentences.ratio(table.loc[name]) if name in table.index else NONE


def answer(f: frames.Frames, rows, hardware: frames.Frames, other: frames.Frames, others) -> list[str]:
    """What follows from it; the table: what a format keeps of F1 on two models, the memory of its weights, and its
    times in the fastest modes; and what to know beside it."""
    rows, others = contrasts.vs_full(f, rows), contrasts.vs_full(other, others)
    shown = [name for name in SHOWN if name in rows.index]
    ratios, size = hardware.ratios(), hardware.sizes.allocated / hardware.sizes.allocated[hardware.full]
    modes = {phase: fastest_mode(hardware, phase) for phase in ("prefill", "decode")}
    batches = ratios.batch[(ratios.phase == "decode") & (ratios["mode"] == modes["decode"])].astype(int)
    timed = {f"prefill, {PROMPT} tokens": contrasts.at(ratios, "prefill", tokens=PROMPT, mode=modes["prefill"])}
    for batch in (batches.min(), batches.max()):
        timed[f"decode, batch {batch}"] = contrasts.at(ratios, "decode", batch=batch, mode=modes["decode"])
    heads = [f"F1 kept, {f.study.model.name}, {f.samples.data_set.nunique()} data sets"]
    heads += [f"F1 kept, {other.study.model.name}", "weights in memory", *timed]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in shown:
        found = [part.loc[name] for part in (rows, others)]
        kept = [sentences.recovered(row.recovery, row.recovery_low, row.recovery_high) for row in found]
        cells = [*kept, percent(size.get(name), 0), *(cell(table, name) for table in timed.values())]
        lines.append(f"| **{f.label(name)}** | {' | '.join(cells)} |")
    how = HOW[modes["decode"]]
    said = [*lead(f, rows, other, others, size, [*timed.values()][1:], how), "", *lines, ""]
    n = []
    for study in (f, other):
        score = points(study.wide("f1")[study.full].mean(), False)
        n.append(f"{study.study.model.name} {sentences.asked(study)}, F1 {score}")
    where = (
        f"Memory and times: Llama-3.2-1B's shape on {sentences.device(hardware)}, over full precision's. Times in the "
    )
    where += f"fastest mode: {', '.join(f'{phase} {HOW[mode]}' for phase, mode in modes.items())}"
    notes = [f"F1 kept: per cent of full precision's, 95% intervals by dialogue. Full precision: {'; '.join(n)}."]
    notes += [f"{where}; brackets: range of three processes.", *untimed(f, hardware, shown, modes["decode"])]
    notes += [*sentences.widened(hardware), *grouped((f, other, hardware))]
    return [*said, *(f"- {text}" for text in [*notes, *elsewhere(hardware, ratios, modes["decode"])])]


def lead(f: frames.Frames, rows, other: frames.Frames, others, size, decode: list, how: str) -> list[str]:
    """The smallest format that is shown to keep F1; what the smallest formats keep."""
    bits, shown = f.configurations.bits_per_weight, [name for name in SHOWN if name in rows.index]
    equal = [name for name in shown if rows.verdict[name].startswith("equal") and name in size]
    said = ["**No format is shown to keep full precision's F1.**"]
    if equal:
        name = min(equal, key=size.get)
        at = [f"{times(t.ratio[name])} at batch {t.batch[name]:.0f}" for t in decode if name in t.index]
        verdicts = [f"{part.verdict[name]} on {study.study.model.name}" for study, part in ((f, rows), (other, others))]
        text = (
            f"**{f.label(name)} keeps full precision's F1 ({', '.join(verdicts)}) in {percent(size[name], 0)} of the "
        )
        text += "memory for weights" + (f"; {how}, a decode step takes {' and '.join(at)}" if at else "")
        said = [f"{text}.**"]
    small = sorted((name for name in shown if bits[name] < 5 and name in others.index), key=lambda n: -rows.recovery[n])
    kept = [f"{f.label(n)} {number(rows.recovery[n], 0)}% and {number(others.recovery[n], 0)}%" for n in small]
    said += [f"At 4 bits this much of F1 is left on the two models: {sentences.listed(kept)}."] if kept else []
    history = {study.study.model.already_quantized for study in (f, other)}
    if all(history):
        said.append("Both models are small and came as 4-bit files; larger ones may lose less.")
    return [" ".join(said)]


def untimed(f: frames.Frames, hardware: frames.Frames, shown: list[str], mode: str) -> list[str]:
    """Why a format has no times."""
    said, kernels = [], hardware.configurations.kernel
    for name in shown:
        twins = [hardware.label(twin) for twin in kernels.index[kernels == f.configurations.kernel[name]]]
        if name not in kernels.index:
            said.append(f"{f.label(name)} was not timed" + (f": it runs {twins[0]}'s kernel." if twins else "."))
        else:
            said += [f"{why}." for why in reasons(hardware, name, mode)]
    return said


def grouped(studies) -> list[str]:
    """Formats whose weights share a scale in groups of another size in another study."""
    said = []
    for name in SHOWN:
        sizes = {}
        for study in studies:
            if size := study.configurations.group_size.dropna().get(name):
                sizes.setdefault(int(size), []).append(study.study.study)
        where = ", ".join(f"{size} in {sentences.listed(found)}" for size, found in sizes.items())
        said += [f"{studies[0].label(name)}: weights that share a scale: {where}."] if len(sizes) > 1 else []
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
                f"{own.label(name)}'s answers change with what is batched together: F1 {scores[0]} or {scores[1]} on "
                f"the same {len(alone):,} questions ({odd} answers score otherwise). The intervals leave that out."
            )
    return said


def elsewhere(f: frames.Frames, ratios, shown: str) -> list[str]:
    """Decode at batch 1 in the modes that the table does not show."""
    parts = []
    for mode in (mode for mode in frames.MODES if mode != shown and (ratios["mode"] == mode).any()):
        rows = contrasts.at(ratios, "decode", batch=1, mode=mode)
        rows = rows.reindex([name for name in SHOWN if name in rows.index])
        found = [f"{f.label(row.Index)} {sentences.ratio(row)}" for row in rows.itertuples()]
        parts.append(f"{frames.MODES[mode]}: {', '.join(found)}")
    return [f"Decode at batch 1 in other modes. {'. '.join(part[0].upper() + part[1:] for part in parts)}."]


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
    return f"On {measured['provenance']['cores']} cores without a GPU, download time not counted: {', '.join(parts)}."


def rendered(text: str) -> str:
    """README.md's text with its findings rendered again. Raises StudyError if the marks are gone."""
    if any(text.count(mark) != 1 for mark in MARKS):
        raise StudyError(f"README.md: the lines {MARKS[0]!r} and {MARKS[1]!r} must each stand there once")
    wide, own, hardware, other = (frames.load(f"executed/reference/hopper/{name}") for name in STUDIES)
    paper, others = params.read_paper(), contrasts.table(other)
    # Of a claim that several studies measured the largest one's verdict counts.
    facts, shape, largest = (evidence.facts(f, paper) for f in (own, hardware, wide))
    rows = largest.every
    pair = rows[(rows.a == "nf4") & (rows.b == "fp4")]
    found = [sentences.told(wide, row) for _, row in pair.iterrows()]
    found += sentences.heterogeneity(wide, contrasts.pooled(wide, contrasts.groups(wide, "data_set")))
    found += [other_models.order(own, facts.every, other, others)]
    found += batching(own, wide)
    found += sentences.by_chance(own, contrasts.vs_full(own, facts.every), contrasts.vs_full(own, facts.last))
    found += sentences.redraws(wide, largest.designs[:1])
    lines = [*answer(wide, rows, hardware, other, others), "", *(f"- {text}" for text in found)]
    lines += [
        "",
        f"Of the paper's {len(paper['claims'])} claims, each judged on the largest study that measured it:",
        "",
    ]
    lines += [f"- {text}" for text in sentences.claims(*(claims.judged(study) for study in (shape, largest, facts)))]
    lines += ["", pipeline(json.loads((ROOT / "executed/reference/bench_pipeline.json").read_text())), ""]
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n" + "\n".join(lines) + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    results.write_text(path, rendered(path.read_text(encoding="utf-8")))
