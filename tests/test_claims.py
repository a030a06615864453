"""The verdicts: made-up results that flip each of them, both ways, and results with parts missing."""

import copy
import json

import numpy as np
import pytest

from helpers import StudyError, params
from helpers.analysis import claims
from helpers.analysis.claims import FAILS, HOLDS, OPEN
from helpers.analysis.redraw import redraw
from helpers.statistics import compare_all

PAPER = params.read_paper()


def row(a, b, low, high, metric="f1"):
    counts = {"n_questions": 500, "n_dialogues": 50, "p": 0.01, "p_holm": 0.04, "detectable": 0.03, "reason": None}
    return {
        "metric": metric,
        "a": a,
        "b": b,
        "difference": (low + high) / 2,
        "ci_low": low,
        "ci_high": high,
        "mean_a": 0.5,
        "mean_b": 0.5,
    } | counts


def times(unit, key, values, mode="eager", spread=0.01):
    """Rows of a benchmark from {length or batch: median}; quartiles `spread` (share) either side."""
    return [
        {"mode": mode, key: x, f"median_{unit}": v, f"q25_{unit}": v * (1 - spread), f"q75_{unit}": v * (1 + spread)}
        for x, v in values.items()
    ]


def largest(budgets):
    made = {"allocated_before_mb": 1000.0}
    return [
        {"budget_gib": g, "batch": b, "tokens_per_second": r, "predicted_batch": b} | made
        for g, (b, r) in budgets.items()
    ]


def machine(footprint, allocated, prefill, eager, graph, budgets, device="cuda"):
    decode = times("ms_per_token", "batch", eager) + times("ms_per_token", "batch", graph, "cuda_graph")
    return {
        "device": device,
        "memory": {"reported_footprint_mb": footprint, "allocated_mb": allocated, "tensors_mb": allocated},
        "prefill": times("ms", "tokens", prefill),
        "decode": decode,
        "largest_batch": largest(budgets),
    }


@pytest.fixture
def results():
    """A study in which the paper would be right about everything."""
    fast, slow = {1: 10.0, 4: 11.0, 8: 12.0}, {1: 15.0, 4: 17.0, 8: 20.0}
    quick, dragging = {1: 5.0, 8: 6.0}, {1: 9.0, 8: 13.0}
    four = [965.13, 965.2, {128: 18.0, 512: 60.0}, slow, dragging, {4: (60, 900.0)}]
    distances = [{"layer": f"l{i}", "ks_distance": 0.01, "excess_kurtosis": 0.1} for i in range(20)]
    seed = {"log_ppl_ratio": row("fp16", "noise", -0.02, -0.01), "f1": row("fp16", "noise", 0.01, 0.03)}
    draws = [
        {"a": "fp16", "b": "nf4", "share_better": 0.97, "share_worse": 0.03},
        {"a": "fp4", "b": "nf4", "share_better": 0.99, "share_worse": 0.01},
        {"a": "fp16", "b": "fp4", "share_better": 0.02, "share_worse": 0.98},
    ]
    return {
        "model": "Llama-3.2-1B",
        "paper_model": "Llama-3.2-1B",
        "is_paper_model": True,
        "full": "fp16",
        "comparisons": [
            row("fp16", "nf4", 0.02, 0.08),
            row("fp16", "fp4", -0.06, -0.02),
            row("nf4", "fp4", -0.12, -0.05),
        ],
        "redraw": [{"design": "50 last turns, without replacement, from 500", "draws": 10_000, "comparisons": draws}],
        "benchmark": {
            "fp16": machine(2357.13, 2358.13, {128: 12.0, 512: 45.0}, fast, quick, {4: (20, 700.0)}),
            "nf4": machine(*four),
            "fp4": machine(*four),
        },
        "weights": {
            "codebooks": {"fp4": np.linspace(-1, 1, 16).tolist(), "nf4": {"levels": np.linspace(-1, 1, 16).tolist()}},
            "formats": {
                "nf4": {"relative_squared_error": 0.0080},
                "lloyd_max": {"relative_squared_error": 0.00795},
                "fp4": {"relative_squared_error": 0.011},
                "int8": {"relative_squared_error": 0.0001, "dtype": "float8_e4m3fn"},
            },
            "layers": distances,
        },
        "noise": {"seeds": [seed | {"seed": i} for i in range(3)]},
        "failures": [
            {"configuration": "int8", "kind": "benchmark", "reason": "Error at line 380 in file /src/csrc/ops.cu"}
        ],
    }


def verdict(results, name):
    (found,) = [r for r in claims.judge(results, PAPER) if r["id"] == name]
    return found["verdict"]


def test_a_study_in_which_the_paper_is_right(results):
    rows = claims.judge(results, PAPER)
    assert {r["id"]: r["verdict"] for r in rows} == dict.fromkeys(claims.CLAIMS, HOLDS)
    assert all(r["evidence"] for r in rows)


def second_run(results, *swapped):
    """The same times again, those of full precision and NF4 swapped in these parts."""
    again = {
        name: {part: copy.deepcopy(data[part]) for part in ("prefill", "decode")}
        for name, data in results["benchmark"].items()
    }
    for part in swapped:
        again["fp16"][part], again["nf4"][part] = again["nf4"][part], again["fp16"][part]
    results["again"] = again


TIMED = ("prefill_slower", "decode_slower", "throughput_lower", "dequantization_is_the_cause")


def test_times_must_differ_the_same_way_in_a_second_run(results):
    second_run(results)
    rows = {r["id"]: r for r in claims.judge(results, PAPER)}
    assert all(rows[name]["verdict"] == HOLDS for name in TIMED)
    assert "1.50 and again 1.50 at batch 1" in rows["decode_slower"]["evidence"]
    second_run(results, "decode")
    assert [verdict(results, name) for name in TIMED] == [HOLDS, OPEN, OPEN, OPEN]
    second_run(results, "prefill")
    assert [verdict(results, name) for name in TIMED] == [OPEN, HOLDS, HOLDS, HOLDS]


def test_a_second_run_of_one_side_alone_decides_nothing(results):
    second_run(results, "decode")
    del results["again"]["fp16"]
    assert [verdict(results, name) for name in TIMED] == [HOLDS] * 4


def compared(a, b, low, high):
    def change(results):
        results["comparisons"] = [r for r in results["comparisons"] if {r["a"], r["b"]} != {a, b}] + [
            row(a, b, low, high)
        ]

    return change


def put(path, value):
    """Change one value of the results; the path is a sequence of keys."""

    def change(results):
        inner = results
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


def decode_times(name, eager, graph=None, spread=0.01):
    rows = times("ms_per_token", "batch", eager, spread=spread) + times(
        "ms_per_token", "batch", graph or {1: 9.0, 8: 13.0}, "cuda_graph"
    )
    return put(("benchmark", name, "decode"), rows)


def budgets(name, **rates):
    return put(("benchmark", name, "largest_batch"), largest({float(g[1:]): pair for g, pair in rates.items()}))


def noise(ppl, f1):
    seeds = [{"seed": 0, "log_ppl_ratio": row("fp16", "noise", *ppl), "f1": row("fp16", "noise", *f1)}]
    return put(("noise", "seeds"), seeds)


def int8_runs(device):
    def change(results):
        results["failures"] = []
        results["benchmark"]["int8"] = machine(1429.13, 1431.57, {128: 20.0}, {1: 20.0, 8: 21.0}, {}, {}, device)

    return change


NF4 = ("benchmark", "nf4")
FLIPS = [
    ("nf4_beats_full", compared("fp16", "nf4", 0.01, 0.04), FAILS),  # better, but not by five points
    ("nf4_beats_full", compared("fp16", "nf4", -0.08, -0.02), FAILS),
    ("nf4_beats_full", compared("fp16", "nf4", -0.01, 0.06), OPEN),
    ("nf4_beats_full", compared("nf4", "fp16", -0.08, -0.02), HOLDS),  # the pair the other way round
    ("nf4_beats_full", compared("nf4", "fp16", 0.02, 0.08), FAILS),
    ("nf4_matches_full", compared("fp16", "nf4", -0.08, -0.02), FAILS),
    ("nf4_matches_full", compared("fp16", "nf4", -0.009, 0.02), HOLDS),
    ("nf4_matches_full", compared("fp16", "nf4", -0.02, 0.02), OPEN),
    ("fp4_below_nf4", compared("nf4", "fp4", -0.05, -0.01), FAILS),  # worse, but not by nine points
    ("fp4_below_nf4", compared("nf4", "fp4", -0.02, 0.02), FAILS),
    ("fp4_below_nf4", compared("nf4", "fp4", -0.10, 0.02), OPEN),
    ("fp4_below_nf4", compared("fp4", "nf4", 0.05, 0.12), HOLDS),
    ("fp4_below_full", compared("fp16", "fp4", 0.01, 0.02), FAILS),
    ("fp4_below_full", compared("fp16", "fp4", -0.02, 0.02), OPEN),
    ("nf4_pareto", compared("fp16", "nf4", -0.08, -0.02), FAILS),
    ("nf4_pareto", compared("fp16", "nf4", -0.02, 0.02), OPEN),
    ("nf4_pareto", put((*NF4, "memory", "allocated_mb"), 1200.0), FAILS),
    ("fifty_give_direction", put(("redraw", 0, "comparisons", 0, "share_better"), 0.7), FAILS),
    ("fifty_give_direction", compared("fp16", "nf4", -0.08, -0.02), FAILS),  # the draws point the other way
    ("equal_size", put((*NF4, "memory", "reported_footprint_mb"), 965.2), FAILS),
    ("equal_size", put((*NF4, "memory", "allocated_mb"), 980.0), FAILS),
    ("equal_size", put((*NF4, "memory", "allocated_mb"), 966.2), HOLDS),  # the allocator's rounding
    ("equal_size", put((*NF4, "memory", "tensors_mb"), 966.2), FAILS),
    ("size_reduction", put((*NF4, "memory", "reported_footprint_mb"), 1100.0), FAILS),
    ("footprint_is_memory", put((*NF4, "memory", "allocated_mb"), 980.08), FAILS),
    ("prefill_slower", put((*NF4, "prefill"), times("ms", "tokens", {128: 8.0, 512: 60.0})), FAILS),
    ("prefill_slower", put((*NF4, "prefill"), times("ms", "tokens", {128: 12.1, 512: 60.0})), OPEN),
    ("prefill_slower", put((*NF4, "prefill"), times("ms", "tokens", {128: 18.0, 512: 60.0}, spread=0.6)), OPEN),
    (
        "prefill_slower",
        put((*NF4, "prefill"), times("ms", "tokens", {64: 1.0, 128: 18.0, 512: 60.0})),
        HOLDS,
    ),  # 64 is not the paper's
    ("decode_slower", decode_times("nf4", {1: 8.0}), FAILS),
    ("decode_slower", decode_times("nf4", {1: 10.1}), OPEN),
    ("throughput_lower", decode_times("nf4", {1: 15.0, 4: 17.0, 8: 9.0}), FAILS),
    ("throughput_lower", decode_times("nf4", {1: 15.0, 4: 17.0, 8: 12.0}), OPEN),
    ("dequantization_is_the_cause", decode_times("nf4", {1: 15.0}, {1: 4.8, 8: 13.0}), FAILS),
    ("dequantization_is_the_cause", decode_times("nf4", {1: 10.0}), OPEN),
    ("batch_recovers", budgets("nf4", g4=(60, 500.0)), FAILS),
    ("batch_recovers", budgets("fp16", g4=(0, None)), HOLDS),  # full precision does not fit
    ("batch_recovers", budgets("nf4", g8=(60, 500.0)), OPEN),  # no budget in common
    (
        "fp4_is_uniform",
        put(("weights", "codebooks", "fp4"), {"levels": [-1, -0.5, -0.25, 0, 0.0, 0.25, 0.5, 1]}),
        FAILS,
    ),
    ("nf4_is_optimal", put(("weights", "formats", "nf4", "relative_squared_error"), 0.0090), FAILS),
    (
        "weights_are_normal",
        put(("weights", "layers"), [{"ks_distance": 0.01}] * 8 + [{"ks_distance": 0.05}] * 2),
        FAILS,
    ),
    ("weights_are_normal", put(("weights", "layers"), [{"ks_distance": 0.01}] * 9 + [{"ks_distance": 0.05}]), HOLDS),
    ("noise_helps", noise((0.05, 0.1), (-0.03, -0.01)), FAILS),
    ("noise_helps", noise((0.05, 0.1), (-0.03, 0.03)), FAILS),
    ("noise_helps", noise((-0.1, 0.1), (-0.03, 0.03)), OPEN),
    ("noise_helps", noise((0.05, 0.1), (0.01, 0.03)), OPEN),  # perplexity and F1 disagree
    ("noise_helps", noise((-0.1, 0.1), (0.01, 0.03)), HOLDS),
    ("int8_cannot_run", int8_runs("cuda"), FAILS),
    ("int8_cannot_run", int8_runs("cpu"), OPEN),  # not the kernel in question
    (
        "int8_cannot_run",
        put(("failures",), [{"configuration": "int8", "kind": "benchmark", "reason": "no memory"}]),
        OPEN,
    ),
    ("int8_is_fp8", put(("weights", "formats", "int8", "dtype"), "int8"), FAILS),
]


@pytest.mark.parametrize(
    ("name", "change", "expected"), FLIPS, ids=[f"{i}-{name}-{e}" for i, (name, _, e) in enumerate(FLIPS)]
)
def test_results_flip_the_verdict(results, name, change, expected):
    assert verdict(results, name) == HOLDS
    change(results)
    assert verdict(results, name) == expected


def test_every_claim_can_fail():
    assert {name for name, _, expected in FLIPS if expected == FAILS} == set(claims.CLAIMS)


def test_no_direction_to_compare_fifty_with(results):
    for r in results["comparisons"]:
        r["ci_low"], r["ci_high"] = -0.1, 0.1
    assert verdict(results, "fifty_give_direction") == OPEN


def test_nothing_measured_decides_nothing():
    rows = claims.judge({"model": "m"}, PAPER)
    assert {r["verdict"] for r in rows} == {OPEN} and len(rows) == len(claims.CLAIMS)
    assert all("not" in r["evidence"] for r in rows)


@pytest.mark.parametrize("part", ["comparisons", "redraw", "benchmark", "weights", "noise", "failures"])
@pytest.mark.parametrize("value", ["absent", None, "empty"])
def test_a_missing_part_is_said_not_raised(results, part, value):
    if value == "absent":
        del results[part]
    else:
        results[part] = None if value is None else type(results[part])()
    rows = claims.judge(results, PAPER)
    assert any(r["verdict"] == OPEN for r in rows)
    assert all(r["verdict"] == HOLDS or "not" in r["evidence"] for r in rows)


def test_each_missing_piece_of_a_benchmark_is_named(results):
    whole = copy.deepcopy(results)
    for part, names in {
        "memory": {"nf4_pareto", "equal_size", "size_reduction", "footprint_is_memory"},
        "prefill": {"prefill_slower"},
        "decode": {"decode_slower", "throughput_lower", "dequantization_is_the_cause"},
        "largest_batch": {"batch_recovers"},
    }.items():
        results = copy.deepcopy(whole)
        del results["benchmark"]["nf4"][part]
        rows = claims.judge(results, PAPER)
        assert {r["id"] for r in rows if r["verdict"] == OPEN} == names
        assert all("not measured" in r["evidence"] for r in rows if r["verdict"] == OPEN)


def test_a_batch_in_a_budget_of_unknown_size_is_no_evidence(results):
    for row in results["benchmark"]["nf4"]["largest_batch"]:
        del row["allocated_before_mb"]
    (found,) = [r for r in claims.judge(results, PAPER) if r["id"] == "batch_recovers"]
    assert found["verdict"] == OPEN and "not recorded" in found["evidence"]


def test_no_cuda_graph_leaves_the_cause_open(results):
    for data in results["benchmark"].values():
        data["decode"] = [r for r in data["decode"] if r["mode"] == "eager"]
    (found,) = [r for r in claims.judge(results, PAPER) if r["id"] == "dequantization_is_the_cause"]
    assert found["verdict"] == OPEN and "cuda_graph was not measured" in found["evidence"]


def test_weights_and_noise_are_found_in_fidelity(results):
    weights = results.pop("weights")
    own = {"formats": {"nf4": {"relative_squared_error": 0.5}, "gptq": {"relative_squared_error": 0.004}}}
    results["fidelity"] = {
        "nf4": {"weights": own},
        "fp16": {"weights": weights, "noise": results.pop("noise")},
        "int8": None,
    }
    rows = claims.judge(results, PAPER)
    # full precision's analysis measured NF4 like Lloyd-Max, with exact scales; the configuration's own error is another figure
    assert {r["verdict"] for r in rows} == {HOLDS}


def test_an_interval_that_could_not_be_had_gives_its_reason(results):
    for r in results["comparisons"]:
        r.update(
            ci_low=None,
            ci_high=None,
            p=None,
            p_holm=None,
            detectable=None,
            reason="no interval: 9 dialogues are fewer than 10",
        )
    rows = {r["id"]: r for r in claims.judge(results, PAPER)}
    for name in ("nf4_beats_full", "nf4_matches_full", "fp4_below_nf4", "fp4_below_full", "nf4_pareto"):
        assert rows[name]["verdict"] == OPEN and "9 dialogues" in rows[name]["evidence"]


def test_the_scope_says_what_else_differs(results):
    assert all(r["scope"] is None for r in claims.judge(results, PAPER) if r["about"] != "hardware")
    results |= {"model": "smollm2-135m", "is_paper_model": False, "already_quantized": "Q4_1 (GGUF), dequantized"}
    rows = claims.judge(results, PAPER)
    for r in rows:
        if r["about"] == "library":
            assert r["scope"] is None
        else:
            assert "smollm2-135m, not the paper's Llama-3.2-1B" in r["scope"]
            assert ("Q4_1" in r["scope"]) == (r["about"] != "hardware")
    hardware = [
        r["scope"] for r in claims.judge(results | {"same_architecture": True}, PAPER) if r["about"] == "hardware"
    ]
    assert all("not the paper's" not in s and "measured on cuda, in the paper on an NVIDIA A100" in s for s in hardware)


def test_the_evidence_has_the_numbers(results):
    rows = {r["id"]: r for r in claims.judge(results, PAPER)}
    text = rows["nf4_beats_full"]["evidence"]
    assert text.startswith(
        "NF4 minus FP16: +5.0 F1 points, 95% interval +2.0 to +8.0 (500 questions of 50 dialogues; adjusted p 0.04;"
    )
    assert "2357.13 to 965.13 MB, 59.1% smaller" in rows["size_reduction"]["evidence"]
    assert "1.50 at tokens 128, 1.33 at tokens 512" in rows["prefill_slower"]["evidence"]
    assert "+5.00 ms a token in eager mode and +4.00 ms" in rows["dequantization_is_the_cause"]["evidence"]
    assert "(+0.6%)" in rows["nf4_is_optimal"]["evidence"]
    json.dumps(list(rows.values()))


def test_the_papers_numbers():
    rows = {r["id"]: r for r in claims.judge({"model": "m"}, PAPER)}
    assert rows["nf4_beats_full"]["reported"] == "F1 0.676 against 0.625: +5.1 points"
    assert rows["fp4_below_nf4"]["reported"].endswith("-8.9 points")
    assert rows["size_reduction"]["reported"] == "2357.13 to 965.13 MB: 59.1% smaller"
    fp16, nf4 = (PAPER["configurations"][name]["model_size_mb"] for name in ("fp16", "nf4"))
    assert 1 - nf4 / fp16 == pytest.approx(PAPER["size_reduction"], abs=0.001)
    assert all("{" not in r["reported"] and r["section"] and r["claim"] for r in rows.values())


def test_a_claim_without_a_function_is_an_error():
    paper = copy.deepcopy(PAPER)
    paper["claims"][0]["id"] = "nf4_is_magic"
    with pytest.raises(StudyError, match="nf4_beats_full, nf4_is_magic"):
        claims.judge({}, paper)


def test_judges_what_statistics_and_redraw_really_return():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(60), 10)
    base = rng.choice([0.0, 0.5, 1.0], 600)
    loss = {"fp16": 0, "nf4": 0.1, "fp4": 0.4}
    table = {name: {"f1": np.clip(base - x * rng.random(600), 0, 1)} for name, x in loss.items()}
    results = {
        "model": "m",
        "comparisons": compare_all(table, clusters, ["f1"]),
        "redraw": [redraw({n: t["f1"][9::10] for n, t in table.items()}, {("fp16", "nf4"): [], ("fp4", "nf4"): []})],
    }
    rows = {r["id"]: r for r in claims.judge(results, PAPER)}
    assert rows["nf4_beats_full"]["verdict"] == rows["nf4_matches_full"]["verdict"] == FAILS
    assert (
        rows["fp4_below_nf4"]["verdict"]
        == rows["fp4_below_full"]["verdict"]
        == rows["fifty_give_direction"]["verdict"]
        == HOLDS
    )
