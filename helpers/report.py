"""The report's tables and sentences, rendered from analysis.json alone.

Every function takes the dict that `helpers.analysis.analyse` returns (`n`, "the numbers") and gives a table or some sentences. A number
that was not measured is a dash; a sentence that the numbers do not support is not said. Texts that come from a model or a data set
are escaped, never rendered.
"""

import html

import pandas as pd

from helpers import EXECUTED, ROOT, StudyError, results

STYLE = """<style>
.jp-InputPrompt, .jp-OutputPrompt { display: none !important; }
.jp-Cell { padding-top: 0 !important; padding-bottom: 0 !important; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: 0.8rem; }
.jp-Notebook, body { max-width: 62rem; margin: 0 auto !important; }
table.study { border-collapse: collapse; margin: 0.5rem 0 1rem; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
table.study th { text-align: left !important; border-bottom: 2px solid #444; padding: 0.25rem 0.7rem; vertical-align: bottom; }
table.study td { text-align: left !important; border-bottom: 1px solid #ddd; padding: 0.25rem 0.7rem;
  vertical-align: top; white-space: normal; }
table.study tr:hover { background: #f5f5f5; }
p.note { color: #555; font-size: 0.85rem; }
p.warning { border-left: 4px solid #d55e00; padding-left: 0.7rem; }
</style>"""

NONE = "–"


def number(value, digits: int = 2, signed: bool = False) -> str:
    """A number as text, with a true minus sign; a dash if there is none."""
    if value is None:
        return NONE
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def points(value, digits: int = 1, signed: bool = False) -> str:
    """A share in [0, 1] as points of 100."""
    return number(None if value is None else 100 * value, digits, signed)


def bracket(low, high, render=points) -> str:
    return f"[{render(low)}, {render(high)}]" if low is not None else ""


def p_value(value) -> str:
    return NONE if value is None else "< 0.001" if value < 0.001 else number(value, 3)


def table(frame: pd.DataFrame, note: str = "") -> str:
    """HTML of a table; every cell and header is escaped."""
    if frame.empty:
        return note_line(note or "Not measured in this study.")
    return frame.to_html(index=False, escape=True, border=0, classes="study", na_rep=NONE) + (note_line(note) if note else "")


def note_line(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def paragraphs(sentences: list[str]) -> str:
    return "".join(f"<p>{html.escape(s)}</p>" for s in sentences)


def _rows(n: dict, key: str, **wanted) -> list[dict]:
    found = n.get(key) or []
    return [row for row in found if all(row.get(k) == v for k, v in wanted.items())]


def _one(rows: list[dict]) -> dict | None:
    return rows[0] if rows else None


def _name(n: dict, configuration: str) -> str:
    return n["labels"].get(configuration, configuration)


def _difference(n: dict, rows: list[dict], a: str, b: str, metric: str) -> dict | None:
    """The comparison b minus a, whichever way round it was stored."""
    for row in rows or []:
        if row["metric"] == metric and {row["a"], row["b"]} == {a, b} and row.get("difference") is not None:
            if row["a"] == a:
                return row
            flip = {"a": a, "b": b, "difference": -row["difference"], "mean_a": row["mean_b"], "mean_b": row["mean_a"]}
            turned = row["ci_low"] is not None
            return row | flip | {"ci_low": -row["ci_high"] if turned else None, "ci_high": -row["ci_low"] if turned else None}
    return None


def says(row: dict | None) -> str | None:
    """What an interval allows to be said: 'above', 'below', 'not told apart', or none without an interval."""
    if row is None or row.get("ci_low") is None:
        return None
    return "above" if row["ci_low"] > 0 else "below" if row["ci_high"] < 0 else "not told apart"


# ---- what was found ----


def about(n: dict) -> str:
    """What the reader must know before any number."""
    lines = []
    if not n["is_paper_model"]:
        lines.append(
            f"This study measures {n['model']}, not the paper's {n['paper_model']}. It can test the paper's reasoning, not its numbers."
        )
    if n["already_quantized"]:
        lines.append(
            f"The weights are not an original: {n['already_quantized']}. Full precision means what they hold after that, "
            "and methods with similar grids may be flattered."
        )
    reasons = {d["loading"]["dtype_reason"] for d in n["evaluation"].values()} | {d["dtype_reason"] for d in n["benchmark"].values()}
    lines += [f"Computed in {reason}." for reason in sorted(reasons)]
    lines += [f"{_name(n, f['configuration'])}, {f['kind']}: {f['status']}: {f['reason']}." for f in n["failures"]]
    return "".join(f'<p class="warning">{html.escape(line)}</p>' for line in lines)


def headline(n: dict) -> list[str]:
    """The findings, most important first: accuracy, what 50 questions would have said, size, speed."""
    said = []
    full = n["full"]
    if n.get("questions"):
        names = ", ".join(_name(n, name) for name in n["evaluation"])
        said.append(f"{n['questions']} questions in {n['dialogues']} dialogues were put to {names}.")
    for quantized in ("nf4", "fp4"):
        row = _difference(n, n.get("comparisons"), full, quantized, "f1")
        if row:
            said.append(_accuracy_sentence(n, row))
    row = _difference(n, n.get("comparisons"), "fp4", "nf4", "f1")
    if row:
        said.append(_accuracy_sentence(n, row))
    said += perplexity_sentences(n)[:1]
    for redraw in (n.get("redraw") or [])[-1:]:
        said.append(redraw_sentences(n, redraw)[0])
    said += size_sentences(n) + speed_sentences(n)
    return said


def _accuracy_sentence(n: dict, row: dict) -> str:
    a, b = _name(n, row["a"]), _name(n, row["b"])
    value = f"{points(row['difference'], signed=True)} F1 points"
    verdict = says(row)
    if verdict is None:
        return f"{b} minus {a}: {value}; {row['reason']}."
    limits = bracket(row["ci_low"], row["ci_high"], lambda v: points(v, signed=True))
    if verdict == "not told apart":
        return (
            f"{b} and {a} are not told apart by F1: {value} {limits}; "
            f"this many dialogues would show a difference of {points(row['detectable'])} points four times out of five."
        )
    return f"{b} scores {'higher' if verdict == 'above' else 'lower'} than {a}: {value} {limits}."


# ---- accuracy ----


def accuracy_table(n: dict) -> pd.DataFrame:
    last = n.get("last_turn") or {}
    rows = []
    for name in n["labels"]:
        f1, em = (_one(_rows(n, "means", configuration=name, metric=m)) for m in ("f1", "em"))
        if not f1:
            continue
        last_f1, last_em = (_one(_rows(last, "means", configuration=name, metric=m)) for m in ("f1", "em"))
        reported = n["paper"].get(name, {})
        rows.append(
            {
                "Configuration": _name(n, name),
                "F1, all turns": f"{points(f1['mean'])} {bracket(f1['ci_low'], f1['ci_high'])}",
                "EM, all turns": f"{points(em['mean'])} {bracket(em['ci_low'], em['ci_high'])}",
                "F1, last turns": f"{points(last_f1['mean'])} {bracket(last_f1['ci_low'], last_f1['ci_high'])}",
                "EM, last turns": f"{points(last_em['mean'])} {bracket(last_em['ci_low'], last_em['ci_high'])}",
                "Paper: F1": points(reported.get("coqa_f1")),
                "Paper: EM": points(reported.get("coqa_em")),
            }
        )
    return pd.DataFrame(rows)


def accuracy_note(n: dict) -> str:
    if not n.get("questions"):
        return "This study measures hardware only."
    return (
        f"F1 and exact match in points of 100, with 95% intervals by cluster bootstrap over {n['dialogues']} dialogues: "
        f"{n['questions']} questions "
        f"on all turns, {n['last_turn']['questions']} on last turns, which are what lm-eval's own task asks. "
        f"The paper's columns are {n['paper_model']} on 50 last turns of CoQA."
    )


def difference_table(n: dict, metric: str = "f1") -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "Compared": f"{_name(n, row['b'])} minus {_name(n, row['a'])}",
                "Difference": points(row["difference"], signed=True),
                "95% interval": bracket(row["ci_low"], row["ci_high"], lambda v: points(v, signed=True)) or NONE,
                "p": p_value(row["p"]),
                "p (Holm)": p_value(row["p_holm"]),
                "Detectable": points(row["detectable"]),
                "Verdict": says(row) or row["reason"],
            }
            for row in _rows(n, "comparisons", metric=metric)
            if row["difference"] is not None
        ]
    )


def needed_sentences(n: dict) -> list[str]:
    said = []
    for row in n.get("needed") or []:
        if row["n_dialogues"]:
            said.append(
                f"To show {_name(n, row['b'])} minus {_name(n, row['a'])} at the {points(row['difference'], signed=True)} points "
                f"measured here, with 80% power: "
                f"{row['n_dialogues']:,} dialogues like these ({row['n_questions']:,} questions)."
            )
    return said


def flips_table(n: dict) -> pd.DataFrame:
    same = {row["configuration"]: row["share"] for row in n.get("identical_answers") or []}
    return pd.DataFrame(
        [
            {
                "Configuration": _name(n, row["configuration"]),
                "Right to wrong": row["right_to_wrong"],
                "Wrong to right": row["wrong_to_right"],
                "Same answer, word for word": f"{points(same[row['configuration']])} %",
                "Questions": row["questions"],
            }
            for row in n.get("flips") or []
        ]
    )


def examples_table(n: dict) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "Configuration": _name(n, row["configuration"]),
                "Dialogue, turn": f"{row['dialogue']}, {row['turn']}",
                "Question": row["question"],
                "Gold": row["gold"],
                "Full precision": row["full"] or "(empty)",
                "Quantized": row["quantized"] or "(empty)",
                "F1": points(row["change"], 0, signed=True),
            }
            for row in n.get("examples") or []
        ]
    )


# ---- 50 questions ----


def redraw_sentences(n: dict, redraw: dict) -> list[str]:
    """Two sentences on what the paper's design would have said of these very answers."""
    full = n["full"]
    by = {(row["a"], row["b"]): row for row in redraw["comparisons"]}
    gain, order = by.get((full, "nf4")), by.get(("nf4", "fp4"))
    if not gain:
        return []
    first = (
        f"Ask {redraw['size']} questions, as the paper did, {redraw['draws']:,} times over ({redraw['design']}): "
        f"NF4 beats {_name(n, full)} in {points(gain['share_better'])} % of them"
    )
    for row in gain["at_least"]:
        first += f", by {points(row['threshold'])} points or more in {points(row['share'])} %"
    low, high = gain["percentiles"]["2.5"], gain["percentiles"]["97.5"]
    second = (
        f"The difference that all questions give is {points(gain['difference'], signed=True)} points; 95% of the draws lie between "
        f"{points(low, signed=True)} and {points(high, signed=True)}."
    )
    if order:
        second += f" FP4 beats NF4 in {points(order['share_better'])} % of the draws."
    return [first + ".", second]


# ---- size ----


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
                "Configuration": _name(n, name),
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
        f"NF4 takes {number(b['allocated_mb'], 1)} MB where {_name(n, full)} takes {number(a['allocated_mb'], 1)} MB: "
        f"{number(100 * (1 - b['allocated_mb'] / a['allocated_mb']), 1)} % less. The footprint that transformers reports leaves "
        f"{number(b['allocated_mb'] - b['reported_footprint_mb'], 1)} MB of that out."
    ]


# ---- speed ----


def _spread(row: dict, unit: str) -> str:
    return f"{number(row[f'median_{unit}'])} ({number(row[f'q25_{unit}'])}–{number(row[f'q75_{unit}'])})"


def prefill_table(n: dict) -> pd.DataFrame:
    rows = []
    for name, data in n["benchmark"].items():
        for mode in dict.fromkeys(row["mode"] for row in data["prefill"]):
            cells = {f"{r['tokens']} tokens, ms": _spread(r, "ms") for r in data["prefill"] if r["mode"] == mode}
            reported = n["paper"].get(name, {}).get("prefill_ms", {})
            rows.append(
                {"Configuration": _name(n, name), "Mode": mode} | cells | {f"Paper: {t}, ms": number(v, 1) for t, v in reported.items()}
            )
    return pd.DataFrame(rows)


def decode_table(n: dict) -> pd.DataFrame:
    rows = []
    for name, data in n["benchmark"].items():
        for mode in dict.fromkeys(row["mode"] for row in data["decode"]):
            mine = [r for r in data["decode"] if r["mode"] == mode]
            cells = {f"batch {r['batch']}, ms per token": _spread(r, "ms_per_token") for r in mine}
            reported = n["paper"].get(name, {}).get("decode_ms_per_token", {}).get("1") if mode == "eager" else None
            rows.append({"Configuration": _name(n, name), "Mode": mode} | cells | {"Paper: batch 1": number(reported, 1)})
    return pd.DataFrame(rows)


def throughput_table(n: dict) -> pd.DataFrame:
    rows = []
    for name, data in n["benchmark"].items():
        for mode in dict.fromkeys(row["mode"] for row in data["decode"]):
            cells = {f"batch {r['batch']}": number(r["tokens_per_second"], 1) for r in data["decode"] if r["mode"] == mode}
            reported = n["paper"].get(name, {}).get("throughput_tokens_per_second", {}) if mode == "eager" else {}
            rows.append(
                {"Configuration": _name(n, name), "Mode": mode} | cells | {f"Paper: batch {b}": number(v, 1) for b, v in reported.items()}
            )
    return pd.DataFrame(rows)


def _decode(n: dict, name: str, mode: str, batch: int) -> dict | None:
    rows = n["benchmark"].get(name, {}).get("decode", [])
    return _one([r for r in rows if r["mode"] == mode and r["batch"] == batch])


def speed_sentences(n: dict) -> list[str]:
    """NF4 against full precision, per mode, at batch 1 and at the largest batch."""
    said, full = [], n["full"]
    for mode in ("eager", "cuda_graph", "compile"):
        batches = sorted({r["batch"] for r in n["benchmark"].get("nf4", {}).get("decode", []) if r["mode"] == mode})
        parts = []
        for batch in dict.fromkeys([*batches[:1], *batches[-1:]]):
            a, b = _decode(n, full, mode, batch), _decode(n, "nf4", mode, batch)
            if a and b:
                parts.append(
                    f"at batch {batch} {number(b['median_ms_per_token'])} ms against {number(a['median_ms_per_token'])} ms per step "
                    f"({number(b['median_ms_per_token'] / a['median_ms_per_token'])} times)"
                )
        if parts:
            where = {"cpu": "CPU", "cuda": "GPU"}[n["benchmark"]["nf4"]["device"]]
            said.append(f"Decoding with NF4 against {_name(n, full)} on the {where}, mode {mode}: {', '.join(parts)}.")
    return said


# ---- fidelity ----


def perplexity_table(n: dict) -> pd.DataFrame:
    rows = []
    for name, data in n["fidelity"].items():
        ppl, kl = data["perplexity"]["all"], data["kl"]
        rows.append(
            {
                "Configuration": _name(n, name) + (" against itself (noise floor)" if name == n["full"] else ""),
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
        + "; ".join(f"{_name(n, name)}: {d['placement']}" for name, d in n["fidelity"].items())
        + "."
    )


def perplexity_sentences(n: dict) -> list[str]:
    others = {name: data["perplexity"]["all"] for name, data in n["fidelity"].items() if name != n["full"]}
    if not others:
        return []
    base = next(iter(others.values()))["full"]
    listed = ", ".join(
        f"{_name(n, name)} {number(row['quantized'])}" for name, row in sorted(others.items(), key=lambda item: item[1]["quantized"])
    )
    return [f"Perplexity on the same text orders them: {_name(n, n['full'])} {number(base)}, {listed}."]


def flips_and_kl_table(n: dict) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "Configuration": _name(n, row["configuration"]),
                "Spearman, KL and |change of F1|": number(row["rho"], 3),
                "95% interval": bracket(row["ci_low"], row["ci_high"], lambda v: number(v, 3)) or NONE,
                "Questions": row["n_questions"],
            }
            for row in n.get("kl_and_f1") or []
        ]
    )


# ---- weights and noise ----


def _weights(n: dict) -> dict:
    return (n["fidelity"].get(n["full"]) or {}).get("weights") or {}


def weights_table(n: dict) -> pd.DataFrame:
    names = {"nf4": "NF4", "fp4": "FP4", "int8": "LLM.int8()", "uniform": "Uniform 4-bit grid"}
    names |= {"lloyd_max": "Lloyd-Max for these weights", "gaussian_lloyd_max": "Lloyd-Max for a Gaussian"}
    measured = dict(_weights(n).get("formats") or {})
    for data in n["fidelity"].values():
        measured |= {k: v for k, v in ((data.get("weights") or {}).get("formats") or {}).items() if k not in measured}
    rows = [(names.get(k) or _name(n, k), v) for k, v in measured.items()]
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
                "95% interval": bracket(ppl.get("ci_low"), ppl.get("ci_high"), lambda v: number(v, 4, signed=True)) or NONE,
                "F1 change": points(f1.get("difference"), signed=True),
                "95% interval ": bracket(f1.get("ci_low"), f1.get("ci_high"), lambda v: points(v, signed=True)) or NONE,
            }
        )
    return pd.DataFrame(rows)


# ---- claims, provenance ----


def claims_table(n: dict) -> pd.DataFrame:
    columns = {
        "section": "Section",
        "claim": "The paper says",
        "reported": "Its numbers",
        "verdict": "Here",
        "evidence": "Evidence",
        "scope": "But",
    }
    return pd.DataFrame([{title: row[key] or NONE for key, title in columns.items()} for row in n["claims"]])


def provenance_table(n: dict) -> pd.DataFrame:
    rows = []
    for p in n["provenance"]:
        gpu = p["gpu"] or {}
        rows.append(
            {
                "Result": f"{p['configuration']}, {p['kind']}",
                "When (UTC)": p["created"][:16].replace("T", " "),
                "Commit": (p["commit"] or "unknown")[:10] + (" + changes" if p["dirty"] else ""),
                "Hardware": gpu.get("name") or f"{p['processor']}, {p['cores']} cores, {p['memory_gib']} GiB",
                "Driver, CUDA": f"{gpu['driver']}, {gpu['cuda']}" if gpu else NONE,
                "torch": p["packages"]["torch"],
                "transformers": p["packages"]["transformers"],
                "bitsandbytes": p["packages"]["bitsandbytes"],
                "Seed": p["seed"],
            }
        )
    return pd.DataFrame(rows)


# ---- more of the hardware, further tasks ----


def bullets(sentences: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(s)}</li>" for s in sentences) + "</ul>"


def figure(name: str, study, found: dict, n: dict) -> str:
    """A figure with its caption, embedded; a note instead where its inputs are missing."""
    from helpers import figures

    try:
        return figures.inline(name, study, found, n)
    except figures.Missing as missing:
        return note_line(f"{name}: no figure: {missing}")


def limit_table(n: dict) -> pd.DataFrame:
    """Decode against bytes over bandwidth: what a step must read, and the share of the measured copy bandwidth that it reaches."""
    rows = []
    for name, data in n["benchmark"].items():
        for row in data["decode"]:
            if row.get("limit_ms") is None:
                continue
            rows.append(
                {
                    "Configuration": _name(n, name),
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


def _benchmark_rows(n: dict, part: str, digits: int) -> pd.DataFrame:
    """A list of the benchmark's as it is, for all configurations; the keys become the headers."""
    rows = []
    for name, data in n["benchmark"].items():
        for row in data.get(part) or []:
            cells = {
                k.replace("_", " "): number(v, digits) if isinstance(v, float) else v for k, v in row.items() if not isinstance(v, list)
            }
            rows.append({"Configuration": _name(n, name)} | cells)
    return pd.DataFrame(rows)


def profile_table(n: dict) -> pd.DataFrame:
    return _benchmark_rows(n, "profile", 3)


def largest_batch_table(n: dict) -> pd.DataFrame:
    return _benchmark_rows(n, "largest_batch", 1)


def tasks_table(n: dict) -> pd.DataFrame:
    """Tasks beside the dialogues, with lm-eval's own standard errors."""
    rows = []
    for name, data in n["evaluation"].items():
        for task, scores in data["tasks"].items():
            if task.startswith("coqa_"):
                continue
            for metric, value in scores.items():
                if isinstance(value, (int, float)) and not metric.endswith("_stderr") and metric != "questions":
                    error = scores.get(f"{metric}_stderr")
                    row = {"Task": task, "Metric": metric, "Configuration": _name(n, name), "Value": number(value, 4)}
                    rows.append(row | {"Standard error": number(error, 4), "Documents": scores["questions"]})
    return pd.DataFrame(sorted(rows, key=lambda r: (r["Task"], r["Metric"])))


def engine_table(n: dict) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "Configuration": _name(n, name),
                "Questions": data["questions"],
                "Seconds": number(data["seconds"], 1),
                "Seconds per question": number(data["seconds"] / data["questions"], 3),
                "dtype": data["loading"]["dtype"],
                "Process peak, MB": number(data["process_peak_mb"], 0),
            }
            for name, data in n["evaluation"].items()
        ]
    )


# ---- README ----

MARKS = ("<!-- found: rendered by make readme from executed/reference -->", "<!-- end of found -->")
REFERENCES = ("smollm2-135m", "llama-3.2-1b-random")


def readme(text: str) -> str:
    """README.md's text with its findings rendered again from the committed runs. Raises StudyError if the marks are gone."""
    if any(text.count(mark) != 1 for mark in MARKS):
        raise StudyError(f"README.md: the lines {MARKS[0]!r} and {MARKS[1]!r} must each stand there once")
    lines = []
    for study in REFERENCES:
        folder = EXECUTED / "reference" / "h100" / study
        n = results.read(folder / "analysis.json").data["numbers"]
        hardware = sorted({p["gpu"]["name"] for p in n["provenance"] if p["gpu"]})
        lines += [f"**{n['title']}** ({', '.join(hardware)}; [report](executed/reference/h100/{study}/report.html)):", ""]
        lines += [f"- {sentence}" for sentence in headline(n)]
        verdicts = [row["verdict"] for row in n["claims"]]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
        lines += [f"- Of the paper's {len(verdicts)} claims, by this run alone: {counts}.", ""]
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n" + "\n".join(lines) + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    results.write_text(path, readme(path.read_text(encoding="utf-8")))
