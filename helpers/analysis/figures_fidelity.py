"""Figures of what quantization does to the weights and to the predicted distributions."""

import numpy as np
from matplotlib.ticker import LogLocator

from helpers.analysis import figures_style as style
from helpers.analysis.figures_style import DARK, LIGHT, Missing, dig

QUANTILES = {"mean": "mean", "median": "median", "p95": "95%", "p99": "99%", "p999": "99.9%", "max": "maximum"}


BOOKS = {  # label and colour
    "nf4": ("NF4", style.LOOKS["nf4"][0]),
    "fp4": ("FP4", style.LOOKS["fp4"][0]),
    "uniform": ("uniform", "#7f7f7f"),
    "lloyd_max": ("Lloyd-Max, these weights", "#009E73"),
    "gaussian_lloyd_max": ("Lloyd-Max, Gaussian", "#000000"),
}


def _weights(found: dict, analysis: dict, part: str):
    """A part of `helpers.weights.analyse`'s result, which concerns the full-precision weights and so is the same for all."""
    value = dig(analysis, f"weights.{part}")
    return next(iter(style.with_value(found, "fidelity", f"weights.{part}").values())) if value is None else value


def codebooks(study, found: dict, analysis: dict):
    """The values that a 4-bit weight can take, in units of its block's largest magnitude, under the density of this model's own weights in
    the same units (line: of Gaussian weights). NF4 and FP4 as read from bitsandbytes. Lloyd-Max: the levels with the least squared error.
    In brackets: how many different levels."""
    books, histogram = _weights(found, analysis, "codebooks"), _weights(found, analysis, "histogram")
    books = {name: books[name] for name in [*BOOKS, *books] if name in books}
    figure, (top, below) = style.new(
        2, 1, height=2.6 + 0.4 * len(books), sharex=True, height_ratios=[2, 0.4 * len(books) + 0.4]
    )
    edges, density = np.array(histogram["edges"]), np.array(histogram["density"])
    top.stairs(density, edges, fill=True, color="#d0d0d0")
    if histogram.get("gaussian_density"):
        top.plot((edges[1:] + edges[:-1]) / 2, histogram["gaussian_density"], color=DARK, linewidth=1)
    top.set_ylabel("density of weights")
    top.set_ylim(0, None)
    labels = []
    for i, (name, book) in enumerate(books.items()):
        text, colour = BOOKS.get(name, (name.replace("_", " "), LIGHT))
        labels.append(f"{text} ({len({float(level) + 0.0 for level in book['levels']})})")  # -0.0 + 0.0 is 0.0
        below.vlines(book["levels"], i - 0.32, i + 0.32, color=colour, linewidth=2)
    below.set_yticks(range(len(books)), labels)
    below.set_ylim(len(books) - 0.4, -0.6)
    below.grid(False, axis="y")
    below.set_xlabel("weight / largest magnitude in its block")
    return figure


def kl(study, found: dict, analysis: dict):
    """KL divergence of each configuration's next-token distribution from full precision's: its mean, and quantiles over token positions.
    Full precision against itself, read in batches of another shape, is the noise floor. Error bars: intervals, clustered by dialogue; a
    maximum has none. Logarithmic axis; values of 0 can't be shown on it."""
    summaries, full = style.with_value(found, "fidelity", "kl"), style.full_precision(found)
    figure, axes = style.new(height=4.3)
    handles = []
    for i, (name, summary) in enumerate(summaries.items()):
        shown = [(x, q) for x, q in enumerate(QUANTILES) if (summary.get(q) or 0) > 0]
        if not shown:
            continue
        colour, marker = style.look(found, name)
        shift = 0.07 * (i - (len(summaries) - 1) / 2)  # so that no interval hides another
        x, values = np.array([x + shift for x, _ in shown]), np.array([summary[q] for _, q in shown])
        low, high = np.array([_ends(summary, q) for _, q in shown]).T
        first = 1 if shown[0][0] == 0 else 0  # the mean is no quantile
        axes.plot(x[first:], values[first:], color=colour, linewidth=0.9)
        error = [np.maximum(0, values - low), np.maximum(0, high - values)]
        axes.errorbar(x, values, yerr=error, color=colour, marker=marker, linestyle="none")
        handles.append(style.handle(found, name, line=True))
        if name == full:
            handles[-1].set_label(f"{style.label(found, name)} with itself: noise floor")
    if not handles:
        raise Missing("no configuration differs from full precision in its predictions")
    style.log_axis(axes.yaxis)
    axes.set_xticks(range(len(QUANTILES)), QUANTILES.values())
    axes.set_xlabel("mean, and quantiles over token positions")
    axes.set_ylabel("KL(full || quantized) (nats)")
    style.legend_below(figure, handles)
    return figure


def _ends(summary: dict, key: str) -> tuple[float, float]:
    """The interval of a summary's value, or the value itself twice where it has none. Its lower end stays on a logarithmic axis."""
    interval = dig(summary, f"intervals.{key}") or {}
    low, high = (summary[key] if interval.get(k) is None else interval[k] for k in ("ci_low", "ci_high"))
    return max(low, summary[key] * 1e-2), high


def weight_error_vs_perplexity(study, found: dict, analysis: dict):
    """Does the error of the weights foretell the loss? Left: relative squared error of each configuration's weights over all linear layers,
    and the change in log perplexity that it came with; error bars: intervals, clustered by dialogue; dashed: no change. Right: one block
    of the model quantized at a time, its weights' error and the KL divergence from full precision that follows, on fewer tokens."""
    points = {}
    for name, data in style.measured(found, "fidelity").items():
        error, change = weight_error(data, name), style.log_ratio(data)
        if error and change:
            points[name] = (error, change)
    blocks = next(iter(style.values_of(found, found, "fidelity", "sensitivity").values()), None)
    if not points and not blocks:
        raise Missing("no configuration has both a weight error and a perplexity")
    figure, panels = style.new(1, 2, height=4.2)
    _by_configuration(panels[0], found, points)
    _by_block(panels[1], found, blocks)
    formats = [row["format"] for row in (blocks or {}).get("layers", [])]
    style.legend_below(figure, [style.handle(found, n) for n in found if n in points or n in formats])
    return figure


def _by_configuration(axes, found: dict, points: dict) -> None:
    axes.set_title("configurations")
    if not points:
        return style.note_in(axes, "no configuration has both a weight error and a perplexity")
    for name, (error, row) in points.items():
        colour, marker = style.look(found, name)
        style.interval(axes, error, row["difference"], row, "difference", False, color=colour, marker=marker)
    axes.axhline(0, color=LIGHT, linestyle="--", linewidth=1)
    errors = [error for error, _ in points.values()]
    axes.set_xlim(min(errors) / 1.8, max(errors) * 1.8)
    style.log_axis(axes.xaxis)
    _decades(axes.xaxis, errors)
    axes.set_xlabel("relative squared error of the weights")
    axes.set_ylabel("ln(perplexity / full precision's)")


def _by_block(axes, found: dict, blocks: dict | None) -> None:
    axes.set_title("one block at a time")
    rows = [r for r in (blocks or {}).get("layers", []) if r["kl"] > 0 and r["relative_squared_error"] > 0]
    if not rows:
        return style.note_in(axes, "blocks were not quantized one at a time")
    for name in dict.fromkeys(row["format"] for row in rows):
        colour, marker = style.look(found, name)
        mine = [row for row in rows if row["format"] == name]
        errors, losses = [r["relative_squared_error"] for r in mine], [r["kl"] for r in mine]
        axes.plot(errors, losses, color=colour, marker=marker, ms=5, linestyle="none")
    rho = dig(blocks, "spearman.layers.kl")
    if rho is not None:
        axes.set_title(f"one block at a time (Spearman {style.signed(rho, '{:.2f}')})")
    style.log_axis(axes.xaxis)
    style.log_axis(axes.yaxis)
    _decades(axes.xaxis, [row["relative_squared_error"] for row in rows])
    axes.set_xlabel("relative squared error of the block's weights")
    axes.set_ylabel("KL(full || quantized) (nats)")


def _decades(axis, values: list[float]) -> None:
    """Fewer ticks where half a figure's width would be too little for 1, 2 and 5."""
    if max(values) / min(values) > 20:
        axis.set_major_locator(LogLocator())


def weight_error(data: dict, name: str) -> float | None:
    return dig(data, f"weights.formats.{name}.relative_squared_error")
