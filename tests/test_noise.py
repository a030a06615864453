"""Perturbed weights: what is put in, what comes out, and that everything is put back."""

import copy
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kstest

from helpers import StudyError
from helpers.analysis.weight_claims import noise_helps
from helpers.fidelity import formats, perturb, texts
from helpers.schema import DATA
from helpers.setup import coqa
from helpers.setup.layers import linear_layers

OPTIONS = {"confidence": 0.95, "resamples": 200, "seed": 1}


BLOCKS = 4


def beginning(whole) -> torch.nn.Module:
    """A model's first blocks, with its embedding and output layer."""
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers, config.layer_types = BLOCKS, None
    with torch.device("meta"):
        model = type(whole)(config).eval()
    for name in ("embed_tokens", "norm", "rotary_emb"):
        setattr(model.model, name, getattr(whole.model, name))
    model.model.layers, model.lm_head = whole.model.layers[:BLOCKS], whole.lm_head
    return model


@pytest.fixture(scope="module")
def model(load):
    return beginning(load("fp16").model)


@pytest.fixture(scope="module")
def short(load):
    (text,), _ = texts.encode(coqa.read("embedded", 1), load("fp16").tokenizer)
    return [text._replace(ids=text.ids[:48], turn=text.turn[:48])]


def test_swapped_weights_are_put_back_even_after_an_error(model):
    name = "model.layers.2.mlp.up_proj"
    layer = model.get_submodule(name)
    before = layer.weight.detach().clone()
    with pytest.raises(KeyError), perturb.swapped(model, {name: torch.zeros_like(before)}):
        assert layer.weight.abs().max() == 0
        raise KeyError
    assert torch.equal(layer.weight, before)


def test_noise_has_the_size_of_the_error_in_every_block(model):
    name = "model.layers.3.self_attn.q_proj"
    weight = model.get_submodule(name).weight.detach()
    quantized = {name: formats.round_trip(weight, "nf4", double=True)}
    error = (quantized[name] - weight).view(-1, 64)
    added, again, other = ((perturb.noisy(model, quantized, s)[name] - weight).view(-1, 64) for s in (4, 4, 5))
    assert torch.allclose(added.norm(dim=1), error.norm(dim=1), rtol=1e-2)
    gaussian = (added / added.norm(dim=1, keepdim=True) * 8).flatten()[:50_000].double().numpy()
    assert kstest(gaussian, "norm").statistic < 0.01  # on a sphere of 64 dimensions: nearly Gaussian
    assert torch.equal(again, added) and not torch.equal(other, added)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_moves_three_weights_of_ten_by_one_step(dtype):
    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(300, 300, bias=False, dtype=dtype)

        def get_output_embeddings(self):
            return None

    model = One()
    new, detail = perturb.rounding(model, 0)
    power = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
    assert f"2^-{power}" in detail and f"{dtype}".removeprefix("torch.") in detail
    weight = model.a.weight.detach()
    size = weight.double().abs().clamp(min=torch.finfo(dtype).tiny)  # below it numbers are spaced evenly
    step = (new["a"].double() - weight.double()).abs() / size
    assert (step <= 2 * torch.finfo(dtype).eps).all()
    assert 0.2 < (step > 0).double().mean() < 0.45


def test_noise(model, short):
    calls = []

    def score(current):
        calls.append(current.model.layers[0].mlp.up_proj.weight.detach().clone())
        return [0.5 - 0.1 * (len(calls) > 1)] * 3, ["a", "a", "b"]

    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    found = perturb.noise(model, short, [0, 1], OPTIONS, score=score)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before) and torch.equal(calls[0], before)
    assert len(calls) == 4 and not any(torch.equal(a, before) for a in calls[1:])
    assert [(row["kind"], row["seed"]) for row in found["seeds"]] == [("block", 0), ("block", 1)]
    size = found["nf4"]["relative_squared_error"]
    assert found["tokens"] == len(texts.scored(short[0])) and found["dialogues"] == 1
    for row in (found["nf4"], *found["seeds"]):
        assert row["relative_squared_error"] == pytest.approx(size, rel=1e-3)
        assert row["log_ppl_ratio"]["difference"] == pytest.approx(np.log(row["ppl"] / found["full"]["ppl"]))
        assert row["f1"] is not None
    assert found["f1_reason"] is None
    assert found["nf4"]["f1"]["difference"] == pytest.approx(-0.1) and found["nf4"]["f1"]["ci_low"] is None


def test_without_f1_the_claim_says_why():
    limits = {"ln_ratio": 0.05, "ln_low": 0.01, "ln_high": 0.09, "f1_low": None}
    frames = SimpleNamespace(
        noise=pd.DataFrame([{"seed": 0} | limits]), weights={"noise": {"f1_reason": perturb.NOT_SCORED}}
    )
    evidence = noise_helps(SimpleNamespace(f=frames)).evidence
    assert "perplexity 1.05x" in evidence and f"F1 not scored ({perturb.NOT_SCORED})" in evidence


def test_nf4_swapped_in_is_the_nf4_configuration(model, load, short):
    """The dequantized weights in the full-precision model predict as bitsandbytes' own layers do."""
    quantized = beginning(load("nf4").model)
    with perturb.swapped(model, perturb.nf4(model)):
        ours = texts.nll_sums(model, short)
    assert ours[0][0] == pytest.approx(texts.nll_sums(quantized, short)[0][0], rel=2e-3)  # bfloat16 on some CPUs


def test_a_score_of_other_questions_is_an_error(model, short):
    ids = iter([["a", "b"], ["a", "c"]])
    with pytest.raises(StudyError, match="other questions"):
        perturb.noise(model, short, [], OPTIONS, score=lambda m: ([0.1, 0.2], next(ids)))


def test_perplexity_of_block_sizes(model, short):
    rows = [
        {"format": kind, "block_size": size, "ppl": None, "ln_ratio": None}
        for kind, size in (("nf4", 64), ("fp4", 1024), ("nf4", 128), ("uniform", 64))
    ]
    found = perturb.block_sizes(model, short, rows)
    assert [row["ppl"] is not None for row in rows] == [True, True, False, False]
    assert "64 and 1024" in found["reason"] and found["tokens"] == len(texts.scored(short[0]))
    new = {n: formats.round_trip(m.weight, "fp4", 1024) for n, m in linear_layers(model).items()}
    with perturb.swapped(model, new):
        assert rows[1]["ppl"] == pytest.approx(texts.perplexity(texts.nll_sums(model, short)))
    assert rows[0]["ln_ratio"] == pytest.approx(np.log(rows[0]["ppl"] / found["ppl_full"]))


def test_results_are_what_the_schema_says(model, short):
    weights = formats.analyse(model, [64])
    weights["block_sizes_read"] = perturb.block_sizes(model, short, weights["block_sizes"])
    found = {
        "weights": weights,
        "noise": perturb.noise(model, short, [0], OPTIONS),
        "left_out": [],
    }
    DATA["weights"].model_validate(found, context="writing")
    assert "needs a GPU" in found["noise"]["f1_reason"]
    DATA["weights"].model_validate(found | {"noise": {"reason": "no linear layers"}}, context="writing")
