"""The report on predictions and weights: perplexity, KL, errors of the weights, noise (see helpers.report)."""

import pandas as pd

from helpers.analysis.report_style import NONE, bracket, name_of, number, points


def perplexity_table(n: dict) -> pd.DataFrame:
    rows = []
    for name, data in n["fidelity"].items():
        ppl, kl = data["perplexity"]["all"], data["kl"]
        rows.append(
            {
                "Configuration": name_of(n, name) + (" against itself (noise floor)" if name == n["full"] else ""),
                "Perplexity": number(ppl["quantized"]),
                "ln(PPL ratio)": number(ppl["ln_ratio"], 4, signed=True),
                "95% interval": bracket(ppl["ci_low"], ppl["ci_high"], lambda v: number(v, 4, signed=True)) or NONE,
                "KL mean, nats": number(kl["mean"], 5),
                "median": number(kl["median"], 5),
                "95 %": number(kl["p95"], 4),
                "99 %": number(kl["p99"], 4),
                "99.9 %": number(kl["p999"], 4),
                "max": number(kl["max"], 3),
                "Same top token": f"{points(data['agreement'])} %",
                "RMS Δp": f"{points(data['correct_token']['rms'], 2)} %",
            }
        )
    return pd.DataFrame(rows)


def perplexity_note(n: dict) -> str:
    data = next(iter(n["fidelity"].values()), None)
    if data is None:
        return "not measured in this study"
    return (
        f"{data['tokens']:,} tokens (stories and gold answers) of {data['dialogues']} dialogues, the same for all; "
        "RMS Δp is the root mean square change of the right token's probability; "
        "intervals by bootstrap over dialogues. "
        + "; ".join(f"{name_of(n, name)}: {d['placement']}" for name, d in n["fidelity"].items())
        + "."
    )


def perplexity_sentences(n: dict) -> list[str]:
    others = {name: data["perplexity"]["all"] for name, data in n["fidelity"].items() if name != n["full"]}
    if not others:
        return []
    base = next(iter(others.values()))["full"]
    listed = ", ".join(
        f"{name_of(n, name)} {number(row['quantized'])}"
        for name, row in sorted(others.items(), key=lambda item: item[1]["quantized"])
    )
    return [f"Perplexity on the same text orders them: {name_of(n, n['full'])} {number(base)}, {listed}."]


def flips_and_kl_table(n: dict) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "Configuration": name_of(n, row["configuration"]),
                "Spearman, KL and |change of F1|": number(row["rho"], 3),
                "95% interval": bracket(row["ci_low"], row["ci_high"], lambda v: number(v, 3)) or NONE,
                "Questions": row["n_questions"],
            }
            for row in n.get("kl_and_f1") or []
        ]
    )


def _weights(n: dict) -> dict:
    return (n["fidelity"].get(n["full"]) or {}).get("weights") or {}


def weights_table(n: dict) -> pd.DataFrame:
    names = {"nf4": "NF4", "fp4": "FP4", "int8": "LLM.int8()", "uniform": "Uniform 4-bit grid"}
    names |= {"lloyd_max": "Lloyd-Max for these weights", "gaussian_lloyd_max": "Lloyd-Max for a Gaussian"}
    measured = dict(_weights(n).get("formats") or {})
    for data in n["fidelity"].values():
        measured |= {k: v for k, v in ((data.get("weights") or {}).get("formats") or {}).items() if k not in measured}
    rows = [(names.get(k) or name_of(n, k), v) for k, v in measured.items()]
    return pd.DataFrame(
        [
            {
                "Format": name,
                "Relative squared error": number(row["relative_squared_error"], 6),
                "SQNR, dB": number(row["sqnr_db"]),
            }
            for name, row in sorted(rows, key=lambda item: item[1]["relative_squared_error"])
        ]
    )


def noise_table(n: dict) -> pd.DataFrame:
    noise = (n["fidelity"].get(n["full"]) or {}).get("noise") or {}
    rows = []
    for row in noise.get("seeds") or []:
        ppl, f1 = row.get("log_ppl_ratio") or {}, row.get("f1") or {}
        rows.append(
            {
                "Seed": row["seed"],
                "Perplexity": number(row.get("ppl")),
                "ln(PPL ratio)": number(ppl.get("difference"), 4, signed=True),
                "95% interval": bracket(ppl.get("ci_low"), ppl.get("ci_high"), lambda v: number(v, 4, signed=True))
                or NONE,
                "F1 change": points(f1.get("difference"), signed=True),
                "95% interval ": bracket(f1.get("ci_low"), f1.get("ci_high"), lambda v: points(v, signed=True)) or NONE,
            }
        )
    return pd.DataFrame(rows)
