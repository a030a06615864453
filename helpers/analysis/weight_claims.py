"""Claims about the weights, and about bitsandbytes."""

import numpy as np
import pandas as pd
from scipy import stats

from helpers.analysis.evidence import FAILS, HOLDS, OPEN, PARTLY, Facts, NotMeasured, Verdict
from helpers.analysis.style import number, percent, points, times
from helpers.analysis.tables import dig

UNIFORM = 1.01  # largest over smallest gap of a uniform grid
OPTIMAL = 1.01  # error over the smallest possible one
DISTANCES = (0.01, 0.02, 0.03)  # Kolmogorov-Smirnov distances to show: no cut decides


def noise_helps(facts):
    rows = facts.f.noise
    rows = rows[rows.seed.notna()] if len(rows) else rows
    better, worse, parts = [], [], []
    for sign, low, high, value in ((-1, "ln_low", "ln_high", "ln_ratio"), (1, "f1_low", "f1_high", "f1")):
        known = rows[rows[low].notna()] if len(rows) else rows
        if len(known):
            better.append((known[low] > 0).all() if sign > 0 else (known[high] < 0).all())
            worse.append((known[high] < 0).all() if sign > 0 else (known[low] > 0).all())
            ends = known[value].min(), known[value].max()
            outer = known[low].min(), known[high].max()
            texts = [points(v) if sign > 0 else times(np.exp(v)) for v in (*ends, *outer)]
            what = f"{'F1 points' if sign > 0 else 'perplexity'} {texts[0]} to {texts[1]}"
            parts.append(f"{what} in {len(known)} draws (intervals from {texts[2]} to {texts[3]})")
    if parts and (reason := dig(facts.f.weights, "noise.f1_reason")):
        parts.append(f"F1 not scored ({reason})")
    if not parts:
        raise NotMeasured("noise on the weights was not tried in this study, or has no interval")
    verdict = HOLDS if any(better) and not any(worse) else FAILS if any(worse) and not any(better) else OPEN
    return Verdict(verdict, f"with noise of NF4's squared error, vs none: {', '.join(parts)}")


def fp4_is_uniform(facts):
    book = dig(facts.f.weights, "weights.codebooks.fp4")
    if not book:
        raise NotMeasured("FP4's levels were not read in this study")
    levels = np.unique(book["levels"])  # FP4 has a zero of either sign
    gaps = np.diff(levels)
    apart = f"{number(gaps.min(), 4)} to {number(gaps.max(), 4)}"
    text = f"{len(levels)} levels, neighbours {apart} of the block's largest weight apart"
    return Verdict(HOLDS if gaps.max() / gaps.min() <= UNIFORM else FAILS, text)


def _errors(facts: Facts, *names: str) -> list[float]:
    errors = facts.f.formats.relative_squared_error if len(facts.f.formats) else {}
    for name in names:
        if name not in errors or pd.isna(errors[name]):
            raise NotMeasured(f"the weight error of {facts.f.label(name)} was not measured in this study")
    return [float(errors[name]) for name in names]


def nf4_is_optimal(facts):
    nf4, best = _errors(facts, "nf4", "lloyd_max")
    more = f"{percent(nf4 / best - 1, signed=True)} on the best 16 levels for them ({number(best, 5)})"
    return Verdict(HOLDS if nf4 <= best * OPTIMAL else FAILS, f"squared error {number(nf4, 5)} of the weights', {more}")


def weights_are_normal(facts):
    """Is a layer farther from normal than its number of weights explains? What that costs NF4's levels is told."""
    layers = facts.f.layers.dropna(subset="ks_distance")
    if not len(layers):
        raise NotMeasured("the layers' distance from a normal distribution was not measured in this study")
    distances, confidence = layers.ks_distance, facts.f.study.statistics.confidence
    by_chance = stats.kstwobign.ppf(confidence) / np.sqrt(layers.weights)
    off = float((distances > by_chance).mean())
    near = ", ".join(f"{percent((distances <= d).mean(), 0)} at {d:g}" for d in DISTANCES)
    text = f"{percent(off, 0)} of {len(layers)} layers are farther from normal than chance (Kolmogorov-Smirnov, "
    text += f"{percent(confidence, 0)}), a verdict that many weights decide; the distance, 0 to 1, is "
    text += f"{number(distances.median(), 3)} in the median layer, at most {number(distances.max(), 3)}; "
    text += f"within a distance: {near}"
    try:
        gaussian, best = _errors(facts, "gaussian_lloyd_max", "lloyd_max")
        text += f"; 16 levels made for a normal distribution cost {percent(gaussian / best - 1, signed=True)} error"
    except NotMeasured as missing:
        text += f"; {missing}"
    verdict = FAILS if off > 0.5 else HOLDS if off <= 2 * (1 - confidence) else OPEN
    if (before := facts.f.study.model.already_quantized) and verdict == FAILS:
        verdict, text = OPEN, f"weights read from a file of few values ({before}) cannot be normal; {text}"
    return Verdict(verdict, text)


def int8_cannot_run(facts):
    runs = facts.f.runs
    runs = runs[(runs.configuration == "int8") & (runs.kind == "benchmark")]
    failed = [reason for reason in runs.reason.dropna() if "ops.cu" in reason]
    if failed:
        return Verdict(HOLDS, f"it failed here: {failed[0]}")
    done = runs[runs.status == "ok"]
    if done.empty:
        raise NotMeasured("02, which says on what LLM.int8() ran, was not run in this study")
    if done.gpu.isna().all():
        raise NotMeasured("LLM.int8() ran here on a CPU, without the CUDA kernel that the paper blames")
    rows = facts.f.times
    batches = rows[(rows.configuration == "int8") & (rows.phase == "decode")].batch
    text = f"it ran here on a GPU with bitsandbytes {done.bitsandbytes.iloc[0]}"
    text += f", up to batch {batches.max():,.0f}" if len(batches) else ""
    theirs = f"the paper had {facts.paper['bitsandbytes']}, on an {facts.paper['device']}"
    tried = facts.f.int8_limit
    crash, well = tried[tried.last_line.astype(str).str.contains("ops.cu")], tried[tried.exit_code == 0]
    if (tried.exit_code != 0).any() and (crash.empty or well.empty):
        return Verdict(OPEN, f"{text}; the crash was looked for and not told from another error; {theirs}")
    if crash.empty:
        return Verdict(FAILS, f"{text}; {theirs}")
    most, worked = (" x ".join(f"{n:,.0f}" for n in part[["rows", "columns"]].max()) for part in (crash, well))
    said = str(crash.last_line.iloc[0]).strip().rstrip(".")
    text += f"; the crash is real: one layer's output of {most} (2^31 elements) ends the process ({said})"
    return Verdict(PARTLY, f"{text}, of {worked} it does not; {theirs}")


def int8_is_fp8(facts):
    formats = facts.f.formats
    dtype = formats.dtype.get("int8") if len(formats) else None
    if dtype is None or pd.isna(dtype):
        raise NotMeasured("the data type of LLM.int8()'s weights was not recorded in this study")
    dtype = str(dtype).removeprefix("torch.")
    return Verdict(HOLDS if "float8" in dtype else FAILS, f"it stores its weights as {dtype}")
