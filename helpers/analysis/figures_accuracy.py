"""Figures of how well each configuration answers."""

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from helpers.analysis import figures_style as style
from helpers.analysis.figures_style import DARK, LIGHT, Missing


def _means(found: dict, analysis: dict, metric: str) -> dict[str, dict]:
    rows = {name: style.mean(analysis, name, metric) for name in found}
    rows = {name: row for name, row in rows.items() if row}
    if not rows:
        style.measured(found, "evaluation")  # knows why, if the evaluations failed
        raise Missing(f"the analysis holds no {style.METRICS[metric]} means")
    return rows


def fig1_accuracy_vs_memory(study, found: dict, analysis: dict):
    """F1 over all turns against the memory that the loaded model really occupies, quantization state included.
    A circle marks the Pareto front: no other configuration is both smaller and better, by the means."""
    rows = _means(found, analysis, "f1")
    size = style.with_value(found, "benchmark", "memory.allocated_mb")
    names = [name for name in rows if name in size]
    if not names:
        raise Missing("no configuration has both F1 and a memory figure")
    figure, axes = style.new(height=4.6)
    for i, name in enumerate(names):
        twins = [n for n in names if abs(np.log(size[n] / size[name])) < 0.02]
        colour, marker = style.look(found, name)
        place = style.nudge(figure, axes, twins.index(name), len(twins), 9)
        style.interval(
            axes,
            size[name],
            rows[name]["mean"],
            rows[name],
            "mean",
            False,
            color=colour,
            marker=marker,
            transform=place,
            zorder=3 + i,
        )
        if not any(_dominates(n, name, size, rows) for n in names):
            axes.plot(size[name], rows[name]["mean"], "o", ms=16, mfc="none", mec=LIGHT, mew=1.1, transform=place)
    reported = {n: (style.paper(analysis, n, "model_size_mb"), style.paper(analysis, n, "coqa_f1")) for n in found}
    reported = {n: point for n, point in reported.items() if None not in point}
    for name, point in reported.items():
        twins = [n for n in reported if reported[n][0] == point[0]]
        colour, marker = style.look(found, name)
        place = style.nudge(figure, axes, twins.index(name), len(twins), 9)
        axes.plot(*point, marker=marker, color=colour, mfc="none", linestyle="none", transform=place)
    # Transformed points don't count for the limits, and intervals should not touch the frame.
    edges = [
        e for n in names for e in (rows[n]["mean"], rows[n].get("ci_low"), rows[n].get("ci_high")) if e is not None
    ]
    axes.set_ylim(*style.room(edges + [f1 for _, f1 in reported.values()]))
    sizes = [size[n] for n in names] + [mb for mb, _ in reported.values()]
    axes.set_xlim(min(sizes) / 1.15, max(sizes) * 1.15)
    style.log_axis(axes.xaxis)
    axes.set_xlabel("memory of the loaded model (MB, logarithmic)")
    axes.set_ylabel("F1 (0 to 1)")
    handles = [style.handle(found, n) for n in names]
    handles.append(Line2D([], [], marker="o", ms=12, mfc="none", mec=LIGHT, linestyle="none", label="Pareto front"))
    if reported:
        handles.append(style.paper_handle(analysis, hollow=True))
    style.legend_below(figure, handles)
    return figure


def _dominates(a: str, b: str, size: dict, rows: dict) -> bool:
    """Whether a is at least as small (to 1%: what rounding to blocks makes) and as good as b, and better in one of the two."""
    smaller, better = size[a] < 0.99 * size[b], rows[a]["mean"] > rows[b]["mean"]
    return (smaller or better) and size[a] <= 1.01 * size[b] and rows[a]["mean"] >= rows[b]["mean"]


def fig2_bar_comparison(study, found: dict, analysis: dict):
    """F1 and exact match by configuration. Bars: all turns; vertical ticks: the last turn of each dialogue alone, which is what
    stock lm-eval scores and what the paper's values stand for."""
    rows = {metric: _means(found, analysis, metric) for metric in style.METRICS}
    names = list(found)
    figure, panels = style.new(1, 2, height=1.7 + 0.42 * len(names), sharey=True)
    y = np.arange(len(names))
    reported = last = False
    for axes, (metric, title) in zip(panels, style.METRICS.items()):
        top = 0.0
        for i, name in enumerate(names):
            row = rows[metric].get(name)
            hollow = style.paper(analysis, name, f"coqa_{metric}")
            turn = (style.mean(analysis.get("last_turn") or {}, name, metric) or {}).get("mean")
            if row is None:
                axes.text(0.01, i, _why(found, name), va="center", fontsize=8.5, color=LIGHT)
            else:
                axes.barh(i, row["mean"], height=0.58, color=style.look(found, name)[0], alpha=0.85)
                style.interval(
                    axes,
                    row["mean"],
                    i,
                    row,
                    "mean",
                    True,
                    color=DARK,
                    fmt="none",
                    elinewidth=1.3,
                    path_effects=style.OUTLINE,
                )
            if turn is not None:
                axes.plot([turn, turn], [i - 0.38, i + 0.38], color=DARK, linewidth=1.8, path_effects=style.OUTLINE)
                last = True
            if hollow is not None:
                axes.plot(hollow, i, marker="D", mec=DARK, mfc="white", linestyle="none")
                reported = True
            values = [v for v in ((row or {}).get("ci_high"), (row or {}).get("mean"), hollow, turn) if v is not None]
            top = max([top, *values])
            if row:
                # beside this study's own marks: behind the paper's it would read as the paper's value
                _bar_value(axes, i, row, max(v for v in values if v != hollow), style.look(found, name)[0])
        axes.set_xlim(0, top * 1.1 or 1)
        axes.set_title(title)
        axes.set_xlabel(f"{title} (0 to 1)")
        axes.grid(False, axis="y")
    panels[0].set_yticks(y, [style.wrap(style.label(found, n), 16) for n in names])
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    handles = [Patch(color=LIGHT, label="all turns, with interval")]
    if last:
        handles.append(
            Line2D([], [], marker="|", ms=11, mew=1.8, color=DARK, linestyle="none", label="last turns only")
        )
    if reported:
        handles.append(style.paper_handle(analysis))
    style.legend_below(figure, handles)
    return figure


def _bar_value(axes, i: int, row: dict, end: float, colour: str) -> None:
    """The mean, inside the bar where it has the room, else behind everything."""
    low = row["mean"] if row.get("ci_low") is None else row["ci_low"]
    inside = low > 0.35 * end
    x, shade = (0, style.ink(colour)) if inside else (end, DARK)
    axes.annotate(
        f"{row['mean']:.3f}", (x, i), (5, 0), textcoords="offset points", va="center", fontsize=9, color=shade
    )


def _why(found: dict, name: str) -> str:
    result = found[name].get("evaluation")
    if result is None:
        return "not evaluated"
    return style.shorten(f"{result.status}: {result.reason}" if result.status != "ok" else "not in the analysis", 42)


def fig3_nf4_vs_fp4(study, found: dict, analysis: dict):
    """The two 4-bit formats side by side. The last panel is the one that decides: the paired difference over the same questions,
    whose interval says whether their order is known."""
    names = [n for n in ("nf4", "fp4") if n in found]
    if len(names) < 2:
        raise Missing("NF4 and FP4 are not both among the configurations")
    figure, panels = style.new(1, 4, height=3.5, width=style.WIDTH)
    _pair_of_bars(
        panels[0],
        found,
        names,
        style.values_of(found, names, "benchmark", "memory.allocated_mb"),
        "memory (MB)",
        "{:,.0f}",
    )
    means = {n: style.mean(analysis, n, "f1") for n in names}
    _pair_of_bars(
        panels[1], found, names, {n: m["mean"] for n, m in means.items() if m}, "F1, all turns", "{:.3f}", means
    )
    perplexity = style.values_of(found, names, "fidelity", "perplexity.all.quantized")
    _pair_of_bars(panels[2], found, names, perplexity, "perplexity", "{:.2f}")
    axes = panels[3]
    row = style.difference(analysis, "fp4", "nf4", "f1")
    reported = [style.paper(analysis, n, "coqa_f1") for n in names]
    if row is None:
        style.note_in(axes, "F1 was not compared", 16)
    else:
        # points: F1 times 100
        style.interval(
            axes, 0, 100 * row["difference"], style.scaled(row, 100), "difference", False, color=DARK, marker="o"
        )
        values = [
            0.0,
            100 * row["difference"],
            *(100 * row[k] for k in ("ci_low", "ci_high") if row.get(k) is not None),
        ]
        if None not in reported:
            values.append(100 * (reported[0] - reported[1]))
            axes.plot(0.6, values[-1], marker="D", mfc="none", color=DARK)
        axes.axhline(0, color=LIGHT, linewidth=1)
        axes.set_xlim(-0.6, 1.2)
        axes.set_ylim(*style.room(values, 0.2))
        axes.set_xticks(
            [0, 0.6] if None not in reported else [0], ["here", "paper"] if None not in reported else ["here"]
        )
    axes.set_title(f"NF4 {style.MINUS} FP4 (F1, points)")
    return figure


def _pair_of_bars(axes, found, names, values: dict, title: str, form: str, rows: dict | None = None) -> None:
    axes.set_title(title)
    if not values:
        return style.note_in(axes, "not measured", 16)
    top = 0.0
    for i, name in enumerate(names):
        if name not in values:
            axes.text(i, 0, "not\nmeasured", ha="center", va="bottom", fontsize=8.5, color=LIGHT)
            continue
        axes.bar(i, values[name], width=0.62, color=style.look(found, name)[0], alpha=0.85)
        row = (rows or {}).get(name)
        if row:
            style.interval(
                axes, i, values[name], row, "mean", False, color=DARK, fmt="none", path_effects=style.OUTLINE
            )
        high = max(values[name], (row or {}).get("ci_high") or 0)
        axes.annotate(
            form.format(values[name]),
            (i, high),
            (0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
        )
        top = max(top, high)
    axes.set_ylim(0, top * 1.15 or 1)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xticks(range(len(names)), [style.label(found, n) for n in names])
    axes.grid(False, axis="x")
