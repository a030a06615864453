"""The report on answers: accuracy, differences, examples, the paper's 50 questions, further tasks (see helpers.report)."""

import pandas as pd

from helpers.analysis.report_style import NONE, bracket, name_of, number, one, p_value, points, rows_of, says


def accuracy_sentence(n: dict, row: dict) -> str:
    a, b = name_of(n, row["a"]), name_of(n, row["b"])
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


def accuracy_table(n: dict) -> pd.DataFrame:
    last = n.get("last_turn") or {}
    rows = []
    for name in n["labels"]:
        f1, em = (one(rows_of(n, "means", configuration=name, metric=m)) for m in ("f1", "em"))
        if not f1:
            continue
        last_f1, last_em = (one(rows_of(last, "means", configuration=name, metric=m)) for m in ("f1", "em"))
        reported = n["paper"].get(name, {})
        rows.append(
            {
                "Configuration": name_of(n, name),
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
    note = (
        f"F1 and exact match in points of 100, with 95% intervals by cluster bootstrap over {n['dialogues']} dialogues: "
        f"{n['questions']} questions "
        f"on all turns, {n['last_turn']['questions']} on last turns, which are what lm-eval's own task asks. "
        f"The paper's columns are {n['paper_model']} on 50 last turns of CoQA."
    )
    for name, data in n["evaluation"].items():
        # bitsandbytes/backends/cuda/ops.py, int8_vectorwise_quant: a column with one large value is one for all rows.
        if data["loading"]["quantization"].get("threshold"):
            note += (
                f" {name_of(n, name)} keeps a column of activations in 16 bits for the whole batch as soon as one token needs it, so its "
                "answers, unlike the others', also depend on which questions share a batch."
            )
    return note


def difference_table(n: dict, metric: str = "f1") -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "Compared": f"{name_of(n, row['b'])} minus {name_of(n, row['a'])}",
                "Difference": points(row["difference"], signed=True),
                "95% interval": bracket(row["ci_low"], row["ci_high"], lambda v: points(v, signed=True)) or NONE,
                "p": p_value(row["p"]),
                "p (Holm)": p_value(row["p_holm"]),
                "Detectable": points(row["detectable"]),
                "Verdict": says(row) or row["reason"],
            }
            for row in rows_of(n, "comparisons", metric=metric)
            if row["difference"] is not None
        ]
    )


def needed_sentences(n: dict) -> list[str]:
    said = []
    for row in n.get("needed") or []:
        if row["n_dialogues"]:
            said.append(
                f"To show {name_of(n, row['b'])} minus {name_of(n, row['a'])} at the {points(row['difference'], signed=True)} points "
                f"measured here, with 80% power: "
                f"{row['n_dialogues']:,} dialogues like these ({row['n_questions']:,} questions)."
            )
    return said


def flips_table(n: dict) -> pd.DataFrame:
    same = {row["configuration"]: row["share"] for row in n.get("identical_answers") or []}
    return pd.DataFrame(
        [
            {
                "Configuration": name_of(n, row["configuration"]),
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
                "Configuration": name_of(n, row["configuration"]),
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


def redraw_sentences(n: dict, redraw: dict) -> list[str]:
    """Two sentences on what the paper's design would have said of these very answers."""
    full = n["full"]
    by = {(row["a"], row["b"]): row for row in redraw["comparisons"]}
    gain, order = by.get((full, "nf4")), by.get(("nf4", "fp4"))
    if not gain:
        return []
    first = (
        f"Ask {redraw['size']} questions, as the paper did, {redraw['draws']:,} times over ({redraw['design']}): "
        f"NF4 beats {name_of(n, full)} in {points(gain['share_better'])} % of them"
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
                    row = {"Task": task, "Metric": metric, "Configuration": name_of(n, name), "Value": number(value, 4)}
                    rows.append(row | {"Standard error": number(error, 4), "Documents": scores["questions"]})
    return pd.DataFrame(sorted(rows, key=lambda r: (r["Task"], r["Metric"])))


def engine_table(n: dict) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "Configuration": name_of(n, name),
                "Questions": data["questions"],
                "Seconds": number(data["seconds"], 1),
                "Seconds per question": number(data["seconds"] / data["questions"], 3),
                "dtype": data["loading"]["dtype"],
                "Process peak, MB": number(data["process_peak_mb"], 0),
            }
            for name, data in n["evaluation"].items()
        ]
    )


def stock_sentences(n: dict) -> list[str]:
    """How long the questions took, and what stock lm-eval would have taken, where bench-eval measured both side by side."""
    said = []
    for name, row in (n.get("stock") or {}).items():
        if name not in n["evaluation"]:
            continue
        data = n["evaluation"][name]
        took, stock = data["engine"]["seconds"]["total"], row["stock_seconds_per_question"] * data["questions"]
        said.append(
            f"{name_of(n, name)}: {data['questions']} questions were answered in {number(took, 1)} s. Stock lm-eval would have taken "
            f"{number(stock, 0)} s: {number(row['stock_seconds_per_question'], 3)} s a question at its fastest batch size, measured on "
            f"{row['questions']} questions beside this engine, which was {number(row['ratio'], 1)} times faster there and gave the same "
            f"prediction to {points(row['identical'])} % of them."
        )
    return said or ["What stock lm-eval would have taken was not measured: make bench-eval does, side by side."]
