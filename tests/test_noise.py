"""Perturbed weights: what is put in, what comes out, and that everything is put back."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest, rankdata

from helpers import StudyError
from helpers.fidelity import codebooks, noise, sensitivity
from helpers.fidelity import compare as fidelity
from helpers.fidelity import formats as weights
from helpers.setup import coqa


@pytest.fixture(scope="module")
def model(load):
    return load("fp16").model


@pytest.fixture(scope="module")
def texts(load):
    return fidelity.encode(coqa.read("embedded", 1), load("fp16").tokenizer)


@pytest.fixture(scope="module")
def short(texts):
    return [fidelity.Text(texts[0].id, texts[0].ids[:48], texts[0].turn[:48])]


def test_swapped_weights_are_put_back_even_after_an_error(model):
    name = "model.layers.2.mlp.up_proj"
    layer = model.get_submodule(name)
    before = layer.weight.detach().clone()
    with pytest.raises(KeyError), noise.swapped(model, {name: torch.zeros_like(before)}):
        assert layer.weight.abs().max() == 0
        raise KeyError
    assert torch.equal(layer.weight, before)


def test_noise_has_the_asked_size_and_is_gaussian(model):
    errors = {"model.layers.2.mlp.up_proj": 0.0087, "model.layers.5.self_attn.q_proj": 0.02}
    found = noise.gaussian(model, errors, seed=4)
    for name, error in errors.items():
        weight = model.get_submodule(name).weight.detach()
        added = (found[name] - weight).double().flatten().numpy()
        assert (added**2).sum() / (weight.double() ** 2).sum().item() == pytest.approx(error, rel=1e-4)
        assert kstest(added[:50_000] / added.std(), "norm").pvalue > 1e-3
    again, other = noise.gaussian(model, errors, seed=4), noise.gaussian(model, errors, seed=5)
    for name in errors:
        assert torch.equal(found[name], again[name]) and not torch.equal(found[name], other[name])


def test_measure(model, short, study):
    calls = []

    def score(current):
        calls.append(current.model.layers[0].mlp.up_proj.weight.detach().clone())
        return [0.5 - 0.1 * (len(calls) > 1)] * 3, ["a", "a", "b"]

    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    found = noise.measure(model, short, [0, 1], score=score)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before) and torch.equal(calls[0], before)
    assert len(calls) == 4 and not any(torch.equal(a, before) for a in calls[1:])
    size = found["nf4"]["relative_squared_error"]
    assert [row["relative_squared_error"] for row in found["seeds"]] == pytest.approx([size, size], rel=1e-3)
    assert found["tokens"] == len(fidelity.scored(short[0])) and found["dialogues"] == 1
    for row in (found["nf4"], *found["seeds"]):
        assert row["log_ppl_ratio"]["difference"] == pytest.approx(np.log(row["ppl"] / found["full"]["ppl"]))
        assert row["f1"]["difference"] == pytest.approx(-0.1) and row["f1"]["ci_low"] is None
    assert found["seeds"][0]["ppl"] != found["seeds"][1]["ppl"]


def test_nf4_swapped_in_is_the_nf4_configuration(model, load, texts):
    """The dequantized weights in the full-precision model predict as bitsandbytes' own layers do."""
    with noise.swapped(model, noise.nf4(model)):
        ours = fidelity.nll_sums(model, texts)
    assert ours[0][0] == pytest.approx(
        fidelity.nll_sums(load("nf4").model, texts)[0][0], rel=1e-3
    )  # bfloat16 on some CPUs


def test_a_score_of_other_questions_is_an_error(model, short):
    ids = iter([["a", "b"], ["a", "c"]])
    with pytest.raises(StudyError, match="other questions"):
        noise.measure(model, short, [], score=lambda m: ([0.1, 0.2], next(ids)))


def test_f1_comes_from_the_evaluation(load, study, monkeypatch):
    from helpers.evaluate import run as evaluation

    asked = []

    def evaluate(study, loaded):
        asked.append((study.data.dialogues, study.evaluation.max_gen_toks, loaded.model))
        return {"samples": {evaluation.DIALOGUES: [{"f1": 0.25, "doc": {"id": "d", "turn": 1}}]}}

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    marker = object()
    assert noise.f1_scorer(study, load("fp16"))(marker) == ([0.25], ["d"])
    assert asked == [(noise.DIALOGUES["cpu"], noise.ANSWER_TOKENS, marker)]
    few = study.model_copy(update={"data": study.data.model_copy(update={"dialogues": 2})})
    noise.f1_scorer(few, load("fp16"))(marker)
    assert asked[-1][0] == 2


def test_starting_at_a_block_is_exact(model, short):
    """With the blocks before it skipped, a changed block leads to the same loss as a whole forward pass."""
    blocks = sensitivity._blocks(model)
    entering, reference = sensitivity._reference(model, blocks, short)
    assert len(entering) == len(blocks)
    name = "model.layers.20.mlp.down_proj"
    new = {name: weights.round_trips(model.get_submodule(name).weight, "fp4")[0]}
    with noise.swapped(model, new):
        whole = sensitivity._loss(model, short, reference)
        with sensitivity._starting_at(blocks, 20, entering):
            skipped = sensitivity._loss(model, short, reference)
    assert skipped == pytest.approx(whole, rel=1e-3, abs=1e-6) and whole["kl"] > 0
    unchanged = sensitivity._loss(model, short, reference)
    assert unchanged["kl"] == pytest.approx(0, abs=1e-5) and "forward" not in blocks[0].__dict__


def test_loss_is_what_the_comparison_says(model, short):
    _, reference = sensitivity._reference(model, sensitivity._blocks(model), short)
    before, head = fidelity.hidden_states(model, short)[0], model.get_output_embeddings()
    with noise.swapped(model, noise.nf4(model)):
        loss = sensitivity._loss(model, short, reference)
        found = fidelity.compare_text(short[0], before, head, fidelity.hidden_states(model, short)[0], head)
    assert loss["kl"] == pytest.approx(found["kl"].mean(), rel=1e-4)
    assert loss["ln_ratio"] == pytest.approx((found["nll"] - found["nll_full"]).mean(), abs=1e-5)


def test_sensitivity(model, short, monkeypatch):
    monkeypatch.setattr(sensitivity, "FORMATS", ("int8", "nf4", "uniform", "fp4"))
    found = sensitivity.measure(model, short, {"uniform": codebooks.uniform()})
    assert len(found["layers"]) == 2 * len(model.model.layers) and found["tokens"] == len(fidelity.scored(short[0]))
    kl = {row["format"]: row["kl"] for row in found["formats"]}
    assert 0 < kl["int8"] < kl["nf4"] < kl["fp4"]
    blocks = [row["kl"] for row in found["layers"] if row["format"] == "nf4"]
    assert all(0 < value < 10 * kl["nf4"] for value in blocks)
    assert found["spearman"]["layers_nf4"]["n"] == 30 and found["spearman"]["layers_nf4"]["kl_p"] is not None
    fp4 = [row["kl"] for row in found["layers"] if row["format"] == "fp4"]
    assert found["fp4_loses_more"]["count"] == sum(b > a for a, b in zip(blocks, fp4, strict=True)) > 20
    assert found["spearman"]["formats"]["n"] == 4 and found["spearman"]["formats"]["kl_p"] is None


def test_spearman_is_pearson_of_ranks():
    rng = np.random.default_rng(0)
    rows = [
        {"relative_squared_error": e, "kl": e + n, "ln_ratio": 1.0}
        for e, n in zip(rng.random(20), rng.normal(0, 0.2, 20), strict=True)
    ]
    error, kl = ([row[key] for row in rows] for key in ("relative_squared_error", "kl"))
    found = sensitivity.spearman(rows)
    assert found["kl"] == pytest.approx(np.corrcoef(rankdata(error), rankdata(kl))[0, 1])
    assert found["ln_ratio"] is None and found["n"] == 20


def test_sign_test_in_closed_form():
    # 9 of 10: 2 * (1 + 10) / 2^10
    found = sensitivity.sign_test([1.0] * 9 + [-0.5, 0.0])
    assert (found["count"], found["n"]) == (9, 10) and found["p"] == pytest.approx(22 / 1024)
    assert sensitivity.sign_test([0.0])["p"] is None


def test_a_model_without_a_list_of_blocks_is_refused():
    class Other:
        base_model = torch.nn.Linear(2, 2)

    with pytest.raises(StudyError, match="no list of blocks"):
        sensitivity._blocks(Other())
