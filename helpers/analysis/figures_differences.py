"""Figures of differences: between configurations, against full precision, and in redraws of 50 questions."""

import numpy as np
from matplotlib.lines import Line2D

from helpers.analysis import figures_style as style
from helpers.analysis.figures_style import DARK, LIGHT, Missing


def differences(study, found: dict, analysis: dict):
    """Paired differences between configurations over the same questions, in points (score times 100). Filled: still significant at 5%
    after Holm's adjustment over all comparisons; hollow: not."""
    pairs = [
        (r["a"], r["b"])
        for r in analysis.get("comparisons", [])
        if r["metric"] == "f1" and r.get("difference") is not None
    ]
    if not pairs:
        raise Missing("the analysis holds no comparisons of two evaluated configurations")
    figure, panels = style.new(1, 2, height=1.6 + 0.27 * len(pairs), sharey=True)
    for axes, (metric, title) in zip(panels, style.METRICS.items()):
        for i, (a, b) in enumerate(pairs):
            row = style.difference(analysis, a, b, metric)
            if row is None:
                continue
            sure = row.get("p_holm") is not None and row["p_holm"] < 0.05
            colour, marker = style.look(found, b)
            fill = {} if sure else {"mfc": "white"}
            style.interval(
                axes,
                100 * row["difference"],
                i,
                style.scaled(row, 100),
                "difference",
                True,
                color=colour,
                marker=marker,
                **fill,
            )
            hollow = [style.paper(analysis, n, f"coqa_{metric}") for n in (a, b)]
            if None not in hollow:
                axes.plot(100 * (hollow[1] - hollow[0]), i, marker="D", ms=5, color=LIGHT, mfc="none")
        axes.axvline(0, color=DARK, linewidth=0.9)
        axes.margins(x=0.08)
        axes.set_title(title)
        axes.set_xlabel(f"difference in {title} (points)")
    panels[0].set_yticks(
        range(len(pairs)), [f"{style.label(found, b)} {style.MINUS} {style.label(found, a)}" for a, b in pairs]
    )
    panels[0].set_ylim(len(pairs) - 0.5, -0.5)
    handles = [
        Line2D([], [], marker="o", color=DARK, linestyle="none", label="p < 0.05, adjusted"),
        Line2D([], [], marker="o", color=DARK, mfc="white", linestyle="none", label="not significant"),
    ]
    if any(style.paper(analysis, n, "coqa_f1") is not None for n in found):
        handles.append(
            Line2D(
                [], [], marker="D", ms=5, color=LIGHT, mfc="none", linestyle="none", label=style.paper_label(analysis)
            )
        )
    style.legend_below(figure, handles)
    return figure


def redraw_designs(analysis: dict) -> list[dict]:
    """The results of `helpers.redraw`, one per design."""
    kept = analysis.get("redraw") or []
    designs = [d for d in ([kept] if isinstance(kept, dict) else kept) if d.get("comparisons")]
    if not designs:
        raise Missing("the paper's 50-question design was not redrawn; it takes at least two evaluated configurations")
    return designs


def redraw(study, found: dict, analysis: dict):
    """What would 50 questions have said? The paper's design, redrawn many times from this study's full result: the difference in F1 that
    each redraw would have reported. Darker bars: the sign is the other way round than over all questions."""
    designs = redraw_designs(analysis)
    pairs: list[tuple[str, str]] = []
    for row in designs[0]["comparisons"]:
        if (row["b"], row["a"]) not in pairs:  # the other way round, it is the same picture
            pairs.append((row["a"], row["b"]))
    figure, grid = style.new(len(pairs), len(designs), height=0.6 + 2.15 * len(pairs), squeeze=False, sharex=True)
    has_paper = False
    for column, design in enumerate(designs):
        rows = {(row["a"], row["b"]): row for row in design["comparisons"]}
        for axes, row in zip(grid[:, column], (rows[pair] for pair in pairs)):
            edges, counts = 100 * np.array(row["histogram"]["edges"]), np.array(row["histogram"]["counts"])
            share = 100 * counts / counts.sum()
            centres, truth = (edges[1:] + edges[:-1]) / 2, 100 * row["difference"]
            colour = style.look(found, row["b"])[0]
            axes.bar(centres, share, width=np.diff(edges), color=colour, alpha=0.4)
            against = centres * truth < 0
            axes.bar(centres[against], share[against], width=np.diff(edges)[against], color=colour)
            axes.axvline(0, color=DARK, linewidth=0.8)
            axes.axvline(truth, color=DARK, linewidth=1.4, linestyle="--")
            reported = [style.paper(analysis, row[k], "coqa_f1") for k in "ab"]
            if None not in reported:
                axes.plot(
                    100 * (reported[1] - reported[0]), 0, marker="D", mfc="white", mec=DARK, clip_on=False, zorder=5
                )
                has_paper = True
            better = f"{style.label(found, row['b'])} above {style.label(found, row['a'])} in {100 * row['share_better']:.3g}% of redraws"
            axes.set_title(better + (f"\n{style.wrap(design['design'], 44)}" if axes is grid[0, column] else ""))
            axes.margins(x=0.04)
            axes.set_ylim(0, share.max() * 1.1)
            if column == 0:
                axes.set_ylabel("redraws (%)")
        grid[-1, column].set_xlabel("difference in F1 (points)")
    handles = [Line2D([], [], color=DARK, linestyle="--", label="over all questions of the design")]
    if has_paper:
        handles.append(style.paper_handle(analysis))
    style.legend_below(figure, handles)
    return figure


def fig6_summary_metrics(study, found: dict, analysis: dict):
    """Everything against full precision, at a glance: compression of the loaded model, paired difference in F1, ratio of perplexities,
    and ratio of decode times (batch 1, eager). Dashed: no difference."""
    full = style.full_precision(found)
    names = [n for n in found if n != full]
    if full is None or not names:
        raise Missing("full precision and at least one other configuration are needed")
    panels_data = [
        ("compression (times)\nlarger is smaller memory", 1.0, "{:.2f}", _compression(found, full)),
        ("F1 (points)\nright is better", 0.0, "{:+.1f}", _f1_rows(analysis, names, full)),
        ("perplexity ratio\nright is worse", 1.0, "{:.3f}", _perplexity_rows(found, names)),
        ("decode time ratio\nright is slower", 1.0, "{:.2f}", _decode_rows(found, names, full)),
    ]
    if not any(rows for *_, rows in panels_data):
        raise Missing("nothing was measured that can be compared with full precision")
    figure, panels = style.new(1, 4, height=1.5 + 0.45 * len(names), sharey=True)
    for axes, (title, same, form, rows) in zip(panels, panels_data):
        axes.set_title(title, fontsize=9.5)
        axes.axvline(same, color=LIGHT, linestyle="--", linewidth=1)
        values = [same]
        for i, name in enumerate(names):
            if name not in rows:
                axes.text(
                    0.5,
                    i,
                    "not measured",
                    transform=axes.get_yaxis_transform(),
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color=LIGHT,
                )
                continue
            row, (colour, marker) = rows[name], style.look(found, name)
            style.interval(axes, row["mean"], i, row, "mean", True, color=colour, marker=marker)
            axes.annotate(
                style.signed(row["mean"], form),
                (row["mean"], i),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                path_effects=style.OUTLINE,
            )
            values += [v for v in (row["mean"], row.get("ci_low"), row.get("ci_high")) if v is not None]
        axes.set_xlim(*style.room(values, 0.22))
        axes.grid(False, axis="y")
        axes.locator_params(axis="x", nbins=4)
    panels[0].set_yticks(range(len(names)), [style.wrap(style.label(found, n), 16) for n in names])
    panels[0].set_ylim(len(names) - 0.5, -0.7)
    return figure


def _compression(found, full) -> dict:
    size = style.values_of(found, found, "benchmark", "memory.allocated_mb")
    return {n: {"mean": size[full] / mb} for n, mb in size.items() if n != full} if full in size else {}


def _f1_rows(analysis, names, full) -> dict:
    rows = {n: style.difference(analysis, full, n, "f1") for n in names}
    return {n: style.scaled(row | {"mean": row["difference"]}, 100) for n, row in rows.items() if row}


def _perplexity_rows(found, names) -> dict:
    """Ratio with its interval, from ln(PPL ratio)."""
    rows = {}
    for name, perplexity in style.values_of(found, names, "fidelity", "perplexity").items():
        if row := style.log_ratio({"perplexity": perplexity}):
            ends = {k: None if row.get(k) is None else float(np.exp(row[k])) for k in ("ci_low", "ci_high")}
            rows[name] = {"mean": float(np.exp(row["difference"]))} | ends
    return rows


def _decode_rows(found, names, full) -> dict:
    """Ratio of medians; as its spread, the quartiles of one over the median of the other."""
    cells = {}
    for name, rows in style.values_of(found, found, "benchmark", "decode").items():
        for row in rows:
            if (row.get("mode"), row.get("batch")) == ("eager", 1) and row.get("median_ms_per_token"):
                cells[name] = row
    if full not in cells:
        return {}
    base = cells[full]["median_ms_per_token"]
    keys = {"mean": "median_ms_per_token", "ci_low": "q25_ms_per_token", "ci_high": "q75_ms_per_token"}
    return {n: {k: cells[n][key] / base for k, key in keys.items()} for n in names if n in cells}
