"""README.md's findings, rendered from the committed runs: `make readme`.

Between the two marks stand a table of a few rows, the sentences beside it, and the paper's claims by kind. Nothing
there is typed; everything else in README.md is.
"""

import json

from helpers import ROOT, StudyError, params, results
from helpers.analysis import claims, contrasts, evidence, frames, other_models, sentences
from helpers.analysis.style import NONE, number, percent, times

MARKS = ("<!-- found: rendered by make readme from executed/reference -->", "<!-- end of found -->")
# three data sets, the claims, the hardware, another model
STUDIES = ("smollm2-135m-public", "smollm2-135m", "llama-3.2-1b-random", "gemma3-270m")
SHOWN = ("nf4", "fp4", "gptq", "int8", "fp8")


def answer(f: frames.Frames, rows, hardware: frames.Frames, other: frames.Frames, others) -> list[str]:
    """The table: what a format keeps of F1 on two models, its memory, and its decode time at the smallest and the
    largest batch."""
    others = contrasts.vs_full(other, others)
    rows, ratios, size = contrasts.vs_full(f, rows), hardware.ratios(), hardware.sizes.allocated
    mode = contrasts.fastest_mode(hardware, ratios)
    batches = ratios.batch[(ratios.phase == "decode") & (ratios["mode"] == mode)]
    ends = int(batches.min()), int(batches.max())
    decode = [contrasts.at(ratios, "decode", batch=b, mode=mode).ratio for b in ends]
    models = (
        f"F1 kept, {f.study.model.name}, {f.samples.data_set.nunique()} data sets | F1 kept, {other.study.model.name}"
    )
    lines = [
        f"| | {models} | memory | decode, batch {ends[0]} | decode, batch {ends[1]} |",
        "|---|---|---|---|---|---|",
    ]
    for name in (name for name in SHOWN if name in rows.index):
        found = [part.loc[name] for part in (rows, others)]
        kept = [sentences.recovered(row.recovery, row.recovery_low, row.recovery_high) for row in found]
        memory = percent(size.get(name) / size.get(hardware.full), 0) if name in size else NONE
        cells = [f"**{f.label(name)}**", *kept, memory, *(times(column.get(name)) for column in decode)]
        lines.append(f"| {' | '.join(cells)} |")
    where = f"Memory and time: Llama-3.2-1B's shape, {frames.MODES[mode]}, {sentences.device(hardware)}."
    dashes = [name for name in SHOWN if name in rows.index and name not in decode[0]]
    where += "".join(f" {NONE}: {why}." for name in dashes for why in reasons(hardware, name, mode))
    n = [f"{study.study.model.name}, {sentences.counts(study).split(';')[0]}" for study in (f, other)]
    notes = f"All vs full precision; {sentences.counts(f).split('; ')[1]}", f"F1: {'; '.join(n)}.", where
    return [*lines, "", "\n\n".join([*notes, *elsewhere(hardware, ratios, mode)])]


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
    found = [sentences.differs(wide, row) for _, row in pair.iterrows()]
    found += sentences.heterogeneity(wide, contrasts.pooled(wide, contrasts.groups(wide, "data_set")))
    found += [other_models.order(own, facts.every, other, others)]
    found += sentences.compiled(hardware, shape.ratios)
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
