"""What the figures share: a look per configuration, forest plots, and the way into notebook, file and report.

    with plots.figure("latency", f, 2, 3, height=5, caption="...") as (fig, axes):
        ...        # drawn; then saved as PNG and SVG, and shown with its caption

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which people with any colour vision can tell apart.
PNG and SVG have the same bytes for the same results: no dates, no random names. Sizes are in inches.
"""

import base64
import contextlib
import html
import textwrap

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from helpers import results
from helpers.analysis.frames import Frames

STYLE = {
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # ships with matplotlib, so that every machine draws the same picture
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.markersize": 6.5,
    "errorbar.capsize": 2.5,
    "text.parse_math": False,  # a label may hold a dollar sign
    "svg.fonttype": "none",  # text stays text: it can be searched and copied
}
WIDTH = 8.0
PNG_DPI = 144
SVG_BYTES = 150_000  # the page embeds a smaller SVG as it is, and a PNG in place of a larger one
LIGHT, DARK = "#8c8c8c", "#333333"
LOOKS = """fp16 #000000 o, bf16 #000000 o, fp32 #000000 o, int8 #56B4E9 s, int8-weights #8a9bb0 h, fp8 #E69F00 D,
gptq #009E73 ^, awq #CC79A7 v, hqq #a6761d >, nf4 #0072B2 P, nf4-plain #5b3a8c *, fp4 #D55E00 X, int4 #8a7a00 <,
uniform #7f7f7f |, lloyd_max #009E73 |, gaussian_lloyd_max #000000 |"""
LOOKS = {name: look for name, *look in map(str.split, LOOKS.split(","))}  # configuration -> colour, marker
SPARE = (("#7f7f7f", ">"), ("#5b3a8c", "*"), ("#00626b", "p"), ("#a6761d", "h"))


def look(name: str) -> dict:
    """Colour and marker of a configuration or codebook, the same in every figure."""
    colour, marker = LOOKS.get(name) or SPARE[sum(map(ord, name)) % len(SPARE)]
    return {"color": colour, "marker": marker}


@contextlib.contextmanager
def figure(name: str, f: Frames, rows: int = 1, columns: int = 1, height: float = 4.2, caption: str = "", **options):
    """Axes to draw on; on leaving, the figure is saved as figures/STUDY/NAME.png and .svg, and shown with its
    caption.

    caption: one or two sentences of plain text; the first says what to see, and is the alternative text. Axes that stay
    empty show nothing, and an earlier run's figure goes: the section's table says what was not measured.
    """
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        drawn, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", **options)
        try:
            yield drawn, axes
            folder = results.figures_folder(f.study)
            if not any(np.isfinite(panel.dataLim.get_points()).all() for panel in drawn.axes):
                for kind in ("png", "svg", "txt"):
                    (folder / f"{name}.{kind}").unlink(missing_ok=True)
                return
            folder.mkdir(parents=True, exist_ok=True)
            for kind, extra in (("png", {"dpi": PNG_DPI}), ("svg", {})):
                meta = {"Software": None} if kind == "png" else {"Date": None}
                with results.atomically(folder / f"{name}.{kind}") as scratch:
                    drawn.savefig(scratch, format=kind, metadata=meta, **extra)
                drawn.set_layout_engine("none")  # solved once: it takes as long as drawing
            results.write_text(folder / f"{name}.txt", caption + "\n")
            display(HTML(embedded(name, folder, caption)))
        finally:
            plt.close(drawn)


def embedded(name: str, folder, caption: str | None = None) -> str:
    """HTML of a saved figure: the picture inside the page, its caption, its first sentence as alternative text."""
    caption = (folder / f"{name}.txt").read_text(encoding="utf-8").strip() if caption is None else caption
    svg = (folder / f"{name}.svg").read_bytes()
    kind, data = ("svg+xml", svg) if len(svg) < SVG_BYTES else ("png", (folder / f"{name}.png").read_bytes())
    picture = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    text, alt = html.escape(caption), html.escape(caption.split(". ")[0])
    return (
        f'<figure id="{html.escape(name)}"><img src="{picture}" alt="{alt}" style="width: 100%; max-width: 800px">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def forest(axes, table, value: str, low: str, high: str, zero: float | None = None, scale: float = 1.0) -> None:
    """A row per configuration of `table` (its index), a point with its interval; rows without a value stay empty."""
    numbers = scale * table[[value, low, high]].astype(float)  # None, too few dialogues for an interval, becomes NaN
    for y, (name, row) in enumerate(table.iterrows()):
        at, least, most = numbers.iloc[y]
        if np.isnan(at):
            continue
        error = None if np.isnan([least, most]).any() else np.maximum(0, [[at - least], [most - at]])
        shape = look(name[-1] if isinstance(name, tuple) else name)
        fill = {} if bool(row.get("differs", True)) else {"mfc": "white"}
        axes.errorbar(at, y, xerr=error, linestyle="none", **shape, **fill)
    if zero is not None and len(table):
        axes.axvline(scale * zero, color=LIGHT, linestyle="--", linewidth=1)
    axes.set_ylim(max(len(table), 1) - 0.5, -0.5)
    axes.grid(False, axis="y")


def names(axes, f: Frames, configurations, width: int = 16) -> None:
    """Configurations as the labels of a vertical axis, first on top."""
    labels = [textwrap.fill(f.label(name), width) for name in configurations]
    axes.set_yticks(range(len(labels)), labels)


def legend(fig, f: Frames, configurations, columns: int = 5) -> None:
    """One legend below all panels, in the order of the tables."""
    names = list(f.configurations.index.intersection(configurations, sort=False))
    names += [name for name in configurations if name not in names]
    handles = [Line2D([], [], label=f.label(name), **look(name)) for name in names]
    fig.legend(handles=handles, loc="outside lower center", ncols=min(columns, max(1, len(handles))))


PAPER = {"marker": "D", "mfc": "white", "mec": DARK}


def log(axis, values=None) -> None:
    """A logarithmic axis with numbers as people write them (0.002, 4,096), at `values` where given."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_minor_formatter(NullFormatter())
    low, high = axis.get_data_interval()
    if values is None and low > 0 and high < 20 * low:  # within a decade or so powers of ten would leave no tick
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    if values is not None:
        axis.set_ticks(sorted(set(values)))
        axis.set_minor_locator(NullLocator())
