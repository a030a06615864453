"""Diagrams of how the study is set up, with its own numbers: the model and its configurations, what runs where, and how it is evaluated."""

import textwrap

from matplotlib.patches import FancyBboxPatch

from helpers.analysis import figures_style as style
from helpers.analysis.figures_style import DARK, LIGHT, Missing, dig

PALE = "#f2f4f7"
LINE = 0.19  # inches per line of text


def _canvas(height: float):
    """Figure and axes whose unit is an inch, so that text and boxes fit at any height."""
    figure, axes = style.new(height=height)
    axes.set_axis_off()
    axes.set_xlim(0, style.WIDTH)
    axes.set_ylim(height, 0)
    return figure, axes


def _box(
    axes,
    x: float,
    y: float,
    width: float,
    height: float,
    title: str,
    text: str = "",
    colour: str = LIGHT,
    face: str = PALE,
) -> None:
    """A box with a bold title and lines of text, wrapped to its width; more of them than it has room for are set smaller."""
    frame = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": face, "edgecolor": colour, "linewidth": 1.2}
    axes.add_patch(FancyBboxPatch((x, y), width, height, **frame))
    letters = int((width - 0.16) / 0.076)
    lines = [line for part in text.split("\n") for line in (textwrap.wrap(part, letters) or [""])] if text else []
    titles = textwrap.wrap(title, int(letters * 0.88))
    pitch = min(LINE, (height - 0.08) / (len(titles) + len(lines)))
    top = y + (height - pitch * (len(titles) + len(lines))) / 2
    for i, line in enumerate(titles + lines):
        bold = "bold" if i < len(titles) else "normal"
        size = (9 if bold == "bold" else 8.5) * pitch / LINE
        axes.text(x + width / 2, top + pitch * (i + 0.5), line, ha="center", va="center", fontsize=size, weight=bold)


def _arrow(axes, start: tuple, end: tuple, text: str = "") -> None:
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": DARK, "linewidth": 1.1, "shrinkA": 1, "shrinkB": 1}
    )
    if text:
        axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 - 0.05, text, ha="center", va="bottom", fontsize=8.5)


def _any(found: dict, path: str):
    """The first value at `path` in any finished result, with its result; (None, None) if there is none."""
    for parts in found.values():
        for result in parts.values():
            if (value := dig(result.data or {}, path)) is not None:
                return value, result
    return None, None


def _method(result) -> str:
    quantization = dig(result.provenance, "configuration.quantization") or {}
    shown = ("quant_type", "double_quant", "block_size", "group_size", "symmetric", "threshold", "activations")
    extra = [
        f"{k.replace('_', ' ')} {quantization[k]}".replace(" True", "")
        for k in shown
        if quantization.get(k) not in (None, False)
    ]
    if samples := dig(quantization, "calibration.samples"):
        extra.append(f"{samples} calibration samples")
    method = quantization.get("method", "method not recorded")
    return "not quantized" if method == "none" else ", ".join([method, *extra])


def setup_1_model(study, found: dict, analysis: dict):
    """Where the weights come from, and what each configuration makes of them: memory of the loaded model, quantization state included, and
    the compression against full precision."""
    step, top = 1.0, 0.1
    height = max(2.2, top * 2 + step * len(found))
    figure, axes = _canvas(height)
    middle = height / 2
    source = {
        "package": "from the Python package index",
        "hub": "from the Hugging Face hub",
        "path": "from a local folder",
        "random": "random",
    }
    history = f"\nbefore this study: {study.model.already_quantized}" if study.model.already_quantized else ""
    parameters, _ = _any(found, "loading.parameters")
    count = f"\n{parameters / 1e6:,.1f} million parameters" if parameters else ""
    _box(axes, 0.05, middle - 0.85, 2.2, 1.7, study.model.name, f"weights {source[study.model.source]}{count}{history}")
    dtype, _ = _any(found, "loading.dtype")
    _box(
        axes,
        2.85,
        middle - 0.6,
        1.6,
        1.2,
        "from_pretrained",
        "quantized as each configuration says" + (f"\nthe rest in {dtype}" if dtype else ""),
    )
    _arrow(axes, (2.25, middle), (2.85, middle))
    size = {
        n: dig(parts["benchmark"].data or {}, "memory.allocated_mb")
        for n, parts in found.items()
        if "benchmark" in parts
    }
    full = size.get(style.full_precision(found))
    for i, (name, parts) in enumerate(found.items()):
        y = top + (height - 2 * top - step * len(found)) / 2 + step * i
        if size.get(name):
            line = f"{size[name]:,.1f} MB" + (
                f", {full / size[name]:.2f} times smaller" if full and size[name] != full else ""
            )
        else:
            line = "memory not measured"
        result = next(iter(parts.values()))
        _box(
            axes,
            5.05,
            y + 0.05,
            2.9,
            step - 0.1,
            style.label(found, name),
            f"{_method(result)}\n{line}",
            style.look(found, name)[0],
            "white",
        )
        _arrow(axes, (4.45, middle), (5.05, y + step / 2))
    return figure


def _hardware_lines(found: dict) -> str:
    result = next(
        (p[kind] for kind in ("benchmark", "evaluation", "fidelity") for p in found.values() if kind in p), None
    )
    if result is None:
        raise Missing("no results, so nothing says what they were made on")
    origin = result.provenance
    gpu = origin.get("gpu")
    device = (
        f"{gpu['name']}, CUDA {gpu['cuda']}, driver {gpu['driver']}" if gpu else f"no GPU; {origin.get('processor')}"
    )
    packages = origin.get("packages") or {}
    shown = [f"{n} {packages[n]}" for n in ("torch", "transformers", "bitsandbytes", "lm_eval") if packages.get(n)]
    memory = f"{origin.get('cores')} cores, {origin.get('memory_gib')} GiB memory, {origin.get('system')}"
    return "\n".join([device, memory, ", ".join([f"Python {origin.get('python')}", *shown])])


def setup_2_infra(study, found: dict, analysis: dict):
    """What runs where. Notebooks pass results on through checked files alone; a notebook per configuration is a process of its own, so its
    memory is clean. Hardware and versions as recorded in the results."""
    lines = _hardware_lines(found)
    figure, axes = _canvas(4.7)
    _box(axes, 0.05, 0.1, 1.65, 0.85, "params/", f"{study.study}:\nstudy, configurations")
    _box(axes, 2.15, 0.1, 1.65, 0.85, "Make", "runs what is not fresh")
    _box(axes, 4.25, 0.1, 1.65, 0.85, "papermill", "one process per notebook")
    _box(axes, 6.35, 0.1, 1.6, 0.85, "helpers/", "the code, imported by notebooks")
    for x in (1.7, 3.8):
        _arrow(axes, (x, 0.525), (x + 0.45, 0.525))
    _arrow(axes, (5.08, 0.95), (5.08, 1.3))
    _arrow(axes, (7.15, 0.95), (7.15, 1.3))
    n = len(found)
    _box(axes, 0.05, 1.3, 1.65, 0.95, "00_setup", "once: weights, data, environment", DARK, "white")
    _box(axes, 2.15, 1.3, 5.8, 0.95, "01_evaluate, 02_benchmark, 03_fidelity",
         f"once for each of {n} configurations: {', '.join(style.label(found, c) for c in found)}", DARK, "white")  # fmt: skip
    _arrow(axes, (1.7, 1.775), (2.15, 1.775))
    _box(axes, 2.15, 2.6, 2.75, 0.7, "executed/", "results: JSON and JSONL, with provenance")
    _box(axes, 5.2, 2.6, 2.75, 0.7, "04_analysis, 05_figures", "once, from the result files alone", DARK, "white")
    _box(axes, 0.05, 2.6, 1.65, 0.7, "report.html", "and figures/")
    _arrow(axes, (3.5, 2.25), (3.5, 2.6))
    _arrow(axes, (4.9, 2.95), (5.2, 2.95))
    axes.plot([7.0, 7.0, 0.87, 0.87], [3.3, 3.46, 3.46, 3.4], color=DARK, linewidth=1.1, solid_joinstyle="miter")
    _arrow(axes, (0.87, 3.46), (0.87, 3.3))
    _box(axes, 0.05, 3.64, 7.9, 0.98, "measured on", lines, LIGHT, "white")
    return figure


def setup_3_eval(study, found: dict, analysis: dict):
    """How a dialogue is evaluated. In CoQA's prompt each turn's prompt is a prefix of the next one's, so one prefill of the last prompt
    holds them all; every turn is then decoded as a row of one batch that sees the prefix up to its own question."""
    data = next(iter(style.measured(found, "evaluation").values()))
    figure, axes = _canvas(4.2)
    turns = data["questions"] / data["dialogues"]
    axes.text(0.05, 0.18, "prompt of the last turn: one prefill", fontsize=9, weight="bold", va="center")
    x, parts = (
        0.05,
        [("story", 2.3), ("Q1", 0.62), ("A1", 0.62), ("Q2", 0.62), ("A2", 0.62), ("...", 0.62), ("last Q", 0.8)],
    )
    ends = {}
    for text, width in parts:
        question = text.startswith("Q") or text == "last Q"
        _box(
            axes,
            x,
            0.38,
            width,
            0.36,
            text,
            colour="#0072B2" if question else LIGHT,
            face="#dcebf5" if question else PALE,
        )
        x += width
        ends[text] = x
    for row, text in enumerate(("Q1", "Q2", "last Q")):
        y = 1.08 + 0.44 * row
        axes.plot([0.05, ends[text]], [y, y], color="#0072B2", linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot([ends[text]] * 2, [0.74, y], color=LIGHT, linewidth=0.8, linestyle=":")
        _arrow(axes, (ends[text], y), (6.75, y))
        axes.text(6.82, y, ("answer 1", "answer 2", "last answer")[row], va="center", fontsize=9)
    axes.text(
        0.05,
        2.3,
        "rows of one batch: each sees the prefix up to its own question, then decodes",
        fontsize=9,
        va="center",
    )
    _box(
        axes,
        0.05,
        2.62,
        2.4,
        1.4,
        "data",
        f"{data['dialogues']:,} dialogues\n{data['questions']:,} questions\n{turns:.1f} turns a dialogue",
    )
    _box(
        axes,
        2.8,
        2.62,
        2.4,
        1.4,
        "answer",
        "greedy, cut at its first line; gold answers, not the model's own, in the history",
    )
    _box(
        axes,
        5.55,
        2.62,
        2.4,
        1.4,
        "score",
        "F1 and exact match against four reference answers, each left out in turn; all turns, and last turns alone",
    )
    _arrow(axes, (2.45, 3.32), (2.8, 3.32))
    _arrow(axes, (5.2, 3.32), (5.55, 3.32))
    return figure
