"""The report on hardware: size, prefill, decode, throughput, the limit (see helpers.report)."""

import statistics

import pandas as pd

from helpers.analysis.evidence import (
    NotMeasured,
    beside_full,
    budget_is_known,
    paired_timings,
    timings,
    tokens_per_second_in,
)
from helpers.analysis.report_style import NONE, name_of, number, one


def _memory(n: dict) -> dict:
    return {name: data["memory"] for name, data in n["benchmark"].items()}


def size_table(n: dict) -> pd.DataFrame:
    memory, full = _memory(n), n["full"]
    rows = []
    for name, m in memory.items():
        base = memory.get(full)
        reported = n["paper"].get(name, {})

        def less(key, m=m, base=base, name=name):
            return NONE if base is None or name == full else f"{number(100 * (1 - m[key] / base[key]), 1)} %"

        rows.append(
            {
                "Configuration": name_of(n, name),
                "Reported footprint, MB": number(m["reported_footprint_mb"]),
                "Reduction": less("reported_footprint_mb"),
                "Really allocated, MB": number(m["allocated_mb"]),
                "Reduction ": less("allocated_mb"),
                "of which quantization state, MB": number(m.get("quantization_state_mb")),
                "Paper: MB": number(reported.get("model_size_mb")),
            }
        )
    return pd.DataFrame(rows)


def size_sentences(n: dict) -> list[str]:
    memory, full = _memory(n), n["full"]
    if full not in memory or "nf4" not in memory:
        return []
    a, b = memory[full], memory["nf4"]
    return [
        f"NF4 takes {number(b['allocated_mb'], 1)} MB where {name_of(n, full)} takes {number(a['allocated_mb'], 1)} MB: "
        f"{number(100 * (1 - b['allocated_mb'] / a['allocated_mb']), 1)} % less. The footprint that transformers reports leaves the "
        f"quantization state out, {number(b['quantization_state_mb'], 1)} MB."
    ]


def _spread(row: dict, unit: str) -> str:
    return f"{number(row[f'median_{unit}'])} ({number(row[f'q25_{unit}'])}–{number(row[f'q75_{unit}'])})"


def prefill_table(n: dict) -> pd.DataFrame:
    rows = []
    for name, data in n["benchmark"].items():
        for mode in dict.fromkeys(row["mode"] for row in data["prefill"]):
            cells = {f"{r['tokens']} tokens, ms": _spread(r, "ms") for r in data["prefill"] if r["mode"] == mode}
            reported = n["paper"].get(name, {}).get("prefill_ms", {}) if mode == "eager" else {}
            rows.append(
                {"Configuration": name_of(n, name), "Mode": mode}
                | cells
                | {f"Paper: {t}, ms": number(v, 1) for t, v in reported.items()}
            )
    return pd.DataFrame(rows)


def decode_table(n: dict) -> pd.DataFrame:
    rows = []
    for name, data in n["benchmark"].items():
        for mode in dict.fromkeys(row["mode"] for row in data["decode"]):
            mine = [r for r in data["decode"] if r["mode"] == mode]
            cells = {f"batch {r['batch']}, ms per token": _spread(r, "ms_per_token") for r in mine}
            reported = n["paper"].get(name, {}).get("decode_ms_per_token", {}).get("1") if mode == "eager" else None
            rows.append(
                {"Configuration": name_of(n, name), "Mode": mode} | cells | {"Paper: batch 1": number(reported, 1)}
            )
    return pd.DataFrame(rows)


def throughput_table(n: dict) -> pd.DataFrame:
    rows = []
    for name, data in n["benchmark"].items():
        for mode in dict.fromkeys(row["mode"] for row in data["decode"]):
            cells = {
                f"batch {r['batch']}": number(r["tokens_per_second"], 1) for r in data["decode"] if r["mode"] == mode
            }
            reported = n["paper"].get(name, {}).get("throughput_tokens_per_second", {}) if mode == "eager" else {}
            rows.append(
                {"Configuration": name_of(n, name), "Mode": mode}
                | cells
                | {f"Paper: batch {b}": number(v, 1) for b, v in reported.items()}
            )
    return pd.DataFrame(rows)


def _crossover(n: dict, name: str, mode: str) -> str:
    """From which measured batch size on every step takes longer than full precision's, and where it takes less."""
    try:
        shared = sorted(set(timings(n, name, "decode", mode)) & set(timings(n, n["full"], "decode", mode)))
    except NotMeasured:
        return NONE
    signs = [beside_full(n, name, "decode", mode, batch)[0] for batch in shared]
    slower = [batch for at, batch in enumerate(shared) if all(sign == 1 for sign in signs[at:])]
    faster = [str(batch) for batch, sign in zip(shared, signs, strict=True) if sign == -1]
    said = f"slower from batch {slower[0]}" if slower else f"not clearly slower at batch {shared[-1]}"
    return said + (f", faster at batch {', '.join(faster)}" if faster else "")


def _modes(n: dict) -> list[str]:
    return list(dict.fromkeys(row["mode"] for data in n["benchmark"].values() for row in data["decode"]))


def crossover_table(n: dict) -> pd.DataFrame:
    others = [name for name in n["benchmark"] if name != n["full"]] if n["full"] in n["benchmark"] else []
    return pd.DataFrame(
        [
            {"Configuration": name_of(n, name)} | {mode: _crossover(n, name, mode) for mode in _modes(n)}
            for name in others
        ]
    )


def _decode(n: dict, name: str, mode: str, batch: int, run: str = "benchmark") -> dict | None:
    rows = n.get(run, {}).get(name, {}).get("decode", [])
    return one([r for r in rows if r["mode"] == mode and r["batch"] == batch])


def _ratio(n: dict, mode: str, batch: int) -> str:
    """How many times as long NF4's step takes as full precision's, in every run that measured both."""
    said = [
        "within the spread of the samples" if _overlap(a, b) else f"{number(b[1] / a[1])} times"
        for a, b in paired_timings(n, "nf4", "decode", mode, batch)
    ]
    return said[0] + (f"; {said[1]} in a second run" if said[1:] else "")


def speed_sentences(n: dict) -> list[str]:
    """NF4 against full precision, per mode, at batch 1 and at the largest batch. Where the middle halves of both samples overlap, it
    says so: a virtual machine starts kernels at a pace of its own."""
    said, full = [], n["full"]
    for mode in ("eager", "cuda_graph", "compile"):
        batches = sorted({r["batch"] for r in n["benchmark"].get("nf4", {}).get("decode", []) if r["mode"] == mode})
        parts = []
        for batch in dict.fromkeys([*batches[:1], *batches[-1:]]):
            a, b = _decode(n, full, mode, batch), _decode(n, "nf4", mode, batch)
            if a and b:
                parts.append(
                    f"at batch {batch} {number(b['median_ms_per_token'])} ms against {number(a['median_ms_per_token'])} ms per step "
                    f"({_ratio(n, mode, batch)})"
                )
        if parts:
            where = {"cpu": "CPU", "cuda": "GPU"}[n["benchmark"]["nf4"]["device"]]
            said.append(
                f"Decoding with NF4 against {name_of(n, full)} on the {where}, mode {mode}: {', '.join(parts)}."
            )
    return said


def _apart(n: dict, part: str, mode: str) -> dict[tuple[str, int], float]:
    """(configuration, prompt length or batch size) -> how far apart the medians of the two runs are, per cent of the smaller."""
    found = {}
    for name in n.get("again", {}):
        try:
            first, second = (timings(n, name, part, mode, run) for run in ("benchmark", "again"))
        except NotMeasured:
            continue
        for size in sorted(set(first) & set(second)):
            low, high = sorted((first[size][1], second[size][1]))
            found[name, size] = 100 * (high / low - 1)
    return found


def repeat_table(n: dict) -> pd.DataFrame:
    rows = []
    for part, at in (("prefill", "tokens"), ("decode", "batch")):
        for mode in _modes(n):
            apart = _apart(n, part, mode)
            if not apart:
                continue
            name, size = max(apart, key=apart.get)
            rows.append(
                {
                    "": part.capitalize(),
                    "Mode": mode,
                    "Medians measured twice": len(apart),
                    "Half are no more apart than": f"{number(statistics.median(apart.values()), 1)} %",
                    "Largest": f"{number(apart[name, size], 1)} % ({name_of(n, name)}, {at} {size})",
                    "Within 3 %": f"{number(100 * sum(p <= 3 for p in apart.values()) / len(apart), 0)} %",
                }
            )
    return pd.DataFrame(rows)


def repeat_note(n: dict) -> str:
    if not n.get("again"):
        return "Measured once. make again measures a second time."
    return "Apart: the larger of the two medians over the smaller, less one."


def limit_table(n: dict) -> pd.DataFrame:
    """Decode against bytes over bandwidth: what a step must read, and the share of the measured copy bandwidth that it reaches."""
    rows = []
    for name, data in n["benchmark"].items():
        for row in data["decode"]:
            if row.get("limit_ms") is None:
                continue
            rows.append(
                {
                    "Configuration": name_of(n, name),
                    "Mode": row["mode"],
                    "Batch": row["batch"],
                    "Step, ms": number(row["median_ms_per_token"]),
                    "Must read, MB": number(row["bytes_per_step"] / 2**20, 1),
                    "Limit, ms": number(row["limit_ms"]),
                    "GB/s": number(row["achieved_gb_per_second"], 1),
                    "Of the bandwidth": f"{number(row['percent_of_bandwidth'], 1)} %",
                }
            )
    return pd.DataFrame(rows)


def _benchmark_rows(n: dict, part: str, digits: int, wanted=lambda row: True) -> pd.DataFrame:
    """A list of the benchmark's as it is, for all configurations, of the rows that are wanted; the keys become the headers."""
    rows = []
    for name, data in n["benchmark"].items():
        for row in filter(wanted, data.get(part) or []):
            cells = {
                k.replace("_", " "): number(v, digits) if isinstance(v, float) else v
                for k, v in row.items()
                if not isinstance(v, list)
            }
            rows.append({"Configuration": name_of(n, name)} | cells)
    return pd.DataFrame(rows)


def profile_table(n: dict) -> pd.DataFrame:
    return _benchmark_rows(n, "profile", 3)


def largest_batch_table(n: dict) -> pd.DataFrame:
    return _benchmark_rows(n, "largest_batch", 1, budget_is_known)


def capacity_sentence(n: dict) -> list[str]:
    """What the memory that NF4 frees buys: the largest batches of the smallest and the largest budget that both could use."""
    try:
        base, nf4 = (tokens_per_second_in(n, name) for name in (n["full"], "nf4"))
    except NotMeasured:
        return []
    shared = sorted(gib for gib in set(base) & set(nf4) if base[gib][1] and nf4[gib][1])
    parts = [
        f"in {number(gib, 0)} GiB {number(nf4[gib][1], 0)} tokens per second ({number(nf4[gib][0], 0)} rows) against "
        f"{number(base[gib][1], 0)} ({number(base[gib][0], 0)} rows), {number(nf4[gib][1] / base[gib][1])} times"
        for gib in dict.fromkeys([*shared[:1], *shared[-1:]])
    ]
    return (
        [f"Batches as large as a memory budget allows, NF4 against {name_of(n, n['full'])}: {'; '.join(parts)}."]
        if parts
        else []
    )


def _overlap(a: tuple, b: tuple) -> bool:
    """Whether the quartiles of two times (lower quartile, median, upper quartile) leave open which is faster."""
    return max(a[0], b[0]) <= min(a[2], b[2])


def fastest_sentence(n: dict) -> list[str]:
    """Every configuration's fastest mode at batch 1, fastest first; none on a CPU, which has one mode."""
    best = {}
    for name, data in n["benchmark"].items():
        rows = [r for r in data["decode"] if r["batch"] == 1]
        if rows and len({r["mode"] for r in rows}) > 1:
            best[name] = min(rows, key=lambda r: r["median_ms_per_token"])
    if len(best) < 2:
        return []
    parts, twice = [], False
    for name in sorted(best, key=lambda name: best[name]["median_ms_per_token"]):
        row = best[name]
        again = _decode(n, name, row["mode"], 1, "again")
        twice = twice or again is not None
        both = [number(r["median_ms_per_token"]) for r in (row, again) if r]
        parts.append(f"{name_of(n, name)} {' and '.join(dict.fromkeys(both))} ms ({row['mode']})")
    runs = " (both medians where two runs differ)" if twice else ""
    return [f"One step at batch 1 in each format's fastest mode{runs}: {', '.join(parts)}."]
