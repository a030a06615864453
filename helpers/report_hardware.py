"""The report on hardware: size, prefill, decode, throughput, the limit (see helpers.report)."""

import pandas as pd

from helpers.evidence import budget_is_known
from helpers.report_style import NONE, name_of, number, one


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
        f"{number(100 * (1 - b['allocated_mb'] / a['allocated_mb']), 1)} % less. The footprint that transformers reports leaves "
        f"{number(b['allocated_mb'] - b['reported_footprint_mb'], 1)} MB of that out."
    ]


def _spread(row: dict, unit: str) -> str:
    return f"{number(row[f'median_{unit}'])} ({number(row[f'q25_{unit}'])}–{number(row[f'q75_{unit}'])})"


def prefill_table(n: dict) -> pd.DataFrame:
    rows = []
    for name, data in n["benchmark"].items():
        for mode in dict.fromkeys(row["mode"] for row in data["prefill"]):
            cells = {f"{r['tokens']} tokens, ms": _spread(r, "ms") for r in data["prefill"] if r["mode"] == mode}
            reported = n["paper"].get(name, {}).get("prefill_ms", {})
            rows.append(
                {"Configuration": name_of(n, name), "Mode": mode} | cells | {f"Paper: {t}, ms": number(v, 1) for t, v in reported.items()}
            )
    return pd.DataFrame(rows)


def decode_table(n: dict) -> pd.DataFrame:
    rows = []
    for name, data in n["benchmark"].items():
        for mode in dict.fromkeys(row["mode"] for row in data["decode"]):
            mine = [r for r in data["decode"] if r["mode"] == mode]
            cells = {f"batch {r['batch']}, ms per token": _spread(r, "ms_per_token") for r in mine}
            reported = n["paper"].get(name, {}).get("decode_ms_per_token", {}).get("1") if mode == "eager" else None
            rows.append({"Configuration": name_of(n, name), "Mode": mode} | cells | {"Paper: batch 1": number(reported, 1)})
    return pd.DataFrame(rows)


def throughput_table(n: dict) -> pd.DataFrame:
    rows = []
    for name, data in n["benchmark"].items():
        for mode in dict.fromkeys(row["mode"] for row in data["decode"]):
            cells = {f"batch {r['batch']}": number(r["tokens_per_second"], 1) for r in data["decode"] if r["mode"] == mode}
            reported = n["paper"].get(name, {}).get("throughput_tokens_per_second", {}) if mode == "eager" else {}
            rows.append(
                {"Configuration": name_of(n, name), "Mode": mode} | cells | {f"Paper: batch {b}": number(v, 1) for b, v in reported.items()}
            )
    return pd.DataFrame(rows)


def _decode(n: dict, name: str, mode: str, batch: int) -> dict | None:
    rows = n["benchmark"].get(name, {}).get("decode", [])
    return one([r for r in rows if r["mode"] == mode and r["batch"] == batch])


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
                ratio = f"{number(b['median_ms_per_token'] / a['median_ms_per_token'])} times"
                parts.append(
                    f"at batch {batch} {number(b['median_ms_per_token'])} ms against {number(a['median_ms_per_token'])} ms per step "
                    f"({'within the spread of the samples' if _overlap(a, b) else ratio})"
                )
        if parts:
            where = {"cpu": "CPU", "cuda": "GPU"}[n["benchmark"]["nf4"]["device"]]
            said.append(f"Decoding with NF4 against {name_of(n, full)} on the {where}, mode {mode}: {', '.join(parts)}.")
    return said


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
                k.replace("_", " "): number(v, digits) if isinstance(v, float) else v for k, v in row.items() if not isinstance(v, list)
            }
            rows.append({"Configuration": name_of(n, name)} | cells)
    return pd.DataFrame(rows)


def profile_table(n: dict) -> pd.DataFrame:
    return _benchmark_rows(n, "profile", 3)


def largest_batch_table(n: dict) -> pd.DataFrame:
    return _benchmark_rows(n, "largest_batch", 1, budget_is_known)


def _overlap(a: dict, b: dict) -> bool:
    """Whether the quartiles of two cells leave open which is faster."""
    return max(a["q25_ms_per_token"], b["q25_ms_per_token"]) <= min(a["q75_ms_per_token"], b["q75_ms_per_token"])


def fastest_sentence(n: dict) -> list[str]:
    """Every configuration's fastest mode at batch 1, fastest first; none on a CPU, which has one mode."""
    best = {}
    for name, data in n["benchmark"].items():
        rows = [r for r in data["decode"] if r["batch"] == 1]
        if rows and len({r["mode"] for r in rows}) > 1:
            best[name] = min(rows, key=lambda r: r["median_ms_per_token"])
    if len(best) < 2:
        return []
    order = sorted(best, key=lambda name: best[name]["median_ms_per_token"])
    said = ", ".join(f"{name_of(n, c)} {number(best[c]['median_ms_per_token'])} ms ({best[c]['mode']})" for c in order)
    return [f"One step at batch 1 in each format's fastest mode: {said}."]
