"""The paper's claims, each decided by a function of the results.

params/paper.yaml says what the paper claims and reports; here is how each claim is decided, and helpers/analysis/evidence.py says what
`results` holds. `judge(results)` returns a row a claim: id, section, about, claim, reported (the paper's numbers as text), verdict
("holds", "does not hold", "cannot be decided"), evidence (a sentence with this study's numbers) and scope (what else one has to know:
another model, another device; none if nothing). Whatever is missing gives "cannot be decided" and says what was not measured.

An interval decides: a claim holds if the whole interval agrees with it, does not hold if none of it does. Each is one question asked in
advance, so the interval is not adjusted; the evidence gives p adjusted over all comparisons. Times count as different if the
quartiles of their repeats do not overlap and the medians are more than SAME_TIME apart, the same way round in a second run if there is one.
"""

import numpy as np

from helpers import StudyError, params
from helpers.analysis.evidence import (
    NotMeasured,
    benchmark,
    beside_full,
    comparison,
    device,
    full,
    label,
    levels,
    noise_seeds,
    points,
    sentence,
    size_mb,
    stored_dtype,
    timings,
    tokens_per_second_in,
    weight_error,
    weights,
)

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be decided"

MATCH = 0.01  # F1: a loss below one point counts as none
SAME_SIZE = 0.01  # share: less is the allocator's rounding
UNIFORM = 1.01  # largest over smallest gap of a uniform grid
OPTIMAL = 1.01  # error over the smallest possible one
NORMAL = 0.02  # Kolmogorov-Smirnov distance: no more than 2% of the weights lie on the wrong side of any value
MOST = 0.9  # share of layers that "the weights" stands for
SURE = 0.95  # share of redraws


# The claims. Each takes (results, paper) and returns verdict and evidence, or raises NotMeasured.


def _of_reported_size(row: dict, reported: float) -> str:
    """Does the interval exclude zero on the reported side, and does it reach the reported size?"""
    near, far = (row["ci_low"], row["ci_high"]) if reported > 0 else (-row["ci_high"], -row["ci_low"])
    if far < abs(reported):
        return FAILS
    return HOLDS if near > 0 else OPEN


def _f1(paper: dict, b: str, a: str) -> float:
    return paper["configurations"][b]["coqa_f1"] - paper["configurations"][a]["coqa_f1"]


def nf4_beats_full(results, paper):
    row = comparison(results, "f1", full(results), "nf4")
    return _of_reported_size(row, _f1(paper, "nf4", "fp16")), sentence(results, row)


def nf4_matches_full(results, paper):
    row = comparison(results, "f1", full(results), "nf4")
    verdict = HOLDS if row["ci_low"] > -MATCH else FAILS if row["ci_high"] < -MATCH else OPEN
    return verdict, f"{sentence(results, row)}; a loss below {100 * MATCH:.0f} point counts as none"


def fp4_below_nf4(results, paper):
    row = comparison(results, "f1", "nf4", "fp4")
    return _of_reported_size(row, _f1(paper, "fp4", "nf4")), sentence(results, row)


def fp4_below_full(results, paper):
    row = comparison(results, "f1", full(results), "fp4")
    return HOLDS if row["ci_high"] < 0 else FAILS if row["ci_low"] > 0 else OPEN, sentence(results, row)


def nf4_pareto(results, paper):
    size = size_mb(results, "nf4", "allocated_mb")
    others = {
        name for row in results.get("comparisons") or [] if row["metric"] == "f1" for name in (row["a"], row["b"])
    } - {"nf4"}
    if not others:
        raise NotMeasured("F1 of NF4 and other configurations was not compared in this study")
    smaller = [n for n in sorted(others) if size_mb(results, n, "allocated_mb") < size * (1 - SAME_SIZE)]
    rows = [comparison(results, "f1", name, "nf4") for name in sorted(others)]
    better = [row["a"] for row in rows if row["ci_high"] < 0]
    if smaller or better:
        parts = [f"{label(results, n)} takes less memory" for n in smaller] + [
            f"{label(results, n)} has a higher F1" for n in better
        ]
        return FAILS, f"NF4 takes {size:.0f} MB; {', '.join(parts)}"
    unclear = [label(results, row["a"]) for row in rows if row["ci_low"] <= 0]
    if unclear:
        return (
            OPEN,
            f"nothing is smaller than NF4 ({size:.0f} MB), but its F1 is not clearly above that of {', '.join(unclear)}",
        )
    return HOLDS, f"nothing is smaller than NF4 ({size:.0f} MB), and its F1 is above that of all {len(rows)} others"


def fifty_give_direction(results, paper):
    designs = results.get("redraw") or []
    if not designs:
        raise NotMeasured("the design of 50 questions was not redrawn in this study")
    design = designs[0]
    shares, parts, why = [], [], "over all questions no interval excludes zero"
    for a, b in ((full(results), "nf4"), ("nf4", "fp4"), (full(results), "fp4")):
        found = next((row for row in design["comparisons"] if {row["a"], row["b"]} == {a, b}), None)
        if found is None:
            continue
        above, below = (
            (found["share_better"], found["share_worse"])
            if found["a"] == a
            else (found["share_worse"], found["share_better"])
        )
        parts.append(f"{label(results, b)} above {label(results, a)} in {above:.0%}")
        try:
            row = comparison(results, "f1", a, b)
        except NotMeasured as missing:
            why = str(missing)
            continue
        if row["ci_low"] > 0 or row["ci_high"] < 0:
            shares.append(above if row["ci_low"] > 0 else below)
    evidence = f"{design['draws']:,} redraws of {design['design']}: {', '.join(parts)}"
    if not shares:
        return OPEN, f"{evidence}; there is no direction to compare with: {why}"
    return HOLDS if min(
        shares
    ) >= SURE else FAILS, f"{evidence}; the direction of all questions comes out in {min(shares):.0%} or more"


def equal_size(results, paper):
    reported = [size_mb(results, name, "reported_footprint_mb") for name in ("nf4", "fp4")]
    allocated = [size_mb(results, name, "allocated_mb") for name in ("nf4", "fp4")]
    tensors = [size_mb(results, name, "tensors_mb") for name in ("nf4", "fp4")]
    rounded = abs(allocated[0] / allocated[1] - 1) <= SAME_SIZE
    same = abs(reported[0] - reported[1]) < 0.005 and abs(tensors[0] / tensors[1] - 1) < 0.001 and rounded
    text = f"NF4 and FP4 report {reported[0]:.2f} and {reported[1]:.2f} MB, and {allocated[0]:.2f} and {allocated[1]:.2f} MB are allocated"
    return HOLDS if same else FAILS, text


def size_reduction(results, paper):
    before, after = (size_mb(results, name, "reported_footprint_mb") for name in (full(results), "nf4"))
    real_before, real_after = (size_mb(results, name, "allocated_mb") for name in (full(results), "nf4"))
    text = f"reported {before:.2f} to {after:.2f} MB, {1 - after / before:.1%} smaller; allocated {real_before:.2f} to {real_after:.2f} MB, "
    verdict = HOLDS if abs(1 - after / before - paper["size_reduction"]) < 0.005 else FAILS
    return verdict, f"{text}{1 - real_after / real_before:.1%} smaller"


def footprint_is_memory(results, paper):
    parts, equal = [], []
    for name in ("nf4", "fp4"):
        reported, allocated = size_mb(results, name, "reported_footprint_mb"), size_mb(results, name, "allocated_mb")
        equal.append(abs(allocated / reported - 1) <= SAME_SIZE)
        parts.append(
            f"{label(results, name)} reports {reported:.2f} MB and takes {allocated:.2f} MB ({allocated / reported - 1:+.1%})"
        )
    return HOLDS if all(equal) else FAILS, "; ".join(parts)


def _time_claim(results, paper, part: str, reported_key: str):
    """Are both 4-bit formats slower in eager mode at every setting that the paper reports (none of them measured: at every one)?"""
    signs, parts = [], []
    base = timings(results, full(results), part, "eager")
    for name in ("nf4", "fp4"):
        mine = timings(results, name, part, "eager")
        shared = sorted(set(base) & set(mine))
        wanted = [x for x in shared if str(x) in paper["configurations"][name][reported_key]] or shared
        if not wanted:
            raise NotMeasured(
                f"{part} of {label(results, name)} was measured at none of {label(results, full(results))}'s settings"
            )
        found = [beside_full(results, name, part, "eager", x) for x in wanted]
        signs += [sign for sign, _ in found]
        unit = "tokens" if part == "prefill" else "batch"
        ratios = ", ".join(f"{ratio} at {unit} {x}" for x, (_, ratio) in zip(wanted, found, strict=True))
        parts.append(f"{label(results, name)} takes {ratios} times as long")
    verdict = FAILS if -1 in signs else HOLDS if all(signs) else OPEN
    return verdict, f"eager: {'; '.join(parts)}{_other_modes(results, part)}"


def _other_modes(results, part: str) -> str:
    texts = []
    for mode, text in (("cuda_graph", "CUDA graph"), ("compile", "torch.compile")):
        try:
            base, nf4 = (timings(results, name, part, mode) for name in (full(results), "nf4"))
        except NotMeasured:
            continue
        x = min(set(base) & set(nf4), default=None)
        if x is not None:
            texts.append(f"{text}: NF4 {beside_full(results, 'nf4', part, mode, x)[1]} at {x}")
    return "".join(f"; {text}" for text in texts)


def prefill_slower(results, paper):
    return _time_claim(results, paper, "prefill", "prefill_ms")


def decode_slower(results, paper):
    return _time_claim(results, paper, "decode", "decode_ms_per_token")


def throughput_lower(results, paper):
    return _time_claim(results, paper, "decode", "throughput_tokens_per_second")


def dequantization_is_the_cause(results, paper):
    """Without the launches of eager mode, is at least half of the slowdown still there?"""
    base, nf4 = (timings(results, name, "decode", "eager") for name in (full(results), "nf4"))
    if 1 not in base or 1 not in nf4:
        raise NotMeasured("decode at batch 1 was not measured in this study")
    sign, ratio = beside_full(results, "nf4", "decode", "eager", 1)
    if sign < 1:
        said = f"eager: {nf4[1][1]:.2f} ms a token, full precision {base[1][1]:.2f} ms, {ratio} times as long"
        return OPEN, f"NF4 is not clearly slower at batch 1 ({said})"
    try:
        quick_base, quick = (timings(results, name, "decode", "cuda_graph") for name in (full(results), "nf4"))
    except NotMeasured as missing:
        raise NotMeasured(f"the cause shows only where launches cost nothing: {missing}") from None
    shared = sorted(set(quick_base) & set(quick))
    if 1 not in shared:
        raise NotMeasured("decode at batch 1 under a CUDA graph was not measured in this study")
    lost, kept = nf4[1][1] - base[1][1], quick[1][1] - quick_base[1][1]
    largest = shared[-1]
    evidence = (
        f"batch 1: NF4 costs {lost:+.2f} ms a token in eager mode and {kept:+.2f} ms under a CUDA graph, which launches once"
        f"; at batch {largest} under a CUDA graph it takes {quick[largest][1] / quick_base[largest][1]:.2f} times as long"
    )
    return HOLDS if kept >= lost / 2 else FAILS, evidence


def batch_recovers(results, paper):
    base, nf4 = (tokens_per_second_in(results, name) for name in (full(results), "nf4"))
    won, parts = [], []
    for gib in sorted(set(base) & set(nf4)):
        (batch, rate), (other_batch, other) = nf4[gib], base[gib]
        if not rate and not other:
            continue
        won.append(rate >= other)
        texts = [
            f"{r:.0f} tokens/s at batch {b}" if r else "does not fit" for b, r in ((batch, rate), (other_batch, other))
        ]
        parts.append(f"{gib:g} GiB: NF4 {texts[0]}, full precision {texts[1]}")
    if not won:
        raise NotMeasured("the largest batch in a memory budget was not measured in this study")
    return HOLDS if any(won) else FAILS, "; ".join(parts)


def fp4_is_uniform(results, paper):
    fp4 = levels(results, "fp4")
    gaps = np.diff(fp4)
    text = f"{len(fp4)} different levels, neighbours {gaps.min():.4f} to {gaps.max():.4f} of the block's largest weight apart"
    return HOLDS if gaps.max() / gaps.min() <= UNIFORM else FAILS, text


def nf4_is_optimal(results, paper):
    nf4, best = weight_error(results, "nf4"), weight_error(results, "lloyd_max")
    text = f"NF4 {nf4:.5f} of the weights' squared size, the best 16 levels for them {best:.5f} ({nf4 / best - 1:+.1%})"
    for name in ("fp4", "uniform"):
        try:
            text += f"; {label(results, name)} {weight_error(results, name):.5f}"
        except NotMeasured:
            continue
    return HOLDS if nf4 <= best * OPTIMAL else FAILS, text


def weights_are_normal(results, paper):
    rows = [row for row in weights(results, "layers") if row.get("ks_distance") is not None]
    if not rows:
        raise NotMeasured("the layers' distance from a normal distribution was not measured in this study")
    distances = [row["ks_distance"] for row in rows]
    near = float(np.mean(np.array(distances) <= NORMAL))
    text = f"distance from a normal distribution (Kolmogorov-Smirnov) at most {NORMAL} in {near:.0%} of {len(rows)} layers, "
    text += f"median {np.median(distances):.3f}, largest {max(distances):.3f}"
    kurtosis = [row["excess_kurtosis"] for row in rows if row.get("excess_kurtosis") is not None]
    text += (
        f"; excess kurtosis in blocks: median {np.median(kurtosis):+.2f}, largest {max(kurtosis):+.2f}"
        if kurtosis
        else ""
    )
    return HOLDS if near >= MOST else FAILS, text


def noise_helps(results, paper):
    seeds = noise_seeds(results)

    def rows(key):
        return [row[key] for row in seeds if (row.get(key) or {}).get("ci_low") is not None]

    ppl, f1 = rows("log_ppl_ratio"), rows("f1")
    if not ppl and not f1:
        raise NotMeasured("no seed of the noise experiment has an interval")
    better = [bool(ppl) and all(r["ci_high"] < 0 for r in ppl), bool(f1) and all(r["ci_low"] > 0 for r in f1)]
    worse = [bool(ppl) and all(r["ci_low"] > 0 for r in ppl), bool(f1) and all(r["ci_high"] < 0 for r in f1)]
    parts = []
    if ppl:
        low, high = (np.exp(edge(r["difference"] for r in ppl)) for edge in (min, max))
        parts.append(f"perplexity {low:.3f} to {high:.3f} times full precision's")
    if f1:
        low, high = (edge(r["difference"] for r in f1) for edge in (min, max))
        parts.append(f"F1 {points(low)} to {points(high)} points")
    verdict = HOLDS if any(better) and not any(worse) else FAILS if any(worse) and not any(better) else OPEN
    return verdict, f"with Gaussian noise of NF4's size, {len(seeds)} seeds: {', '.join(parts)}"


def int8_cannot_run(results, paper):
    failed = [
        row
        for row in results.get("failures") or []
        if row["configuration"] == "int8" and "ops.cu" in (row.get("reason") or "")
    ]
    if failed:
        return HOLDS, f"it failed here: {failed[0]['reason']}"
    rows = benchmark(results, "int8", "decode")
    crash = results["benchmark"]["int8"].get("int8_limit") or {}
    if results["benchmark"]["int8"].get("device") != "cuda":
        raise NotMeasured("LLM.int8() ran here on a CPU, without the CUDA kernel that the paper blames")
    rule = (
        f"; the crash comes back beyond {crash['most_rows']:,} rows of {crash['columns']:,} columns"
        if crash.get("reproduced")
        else ""
    )
    return FAILS, f"it ran here on a GPU, up to batch {max(row['batch'] for row in rows)}{rule}"


def int8_is_fp8(results, paper):
    dtype = stored_dtype(results, "int8")
    return HOLDS if "float8" in dtype else FAILS, f"it stores its weights as {dtype}"


CLAIMS = {
    f.__name__: f
    for f in (
        nf4_beats_full, nf4_matches_full, fp4_below_nf4, fp4_below_full, nf4_pareto, fifty_give_direction, equal_size, size_reduction,
        footprint_is_memory, prefill_slower, decode_slower, throughput_lower, dequantization_is_the_cause, batch_recovers, fp4_is_uniform,
        nf4_is_optimal, weights_are_normal, noise_helps, int8_cannot_run, int8_is_fp8,
    )
}  # fmt: skip


def reported_numbers(paper: dict) -> dict[str, float]:
    """What the templates in paper.yaml may name; differences of F1 in points, reductions in per cent, times as ratios to full precision."""
    rows = paper["configurations"]
    numbers = {f"{name}_f1": row["coqa_f1"] for name, row in rows.items()} | {
        f"{name}_mb": row["model_size_mb"] for name, row in rows.items()
    }

    def ratio(key, at):
        return rows["nf4"][key][at] / rows["fp16"][key][at]

    return numbers | {
        "questions": paper["questions"],
        "nf4_gain": 100 * _f1(paper, "nf4", "fp16"),
        "fp4_to_nf4": 100 * _f1(paper, "fp4", "nf4"),
        "fp4_to_full": 100 * _f1(paper, "fp4", "fp16"),
        "reduction": 100 * paper["size_reduction"],
        "nf4_prefill": ratio("prefill_ms", "128"),
        "nf4_decode": ratio("decode_ms_per_token", "1"),
        "nf4_throughput": ratio("throughput_tokens_per_second", "1"),
    }


def scope(results: dict, paper: dict, about: str) -> str | None:
    """What to know beside a verdict before taking it for the paper's."""
    if about == "library":
        return None
    parts = []
    mine = results.get("is_paper_model", results.get("model") == paper["model"])
    if about == "hardware":
        mine = results.get("same_architecture") or mine
    if not mine:
        parts.append(
            f"{results.get('model', 'this model')}, not the paper's {results.get('paper_model') or paper['model']}"
        )
    if about != "hardware" and results.get("already_quantized"):
        parts.append(f"its full-precision weights had been quantized before ({results['already_quantized']})")
    if about == "hardware" and device(results):
        parts.append(f"measured on {device(results)}, in the paper on an {paper['device']}")
    return "; ".join(parts) or None


def judge(results: dict, paper: dict | None = None) -> list[dict]:
    """A row for each of the paper's claims, in its order. Raises StudyError if paper.yaml and this file don't name the same claims."""
    paper = params.read_paper() if paper is None else paper
    named = [entry["id"] for entry in paper["claims"]]
    if sorted(named) != sorted(CLAIMS):
        odd = ", ".join(sorted(set(named) ^ set(CLAIMS))) or "an id twice"
        raise StudyError(
            f"paper.yaml and helpers/analysis/claims.py differ in {odd}; give each claim one entry and one function"
        )
    numbers = reported_numbers(paper)
    rows = []
    for entry in paper["claims"]:
        try:
            verdict, evidence = CLAIMS[entry["id"]](results, paper)
        except NotMeasured as missing:
            verdict, evidence = OPEN, str(missing)
        reported = entry["reported"].format(**numbers)
        rows.append(
            entry
            | {
                "reported": reported,
                "verdict": verdict,
                "evidence": evidence,
                "scope": scope(results, paper, entry["about"]),
            }
        )
    return rows
