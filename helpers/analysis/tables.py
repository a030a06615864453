"""Tables out of a result's data, one function a table; helpers/analysis/frames.py says what their columns mean."""

import pandas as pd

LARGEST = ["budget_gib", "mode", "batch", "fails_at", "tokens_per_second", "reason"]
ENERGY = ["mode", "batch", "seconds", "joules_per_token", "watts"]
PROFILE = ["mode", "batch", "what", "ms", "share", "kernels", "gb_per_second"]
AGREEMENT = ["mode", "tokens", "identical"]
TOKEN = ["tokens", "ppl_full", "ppl", "ln_ratio", "ln_low", "ln_high", "p", "kl", "kl_low", "kl_high", "kl_median"]
TOKEN += ["kl_p99", "kl_max", "agreement", "agreement_low", "agreement_high"]
TIME = ["tokens_per_second", "limit_ms", "percent_of_limit", "gb_per_second", "build_seconds"]
DIALOGUE = {"tokens": "count", "nll_full": "nll_full", "nll": "nll", "kl": "kl"}


def scores(evaluations: dict) -> pd.DataFrame:
    rows = []
    for name, data in evaluations.items():
        for task, found in data["tasks"].items():
            for metric, value in found.items():
                if isinstance(value, float) and not metric.endswith("stderr"):
                    stderr = found.get(f"{metric}_stderr")
                    rows.append((name, task, metric, value, stderr, found.get("questions")))
    return pd.DataFrame(rows, columns=["configuration", "task", "metric", "value", "stderr", "questions"])


def dig(values, path: str):
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def table(rows: list[dict], columns: list[str]) -> pd.DataFrame:
    """Rows as a table with exactly these columns; numbers with gaps are floats with NaN."""
    found = pd.DataFrame(rows).reindex(columns=columns)
    for name in found.columns[[found[c].dtype == object for c in found]]:
        if found[name].notna().any() and found[name].dropna().map(lambda v: isinstance(v, int | float)).all():
            found[name] = found[name].astype(float)
    return found


def rows(measured: dict, path: str, renamed: dict, columns: list[str]) -> pd.DataFrame:
    """A list of rows in every benchmark, as one table with configuration and process."""
    found = [
        {"configuration": name, "process": process} | {renamed.get(k, k): v for k, v in row.items()}
        for name, processes in measured.items()
        for process, data in processes
        for row in (dig(data, path) if isinstance(dig(data, path), list) else [])
    ]
    return table(found, ["configuration", "process", *columns])


def times(measured: dict) -> pd.DataFrame:
    rows = []
    for name, processes in measured.items():
        for process, data in processes:
            for part, phase in (("prefill", "prefill"), ("decode", "decode"), ("time_to_first_token", "first token")):
                unit = "ms_per_token" if phase == "decode" else "ms"
                for row in data.get(part) or []:
                    if row.get(f"median_{unit}") is None:
                        continue
                    rows.append(
                        {
                            "configuration": name,
                            "process": process,
                            "phase": phase,
                            "mode": row["mode"],
                            "batch": row["batch"],
                            "tokens": row.get("tokens") or row.get("prompt_tokens"),
                            "ms": row[f"median_{unit}"],
                            "q25": row.get(f"q25_{unit}"),
                            "q75": row.get(f"q75_{unit}"),
                            "n": row.get("n"),
                            "gb_per_second": row.get("achieved_gb_per_second"),
                            **{key: row.get(key) for key in TIME if key != "gb_per_second"},
                        }
                    )
    head = ["configuration", "process", "phase", "mode", "batch", "tokens", "ms", "q25", "q75", "n"]
    found = table(rows, [*head, *TIME])
    found["percent_of_limit"] = 100 * found.limit_ms.astype(float) / found.ms.astype(float)
    return found


def sizes(benchmarks: dict) -> pd.DataFrame:
    names = {
        "reported": "reported_footprint_mb",
        "allocated": "allocated_mb",
        "tensors": "tensors_mb",
        "state": "quantization_state_mb",
        "linear": "linear_layers_mb",
        "checkpoint": "checkpoint_mb",
        "peak_load": "peak_load_mb",
        "peak_prefill": "peak_prefill_mb",
        "peak_decode": "peak_decode_mb",
        "kv_bytes": "kv_cache_bytes_per_token",
    }
    rows = {name: {k: data["memory"].get(key) for k, key in names.items()} for name, data in benchmarks.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(names), dtype=float)


def tokens(fidelity: dict) -> pd.DataFrame:
    rows = []
    for name, data in fidelity.items():
        for group, ppl in data["perplexity"].items():
            kl = data["kl"] if group == "all" else data["kl"]["by_group"].get(group, {})
            interval = (kl.get("intervals") or {}).get("mean") or {}
            agreement = data.get("agreement_interval") or {}
            rows.append(
                {
                    "configuration": name,
                    "group": group,
                    "tokens": ppl["tokens"],
                    "ppl_full": ppl["full"],
                    "ppl": ppl["quantized"],
                    "ln_ratio": ppl["ln_ratio"],
                    "ln_low": ppl["ci_low"],
                    "ln_high": ppl["ci_high"],
                    "p": ppl.get("p"),
                    "kl": kl.get("mean"),
                    "kl_low": interval.get("ci_low"),
                    "kl_high": interval.get("ci_high"),
                    **{f"kl_{key}": kl.get(key) for key in ("median", "p99", "max")},
                    "agreement": data["agreement"] if group == "all" else None,
                    "agreement_low": agreement.get("ci_low") if group == "all" else None,
                    "agreement_high": agreement.get("ci_high") if group == "all" else None,
                }
            )
    return table(rows, ["configuration", "group", *TOKEN])


def confidence(fidelity: dict) -> pd.DataFrame:
    rows = [
        {"configuration": name, "low": row["low"], "high": row["high"], "tokens": row["count"]}
        | {key: row.get(key) for key in ("kl", "agreement")}
        for name, data in fidelity.items()
        for row in data["kl"].get("by_confidence") or []
    ]
    return table(rows, ["configuration", "low", "high", "tokens", "kl", "agreement"])


FLOOR = ["kind", "detail", "kl", "kl_median", "kl_p99", "kl_max", "agreement", "ln_ratio"]


def floor(fidelity: dict) -> pd.DataFrame:
    return table([row for data in fidelity.values() for row in data.get("floor") or []], FLOOR)


def dialogues(fidelity: dict) -> pd.DataFrame:
    rows = []
    for name, data in fidelity.items():
        for row in data["per_dialogue"]:
            groups = [row[g] for g in ("story", "answers") if row.get(g)]
            sums = {k: sum(g[key] for g in groups) for k, key in DIALOGUE.items()}
            rows.append(
                {"configuration": name, "data_set": row.get("data_set", "dialogues"), "dialogue": str(row["id"])} | sums
            )
    return table(rows, ["configuration", "data_set", "dialogue", *DIALOGUE])


def formats(weights: dict, fidelity: dict) -> pd.DataFrame:
    rows = {name: dict(row, comparable=True) for name, row in (dig(weights, "weights.formats") or {}).items()}
    for name, data in fidelity.items():
        for row in ((dig(data, "weights.formats") or {}).get(name),):
            if row and name not in rows:
                rows[name] = dict(row, comparable=name != "awq" and row.get("relative_squared_error") is not None)
    columns = ["relative_squared_error", "sqnr_db", "dtype", "comparable"]
    return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns)


def block_sizes(weights: dict) -> pd.DataFrame:
    """Results of earlier versions also hold rows of double quantization."""
    rows = [row for row in dig(weights, "weights.block_sizes") or [] if not row.get("double_quant")]
    return table(rows, ["format", "block_size", "bits_per_weight", "relative_squared_error", "ppl", "ln_ratio"])


def layers(weights: dict) -> pd.DataFrame:
    shape = {"ks_distance": "ks_distance", "excess_kurtosis": "excess_kurtosis"}
    rows = [
        {k: layer[k] for k in ("layer", "kind", "depth", "weights")}
        | {k: layer.get(key) for k, key in shape.items()}
        | {"distinct_values": layer.get("distinct_values_per_block"), "format": name, "relative_squared_error": error}
        for layer in dig(weights, "weights.layers") or []
        for name, error in layer["errors"].items()
    ]
    columns = ["layer", "kind", "depth", "weights", *shape, "distinct_values", "format", "relative_squared_error"]
    return table(rows, columns)


def noise(noise: dict) -> pd.DataFrame:
    rows = [{"kind": "nf4", "seed": None} | noise["nf4"]] if noise.get("nf4") else []
    rows += [{"kind": row.get("kind", "layer")} | row for row in noise.get("seeds") or []]
    for row in rows:
        for key, short in (("log_ppl_ratio", "ln"), ("f1", "f1")):
            found = row.pop(key, None) or {}
            row["ln_ratio" if short == "ln" else "f1"] = found.get("difference")
            row |= {f"{short}_low": found.get("ci_low"), f"{short}_high": found.get("ci_high")}
    columns = ["kind", "seed", "relative_squared_error", "ln_ratio", "ln_low", "ln_high", "f1", "f1_low", "f1_high"]
    return table(rows, columns)


def hardware(measured: dict) -> pd.DataFrame:
    rows = [
        {
            "configuration": name,
            "process": process,
            "device": data["hardware"].get("name"),
            "gb_per_second": data["hardware"].get("copy_bandwidth_gb_per_second"),
            "tflops": data["hardware"].get("matmul_tflops"),
            "dtype": data.get("dtype"),
            "warnings": dig(data, "conditions.warnings") or [],
        }
        for name, processes in measured.items()
        for process, data in processes
        if data.get("hardware")
    ]
    return table(rows, ["configuration", "process", "device", "gb_per_second", "tflops", "dtype", "warnings"])
