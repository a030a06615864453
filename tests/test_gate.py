"""The gate: pass, fail, or too few dialogues, on the committed results; and the page over several studies."""

import json
import math
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from helpers import ROOT, StudyError
from helpers.analysis import compare, frames, gate, samples

REFERENCE = "executed/reference/hopper/smollm2-135m"


@pytest.fixture(scope="module")
def f() -> frames.Frames:
    return frames.load(REFERENCE)


def more(f: frames.Frames, times: int) -> frames.Frames:
    """The same study with `times` as many dialogues that behave alike."""
    copies = [f.samples.assign(dialogue=f.samples.dialogue + f"-{i}") for i in range(times)]
    return f._replace(samples=pd.concat(copies, ignore_index=True))


def test_the_bound_decides_not_the_estimate(f):
    row = gate.judge(f, "nf4")
    low, middle = row["recovery_bound"], row["recovery"]
    assert row["least_recovery"] == 95 and low < middle < 95 and row["gate"] == "fail"
    assert gate.judge(f, "nf4", math.floor(low))["gate"] == "pass"
    between = gate.judge(f, "nf4", (low + middle) / 2)
    assert between["gate"] == "too small" and between["needed"] > between["n_dialogues"] == 50
    assert f"n too small: needs {between['needed']:,} dialogues" in gate.sentence(f, between)
    above = gate.judge(f, "nf4", middle + 0.1)
    assert above["gate"] == "too small" and above["needed"] is None and "itself misses" in gate.sentence(f, above)


def test_as_many_dialogues_as_it_asks_for_pass(f):
    row = gate.judge(f, "nf4", 72)
    assert row["gate"] == "too small"
    assert gate.judge(more(f, math.ceil(1.2 * row["needed"] / 50)), "nf4", 72)["gate"] == "pass"


def test_a_loss_in_points_is_a_threshold_of_its_own(f):
    row = gate.judge(f, "nf4", None, 2)
    assert row["least_recovery"] is None and row["gate"] == "fail"
    assert gate.judge(f, "nf4", None, math.ceil(-row["difference_bound"]))["gate"] == "pass"
    both = gate.judge(f, "nf4", 50, 2)
    assert both["gate"] == "fail" and "at least 50% and loss of at most 2 points" in gate.sentence(f, both)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (("nf5",), "CONFIG=nf5: has no answers in this study; choose from int8, fp8"),
        (("fp16",), "CONFIG=fp16"),
        (("nf4", 120), "LEAST_RECOVERY=120: is a percentage"),
        (("nf4", None, -1), "LARGEST_LOSS=-1: is a loss in points"),
    ],
)
def test_what_cannot_be_judged_is_named(f, arguments, reason):
    with pytest.raises(StudyError, match=reason):
        gate.judge(f, *arguments)


def test_exit_status_line_and_file(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / REFERENCE, tmp_path / "results")
    for more_arguments, status in ((["--least-recovery", "50"], 0), (["--largest-loss", "2"], 1), ([], 1)):
        monkeypatch.setattr(sys, "argv", ["gate", str(tmp_path / "results"), "nf4", *more_arguments])
        assert gate.main() == status
        line = capsys.readouterr().out
        written = json.loads((tmp_path / "results/nf4/gate.json").read_text())
        assert line.count("\n") == 1 and line.startswith(written["gate"]) and written["confidence"] == 0.95
    command = [sys.executable, "-m", "helpers.analysis.gate", "executed/no-such", "nf4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3 and "executed/no-such: holds no results" in done.stderr


def test_llm_comparator_has_the_fields_that_its_readme_requires(f):
    data = samples.collect(f)
    written = json.loads(json.dumps(samples.comparator(data, "fp16", "nf4"), allow_nan=False))
    assert set(written) == {"metadata", "models", "examples"} and [m["name"] for m in written["models"]] == [
        "FP16",
        "NF4",
    ]
    fields = {field["name"] for field in written["metadata"]["custom_fields_schema"]}
    wide = f.wide("f1")
    assert len(written["examples"]) == len(wide)
    for example, (_, row) in zip(written["examples"], wide.iterrows()):
        required = {"input_text", "tags", "output_text_a", "output_text_b", "score", "individual_rater_scores"}
        assert set(example) == required | {"custom_fields"} and set(example["custom_fields"]) == fields
        assert (
            example["score"] == pytest.approx(1.5 * (row.fp16 - row.nf4), abs=1e-3) and -1.5 <= example["score"] <= 1.5
        )
    with pytest.raises(StudyError, match="nf5: has no answers in this study; choose A and B from fp16"):
        samples.comparator(data, "fp16", "nf5")


# ---- several studies ----


def small(f: frames.Frames, keep, swap: bool = False) -> frames.Frames:
    """Full precision, NF4 and FP4 on some of the dialogues, few resamples; swapped, NF4 is what full precision was."""
    rows = f.samples[f.samples.configuration.isin(["fp16", "nf4", "fp4"]) & f.samples.dialogue.map(keep)]
    if swap:
        rows = rows.assign(configuration=rows.configuration.map({"fp16": "nf4", "nf4": "fp16", "fp4": "fp4"}))
    settings = f.study.statistics.model_copy(update={"resamples": 1000})
    return f._replace(
        samples=rows, dialogues=f.dialogues[:0], study=f.study.model_copy(update={"statistics": settings})
    )


@pytest.mark.parametrize("swap, answer", [(False, "Survives"), (True, "Does not survive")])
def test_a_finding_survives_unless_a_study_says_the_opposite(f, swap, answer):
    studies = {"one": small(f, lambda name: True), "two": small(f, lambda name: True, swap)}
    parts = {part["title"]: part for part in compare.contents(studies)}
    part = parts["NF4 vs full precision: F1 points"]
    assert part["sentence"].startswith(answer) and part["mean"]["data_sets"] == 2
    assert [row["verdict"] for row in part["rows"]] == ["below", "above" if swap else "below"]
    if not swap:  # two equal studies: their mean, and no less uncertain than chance allows
        assert part["mean"]["mean"] == pytest.approx(part["rows"][0]["difference"])
        assert part["mean"]["i2"] == 0 and part["mean"]["ci_high"] - part["mean"]["ci_low"] > 1
    page = compare.page(studies, list(parts.values()))
    assert "one and two share dialogues of one model" in page
    other = studies | {"two": studies["two"]._replace(samples=studies["two"].samples.assign(data_set="another"))}
    assert compare.shared(studies) and not compare.shared(other)
    assert page.count("<figure") == len(parts) and "mean over studies" in part["sentence"]


def test_studies_that_cannot_be_compared_are_told_so(f):
    with pytest.raises(StudyError, match="name two or more"):
        compare.load([REFERENCE])
    hardware = f._replace(samples=f.samples[:0], dialogues=f.dialogues[:0])
    with pytest.raises(StudyError, match="no contrast has an interval"):
        compare.contents({"one": hardware, "two": hardware})
    part = compare.contents({"one": small(f, lambda name: True), "two": hardware})[0]
    assert part["mean"] is None and part["sentence"] == "Only one has an interval for it: nothing to compare."


def test_a_wrong_argument_is_no_verdict(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gate", REFERENCE, "nf4", "--least-recovery", "much"])
    assert gate.main() == 3 and "invalid float value: 'much'" in capsys.readouterr().err
