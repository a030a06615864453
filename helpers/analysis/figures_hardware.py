"""Figures of what quantization does to memory and time, with the limits of the hardware that was measured."""

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from helpers.analysis import figures_style as style
from helpers.analysis.figures_style import DARK, LIGHT, Missing, dig

MODES = {"eager": "eager", "cuda_graph": "CUDA graph", "compile": "torch.compile"}


def _cells(found: dict, kind: str, key: str, value: str) -> dict[str, dict[str, list]]:
    """mode -> configuration -> rows of `prefill` or `decode` that were measured, by `key`."""
    modes: dict[str, dict[str, list]] = {}
    for name, rows in style.with_value(found, "benchmark", kind).items():
        for row in sorted((r for r in rows if r.get(value) is not None), key=lambda r: r[key]):
            modes.setdefault(row["mode"], {}).setdefault(name, []).append(row)
    if not modes:
        raise Missing(f"no {kind} time was measured")
    return {mode: modes[mode] for mode in sorted(modes, key=lambda m: [*MODES, m].index(m))}


def _curve(axes, found, name, x, median, low, high) -> None:
    """Median and quartiles. Every other configuration is drawn wide and behind the rest, so that none hides one that coincides."""
    colour, marker = style.look(found, name)
    narrow = (len(found) - list(found).index(name)) % 2
    width, size = (1.2, 5) if narrow else (2.6, 8)
    below, above = np.maximum(0, np.subtract(median, low)), np.maximum(0, np.subtract(high, median))
    shape = {"marker": marker, "markersize": size, "linewidth": width, "elinewidth": 1.2, "zorder": 3 if narrow else 2}
    axes.errorbar(x, median, yerr=[below, above], color=colour, **shape)


def _column(rows: list[dict], key: str) -> list[float]:
    return [np.nan if r.get(key) is None else r[key] for r in rows]


def _log_log(axes, x_values) -> None:
    style.log_axis(axes.xaxis, set(x_values))
    style.log_axis(axes.yaxis)


def fig4_throughput(study, found: dict, analysis: dict):
    """Tokens per second of decoding by batch size, one panel per way of running it (eager: as the paper did); both axes logarithmic.
    Error bars: quartiles."""
    modes = _cells(found, "decode", "batch", "median_ms_per_token")
    figure, panels = style.new(1, len(modes), height=4.2, sharey=True, squeeze=False)
    has_paper = False
    for axes, (mode, configurations) in zip(panels[0], modes.items()):
        for name, rows in configurations.items():
            rates = [[1e3 * r["batch"] / r[f"{q}_ms_per_token"] for r in rows] for q in ("median", "q75", "q25")]
            _curve(axes, found, name, _column(rows, "batch"), *rates)
        if mode == "eager":
            has_paper = _paper_points(axes, found, analysis, "throughput_tokens_per_second")
        _log_log(axes, {r["batch"] for rows in configurations.values() for r in rows})
        axes.set_title(MODES.get(mode, mode))
        axes.set_xlabel("batch size")
    panels[0, 0].set_ylabel("tokens per second")
    _legend(analysis, figure, found, modes, has_paper)
    return figure


def _legend(analysis, figure, found, modes, has_paper: bool, *more) -> None:
    names = [n for n in found if any(n in configurations for configurations in modes.values())]
    handles = [style.handle(found, n, line=True) for n in names] + list(more)
    if has_paper:
        handles.append(style.paper_handle(analysis, hollow=True))
    style.legend_below(figure, handles)


def _paper_points(axes, found, analysis, key: str) -> bool:
    """Hollow markers at the paper's values: {"1": value, ...} by batch size or length."""
    drawn = False
    for name in found:
        for x, value in (style.paper(analysis, name, key) or {}).items():
            colour, marker = style.look(found, name)
            axes.plot(
                float(x), value, marker=marker, color=colour, mfc="none", linestyle="none", markersize=6, zorder=4
            )
            drawn = True
    return drawn


def latency(study, found: dict, analysis: dict):
    """Time of prefill by prompt length (batch 1) and of one decoded token by batch size; all axes logarithmic. Error bars: quartiles.
    Dashed: what the hardware allows, from the bytes and operations of a step and the rates measured in the same run."""
    prefill = _cells(found, "prefill", "tokens", "median_ms")
    decode = _cells(found, "decode", "batch", "median_ms_per_token")
    panels = [("prefill", mode, cells) for mode, cells in prefill.items()] + [
        ("decode", mode, cells) for mode, cells in decode.items()
    ]
    figure, grid = style.new((len(panels) + 1) // 2, 2, height=1.0 + 2.9 * ((len(panels) + 1) // 2), squeeze=False)
    has_paper = has_limit = False
    drawn = {"prefill": [], "decode": []}
    for axes, (kind, mode, cells) in zip(grid.flat, panels):
        x, unit, title = (
            ("tokens", "ms", "prefill (ms)") if kind == "prefill" else ("batch", "ms_per_token", "decode step (ms)")
        )
        for name, rows in cells.items():
            _curve(
                axes, found, name, _column(rows, x), *(_column(rows, f"{q}_{unit}") for q in ("median", "q25", "q75"))
            )
            limits = _column(rows, "limit_ms")
            if not np.isnan(limits).all():
                axes.plot(_column(rows, x), limits, color=style.look(found, name)[0], linestyle="--", linewidth=0.9)
                has_limit = True
        if mode == "eager":
            has_paper |= _paper_points(
                axes, found, analysis, "prefill_ms" if kind == "prefill" else "decode_ms_per_token"
            )
        axes.set_title(f"{kind}: {MODES.get(mode, mode)}")
        axes.set_ylabel(title)
        axes.set_xlabel("prompt length (tokens)" if kind == "prefill" else "batch size")
        _log_log(axes, {row[x] for rows in cells.values() for row in rows})
        drawn[kind].append(axes)
    for group in drawn.values():  # the same scale for all modes, so that they can be compared by eye
        limits = [axes.get_ylim() for axes in group]
        for axes in group:
            axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
            style.log_axis(axes.yaxis)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    limit = [Line2D([], [], color=DARK, linestyle="--", linewidth=0.9, label="limit")] if has_limit else []
    _legend(analysis, figure, found, prefill | decode, has_paper, *limit)
    return figure


PARTS = {  # part -> legend, opacity, hatch
    "linear": ("weights of the linear layers, which methods quantize", 0.9, None),
    "weights": ("all weights and buffers", 0.9, None),
    "state": ("quantization state", 1.0, "////"),
    "rest": ("embeddings and norms, which stay as they are", 0.35, None),
}


def memory_parts(memory: dict) -> dict[str, float] | None:
    """MB of the parts of a loaded model, which add up to what is allocated: linear, state and rest; weights and state where the linear
    layers were not measured on their own; None without quantization state."""
    total, state, linear = (memory.get(f"{key}_mb") for key in ("allocated", "quantization_state", "linear_layers"))
    if total is None or state is None:
        return None
    if linear is None:
        return {"weights": total - state, "state": state}
    return {"linear": linear, "state": state, "rest": total - state - linear}


def fig5_memory_waterfall(study, found: dict, analysis: dict):
    """Memory of the loaded model by part: what shrinks, what quantization adds, and what stays as it is. Vertical ticks: the footprint that
    transformers reports, which leaves quantization state out."""
    found_parts = {n: memory_parts(m) for n, m in style.with_value(found, "benchmark", "memory").items()}
    found_parts = {n: parts for n, parts in found_parts.items() if parts}
    if not found_parts:
        raise Missing("the memory of the loaded model was not measured by part")
    totals = {n: sum(parts.values()) for n, parts in found_parts.items()}
    full = totals.get(style.full_precision(found))
    names = list(found_parts)
    figure, axes = style.new(height=1.6 + 0.5 * len(names))
    for i, name in enumerate(names):
        start, colour = 0.0, style.look(found, name)[0]
        for part, mb in found_parts[name].items():
            _, alpha, hatch = PARTS[part]
            face = "white" if hatch else colour
            axes.barh(
                i, mb, left=start, height=0.6, color=face, edgecolor=colour, alpha=alpha, hatch=hatch, linewidth=0.8
            )
            start += mb
        footprint = dig(found[name]["benchmark"].data, "memory.reported_footprint_mb")
        if footprint is not None:
            axes.plot([footprint] * 2, [i - 0.4, i + 0.4], color=DARK, linewidth=1.6)
        less = style.signed(100 * (totals[name] / full - 1), " ({:+.1f}%)") if full and totals[name] != full else ""
        axes.text(start, i, f"  {totals[name]:,.1f}{less}", va="center", fontsize=9)
    axes.set_xlim(0, max(totals.values()) * 1.22)
    axes.set_yticks(range(len(names)), [style.wrap(style.label(found, n), 18) for n in names])
    axes.set_ylim(len(names) - 0.5, -0.6)
    axes.set_xlabel("memory (MB)")
    axes.grid(False, axis="y")
    shown = [PARTS[p] for p in PARTS if any(p in parts for parts in found_parts.values())]
    handles = [
        Patch(facecolor="white" if hatch else LIGHT, edgecolor=DARK, alpha=alpha, hatch=hatch, label=text)
        for text, alpha, hatch in shown
    ]
    handles.append(Line2D([], [], color=DARK, marker="|", ms=11, mew=1.6, linestyle="none", label="reported footprint"))
    style.legend_below(figure, handles, 2)
    return figure


def roofline(study, found: dict, analysis: dict):
    """Operations per second of decoding against operations per byte read; both axes logarithmic. Lines: what the copy bandwidth and the
    matmul rate measured in the same run allow. Operations: two per parameter and row; attention, little at these lengths, is left out. A
    configuration's points are its batch sizes, smallest at the left, in its fastest mode."""
    roofs = style.with_value(found, "benchmark", "hardware")
    bandwidth = max((h.get("copy_bandwidth_gb_per_second") or 0) for h in roofs.values())
    rate = max((h.get("matmul_tflops") or 0) for h in roofs.values())
    if not bandwidth or not rate:
        raise Missing("copy bandwidth and matmul rate were not both measured")
    parameters = style.with_value(found, "benchmark", "loading.parameters")
    best: dict[str, list] = {}
    for mode, configurations in _cells(found, "decode", "batch", "median_ms_per_token").items():
        for name, rows in configurations.items():
            rows = [
                r | {"mode": mode, "flops": 2 * parameters[name] * r["batch"]}
                for r in rows
                if r.get("bytes_per_step") and name in parameters
            ]
            if rows and (name not in best or rows[0]["median_ms_per_token"] < best[name][0]["median_ms_per_token"]):
                best[name] = rows
    if not best:
        raise Missing("the bytes of a decode step are not in the results")
    figure, axes = style.new(height=4.6)
    intensity = {n: [r["flops"] / r["bytes_per_step"] for r in rows] for n, rows in best.items()}
    ridge = rate * 1e3 / bandwidth
    low = min(min(x) for x in intensity.values()) / 2
    x = np.array([low, ridge, max(ridge, *(max(v) for v in intensity.values())) * 3])
    axes.plot(x, np.minimum(x * bandwidth / 1e3, rate), color=DARK, linewidth=1.6)
    axes.annotate(f"copy: {style.three(bandwidth)} GB/s", (np.sqrt(low * ridge), np.sqrt(low * ridge) * bandwidth / 1e3), (-8, 6),
                  textcoords="offset points", ha="right", fontsize=9)  # fmt: skip
    axes.annotate(
        f"matmul: {style.plain(float(f'{rate:.3g}'))} TFLOP/s",
        (ridge, rate),
        (0, 5),
        textcoords="offset points",
        ha="center",
        fontsize=9,
    )
    for name, rows in best.items():
        reached = [r["flops"] / r["median_ms_per_token"] / 1e9 for r in rows]  # per ms: 1e-9 of tera per s
        _curve(axes, found, name, intensity[name], reached, reached, reached)
    style.log_axis(axes.xaxis)
    style.log_axis(axes.yaxis)
    axes.set_ylim(top=rate * 3)
    axes.set_xlabel("operations per byte read (FLOP/B)")
    axes.set_ylabel("operations per second (TFLOP/s)")
    handles = [style.handle(found, n, line=True) for n in best]
    for h, rows in zip(handles, best.values()):
        first, last = rows[0]["batch"], rows[-1]["batch"]
        sizes = f"batch {first} to {last}" if last != first else f"batch {first}"
        h.set_label(f"{h.get_label()}: {MODES.get(rows[0]['mode'], rows[0]['mode'])}, {sizes}")
    style.legend_below(figure, handles, 2)
    return figure
