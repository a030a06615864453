"""What all figures share: colours and markers, the way into the result files, small parts of a plot.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which people with any colour vision can tell apart; every
configuration keeps its colour and marker in all figures. Figures are matplotlib `Figure` objects without pyplot, so drawing leaves no
state behind. Sizes are in inches for a display 800 pixels wide.

`found` is `helpers.results.read_all(study)`; `analysis` is the `numbers` of analysis.json. A figure whose inputs are not there raises
`Missing`, which says what and why.
"""

import textwrap

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from helpers import StudyError

WIDTH = 8.0
STYLE = {
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # ships with matplotlib, so that every machine draws the same picture
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.4,
    "lines.markersize": 6.5,
    "errorbar.capsize": 2.5,
    "text.parse_math": False,  # a label may hold a dollar sign
    "svg.fonttype": "none",  # text stays text: it can be searched and copied
}

LOOKS = {
    "fp16": ("#000000", "o"),
    "int8": ("#56B4E9", "s"),
    "fp8": ("#E69F00", "D"),
    "gptq": ("#009E73", "^"),
    "awq": ("#CC79A7", "v"),
    "nf4": ("#0072B2", "P"),
    "fp4": ("#D55E00", "X"),
}
# For configurations that a user adds, in the order of their names.
SPARE_LOOKS = (("#8a7a00", "<"), ("#7f7f7f", ">"), ("#F0E442", "h"), ("#5b3a8c", "*"), ("#00626b", "p"))
METRICS = {"f1": "F1", "em": "exact match"}
LIGHT, DARK = "#8c8c8c", "#333333"
OUTLINE = [withStroke(linewidth=3.2, foreground="white")]  # for dark lines over dark bars
MINUS = "\u2212"


class Missing(StudyError):
    """A figure's inputs are not among the results; the text says which, and why."""


# ---- the results ----


def dig(values, path: str):
    """The value at `a.b.c` in nested dicts, or None where it is not there."""
    for key in path.split("."):
        if not isinstance(values, dict) or key not in values:
            return None
        values = values[key]
    return values


def measured(found: dict, kind: str) -> dict[str, dict]:
    """configuration -> data of the finished results of one kind. Raises Missing, with the reasons, if there are none."""
    data = {name: parts[kind].data for name, parts in found.items() if kind in parts and parts[kind].status == "ok"}
    if not data:
        reasons = sorted({parts[kind].reason or parts[kind].status for parts in found.values() if kind in parts})
        raise Missing(f"no {kind} results" + (f" ({'; '.join(reasons)})" if reasons else " yet"))
    return data


def with_value(found: dict, kind: str, path: str) -> dict:
    """configuration -> value at `path`, of those that have one. Raises Missing if none has."""
    values = {name: dig(data, path) for name, data in measured(found, kind).items()}
    values = {name: value for name, value in values.items() if value is not None}
    if not values:
        raise Missing(f"{path} was not measured for any configuration")
    return values


def values_of(found: dict, names, kind: str, path: str) -> dict:
    """`with_value` of these configurations; empty where it would raise."""
    try:
        values = with_value(found, kind, path)
    except Missing:
        return {}
    return {n: values[n] for n in names if n in values}


def failures(found: dict, *kinds: str) -> list[str]:
    """A sentence for every result of these kinds that failed, with the reason, and one for all configurations that were not run."""
    odd = [
        (name, kind, parts[kind])
        for name, parts in found.items()
        for kind in kinds
        if kind in parts and parts[kind].status != "ok"
    ]
    said = [
        f"{label(found, name)}: {kind} failed: {r.reason or 'no reason given'}"
        for name, kind, r in odd
        if r.status != "skipped"
    ]
    skipped = list(dict.fromkeys(label(found, name) for name, _, r in odd if r.status == "skipped"))
    return said + ([f"Not run on this machine: {', '.join(skipped)}"] if skipped else [])


def full_precision(found: dict) -> str | None:
    """Name of the configuration that others are compared with: the one that is not quantized."""
    for name, parts in found.items():
        if any(dig(result.provenance, "configuration.quantization.method") == "none" for result in parts.values()):
            return name
    return None


def label(found: dict, name: str) -> str:
    for result in found.get(name, {}).values():
        if text := dig(result.provenance, "configuration.label"):
            return str(text)
    return name


def look(found: dict, name: str) -> tuple[str, str]:
    """Colour and marker of a configuration, the same in every figure of a study."""
    if name in LOOKS:
        return LOOKS[name]
    others = sorted(n for n in found if n not in LOOKS)
    return SPARE_LOOKS[others.index(name) % len(SPARE_LOOKS)] if name in others else (LIGHT, ".")


def mean(analysis: dict, name: str, metric: str) -> dict | None:
    """The row of a configuration's mean, or None. For last turns alone, pass analysis["last_turn"]."""
    rows = [
        r
        for r in analysis.get("means", [])
        if (r["configuration"], r["metric"]) == (name, metric) and r.get("mean") is not None
    ]
    return rows[0] if rows else None


def difference(analysis: dict, a: str, b: str, metric: str) -> dict | None:
    """The comparison's row as b minus a, whichever way round it is stored, or None."""
    for row in analysis.get("comparisons", []):
        if row["metric"] != metric or row.get("difference") is None:
            continue
        if (row["a"], row["b"]) == (a, b):
            return row
        if (row["a"], row["b"]) == (b, a):
            low, high = row.get("ci_low"), row.get("ci_high")
            turned = {
                "difference": -row["difference"],
                "ci_low": None if high is None else -high,
                "ci_high": None if low is None else -low,
            }
            return row | {"a": a, "b": b} | turned
    return None


def paper(analysis: dict, name: str, key: str):
    """What the paper reports for a configuration, or None."""
    return dig(analysis.get("paper") or {}, f"{name}.{key}")


def spread(row: dict, centre: str) -> tuple[float, float] | None:
    """Lengths below and above the centre of a row's interval, or None where it has none."""
    if row.get("ci_low") is None or row.get("ci_high") is None:
        return None
    return max(0.0, row[centre] - row["ci_low"]), max(0.0, row["ci_high"] - row[centre])


def log_ratio(fidelity: dict) -> dict | None:
    """ln(PPL quantized / PPL full precision) as {"difference", "ci_low", "ci_high"}, or None."""
    row = dig(fidelity, "perplexity.all")
    ratio = row.get("ln_ratio") if row else None
    if isinstance(ratio, dict):
        return ratio
    return None if ratio is None else {"difference": ratio, "ci_low": row.get("ci_low"), "ci_high": row.get("ci_high")}


def scaled(row: dict, factor: float) -> dict:
    """A row with its mean or difference, and its interval, times a factor."""
    keys = ("difference", "mean", "ci_low", "ci_high")
    return row | {k: row[k] * factor for k in keys if row.get(k) is not None}


def hardware(found: dict) -> str:
    """Device and dtype of the measurements, from the results themselves."""
    for name, data in measured(found, "benchmark").items():
        origin = found[name]["benchmark"].provenance
        where = dig(origin, "gpu.name") if data.get("device") == "cuda" else None
        where = where or f"{origin.get('processor') or 'CPU'}, {origin.get('cores') or 'unknown number of'} cores"
        dtype = dig(data, "loading.dtype") or dig(data, "memory.dtype") or data.get("dtype")
        return where + (f", computing in {dtype}" if dtype else "")
    raise Missing("no benchmark results")


# ---- parts of a plot ----


def interval(axes, x, y, row, centre, horizontal: bool, **options) -> None:
    """A point with its interval, where there is one."""
    lengths = spread(row, centre)
    error = None if lengths is None else [[lengths[0]], [lengths[1]]]
    axes.errorbar(x, y, **{("xerr" if horizontal else "yerr"): error}, **options)


def new(rows: int = 1, columns: int = 1, height: float = 4.2, width: float = WIDTH, **options):
    """Figure and its axes; nothing is cut off or overlaps, since the layout is constrained."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def handle(found: dict, name: str, line: bool = False) -> Line2D:
    colour, marker = look(found, name)
    return Line2D([], [], color=colour, marker=marker, linestyle="-" if line else "none", label=label(found, name))


def paper_handle(analysis: dict, hollow: bool = False) -> Line2D:
    """Legend entry of the paper's values: diamonds, or (`hollow`) each configuration's own marker, not filled."""
    if hollow:
        return Line2D(
            [], [], color=DARK, marker="o", mfc="none", linestyle="none", label=f"hollow: {paper_label(analysis)}"
        )
    return Line2D([], [], color=DARK, marker="D", mfc="white", linestyle="none", label=paper_label(analysis))


def paper_label(analysis: dict) -> str:
    return f"paper ({analysis['paper_model']})" if analysis.get("paper_model") else "paper"


def legend_below(figure: Figure, handles: list, columns: int = 4) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, max(1, len(handles))))


def nudge(figure: Figure, axes, i: int, n: int, points: float = 5.0):
    """Transform that moves the i-th of n coinciding points sideways, so that none hides another."""
    return axes.transData + ScaledTranslation((i - (n - 1) / 2) * points / 72, 0, figure.dpi_scale_trans)


def plain(value: float, _=None) -> str:
    """A number as people write it: 0.002, 1.5, 64, 4,096."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def three(value: float) -> str:
    """A measured number to three digits."""
    return plain(float(f"{value:.3g}"))


def log_axis(axis, values=None) -> None:
    """Logarithmic axis with plain numbers: at `values` if given, else at 1, 2 and 5 times powers of ten; fewer over many decades, and
    evenly spaced round numbers over less than one."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(plain))
    if values is not None:
        axis.set_ticks(sorted(values))
        axis.set_minor_locator(NullLocator())
        return
    low, high = axis.get_view_interval()
    if high < 8 * low:
        values = [v for v in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= v <= high]
        axis.set_major_locator(FixedLocator(values))
        axis.set_minor_locator(NullLocator())
        return
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / max(low, 1e-300) < 3000 else (1,)))


def room(values, share: float = 0.12) -> tuple[float, float]:
    """Axis limits with some space around the values."""
    low, high = float(np.min(values)), float(np.max(values))
    extra = (high - low) * share or abs(high) * share or 1.0
    return low - extra, high + extra


def note_in(axes, text: str, width: int = 28) -> None:
    """Say inside an empty panel why it is empty."""
    axes.text(
        0.5,
        0.5,
        textwrap.fill(text, width),
        transform=axes.transAxes,
        ha="center",
        va="center",
        color=LIGHT,
        fontsize=9,
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


def signed(value: float, form: str) -> str:
    """Formatted, with a minus sign as wide as a plus."""
    return form.format(value).replace("-", MINUS)


def ink(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour (relative luminance of Rec. 709)."""
    return "white" if np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)) < 0.45 else "black"


def shorten(text: str, width: int = 60) -> str:
    return textwrap.shorten(text, width, placeholder="...")


def wrap(text: str, width: int) -> str:
    return textwrap.fill(text, width)
