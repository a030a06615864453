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
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from helpers import results
from helpers.analysis.frames import MODES, Frames

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
LOOKS = {
    "fp16": ("#000000", "o"),
    "bf16": ("#000000", "o"),
    "int8": ("#56B4E9", "s"),
    "fp8": ("#E69F00", "D"),
    "gptq": ("#009E73", "^"),
    "awq": ("#CC79A7", "v"),
    "nf4": ("#0072B2", "P"),
    "fp4": ("#D55E00", "X"),
    "int4": ("#8a7a00", "<"),
    "uniform": ("#7f7f7f", "|"),
    "lloyd_max": ("#009E73", "|"),
    "gaussian_lloyd_max": ("#000000", "|"),
}
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
    empty take the figure away again, with a line that says so.
    """
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        drawn, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", **options)
        try:
            yield drawn, axes
            if not any(np.isfinite(panel.dataLim.get_points()).all() for panel in drawn.axes):
                display(HTML(f'<p class="note">{html.escape(name)}: not drawn, since nothing of it was measured.</p>'))
                return
            folder = results.figures_folder(f.study)
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
    for y, (name, row) in enumerate(table.iterrows()):
        if row[value] is None or np.isnan(row[value]):
            continue
        low_end, middle, high_end = (scale * row[[low, value, high]]).astype(float)  # None: no interval, as NaN
        ends = [[middle - low_end], [high_end - middle]]
        error = None if np.isnan(ends).any() else np.maximum(0, ends)
        shape = look(name[-1] if isinstance(name, tuple) else name)
        fill = {} if bool(row.get("differs", True)) else {"mfc": "white"}
        axes.errorbar(scale * row[value], y, xerr=error, linestyle="none", **shape, **fill)
    if zero is not None and len(table):
        axes.axvline(scale * zero, color=LIGHT, linestyle="--", linewidth=1)
    axes.set_ylim(max(len(table), 1) - 0.5, -0.5)
    axes.grid(False, axis="y")


def histogram(axes, row: dict, colour: str) -> None:
    """Redraws of a difference (a row of redraw.redraw's comparisons), in points; darker where the sign contradicts
    it."""
    edges, counts = 100 * np.array(row["histogram"]["edges"]), np.array(row["histogram"]["counts"])
    centres, share, truth = (edges[1:] + edges[:-1]) / 2, 100 * counts / counts.sum(), 100 * row["difference"]
    against = centres * truth < 0
    axes.bar(centres, share, width=np.diff(edges), color=colour, alpha=0.4)
    axes.bar(centres[against], share[against], width=np.diff(edges)[against], color=colour)
    axes.axvline(truth, color=DARK, linewidth=1.4, linestyle="--")
    axes.axvline(0, color=DARK, linewidth=0.8)
    axes.set_ylabel("redraws (%)")


def names(axes, f: Frames, configurations, width: int = 16) -> None:
    """Configurations as the labels of a vertical axis, first on top."""
    labels = [textwrap.fill(f.label(name), width) for name in configurations]
    axes.set_yticks(range(len(labels)), labels)


def legend(fig, f: Frames, configurations, *more, columns: int = 5) -> None:
    """One legend below all panels."""
    handles = [Line2D([], [], label=f.label(name), **look(name)) for name in configurations]
    handles += more
    fig.legend(handles=handles, loc="outside lower center", ncols=min(columns, max(1, len(handles))))


def mark(label: str, **options) -> Line2D:
    """A legend entry for something that is no configuration."""
    return Line2D([], [], label=label, **({"color": DARK, "linestyle": "none"} | options))


PAPER = {"marker": "D", "mfc": "white", "mec": DARK}


def plain(value: float, _=None) -> str:
    """A number as people write it: 0.002, 1.5, 64, 4,096."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def log(axis, values=None) -> None:
    """A logarithmic axis with plain numbers, at `values` where given."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_minor_formatter(NullFormatter())
    low, high = axis.get_data_interval()
    if values is None and low > 0 and high < 20 * low:  # within a decade or so powers of ten would leave no tick
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(plain))
    if values is not None:
        axis.set_ticks(sorted(set(values)))
        axis.set_minor_locator(NullLocator())


def curves(axes, f: Frames, table, x: str, y: str, limit: str | None = None) -> None:
    """A line per configuration through its medians, bars for the range of its processes; `limit` dashed; log axes."""
    for name in f.configurations.index.intersection(table.configuration.unique(), sort=False):
        rows = table[table.configuration == name].sort_values(x)
        spread = [np.maximum(0, rows[y] - rows.low), np.maximum(0, rows.high - rows[y])] if y == "ms" else None
        axes.errorbar(rows[x], rows[y], yerr=spread, linewidth=1.4, **look(name))
        if limit and rows[limit].notna().any():
            axes.plot(rows[x], rows[limit], color=look(name)["color"], linestyle="--", linewidth=0.9)
    log(axes.xaxis, table[x])
    log(axes.yaxis)


def mode_name(mode: str) -> str:
    return MODES.get(mode, mode)
