"""Does a finding survive on other models, data sets and machines? One page over several studies.

    python -m helpers.analysis.compare smollm2-135m executed/reference/hopper/smollm2-135m    -> executed/compare.html

Per primary contrast, every study's difference with its own report's interval, and over studies the
random-effects mean, Cochran's Q and I2 (helpers.analysis.recovery.pooled, by statsmodels).
"""

import base64
import io
import itertools
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from helpers import EXECUTED, StudyError, results
from helpers.analysis import contrasts, frames, plots, recovery, samples, sentences, style
from helpers.analysis.frames import KEYS, MODES, Frames

POINTS = {"f1": "F1 points", "em": "exact match, points"}
PERPLEXITY = "ln perplexity ratio"
FULL = "full precision"
KEPT = "verdict standard_error difference low high"


def load(names: list[str]) -> dict[str, Frames]:
    """Studies by the name or folder they were asked for. Raises StudyError for fewer than two."""
    if len(set(names)) < 2:
        raise StudyError('STUDIES: name two or more, as in make compare STUDIES="a b"')
    return {name.removeprefix("executed/").removeprefix("reference/").rstrip("/"): frames.load(name) for name in names}


def differences(studies: dict[str, Frames]) -> pd.DataFrame:
    """A row per study, measure and primary contrast: study, measure, a, b (labels; a may be "full
    precision"), name (of b), difference, low, high, standard_error, verdict, dialogues. Points of 100; perplexity in
    nats per token. Rows without an interval are left out."""
    found = []
    for study, f in studies.items():
        tables = [(POINTS[metric], 100, contrasts.table(f, metric)) for metric in POINTS if len(f.samples)]
        pairs = contrasts.primary_pairs(f, list(f.dialogues.configuration.unique()))
        for measure, scale, rows in [*tables, (PERPLEXITY, 1, contrasts.perplexities(f, pairs))]:
            for row in rows[rows.primary & rows.reason.isna()].to_dict("records") if len(rows) else []:
                sides = {"a": FULL if row["a"] == f.full else f.label(row["a"]), "b": f.label(row["b"])}
                where = {"study": study, "measure": measure, "name": row["b"], "dialogues": row["n_dialogues"]}
                numbers = {key: row[key] if key == "verdict" else scale * row[key] for key in KEPT.split()}
                found.append(where | sides | numbers)
    return pd.DataFrame(found, columns=["study", "measure", "name", "dialogues", "a", "b", *KEPT.split()])


def survives(rows: pd.DataFrame, mean: dict, unit: str) -> str:
    """One sentence: does the difference hold in every study, and over them?"""
    b, a = rows.b.iloc[0], rows.a.iloc[0]
    sides = {side: list(rows.study[rows.verdict == side]) for side in ("below", "above")}

    def form(value):
        return style.number(value, 1 if "points" in unit else 3, True)

    over = f"mean over studies {form(mean['mean'])} {style.interval(mean['ci_low'], mean['ci_high'], form)}"
    over += f", I2 {style.number(mean['i2'], 0)}%"
    pooled = "above" if mean["ci_low"] > 0 else "below" if mean["ci_high"] < 0 else None
    if all(sides.values()):
        found = "; ".join(f"{side} in {sentences.listed(names)}" for side, names in sides.items())
        return f"Does not survive: {b} is {found} ({over})."
    side = next((side for side, names in sides.items() if names), None)
    if side is None:
        together = f"together they put {b} {pooled}" if pooled else "nor do all together"
        return f"No finding in any study: none separates {b} from {a}, {together} ({over})."
    count = f"{b} is {side} {a} in {len(sides[side])} of {len(rows)} studies"
    if pooled == side:
        return f"Survives: {count}, and over all of them ({over})."
    if len(sides[side]) == len(rows):
        return f"Survives in these studies, which are too few or too unlike to say more: {count} ({over})."
    return f"Not settled: {count}, but the mean over studies may be zero ({over})."


def forest(rows: pd.DataFrame, mean: dict | None, unit: str) -> str:
    """The studies' differences and their mean, as the address of an SVG inside the page."""
    last, b, a = len(rows), rows.b.iloc[0], rows.a.iloc[0]
    with matplotlib.rc_context(plots.STYLE | {"svg.hashsalt": f"{a}{b}{unit}"}):
        fig, axes = plt.subplots(figsize=(plots.WIDTH, 1.1 + 0.36 * (last + 1)), layout="constrained")
        table = rows.assign(differs=rows.verdict.isin(["below", "above"])).set_index("name")
        plots.forest(axes, table, "difference", "low", "high", 0)
        if mean:
            low, middle, high = mean["ci_low"], mean["mean"], mean["ci_high"]
            axes.fill([low, middle, high, middle], [last, last - 0.25, last, last + 0.25], color=plots.DARK)
        labels = [*rows.study, "mean over studies"] if mean else list(rows.study)
        axes.set_yticks(range(len(labels)), labels)
        axes.set(ylim=(len(labels) - 0.4, -0.6), xlabel=f"{b} minus {a}, {unit}")
        drawn = io.StringIO()
        fig.savefig(drawn, format="svg", metadata={"Date": None})
        plt.close(fig)
    return f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue().encode()).decode()}"


def contents(studies: dict[str, Frames]) -> list[dict]:
    """A part of the page per contrast and measure: title, unit, sentence, mean (recovery.pooled, or None), rows,
    picture."""
    parts = []
    for (name, a, unit), rows in differences(studies).groupby(["name", "a", "measure"], sort=False):
        part = {"title": f"{rows.b.iloc[0]} vs {a}: {unit}", "unit": unit, "name": name, "mean": None}
        part["sentence"] = f"Only {rows.study.iloc[0]} has an interval for it: nothing to compare."
        usable = rows[rows.standard_error > 0]
        if len(usable) > 1:
            confidence = min(f.study.statistics.confidence for f in studies.values())
            part["mean"] = recovery.pooled(usable.difference, usable.standard_error, confidence=confidence)
            part["sentence"] = survives(usable, part["mean"], unit)
        parts.append(part | {"rows": rows.to_dict("records"), "picture": forest(rows, part["mean"], unit)})
    if not parts:
        raise StudyError(f"{', '.join(studies)}: no contrast has an interval; give studies with ten dialogues or more")
    return parts


def shared(studies: dict[str, Frames]) -> list[str]:
    """A warning per two studies that ask one model about the same dialogues: a mean over them counts those twice."""
    asked = {
        study: {(f.study.model.name, *key) for key in f.samples[KEYS[:2]].itertuples(index=False, name=None)}
        for study, f in studies.items()
    }
    pairs = [(one, two) for one, two in itertools.combinations(asked, 2) if asked[one] & asked[two]]
    return [
        f"{one} and {two} share dialogues of one model: a mean over both is surer than the data." for one, two in pairs
    ]


def hardware(studies: dict[str, Frames]) -> list[dict]:
    """Memory and decode time (batch 1) of each format as a share of full precision's, as texts: study, device, format,
    mode, memory, decode, range, processes."""
    rows = []
    for study, f in studies.items():
        ratios = f.ratios()
        mode = contrasts.steadiest_mode(ratios)
        memory = f.sizes.allocated / f.sizes.allocated.get(f.full, np.nan)
        table = contrasts.at(ratios, "decode", batch=1, mode=mode).reindex(
            f.configurations.index[~f.configurations.full]
        )
        for name, row in table.iterrows():
            where = {"study": study, "device": sentences.device(f), "format": f.label(name), "mode": MODES[mode]}
            where |= {"memory": style.percent(memory.get(name)), "decode": style.times(row.ratio)}
            where["range"] = style.interval(row.ratio_low, row.ratio_high, style.times)
            rows.append(where | {"processes": style.number(row.processes, 0)})
    return rows


def page(studies: dict[str, Frames], parts: list[dict]) -> str:
    about = [
        {"study": name, "title": f.study.title, "device": sentences.device(f)}
        | {"n": sentences.counts(f) or "hardware only"}
        for name, f in studies.items()
    ]
    template = samples.environment().get_template("compare.html.j2")
    tables = {"about": about, "parts": parts, "hardware": hardware(studies), "warnings": shared(studies)}
    return template.render(tables, number=style.number)


def main() -> None:
    try:
        studies = load(sys.argv[1:])
        parts = contents(studies)
        target = EXECUTED / "compare.html"
        results.write_text(target, page(studies, parts))
        kept = [{key: part[key] for key in ("title", "sentence", "mean", "rows")} for part in parts]
        results.write_json(target.with_suffix(".json"), kept)
    except StudyError as error:
        raise SystemExit(str(error)) from None
    print("\n".join(shared(studies) + [f"{part['title']}: {part['sentence']}" for part in parts]))
    print("executed/compare.html")


if __name__ == "__main__":
    main()
