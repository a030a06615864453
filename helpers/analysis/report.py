"""The report's tables and sentences, rendered from analysis.json alone: here what was found, the claims, the provenance; the rest in
helpers.report_accuracy, report_hardware and report_fidelity.

Every function takes the dict that `helpers.analysis.analyse` returns (`n`, "the numbers") and gives a table or some sentences. A number
that was not measured is a dash; a sentence that the numbers do not support is not said. Texts that come from a model or a data set
are escaped, never rendered.
"""

import html
import json

import pandas as pd

from helpers import EXECUTED, ROOT, StudyError, results
from helpers.analysis.claims import FAILS, HOLDS, OPEN
from helpers.analysis.report_accuracy import accuracy_sentence, redraw_sentences
from helpers.analysis.report_fidelity import perplexity_sentences
from helpers.analysis.report_hardware import capacity_sentence, fastest_sentence, size_sentences, speed_sentences
from helpers.analysis.report_style import NONE, difference_of, name_of, note_line, number

# ---- what was found ----


def about(n: dict) -> str:
    """What the reader must know before any number."""
    lines = []
    if not n["is_paper_model"]:
        lines.append(
            f"This study measures {n['model']}, not the paper's {n['paper_model']}. It can test the paper's reasoning, not its numbers."
        )
    if n["already_quantized"]:
        lines.append(
            f"The weights are not an original: {n['already_quantized']}. Full precision means what they hold after that, "
            "and methods with similar grids may be flattered."
        )
    computed = dict.fromkeys((name, d["loading"]["dtype_reason"]) for name, d in n["evaluation"].items())
    computed |= dict.fromkeys((name, d["dtype_reason"]) for name, d in n["benchmark"].items())
    reasons = dict.fromkeys(reason for _, reason in computed)
    for reason in reasons:
        names = ", ".join(name_of(n, name) for name, its in computed if its == reason)
        lines.append(f"{names}: computed in {reason}." if len(reasons) > 1 else f"Computed in {reason}.")
    skipped = dict.fromkeys((f["configuration"], f["reason"]) for f in n["failures"] if f["status"] == "skipped")
    lines += [f"{name_of(n, name)} was not run: {reason.removeprefix(f'{name}: ')}." for name, reason in skipped]
    failed = [f for f in n["failures"] if f["status"] != "skipped"]
    lines += [f"{name_of(n, f['configuration'])}, {f['kind']}: {f['status']}: {f['reason']}." for f in failed]
    return "".join(f'<p class="warning">{html.escape(line)}</p>' for line in lines)


def headline(n: dict) -> list[str]:
    """The findings, most important first: accuracy, what 50 questions would have said, size, speed."""
    said = []
    full = n["full"]
    if n.get("questions"):
        names = ", ".join(name_of(n, name) for name in n["evaluation"])
        said.append(f"{n['questions']} questions in {n['dialogues']} dialogues were put to {names}.")
    for quantized in ("nf4", "fp4"):
        row = difference_of(n, n.get("comparisons"), full, quantized, "f1")
        if row:
            said.append(accuracy_sentence(n, row))
    row = difference_of(n, n.get("comparisons"), "fp4", "nf4", "f1")
    if row:
        said.append(accuracy_sentence(n, row))
    said += perplexity_sentences(n)[:1]
    for redraw in (n.get("redraw") or [])[-1:]:
        said.append(redraw_sentences(n, redraw)[0])
    said += size_sentences(n) + speed_sentences(n) + capacity_sentence(n) + fastest_sentence(n)
    return said


# ---- claims, provenance ----


def claims_table(n: dict) -> pd.DataFrame:
    columns = {
        "section": "Section",
        "claim": "The paper says",
        "reported": "Its numbers",
        "verdict": "Here",
        "evidence": "Evidence",
        "scope": "But",
    }
    return pd.DataFrame([{title: row[key] or NONE for key, title in columns.items()} for row in n["claims"]])


def provenance_table(n: dict) -> pd.DataFrame:
    rows = []
    for p in n["provenance"]:
        gpu = p["gpu"] or {}
        rows.append(
            {
                "Result": f"{p['configuration']}, {p['kind']}",
                "When (UTC)": p["created"][:16].replace("T", " "),
                "Commit": (p["commit"] or "unknown")[:10] + (" + changes" if p["dirty"] else ""),
                "Hardware": gpu.get("name") or f"{p['processor']}, {p['cores']} cores, {p['memory_gib']} GiB",
                "Driver, CUDA": f"{gpu['driver']}, {gpu['cuda']}" if gpu else NONE,
                "torch": p["packages"]["torch"],
                "transformers": p["packages"]["transformers"],
                "bitsandbytes": p["packages"]["bitsandbytes"],
                "Seed": p["seed"],
            }
        )
    return pd.DataFrame(rows)


def figure(name: str, study, found: dict, n: dict) -> str:
    """A figure with its caption, embedded; a note instead where its inputs are missing."""
    from helpers.analysis import figures

    try:
        return figures.inline(name, study, found, n)
    except figures.Missing as missing:
        return note_line(f"{name}: no figure: {missing}")


def verdict_sentence(n: dict) -> str:
    verdicts = [row["verdict"] for row in n["claims"]]
    words = {HOLDS: "hold", FAILS: "do not hold", OPEN: OPEN}
    counts = [f"{verdicts.count(verdict)} {said}" for verdict, said in words.items() if verdict in verdicts]
    return f"Of the paper's {len(verdicts)} claims, by this run alone: {', '.join(counts)}."


# ---- README ----

MARKS = ("<!-- found: rendered by make readme from executed/reference -->", "<!-- end of found -->")
REFERENCES = ("smollm2-135m", "llama-3.2-1b-random")


def pipeline_sentence(measured: dict) -> str:
    """What bench-pipeline measured: seconds and memory of a run from nothing, of a second run, and of the tests."""
    runs, machine = measured["runs"], measured["provenance"]
    peak = max(run["peak_mib"] for run in runs.values()) / 1024
    return (
        f"On {machine['cores']} cores without a GPU `make run-all` takes {number(runs['run-all']['seconds'] / 60, 1)} minutes from nothing "
        f"(downloads left out) and {number(runs['run-all again']['seconds'], 1)} s when there is nothing to do, `make test` "
        f"{number(runs['test']['seconds'] / 60, 1)} minutes; no more than {number(peak, 1)} GiB of memory are used."
    )


def readme(text: str) -> str:
    """README.md's text with its findings rendered again from the committed runs. Raises StudyError if the marks are gone."""
    if any(text.count(mark) != 1 for mark in MARKS):
        raise StudyError(f"README.md: the lines {MARKS[0]!r} and {MARKS[1]!r} must each stand there once")
    lines = []
    for study in REFERENCES:
        folder = EXECUTED / "reference" / "h100" / study
        n = results.read(folder / "analysis.json").data["numbers"]
        hardware = sorted({p["gpu"]["name"] for p in n["provenance"] if p["gpu"]})
        lines += [
            f"**{n['title']}** ({', '.join(hardware)}; [report](executed/reference/h100/{study}/report.html)):",
            "",
        ]
        lines += [f"- {sentence}" for sentence in headline(n)]
        lines += [f"- {verdict_sentence(n)}", ""]
    lines += [pipeline_sentence(json.loads((EXECUTED / "reference" / "bench_pipeline.json").read_text())), ""]
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n" + "\n".join(lines) + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    results.write_text(path, readme(path.read_text(encoding="utf-8")))
