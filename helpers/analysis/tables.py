"""Tables out of a result's data, one function a table; helpers/analysis/frames.py says what their columns mean.

`measured` is a list of (configuration, process, data) of every finished benchmark; others map configurations to data.
"""

import pandas as pd

PHASES = {"prefill": "prefill", "decode": "decode", "time_to_first_token": "first token"}
LISTS = {  # table -> where its rows are in a benchmark, what is renamed, its columns
    "largest": ("largest_batch", {"fails_at": "fails"}, "budget_gib mode batch fails_at tokens_per_second reason"),
    "energy": ("energy.rows", {"watts": "mean_watts"}, "mode batch seconds joules_per_token watts"),
    "profile": ("profile", {"ms": "ms_per_step"}, "mode batch what ms share kernels gb_per_second"),
    "agreement": ("agreement", {}, "mode tokens identical"),
    "int8_limit": ("int8_limit.runs", {}, "rows columns exit_code last_line"),
}
TIME = "configuration process phase mode batch tokens ms q25 q75 n tokens_per_second limit_ms gb_per_second"
TOKEN = "tokens ppl_full ppl ln_ratio ln_low ln_high p kl kl_low kl_high kl_median kl_p99 kl_max"
PERPLEXITY = {"ppl_full": "full", "ppl": "quantized", "ln_low": "ci_low", "ln_high": "ci_high"}
SIZES = {"reported": "reported_footprint_mb", "state": "quantization_state_mb", "linear": "linear_layers_mb"}
SIZES |= {key: f"{key}_mb" for key in ("allocated", "tensors", "checkpoint")}
SIZES |= {key: f"{key}_mb" for key in ("peak_load", "peak_prefill", "peak_decode")}
NOISE = "kind seed relative_squared_error ln_ratio ln_low ln_high f1 f1_low f1_high"


def dig(values, path: str):
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def pick(row: dict, columns: str, renamed: dict | None = None) -> dict:
    """Some keys of a row, by the names of their columns; what is missing is None."""
    return {name: row.get((renamed or {}).get(name, name)) for name in columns.split()}


def table(rows: list[dict], columns: str) -> pd.DataFrame:
    """Rows as a table with exactly these columns; numbers with gaps are floats with NaN."""
    found = pd.DataFrame(rows).reindex(columns=columns.split())
    for name in found.columns[[found[c].dtype == object for c in found]]:
        if found[name].notna().any() and found[name].dropna().map(lambda v: isinstance(v, int | float)).all():
            found[name] = found[name].astype(float)
    return found


def scores(evaluations: dict) -> pd.DataFrame:
    rows = [
        {"configuration": name, "task": task, "metric": metric, "value": value}
        | {"stderr": found.get(f"{metric}_stderr"), "questions": found.get("questions")}
        for name, data in evaluations.items()
        for task, found in data["tasks"].items()
        for metric, value in found.items()
        if isinstance(value, float) and not metric.endswith("stderr")
    ]
    return table(rows, "configuration task metric value stderr questions")


def listed(measured: list, name: str) -> pd.DataFrame:
    """A list of rows in every benchmark, as one table with configuration and process."""
    path, renamed, columns = LISTS[name]
    rows = [
        {"configuration": name, "process": process} | pick(row, columns, renamed)
        for name, process, data in measured
        for row in (dig(data, path) if isinstance(dig(data, path), list) else [])
    ]
    return table(rows, f"configuration process {columns}")


def times(measured: list) -> pd.DataFrame:
    rows = []
    for name, process, data in measured:
        for part, phase in PHASES.items():
            unit = "ms_per_token" if phase == "decode" else "ms"
            renamed = {"ms": f"median_{unit}", "q25": f"q25_{unit}", "q75": f"q75_{unit}"}
            renamed |= {"gb_per_second": "achieved_gb_per_second"}
            for row in data.get(part) or []:
                where = {"configuration": name, "process": process, "phase": phase}
                tokens = row.get("tokens") or row.get("prompt_tokens")
                rows.append(pick(row, f"{TIME} build_seconds", renamed) | where | {"tokens": tokens})
    found = table([row for row in rows if row["ms"] is not None], f"{TIME} build_seconds")
    return found.assign(percent_of_limit=100 * found.limit_ms.astype(float) / found.ms.astype(float))


def sizes(benchmarks: dict, checkpoints: dict) -> pd.DataFrame:
    """checkpoints: MiB on disk, known without a benchmark."""
    renamed = SIZES | {"kv_bytes": "kv_cache_bytes_per_token"}
    rows = {name: {"checkpoint": size} for name, size in checkpoints.items()}
    rows |= {name: pick(data["memory"], " ".join(renamed), renamed) for name, data in benchmarks.items()}
    return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=list(renamed)).astype(float)


def tokens(fidelity: dict) -> pd.DataFrame:
    rows = []
    for name, data in fidelity.items():
        for group, ppl in data["perplexity"].items():
            kl = data["kl"] if group == "all" else data["kl"]["by_group"].get(group, {})
            row = {"configuration": name, "group": group} | pick(ppl, TOKEN, PERPLEXITY)
            row |= {"baseline": dig(data, "baseline.dtype")}
            row |= {f"kl_{key}": kl.get(key) for key in ("median", "p99", "max")} | {"kl": kl.get("mean")}
            row |= {f"kl_{side}": dig(kl, f"intervals.mean.ci_{side}") for side in ("low", "high")}
            if group == "all":
                row |= {"agreement": data["agreement"]}
            rows.append(row)
    return table(rows, f"configuration group {TOKEN} agreement baseline")


def texts(fidelity: dict) -> pd.DataFrame:
    columns = "file windows tokens ppl_full ppl ln_ratio ln_low ln_high kl reason"
    rows = [
        {"configuration": name} | pick(data["text"], columns, PERPLEXITY)
        for name, data in fidelity.items()
        if data.get("text")
    ]
    return table(rows, f"configuration {columns}")


def confidence(fidelity: dict) -> pd.DataFrame:
    columns = "low high tokens kl agreement"
    rows = [
        {"configuration": name} | pick(row, columns, {"tokens": "count"})
        for name, data in fidelity.items()
        for row in data["kl"].get("by_confidence") or []
    ]
    return table(rows, f"configuration {columns}")


def floor(fidelity: dict) -> pd.DataFrame:
    floors = [data["floor"] for data in fidelity.values() if isinstance(data.get("floor"), list)]
    return table([row for rows in floors for row in rows], "kind detail kl kl_median kl_p99 kl_max agreement ln_ratio")


def dialogues(fidelity: dict) -> pd.DataFrame:
    rows = []
    for name, data in fidelity.items():
        for row in data["per_dialogue"]:
            groups = [row[g] for g in ("story", "answers") if row.get(g)]
            sums = {key: sum(g[key] for g in groups) for key in ("count", "nll_full", "nll", "kl")}
            where = {"data_set": row.get("data_set", "dialogues"), "dialogue": str(row["id"])}
            rows.append({"configuration": name} | where | {"tokens": sums.pop("count")} | sums)
    return table(rows, "configuration data_set dialogue tokens nll_full nll kl")


def formats(weights: dict, fidelity: dict) -> pd.DataFrame:
    rows = {name: row | {"comparable": True} for name, row in (dig(weights, "weights.formats") or {}).items()}
    for name, data in fidelity.items():
        row = (dig(data, "weights.formats") or {}).get(name)
        if row and name not in rows:
            rows[name] = row | {"comparable": name != "awq" and row.get("relative_squared_error") is not None}
    columns = ["relative_squared_error", "sqnr_db", "dtype", "comparable", "reason"]
    return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns)


def block_sizes(weights: dict) -> pd.DataFrame:
    """Results of earlier versions also hold rows of double quantization."""
    rows = [row for row in dig(weights, "weights.block_sizes") or [] if not row.get("double_quant")]
    return table(rows, "format block_size bits_per_weight relative_squared_error ppl ln_ratio")


def layers(weights: dict) -> pd.DataFrame:
    return table(dig(weights, "weights.layers") or [], "layer weights ks_distance")


def noise(noise: dict) -> pd.DataFrame:
    """Results of earlier versions also hold noise that is matched to NF4's in other ways."""
    rows = [noise["nf4"], *noise["seeds"]] if noise.get("nf4") else []
    rows = [dict(row) for row in rows if row["kind"] in ("nf4", "block")]
    for row in rows:
        for key, short, value in (("log_ppl_ratio", "ln", "ln_ratio"), ("f1", "f1", "f1")):
            found = row.pop(key, None) or {}
            row |= {f"{short}_low": found.get("ci_low"), f"{short}_high": found.get("ci_high")}
            row[value] = found.get("difference")
    return table(rows, NOISE)


def hardware(measured: list) -> pd.DataFrame:
    renamed = {"device": "name", "gb_per_second": "copy_bandwidth_gb_per_second", "tflops": "matmul_tflops"}
    rows = [
        {"configuration": name, "process": process}
        | pick(data["hardware"], " ".join(renamed), renamed)
        | {"dtype": data.get("dtype"), "warnings": "; ".join(dig(data, "conditions.warnings") or [])}
        for name, process, data in measured
        if data.get("hardware")
    ]
    return table(rows, f"configuration process {' '.join(renamed)} dtype warnings")
