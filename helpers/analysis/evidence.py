"""Where the claims find their numbers: all that they know of the results' layout.

`results` is a dict. Whatever is missing gives "cannot be decided" and says what was not measured.

    model, paper_model      names; is_paper_model: bool; already_quantized: text or none; same_architecture: bool (none: is_paper_model)
    full                    name of the full-precision configuration (none: fp16); labels: configuration -> what to call it
    confidence              of the intervals (none: 0.95)
    comparisons             rows of statistics.compare_all on all questions, metrics f1 and em
    redraw                  list of redraw.redraw results; the first is used
    benchmark               configuration -> {"device": "cpu" or "cuda",
                                "memory": {"reported_footprint_mb", "allocated_mb", "tensors_mb"},
                                "prefill": rows of mode, tokens, median_ms, q25_ms, q75_ms,
                                "decode": rows of mode, batch, median_ms_per_token, q25_..., q75_..., tokens_per_second,
                                "largest_batch": rows of budget_gib, batch, tokens_per_second, and if it was tried predicted_batch,
                                    allocated_before_mb,
                                "int8_limit": int8_limit.reproduce's}
    again                   the same of a second run (none: there was none); only prefill and decode are looked at
    weights                 {"codebooks": name -> 16 levels, or {"levels": 16 levels},
                             "formats": name -> {"relative_squared_error", "dtype" of the stored weights}; names nf4, fp4, uniform,
                                 int8, lloyd_max (the best 16 levels for these weights at this block size),
                             "layers": rows of layer, ks_distance, excess_kurtosis (helpers.weights)}
    noise                   {"seeds": rows of seed, log_ppl_ratio, f1}, each a row with difference, ci_low, ci_high (perturbed minus full)
    failures                rows of configuration, kind, reason

weights and noise are also found inside `fidelity` (configuration -> data).
"""

import numpy as np

SAME_TIME = 0.03  # share: a smaller difference of medians counts as none
LABELS = {
    "fp16": "FP16",
    "nf4": "NF4",
    "fp4": "FP4",
    "int8": "LLM.int8()",
    "lloyd_max": "Lloyd-Max",
    "uniform": "a uniform grid",
}


class NotMeasured(Exception):
    """What a verdict would need and the results don't have."""


def full(results: dict) -> str:
    return results.get("full") or "fp16"


def label(results: dict, name: str) -> str:
    return (results.get("labels") or {}).get(name) or LABELS.get(name, name)


def comparison(results: dict, metric: str, a: str, b: str) -> dict:
    """b minus a, whichever way round the results have it. Raises NotMeasured if there is none, or no interval."""
    for row in results.get("comparisons") or []:
        if row["metric"] == metric and {row["a"], row["b"]} == {a, b}:
            if row.get("ci_low") is None:
                raise NotMeasured(row.get("reason") or "no interval")
            if row["a"] == a:
                return row
            turned = {
                "a": a,
                "b": b,
                "mean_a": row["mean_b"],
                "mean_b": row["mean_a"],
                "difference": -row["difference"],
            }
            return row | turned | {"ci_low": -row["ci_high"], "ci_high": -row["ci_low"]}
    raise NotMeasured(f"{metric.upper()} of {label(results, a)} and {label(results, b)} was not compared in this study")


def benchmark(results: dict, name: str, part: str, run: str = "benchmark"):
    """`memory`, `prefill`, `decode` or `largest_batch` of one configuration, in a run ("again": the second). Raises NotMeasured."""
    value = ((results.get(run) or {}).get(name) or {}).get(part)
    if not value:
        raise NotMeasured(f"{part} of {label(results, name)} was not measured in this study")
    return value


def size_mb(results: dict, name: str, which: str) -> float:
    value = benchmark(results, name, "memory").get(which)
    if value is None:
        raise NotMeasured(f"{which} of {label(results, name)} was not measured in this study")
    return value


def timings(
    results: dict, name: str, part: str, mode: str, run: str = "benchmark"
) -> dict[int, tuple[float, float, float]]:
    """Prompt length or batch size -> lower quartile, median, upper quartile (ms, or ms per token). Raises NotMeasured."""
    key, unit = ("tokens", "ms") if part == "prefill" else ("batch", "ms_per_token")
    rows = [
        row
        for row in benchmark(results, name, part, run)
        if row["mode"] == mode and row.get(f"median_{unit}") is not None
    ]
    if not rows:
        raise NotMeasured(f"{part} of {label(results, name)} in mode {mode} was not measured in this study")
    return {row[key]: tuple(row[f"{q}_{unit}"] for q in ("q25", "median", "q75")) for row in rows}


def _sign(a: tuple, b: tuple) -> int:
    """1 if b takes longer than a (quartile, median, quartile), -1 if it takes less, 0 if that is not clear."""
    if b[0] > a[2] and b[1] > a[1] * (1 + SAME_TIME):
        return 1
    return -1 if b[2] < a[0] and b[1] < a[1] * (1 - SAME_TIME) else 0


def paired_timings(results: dict, name: str, part: str, mode: str, x: int) -> list[tuple[tuple, tuple]]:
    """(full precision's, a configuration's) times at x, as `timings` gives them, of every run that measured both; this one comes first.
    Raises NotMeasured or KeyError if this one did not."""
    found = []
    for run in ("benchmark", "again"):
        try:
            found.append(tuple(timings(results, who, part, mode, run)[x] for who in (full(results), name)))
        except (NotMeasured, KeyError):
            if run == "benchmark":
                raise
    return found


def beside_full(results: dict, name: str, part: str, mode: str, x: int) -> tuple[int, str]:
    """1 if a configuration takes longer than full precision, -1 if it takes less, 0 if that is not clear or a second run disagrees; and how
    many times as long, as text."""
    pairs = paired_timings(results, name, part, mode, x)
    signs = {_sign(a, b) for a, b in pairs}
    return signs.pop() if len(signs) == 1 else 0, " and again ".join(f"{b[1] / a[1]:.2f}" for a, b in pairs)


def weights(results: dict, part: str):
    """`codebooks`, `formats` or `layers`; full precision's analysis comes before the other configurations'. Raises NotMeasured."""
    fidelity = results.get("fidelity") or {}
    sources = [
        results.get("weights"),
        (fidelity.get(full(results)) or {}).get("weights"),
        *((d or {}).get("weights") for d in fidelity.values()),
    ]
    found = [source[part] for source in sources if source and source.get(part)]
    if not found:
        raise NotMeasured(f"the weights' {part} were not measured in this study")
    if isinstance(found[0], list):
        return found[0]
    return {name: value for mapping in reversed(found) for name, value in mapping.items()}


def noise_seeds(results: dict) -> list[dict]:
    sources = [results.get("noise"), *((d or {}).get("noise") for d in (results.get("fidelity") or {}).values())]
    found = next((source["seeds"] for source in sources if source and source.get("seeds")), None)
    if not found:
        raise NotMeasured("noise on the weights was not tried in this study")
    return found


def levels(results: dict, name: str) -> np.ndarray:
    book = weights(results, "codebooks").get(name)
    if book is None:
        raise NotMeasured(f"the levels of {label(results, name)} were not read in this study")
    return np.unique(book["levels"] if isinstance(book, dict) else book)  # FP4 has a zero of either sign


def weight_error(results: dict, name: str) -> float:
    value = weights(results, "formats").get(name, {}).get("relative_squared_error")
    if value is None:
        raise NotMeasured(f"the weight error of {label(results, name)} was not measured in this study")
    return value


def stored_dtype(results: dict, name: str) -> str:
    value = weights(results, "formats").get(name, {}).get("dtype")
    if value is None:
        raise NotMeasured(f"the data type of {label(results, name)}'s weights was not recorded in this study")
    return str(value).removeprefix("torch.")


def budget_is_known(row: dict) -> bool:
    """Whether a row of largest_batch, if the budget was tried, says what already lay in memory; else nobody knows how large it was."""
    return "allocated_before_mb" in row or "predicted_batch" not in row


def tokens_per_second_in(results: dict, name: str) -> dict[float, tuple[int, float]]:
    """Memory budget (GiB) -> largest batch that was found to fit and its tokens per second, (0, 0.0) if none did. Raises NotMeasured."""
    rows = benchmark(results, name, "largest_batch")
    if not all(map(budget_is_known, rows)):
        raise NotMeasured(
            f"what already lay in memory before {label(results, name)}'s largest batches was not recorded: measure them again"
        )
    return {
        row["budget_gib"]: (row["batch"], row.get("tokens_per_second") or 0.0)
        for row in rows
        if row.get("tokens_per_second") or "predicted_batch" in row  # else the budget was not tried
    }


def device(results: dict) -> str | None:
    return next(
        (data["device"] for data in (results.get("benchmark") or {}).values() if data and data.get("device")), None
    )


def points(value: float) -> str:
    return f"{100 * value:+.1f}"


def sentence(results: dict, row: dict) -> str:
    p = row.get("p_holm") if row.get("p_holm") is not None else row.get("p")
    extra = [f"{row['n_questions']:,} questions of {row['n_dialogues']} dialogues"]
    extra += [f"adjusted p {p:.2g}"] if p is not None else []
    extra += (
        [f"so many dialogues find {100 * row['detectable']:.1f} points"] if row.get("detectable") is not None else []
    )
    return (
        f"{label(results, row['b'])} minus {label(results, row['a'])}: {points(row['difference'])} {row['metric'].upper()} points, "
        f"{results.get('confidence', 0.95):.0%} interval {points(row['ci_low'])} to {points(row['ci_high'])} ({'; '.join(extra)})"
    )
