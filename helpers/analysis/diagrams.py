"""Diagrams of the study's set-up, with its own numbers.

Each takes the tables and an axes whose unit is an inch; notebook 05 gives it `plots.figure`'s.
"""

import textwrap

import pandas as pd
from matplotlib.patches import FancyBboxPatch

from helpers.analysis import plots
from helpers.analysis.frames import Frames
from helpers.analysis.plots import DARK, LIGHT
from helpers.analysis.style import number, percent

PALE, BLUE = "#f2f4f7", "#0072B2"
LINE = 0.19  # inches per line of text
SOURCES = {"package": "from PyPI", "hub": "from the Hugging Face hub", "path": "from a folder", "random": "random"}


def canvas(axes) -> float:
    """Axes whose unit is an inch, so that text and boxes fit at any height; returns the height."""
    height = axes.figure.get_size_inches()[1]
    axes.set_axis_off()
    axes.set_xlim(0, plots.WIDTH)
    axes.set_ylim(height, 0)
    axes.plot([], [])
    return height


def box(axes, x, y, width, height, title: str, text: str = "", colour: str = LIGHT, face: str = PALE) -> None:
    """A box with a bold title and lines of text, wrapped to its width, and set smaller if there are many."""
    frame = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": face, "edgecolor": colour, "linewidth": 1.2}
    axes.add_patch(FancyBboxPatch((x, y), width, height, **frame))
    letters = int((width - 0.16) / 0.076)
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part, letters)]
    titles = textwrap.wrap(title, int(letters * 0.88))
    pitch = min(LINE, (height - 0.08) / (len(titles) + len(lines)))
    top = y + (height - pitch * (len(titles) + len(lines))) / 2
    for i, line in enumerate(titles + lines):
        weight, size = ("bold", 9) if i < len(titles) else ("normal", 8.5)
        options = {"fontsize": size * pitch / LINE, "weight": weight, "ha": "center", "va": "center"}
        axes.text(x + width / 2, top + pitch * (i + 0.5), line, **options)


def arrow(axes, start: tuple, end: tuple) -> None:
    style = {"arrowstyle": "-|>", "color": DARK, "linewidth": 1.1, "shrinkA": 1, "shrinkB": 1}
    axes.annotate("", end, start, arrowprops=style)


def model(axes, f: Frames) -> None:
    """Where the weights come from, and what each format makes of them."""
    height, step = canvas(axes), 0.62
    history = f.study.model.already_quantized
    before = f"\nbefore this study: {history}" if history else ""
    source = f"weights {SOURCES[f.study.model.source]}{before}"
    box(axes, 0.05, height / 2 - 0.7, 2.3, 1.4, f.study.model.name, source)
    box(axes, 2.9, height / 2 - 0.5, 1.7, 1.0, "from_pretrained", "quantized as each format says")
    arrow(axes, (2.35, height / 2), (2.9, height / 2))
    full = f.sizes.allocated.get(f.full)
    for i, (name, row) in enumerate(f.configurations.iterrows()):
        y = (height - step * len(f.configurations)) / 2 + step * i
        size = f.sizes.allocated.get(name)
        text = "unpacked: full precision's size in memory" if row.same_kernels else "not measured"
        if pd.notna(size):
            text = f"{number(size, 0)} MB" + (f", {percent(size / full, 0)} of full precision" if full else "")
        box(axes, 5.2, y + 0.04, 2.75, step - 0.08, row.label, text, plots.look(name)["color"], "white")
        arrow(axes, (4.6, height / 2), (5.2, y + step / 2))


def infrastructure(axes, f: Frames) -> None:
    """What runs where: Make starts papermill, a process per notebook, and notebooks pass results on through files."""
    canvas(axes)
    top = {
        "params/": "formats, studies",
        "Make": "runs what is stale",
        "papermill": "a process per notebook",
        "helpers/": "a folder per notebook",
    }
    for i, (title, text) in enumerate(top.items()):
        box(axes, 0.05 + 2.02 * i, 0.1, 1.75, 0.75, title, text)
        if i:
            arrow(axes, (2.02 * i - 0.22, 0.475), (2.02 * i + 0.05, 0.475))
    labels = ", ".join(f.configurations.label)
    box(axes, 0.05, 1.15, 1.75, 0.95, "00_setup, 03_weights", "once per study", DARK, "white")
    box(
        axes,
        2.07,
        1.15,
        5.83,
        0.95,
        "01_evaluate, 02_benchmark, 03_fidelity",
        f"once per format: {labels}",
        DARK,
        "white",
    )
    box(axes, 5.05, 2.4, 2.85, 0.7, "executed/", "checked results with provenance")
    box(axes, 2.07, 2.4, 2.6, 0.7, "04, 05, 06", "from the result files alone", DARK, "white")
    box(axes, 0.05, 2.4, 1.65, 0.7, "report.html", "figures/")
    arrow(axes, (1.8, 1.6), (2.07, 1.6))
    arrow(axes, (6.5, 2.1), (6.5, 2.4))
    arrow(axes, (5.05, 2.75), (4.67, 2.75))
    arrow(axes, (2.07, 2.75), (1.7, 2.75))
    run = f.runs.iloc[0]
    device = (
        f"{run.gpu}, CUDA {run.cuda}, driver {run.driver}" if isinstance(run.gpu, str) else f"no GPU; {run.processor}"
    )
    software = f"torch {run.torch}, transformers {run.transformers}, bitsandbytes {run.bitsandbytes}"
    box(
        axes,
        0.05,
        3.35,
        7.85,
        0.8,
        "measured on",
        f"{device}\n{run.cores} cores, {run.memory_gib} GiB; {software}",
        LIGHT,
        "white",
    )


def evaluation(axes, f: Frames) -> None:
    """How a dialogue is scored: one prefill holds the prompts of all turns, and each turn is a row of one batch."""
    canvas(axes)
    axes.text(0.05, 0.18, "prompt of the last turn: one prefill", fontsize=9, weight="bold", va="center")
    x, ends = 0.05, {}
    widths = {"story": 2.3, "Q1": 0.62, "A1": 0.62, "Q2": 0.62, "A2": 0.62, "...": 0.62, "last Q": 0.8}
    for text, width in widths.items():
        question = "Q" in text
        box(axes, x, 0.38, width, 0.36, text, colour=BLUE if question else LIGHT, face="#dcebf5" if question else PALE)
        x += width
        ends[text] = x
    for row, text in enumerate(("Q1", "Q2", "last Q")):
        y = 1.08 + 0.44 * row
        axes.plot([0.05, ends[text]], [y, y], color=BLUE, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot([ends[text]] * 2, [0.74, y], color=LIGHT, linewidth=0.8, linestyle=":")
        arrow(axes, (ends[text], y), (6.75, y))
        axes.text(6.82, y, ("answer 1", "answer 2", "last answer")[row], va="center", fontsize=9)
    one = f.samples[f.samples.configuration == f.samples.configuration.iloc[0]] if len(f.samples) else f.samples
    asked = f"{one[['data_set', 'dialogue']].drop_duplicates().shape[0]:,} dialogues\n{len(one):,} questions"
    parts = {
        "data": asked if len(one) else "none: a hardware study",
        "answer": "greedy, cut at its first line; reference answers, not the model's own, in the history",
        "score": "F1 and exact match, averaged over references left out in turn; all turns, and last turns alone",
    }
    for i, (title, text) in enumerate(parts.items()):
        box(axes, 0.05 + 2.75 * i, 2.3, 2.4, 1.3, title, text)
        if i:
            arrow(axes, (2.75 * i - 0.3, 2.95), (2.75 * i + 0.05, 2.95))
