"""README.md's findings, rendered from the committed runs: `make readme`.

Between the two marks stand a table of a few rows, the sentences beside it, and the paper's claims by kind. Nothing
there is typed; everything else in README.md is.
"""

import json

from helpers import ROOT, StudyError, params, results
from helpers.analysis import claims, contrasts, frames, sentences
from helpers.analysis.frames import MODES, Frames
from helpers.analysis.style import NONE, number, percent, times

MARKS = ("<!-- found: rendered by make readme from executed/reference -->", "<!-- end of found -->")
STUDIES = ("smollm2-135m-public", "smollm2-135m", "llama-3.2-1b-random")  # three data sets, the claims, the hardware
SHOWN = ("nf4", "fp4", "int8", "fp8")


def answer(f: Frames, rows, hardware: Frames) -> list[str]:
    """The table: what a format keeps of F1, its memory, and its decode time at the smallest and the largest batch."""
    rows = contrasts.vs_full(f, rows)
    ratios = hardware.ratios()
    mode = contrasts.fastest_mode(hardware, ratios)
    decode = ratios[(ratios.phase == "decode") & (ratios["mode"] == mode)]
    ends = sorted(decode.batch.unique())[:1] + sorted(decode.batch.unique())[-1:]
    size = hardware.sizes.allocated
    lines = [
        "| | F1 kept | memory | " + " | ".join(f"decode, batch {b}" for b in ends) + " |",
        "|---|---|---|" + "---|" * len(ends),
    ]
    for name in (name for name in SHOWN if name in rows.index):
        row = rows.loc[name]
        kept = sentences.recovered(row.recovery, row.recovery_low, row.recovery_high)
        memory = percent(size.get(name) / size.get(hardware.full), 0) if name in size else NONE
        found = [contrasts.at(ratios, "decode", batch=b, mode=mode).ratio.get(name) for b in ends]
        lines.append(f"| **{f.label(name)}** | {kept} | {memory} | {' | '.join(times(value) for value in found)} |")
    where = f"Memory and time: Llama-3.2-1B's shape, {MODES[mode]}, {sentences.device(hardware)}."
    return [*lines, "", f"All vs {f.label(f.full)}. F1: {f.study.model.name}, {sentences.counts(f)} {where}"]


def pipeline(measured: dict) -> str:
    """What bench-pipeline measured: a run from nothing, a second run, the tests."""
    runs, cores = measured["runs"], measured["provenance"]["cores"]
    peak = max(run["peak_mib"] for run in runs.values()) / 1024
    return (
        f"On {cores} cores without a GPU: `make run-all` {number(runs['run-all']['seconds'] / 60, 0)} minutes without "
        f"downloads, `make test` {number(runs['test']['seconds'] / 60, 0)} minutes, {number(peak, 0)} GiB of memory."
    )


def rendered(text: str) -> str:
    """README.md's text with its findings rendered again. Raises StudyError if the marks are gone."""
    if any(text.count(mark) != 1 for mark in MARKS):
        raise StudyError(f"README.md: the lines {MARKS[0]!r} and {MARKS[1]!r} must each stand there once")
    wide, own, hardware = (frames.load(f"executed/reference/h200/{name}") for name in STUDIES)
    paper, rows = params.read_paper(), contrasts.table(wide)
    pair = rows[(rows.a == "nf4") & (rows.b == "fp4")]
    found = [sentences.differs(wide, row) for _, row in pair.iterrows()] + sentences.heterogeneity(wide)
    found += sentences.chance(own, contrasts.table(own), contrasts.table(own, last_turns=True), paper)
    lines = [*answer(wide, rows, hardware), "", *(f"- {text}" for text in found)]
    lines += ["", f"Of the paper's {len(paper['claims'])} claims:", ""]
    lines += [f"- {text}" for text in sentences.claims(claims.judge(own, paper), claims.judge(hardware, paper))]
    lines += ["", pipeline(json.loads((ROOT / "executed/reference/bench_pipeline.json").read_text())), ""]
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n" + "\n".join(lines) + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    results.write_text(path, rendered(path.read_text(encoding="utf-8")))
