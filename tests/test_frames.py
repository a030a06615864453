"""The tables that everything reads: from the committed results, and from results that a writer made."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from helpers import ROOT, StudyError, params, results, schema_fidelity
from helpers.analysis import (
    contrasts,
    durations,
    evidence,
    frames,
    hardware_claims,
    other_models,
    plots,
    readme,
    sentences,
    style,
    tables,
)
from helpers.benchmark import capacity

REFERENCE = "executed/reference/hopper/smollm2-135m"
HARDWARE = "executed/reference/hopper/llama-3.2-1b-random"
FIRST_ROUND = "executed/reference/schema1/smollm2-135m"  # hardware alone, schema 1, GPTQ and AWQ unpacked


@pytest.fixture(scope="session")
def reference():
    return frames.load(REFERENCE)


@pytest.fixture(scope="session")
def all_turns(reference):
    return contrasts.table(reference)


def copy(results_folder: str, name: str):
    """Committed results without their reports, copied to executed/NAME."""
    target = ROOT / "executed" / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / results_folder, target, ignore=shutil.ignore_patterns("*.html", "*.pdf", "lm_eval.json"))
    return target


@pytest.fixture
def copied():
    """A copy of the committed results, and swap(a, b), which exchanges two configurations' answers."""
    target = copy(REFERENCE, "copied-by-a-test")

    def swap(a: str, b: str) -> None:
        file = "samples_coqa_turns.jsonl"
        texts = {name: (target / name / file).read_text() for name in (a, b)}
        for name, other in ((a, b), (b, a)):
            path = target / name / "evaluation.json"
            envelope = json.loads(path.read_text())
            rows = [json.loads(line) for line in texts[other].split("\n") if line]
            envelope["data"]["files"][file] = results.write_lines(target / name / file, rows)
            envelope.pop("sha256", None)
            envelope["schema_version"] = 1  # as the first round wrote it: without a checksum of its data
            path.write_text(json.dumps(envelope))

    yield target, swap
    shutil.rmtree(target)


@pytest.fixture
def hardware():
    """A copy of the committed results of the 1B shape."""
    target = copy(HARDWARE, "hardware-copied-by-a-test")
    yield target
    shutil.rmtree(target)


def test_the_floor_of_flips_is_full_precisions_own(reference):
    own = results.read(ROOT / REFERENCE / "fp16/evaluation.json").data["floor"]
    assert reference.engine.loc["fp16", list(own)].to_dict() == own and own["same_text"] > 0.95
    assert reference.engine.loc["nf4", list(own)].isna().all()


def test_every_column_is_documented(reference):
    text = frames.__doc__
    for name, table in reference._asdict().items():
        if not isinstance(table, pd.DataFrame) or name == "engine":
            continue
        entry = re.search(rf"^{name}\s+(.*?)(?=^\w+\s{{2,}}|\Z)", text, re.M | re.S)
        assert entry, f"{name} is not in the docstring"
        missing = [c for c in table.columns if not re.search(rf"\b{c}\b", entry[1]) and c not in ("configuration",)]
        assert not missing, f"{name}: {missing}"


def test_a_format_unpacked_to_full_precision_has_no_times_of_its_own():
    reference = frames.load(FIRST_ROUND)
    unpacked = reference.configurations.index[reference.configurations.same_kernels]
    assert list(unpacked) == ["gptq", "awq"]
    for table in (reference.times, reference.largest, reference.energy, reference.profile):
        assert not table.configuration.isin(unpacked).any() and table.configuration.isin(["nf4"]).any()
    assert (
        reference.sizes.loc[unpacked, "allocated"].isna().all()
        and reference.sizes.loc[unpacked, "checkpoint"].notna().all()
    )


def edit_largest(folder, name: str, **changes) -> None:
    """Change a format's row of the smallest budget in its result file."""
    path = folder / name / "benchmark.json"
    envelope = json.loads(path.read_text())
    envelope["data"]["largest_batch"][0] |= capacity.EMPTY | changes
    results.write_json(path, envelope | {"sha256": results.checksum(envelope)})


def test_a_search_that_failed_higher_up_does_not_say_that_nothing_fits(hardware):
    edit_largest(hardware, "nf4", fails=480, reason="no batch decoded within 4 GiB in 5 tries")
    rows = frames.load(hardware).largest.set_index(["configuration", "budget_gib"])
    assert rows.batch.isna()["nf4", 4.0] and "5 tries" in rows.reason["nf4", 4.0] and rows.batch["nf4", 16.0] > 2000


def test_a_search_that_was_not_made_does_not_say_that_nothing_fits(hardware):
    edit_largest(hardware, "fp16", reason="the time for this notebook was over")
    f = frames.load(hardware)
    assert f.largest.set_index(["configuration", "budget_gib"]).batch.isna()["fp16", 4.0]
    facts = evidence.facts(f, params.read_paper(), [])
    assert "4 GiB" not in hardware_claims.batch_recovers(facts).evidence


def test_what_failed_is_said_and_is_not_said_to_run(reference, all_turns):
    runs = reference.runs.astype({"reason": object})
    runs.loc[runs.kind == "weights", ["status", "reason"]] = "failed", "no room on this disk"
    engine = reference.engine.assign(questions=reference.engine.questions.where(reference.engine.index != "nf4", 240))
    said = " ".join(sentences.caveats(reference._replace(runs=runs, engine=engine), params.read_paper()))
    assert "the study: failed: no room on this disk." in said
    assert "NF4 answered 240 questions, others up to 597: only what all answered is compared." in said
    skipped = SimpleNamespace(reason="fp8: torchao not installed here")
    assert frames._reason("fp8", skipped) == "torchao not installed here"
    assert frames._reason(None, skipped).startswith("fp8: ")
    lost = reference.configurations.astype(object)
    lost.loc["nf4", ["evaluation", "benchmark", "fidelity", "reason"]] = "failed", "failed", "failed", "no GPU"
    f = reference._replace(configurations=lost)
    mine = contrasts.vs_full(reference, all_turns).drop(index="nf4")
    assert not sentences.nf4(f, mine, "FP16").startswith("It was not measured")  # a further process has its times
    f = f._replace(times=f.times[f.times.configuration != "nf4"])
    assert sentences.nf4(f, mine, "FP16") == "It was not measured here: no GPU."
    engine = reference.engine.assign(tasks_failed=[None, "hellaswag: ConnectionError: no hub.", *[None] * 6])
    said = " ".join(sentences.caveats(reference._replace(engine=engine), params.read_paper()))
    assert "LLM.int8(): further tasks without scores: hellaswag: ConnectionError: no hub; to ask again, delete" in said


def test_a_pooled_difference_is_told_by_data_set_and_where_a_batch_decides(reference):
    wide = frames.load("executed/reference/hopper/smollm2-135m-public")
    rows = contrasts.table(wide)
    pair = rows[(rows.a == "nf4") & (rows.b == "fp4")].iloc[0]
    said = f" {'; '.join(sentences.by_data_set(wide, pair))}."
    assert re.fullmatch(
        r" By data set, each by itself: this project's dialogues .*, fairytaleqa .*, friendsqa .*\.", said
    )
    assert sentences.told(wide, pair) == sentences.differs(wide, pair) + said
    assert sentences.by_data_set(reference, rows.iloc[0]) == []
    (one,) = readme.batching(reference, wide)
    assert "F1 23.1 or 22.3 on the same 597 questions (72 answers score otherwise)" in one
    (kernel,) = sentences.widened(reference)
    assert kernel.startswith("FP8 here: float8 weights, dequantized to float16 before each multiplication")


def test_a_figure_that_stays_empty_takes_an_earlier_runs_away(hardware):
    f = frames.load(hardware)
    folder = results.figures_folder(f.study)
    with plots.figure("one", f) as (_, axes):
        axes.plot([1, 2], [1, 2])
    assert {path.suffix for path in folder.glob("one.*")} == {".png", ".svg", ".txt"}
    with plots.figure("one", f):
        pass
    assert not list(folder.glob("one.*"))
    shutil.rmtree(folder)


def test_a_second_process_is_seen():
    reference = frames.load(FIRST_ROUND)
    eager = (
        reference.medians()
        .query("phase == 'decode' and mode == 'eager' and batch == 1 and configuration == 'nf4'")
        .iloc[0]
    )
    assert eager.processes == 2 and eager.low < eager.ms < eager.high
    ratio = (
        reference.ratios()
        .query("phase == 'decode' and mode == 'eager' and batch == 1 and configuration == 'nf4'")
        .iloc[0]
    )
    assert ratio.ratio_low < 1 < ratio.ratio_high  # 1.98x in one process, 0.89x in the other


def test_three_processes_decide_and_two_do_not():
    ratios = frames.load(HARDWARE).ratios()
    graph = ratios.query("phase == 'decode' and mode == 'cuda_graph' and batch == 64 and configuration == 'nf4'").iloc[
        0
    ]
    assert graph.processes == 3 and durations.longer(graph) == durations.SLOWER
    assert durations.longer(graph.to_dict() | {"processes": 2}) is None


def test_the_first_figure_shows_cuda_graphs_rather_than_eager_mode():
    f = frames.load(HARDWARE)
    ratios = f.ratios()
    assert contrasts.steadiest_mode(ratios) == "cuda_graph"
    assert contrasts.steadiest_mode(ratios[ratios["mode"] != "cuda_graph"]) == "eager"


def test_a_format_that_wants_to_be_compiled_is_named():
    f = frames.load(HARDWARE)
    ratios = f.ratios()
    (said,) = sentences.compiled(f, ratios)
    steps = ratios.query("configuration == 'fp8' and phase == 'decode' and batch == 1 and tokens == 128")
    step = steps.set_index("mode")
    compiled, neither = (f"{step.ratio[mode]:.2f}x" for mode in ("compile", "cuda_graph"))
    assert said.startswith(f"FP8 wants torch.compile: {compiled} [") and f"compiled, {neither} when neither" in said
    assert sentences.compiled(f, ratios[ratios["mode"] != "compile"]) == []


def test_a_label_says_what_was_computed(reference):
    assert (
        reference.label("fp16") == "FP16"
        and reference.label("nf4") == "NF4"
        and "Lloyd" in reference.label("lloyd_max")
    )


def test_a_hardware_study_has_empty_tables_and_no_error():
    f = frames.load(HARDWARE)
    rows = contrasts.table(f)
    assert rows.empty and contrasts.means(f, "f1").empty and contrasts.designs(f, params.read_paper()) == []
    assert not f.ratios().empty and contrasts.measured_size(f) == "allocated"
    assert sentences.abstract(f, rows, rows, f.ratios(), {"weights": "x", "model": "y"})


def test_formats_are_compared_where_full_precision_has_no_answers(reference):
    f = reference._replace(samples=reference.samples[reference.samples.configuration.isin(["nf4", "fp4"])])
    rows = contrasts.table(f)
    assert list(zip(rows.a, rows.b)) == [("nf4", "fp4")] and rows.recovery.isna().all()
    assert contrasts.groups(f, "domain").empty and contrasts.designs(f, params.read_paper()) == []
    said = sentences.abstract(f, rows, rows, f.ratios(), params.read_paper())
    assert any("FP4 from NF4" in text for text in said)


def test_too_few_dialogues_give_tables_that_figures_can_draw_and_the_reason(reference):
    keep = sorted(set(reference.samples.dialogue))[:4]
    f = reference._replace(samples=reference.samples[reference.samples.dialogue.isin(keep)])
    rows = contrasts.table(f)
    figure, axes = plt.subplots()
    plots.forest(axes, rows.set_index(["a", "b"]), "difference", "low", "high", 0)
    plt.close(figure)
    assert rows.low.isna().all() and set(rows.verdict) == {"n too small to say"}
    said = sentences.abstract(f, rows, rows, f.ratios(), params.read_paper())
    assert "What it costs, these answers cannot say: no interval: 4 dialogues are fewer than 10." in said[0]


def test_no_torch_is_loaded():
    code = f"import sys; from helpers.analysis import frames, contrasts, plots, sentences; frames.load('{REFERENCE}'); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(StudyError, match="holds no results"):
        frames.load(str(tmp_path))


def test_one_rule_says_what_differs(all_turns):
    for row in all_turns.itertuples():
        assert row.differs == (row.low > 0 or row.high < 0) == (row.verdict in ("above", "below"))


def test_only_what_was_named_in_advance_is_adjusted(all_turns):
    primary = all_turns[all_turns.primary]
    assert len(primary) == 8 and len(all_turns) == 28
    assert primary.p_adjusted.notna().all() and all_turns[~all_turns.primary].p_adjusted.isna().all()


def test_recovery_is_of_the_means(reference, all_turns):
    nf4 = contrasts.vs_full(reference, all_turns).loc["nf4"]
    f1 = reference.wide("f1")
    assert (
        nf4.recovery == pytest.approx(100 * f1.nf4.mean() / f1.fp16.mean())
        and nf4.recovery_low < nf4.recovery < nf4.recovery_high
    )


def test_last_turns_are_the_last_of_each_dialogue(reference):
    last = reference.wide("f1", last_turns=True).reset_index()
    assert len(last) == 50 and (last.turn == last.dialogue.map(reference.samples.groupby("dialogue").turn.max())).all()


def test_right_means_half_of_the_references(reference):
    assert ((reference.samples.em >= 0.5) == reference.samples.right).all()
    assert (reference.samples.em == 0.5).any()


def test_the_opposite_finding_gives_the_opposite_sentences(reference, all_turns, copied):
    target, swap = copied
    swap("fp16", "nf4")
    f = frames.load(str(target))
    rows = contrasts.table(f)
    before, after = (contrasts.vs_full(*pair).loc["nf4"] for pair in ((reference, all_turns), (f, rows)))
    assert (
        before.verdict == "below" and after.verdict == "above" and after.difference == pytest.approx(-before.difference)
    )
    paper = {"weights": "x", "model": "y", "questions": 50, "configurations": {}}
    said = " ".join(sentences.abstract(f, rows, contrasts.table(f, last_turns=True), f.ratios(), paper))
    assert "Should I use NF4? On this model yes: it even scores higher" in said and "FP4 scores below NF4" in said
    paper["questions"], said = 50, " ".join(sentences.abstract(reference, all_turns, all_turns, f.ratios(), paper))
    assert "Should I use NF4? On this model not where accuracy counts" in said and "It keeps 74%" in said


@pytest.mark.parametrize(
    ("verdict", "low", "answer"),
    [
        ("below", -0.09, "On this model not where accuracy counts."),
        ("below", -0.01, "On this model yes: it loses less than 1.5 F1 points."),  # clear, and too small to matter
        ("equal within 1.5 points", -0.016, "On this model yes: it loses less than 1.5 F1 points."),
        ("above", 0.01, "On this model yes: it even scores higher."),
        ("n too small to say", -0.09, "n is too small to say what it costs."),
        (None, np.nan, "What it costs, these answers cannot say: no interval. Its weights take 42% of FP16's memory."),
    ],
)
def test_the_answer_follows_the_verdict_and_what_it_may_cost(reference, all_turns, verdict, low, answer):
    mine = contrasts.vs_full(reference, all_turns).astype({"verdict": object})
    mine.loc["nf4", ["verdict", "low"]] = verdict, low
    assert sentences.nf4(reference, mine, "FP16").startswith(answer)


def test_a_gain_of_chance_is_told_with_its_interval(reference, all_turns):
    last = contrasts.table(reference, last_turns=True)
    every, last = (contrasts.vs_full(reference, rows) for rows in (all_turns, last))
    assert sentences.by_chance(reference, every, last) == []
    last.loc["int4", "difference"] = 0.021  # as an earlier run of these questions had it
    (said,) = sentences.by_chance(reference, every, last)
    assert "INT4 (rounded) 2.1 points above FP16 (n = 50)" in said and "of 7 formats" in said
    assert "over all turns INT4 (rounded) loses 6.0 points" in said
    assert sentences.by_chance(reference, *[contrasts.vs_full(reference, all_turns)] * 2) == []


def test_formats_are_set_beside_another_models(reference, all_turns):
    study = reference.study.model_copy(update={"beside": ["gemma3-270m", "not-there"], "folder": REFERENCE})
    f = reference._replace(study=study)
    (other,) = other_models.load(f)
    rows = contrasts.table(other)
    both = set(f.samples.configuration) - {f.full}
    here, there = other_models.separated(all_turns, both), other_models.separated(rows, both)
    assert other.study.study == "gemma3-270m" and ("nf4", "int4") in there - here
    said = other_models.order(f, all_turns, other, rows)
    assert "and 0 the other way round" in said and "NF4 above INT4 (rounded)" in said
    turned = all_turns.assign(difference=-all_turns.difference)
    said = other_models.order(f, all_turns, other, turned)
    assert f"0 of these come out the same way and {len(here)} the other way round (" in said and "more are" not in said
    few = other._replace(samples=other.samples[~other.samples.configuration.isin(["gptq", "awq"])])
    assert " of 10 (n = " in other_models.order(f, all_turns, few, rows)  # pairs of the five that both have
    assert list(other_models.recoveries([(f, all_turns), (other, rows)]).columns)[1:] == [
        other_models.grid(f),
        other_models.grid(other),
    ]


def test_neighbours_in_perplexity_are_separated_only_where_the_pairs_say_so(reference):
    rows = contrasts.perplexities(reference)
    assert rows.set_index(["a", "b"]).verdict["gptq", "awq"] == "n too small to say" and (rows.verdict == "above").any()
    ln = reference.tokens[reference.tokens.group == "all"].set_index("configuration").ln_ratio
    steps = dict(zip(rows.b, rows.difference.cumsum()))  # each against full precision in its own dtype
    assert steps == pytest.approx({name: ln[name] for name in steps}, abs=1e-3)


def test_a_text_of_ones_own_is_a_table():
    values = {"file": "mine.txt", "window": 512, "windows": 10, "windows_in_file": 40, "kl": 0.2, "tokens": 2560}
    values |= {"full": 20.0, "quantized": 22.0, "ratio": 1.1, "ln_ratio": 0.095, "ci_low": 0.08, "ci_high": 0.11}
    read = schema_fidelity.FilePerplexity(**values, p=None, reason=None).model_dump()
    found = tables.texts({"nf4": {"text": read}, "fp4": {"text": {"reason": "too short"}}, "fp16": {"text": None}})
    nf4, fp4 = found.to_dict("records")
    assert (nf4["file"], nf4["ppl_full"], nf4["ln_low"], nf4["kl"]) == ("mine.txt", 20.0, 0.08, 0.2)
    assert fp4["configuration"] == "fp4" and fp4["reason"] == "too short"


def test_caveats_name_what_is_missing_and_what_is_quantized_in_part(reference):
    said = " ".join(sentences.caveats(reference, params.read_paper()))
    assert "empty below" not in said and "quantized only" not in said
    timed = sentences.caveats(frames.load(HARDWARE), params.read_paper())
    assert "Not measured in this study, so empty below: accuracy, fidelity, weights." in timed
    partly = reference.configurations.assign(quantized_share=0.5)
    said = sentences.caveats(reference._replace(configurations=partly), params.read_paper())
    assert "NF4 quantized only 50.0% of the linear weights." in said


@pytest.mark.parametrize(
    "value, text",
    [(0.0123, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,230"), (0, "0"), (None, "–"), (np.nan, "–")],
)
def test_three_digits_whatever_the_size(value, text):
    assert style.significant(value) == text


def test_one_minus_sign_and_no_negative_zero():
    assert style.points(-0.0251) == "−2.5" and style.points(-0.0001) == "0.0" and style.percent(0.5842) == "58.4%"
    assert style.interval(None, None) == "" and style.interval(-0.01, 0.02) == "[−1.0, +2.0]"


def test_cells_and_sentences_are_escaped(monkeypatch):
    shown = []
    monkeypatch.setattr(style, "display", lambda output: shown.append(output.data))
    style.show(pd.DataFrame({"<b>head</b>": ["<script>alert(1)</script>"]}))
    style.say("<img src=x onerror=alert(1)>")
    page = "".join(shown)
    assert "<script" not in page and "<b>" not in page and "<img" not in page and "&lt;script&gt;" in page
