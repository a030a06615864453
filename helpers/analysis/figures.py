"""Every figure of the study, drawn from its result files alone.

    found, (analysis, why_not) = results.read_all(study), figures.read_numbers(study)
    folder = results.figures_folder(study)
    figures.draw_all(study, found, analysis, folder)            # {"fig1_accuracy_vs_memory": "ok", ...}
    HTML(figures.show(["redraw"], study, found, analysis, folder))       # the same, and the figure with its caption

Each function in FIGURES takes (study, found, analysis), returns a matplotlib Figure, and raises `Missing` with the reason if its inputs
are not there. Its docstring is the part of the caption that holds for every study; n, spread and hardware are added from the results.
PNG and SVG are the same bytes for the same results: no dates, no random names.
"""

import base64
import html
import inspect
import io
import os
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg

from helpers import StudyError, results
from helpers.analysis import diagrams, figures_accuracy, figures_differences, figures_fidelity, figures_hardware
from helpers.analysis.figures_hardware import MODES
from helpers.analysis.figures_style import STYLE, Missing, dig, failures, hardware, label, measured

FIGURES = {
    function.__name__: function
    for function in (
        diagrams.setup_1_model,
        diagrams.setup_2_infra,
        diagrams.setup_3_eval,
        figures_accuracy.fig1_accuracy_vs_memory,
        figures_accuracy.fig2_bar_comparison,
        figures_accuracy.fig3_nf4_vs_fp4,
        figures_hardware.fig4_throughput,
        figures_hardware.fig5_memory_waterfall,
        figures_differences.fig6_summary_metrics,
        figures_differences.redraw,
        figures_differences.differences,
        figures_fidelity.codebooks,
        figures_hardware.latency,
        figures_hardware.roofline,
        figures_fidelity.kl,
        figures_fidelity.weight_error_vs_perplexity,
    )
}
PNG_DPI = 200
REPORT_DPI = 144  # the report holds every figure: a smaller page


def read_numbers(study) -> tuple[dict, str | None]:
    """What 04_analysis found, and None; or an empty dict, and why there is nothing."""
    try:
        result = results.read(results.path(study, None, "analysis"))
    except StudyError as error:
        return {}, str(error)
    return (
        (result.data["numbers"], None) if result.status == "ok" else ({}, f"analysis {result.status}: {result.reason}")
    )


def draw(name: str, study, found: dict, analysis: dict):
    """One figure. Raises Missing if its inputs are not there."""
    with matplotlib.rc_context(STYLE):
        figure = FIGURES[name](study, found, analysis)
        FigureCanvasAgg(figure)
    return figure


def draw_all(study, found: dict, analysis: dict, folder: Path, names: list[str] | None = None) -> dict[str, str]:
    """Save NAME.png and NAME.svg of all figures, or of `names`; returns name -> "ok" or why there is none.

    A figure that can't be drawn is deleted from the folder, so that an older one is not taken for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = {}
    for name in names or FIGURES:
        try:
            _save(draw(name, study, found, analysis), folder / name)
            done[name] = "ok"
        except Missing as reason:
            for kind in ("png", "svg"):
                (folder / f"{name}.{kind}").unlink(missing_ok=True)
            done[name] = str(reason)
    return done


def _save(figure, stem: Path) -> None:
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": stem.name}):
        for kind, options in (
            ("png", {"dpi": PNG_DPI, "metadata": {"Software": None}}),
            ("svg", {"metadata": {"Date": None}}),
        ):
            scratch = stem.parent / f".{stem.name}.{kind}"
            figure.savefig(scratch, format=kind, **options)
            os.replace(scratch, stem.parent / f"{stem.name}.{kind}")


def show(names, study, found: dict, analysis: dict, folder: Path) -> str:
    """Draw and save these figures; returns HTML with the pictures embedded, their captions, and why one is missing."""
    parts = []
    for name, outcome in draw_all(study, found, analysis, folder, list(names)).items():
        if outcome != "ok":
            parts.append(f'<p class="note">{name} is not drawn: {html.escape(outcome)}.</p>')
            continue
        parts.append(_embedded(name, (folder / f"{name}.png").read_bytes(), caption(name, study, found, analysis)))
    return "\n".join(parts)


def inline(name: str, study, found: dict, analysis: dict) -> str:
    """One figure as HTML with its caption, without a file. Raises Missing if its inputs are not there."""
    picture = io.BytesIO()
    draw(name, study, found, analysis).savefig(picture, format="png", dpi=REPORT_DPI, bbox_inches="tight")
    return _embedded(name, picture.getvalue(), caption(name, study, found, analysis))


def _embedded(name: str, picture: bytes, text: str) -> str:
    text = html.escape(text)
    image = f'<img src="data:image/png;base64,{base64.b64encode(picture).decode()}" alt="{text}" style="width: 100%; max-width: 800px">'
    return f'<figure id="{name}" style="margin: 1rem 0">{image}<figcaption>{text}</figcaption></figure>'


def caption(name: str, study, found: dict, analysis: dict) -> str:
    """What the figure shows, then n, spread and hardware as the results have them. Plain text."""
    static = " ".join(inspect.getdoc(FIGURES[name]).split())
    notes = [note(study, found, analysis) for note in NOTES.get(name, ())]
    return " ".join([static, *filter(None, notes)])


# ---- what captions add ----


def _accuracy(study, found, analysis) -> str:
    """n and the kind of interval."""
    rows = [r for r in analysis.get("means", []) if r.get("metric") == "f1" and r.get("mean") is not None]
    if not rows:
        return ""
    counts = sorted({(r["n_questions"], r["n_dialogues"]) for r in rows}, reverse=True)
    n = "; ".join(f"{questions:,} questions in {dialogues:,} dialogues" for questions, dialogues in counts)
    reasons = sorted({r["reason"] for r in rows if r.get("reason")})
    bars = (
        f"Error bars: {study.statistics.confidence:.0%} intervals, clustered by dialogue."
        if any(r.get("ci_low") is not None for r in rows)
        else ""
    )
    return " ".join(filter(None, [f"n = {n}.", bars, *(f"{r[0].upper()}{r[1:]}." for r in reasons)]))


def _redraws(study, found, analysis) -> str:
    designs = figures_differences.redraw_designs(analysis)
    return " ".join(f"{d['draws']:,} redraws of {d['design']}." for d in designs)


def _paper(study, found, analysis) -> str:
    if not analysis.get("paper"):
        return ""
    model = analysis.get("paper_model")
    return f"The paper's values{f', of {model},' if model else ''} come from the last turns of 50 dialogues and have no interval."


def _paper_times(study, found, analysis) -> str:
    return (
        f"The paper's times, of {analysis.get('paper_model') or 'its model'}, come without n or spread."
        if analysis.get("paper")
        else ""
    )


def _timing(study, found, analysis) -> str:
    """Repeats, hardware, what disturbed a measurement, and why a mode could not be run."""
    data = measured(found, "benchmark").values()
    repeats = sorted(
        {row["n"] for d in data for kind in ("prefill", "decode") for row in d.get(kind) or [] if row.get("n")}
    )
    n = (
        f"n = {repeats[0]}" + (f" to {repeats[-1]}" if len(repeats) > 1 else "") + " repeats a point, medians. "
        if repeats
        else ""
    )
    remarks = [
        f"{label(found, name)}: {text.rstrip('.')}."
        for name, one in measured(found, "benchmark").items()
        for text in _remarks(one)
    ]
    return " ".join([f"{n}Measured on {hardware(found)}.", *remarks])


def _remarks(one: dict) -> list[str]:
    """What disturbed a benchmark, and why a mode that the study asked for was not run."""
    reasons = {mode: dig(one, f"modes.{mode}.reason") for mode in dig(one, "sizes.modes") or []}
    return [
        *(dig(one, "conditions.warnings") or []),
        *(f"{MODES.get(mode, mode)}: {reason}" for mode, reason in reasons.items() if reason),
    ]


def _memory(study, found, analysis) -> str:
    return f"MB: 2^20 bytes, as in the paper. Measured on {hardware(found)}."


def _tokens(study, found, analysis) -> str:
    """n, and why perplexities have no interval where they have none."""
    rows = measured(found, "fidelity")
    counts = sorted({(d["tokens"], d["dialogues"]) for d in rows.values()})
    n = "; ".join(f"{tokens:,} tokens of {dialogues:,} dialogues" for tokens, dialogues in counts)
    # Full precision does not differ from itself.
    reasons = sorted(
        {dig(d, "perplexity.all.reason") for name, d in rows.items() if name != analysis.get("full")} - {None}
    )
    return " ".join([f"n = {n}.", *(f"Perplexity: {reason}." for reason in reasons)])


def _block_tokens(study, found, analysis) -> str:
    counts = [dig(d, "sensitivity.tokens") for d in measured(found, "fidelity").values()]
    return "".join(f"Right: n = {tokens:,} tokens." for tokens in counts if tokens)


def _optional(note):
    """A note whose results are not needed by the figure itself."""

    def written(study, found, analysis) -> str:
        try:
            return note(study, found, analysis)
        except Missing:
            return ""

    return written


def _history(study, found, analysis) -> str:
    """Full precision is not what it seems where the weights were quantized before."""
    before = study.model.already_quantized
    return f"What is called full precision here was quantized before this study: {before}." if before else ""


def _failed(*kinds):
    return lambda study, found, analysis: " ".join(f"{sentence.rstrip('.')}." for sentence in failures(found, *kinds))


NOTES = {
    "setup_1_model": (_optional(_memory), _failed("benchmark")),
    "fig1_accuracy_vs_memory": (_accuracy, _memory, _paper, _history, _failed("evaluation", "benchmark")),
    "fig2_bar_comparison": (_accuracy, _paper, _history, _failed("evaluation")),
    "fig3_nf4_vs_fp4": (_optional(_accuracy), _optional(_tokens), _optional(_memory), _paper, _history),
    "fig4_throughput": (_timing, _paper_times, _failed("benchmark")),
    "fig5_memory_waterfall": (_memory, _failed("benchmark")),
    "fig6_summary_metrics": (
        _optional(_accuracy),
        _optional(_tokens),
        _optional(_timing),
        _history,
        _failed("evaluation", "benchmark", "fidelity"),
    ),
    "redraw": (_redraws, _paper, _history),
    "differences": (_accuracy, _paper, _history, _failed("evaluation")),
    "codebooks": (_history,),
    "latency": (_timing, _paper_times, _failed("benchmark")),
    "roofline": (_timing, _failed("benchmark")),
    "kl": (_tokens, _history, _failed("fidelity")),
    "weight_error_vs_perplexity": (_tokens, _block_tokens, _history, _failed("fidelity")),
}
