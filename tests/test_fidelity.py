"""Predictions compared on a few shipped dialogues, against direct computations."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from helpers import StudyError, params
from helpers.fidelity import compare as fidelity
from helpers.fidelity import divergence
from helpers.setup import coqa


@pytest.fixture(scope="module")
def dialogues():
    return coqa.read("embedded", 2)


@pytest.fixture(scope="module")
def texts(load, dialogues):
    return fidelity.encode(dialogues, load("fp16").tokenizer)


@pytest.fixture(scope="module")
def compared(study, dialogues):
    """Two dialogues in four configurations."""
    return {
        n: fidelity.compare(study, params.read_configuration(study.study, n), dialogues)
        for n in ("fp16", "int8", "nf4", "fp4")
    }


def test_text_is_what_lm_eval_asks(load, dialogues, texts):
    from lm_eval.tasks.coqa.utils import doc_to_text

    text = load("fp16").tokenizer.decode(texts[0].ids)
    assert text == f"{doc_to_text(dialogues[0])} {dialogues[0]['answers']['input_text'][-1]}\n\n"


def test_every_story_and_answer_token_is_marked(load, dialogues, texts):
    tokenizer = load("fp16").tokenizer
    for dialogue, text in zip(dialogues, texts, strict=True):
        answers = dialogue["answers"]["input_text"]
        assert set(text.turn) == {-1, 0, *range(1, len(answers) + 1)}
        for turn, answer in enumerate(answers, 1):
            assert tokenizer.decode(text.ids[text.turn == turn]).strip() == answer.strip()
        # the very first token has nothing before it
        assert text.turn[0] == -1
        assert (
            tokenizer.decode(text.ids[(text.turn == 0) | (np.arange(len(text.turn)) == 0)]).strip()
            == dialogue["story"].strip()
        )


def test_too_long_or_slow_is_an_error(load, dialogues):
    with pytest.raises(StudyError, match=f"{dialogues[0]['id']}.*the model takes 100"):
        fidelity.encode(dialogues, load("fp16").tokenizer, limit=100)


def test_position_metrics_against_scipy():
    rng = np.random.default_rng(0)
    full, other = (torch.tensor(rng.normal(0, 4, (7, 50)), dtype=torch.float32) for _ in range(2))
    targets = torch.tensor(rng.integers(0, 50, 7))
    found = divergence.position_metrics(full, other, targets)
    p, q = (log_softmax(x.double().numpy(), axis=1) for x in (full, other))
    rows = np.arange(7)
    np.testing.assert_allclose(found["kl"], rel_entr(np.exp(p), np.exp(q)).sum(1), rtol=1e-10)
    np.testing.assert_allclose(found["nll"], -q[rows, targets], rtol=1e-12)
    np.testing.assert_allclose(found["nll_full"], -p[rows, targets], rtol=1e-12)
    np.testing.assert_allclose(found["change"], np.exp(q[rows, targets]) - np.exp(p[rows, targets]), rtol=1e-9)
    np.testing.assert_array_equal(found["agreement"], p.argmax(1) == q.argmax(1))


def test_kl_of_bernoullis_in_closed_form():
    full, other = torch.tensor([[np.log(0.25), np.log(0.75)]]), torch.tensor([[0.0, 0.0]])
    found = divergence.position_metrics(full, other, torch.tensor([0]))
    assert found["kl"][0] == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5))
    assert (found["agreement"][0], found["change"][0]) == (0, pytest.approx(0.25))


def test_perplexity_is_the_models_own_loss(load, texts, compared):
    """transformers' own cross entropy, over the same tokens."""
    model = load("fp16").model
    total = count = 0
    with torch.inference_mode():
        for text in texts:
            labels = torch.where(torch.from_numpy(text.turn) >= 0, text.ids, -100)
            n = int((labels != -100).sum())
            total, count = total + model(text.ids[None], labels=labels[None]).loss.item() * n, count + n
    ours = compared["nf4"]["perplexity"]["all"]
    assert ours["full"] == pytest.approx(np.exp(total / count), rel=1e-5) and ours["tokens"] == count
    assert sum(s for s, _ in fidelity.nll_sums(model, texts)) == pytest.approx(total, rel=1e-5)


def test_chunks_change_nothing(load, texts, monkeypatch):
    full, nf4 = load("fp16").model, load("nf4").model
    states = [fidelity.hidden_states(m, texts[:1])[0] for m in (full, nf4)]
    heads = [m.get_output_embeddings() for m in (full, nf4)]
    whole = fidelity.compare_text(texts[0], states[0], heads[0], states[1], heads[1])
    monkeypatch.setattr(fidelity, "chunk_positions", lambda vocabulary: 37)
    parts = fidelity.compare_text(texts[0], states[0], heads[0], states[1], heads[1])
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-4)


def test_a_padded_batch_reads_the_same(load, texts):
    model = load("fp16").model
    lengths = {len(t.ids) for t in texts}
    assert len(lengths) == 2  # so that one is padded
    for alone, together in zip(
        [fidelity.hidden_states(model, [t])[0] for t in texts], fidelity.hidden_states(model, texts), strict=True
    ):
        torch.testing.assert_close(alone, together, atol=2e-3, rtol=1e-3)


def test_more_bits_are_closer(compared):
    ppl = {name: row["perplexity"]["all"] for name, row in compared.items()}
    assert ppl["fp16"]["full"] <= ppl["int8"]["quantized"] < ppl["nf4"]["quantized"] < ppl["fp4"]["quantized"]
    kl = {name: row["kl"]["mean"] for name, row in compared.items()}
    assert kl["fp16"] < 1e-6 < kl["int8"] < kl["nf4"] < kl["fp4"]
    assert (
        compared["fp16"]["agreement"]
        > 0.999
        > compared["int8"]["agreement"]
        > compared["nf4"]["agreement"]
        > compared["fp4"]["agreement"]
    )


def test_sums_by_dialogue_give_the_whole_back(compared):
    found = compared["nf4"]
    parts = [d[g] for d in found["per_dialogue"] for g in ("story", "answers")]
    count = sum(p["count"] for p in parts)
    assert count == found["tokens"]
    assert sum(p["kl"] for p in parts) / count == pytest.approx(found["kl"]["mean"])
    assert sum(p["agreement"] for p in parts) / count == pytest.approx(found["agreement"])
    assert sum(p["nll"] - p["nll_full"] for p in parts) / count == pytest.approx(found["perplexity"]["all"]["ln_ratio"])
    assert sum(p["change"] for p in parts) / count == pytest.approx(found["correct_token"]["mean"])
    assert np.sqrt(sum(p["change_squared"] for p in parts) / count) == pytest.approx(found["correct_token"]["rms"])
    story = [d["story"] for d in found["per_dialogue"]]
    assert np.exp(sum(s["nll"] for s in story) / sum(s["count"] for s in story)) == pytest.approx(
        found["perplexity"]["story"]["quantized"]
    )


def test_questions_join_with_scores(compared, dialogues):
    rows = compared["nf4"]["per_question"]
    keys = [(d["id"], t) for d in dialogues for t in d["answers"]["turn_id"]]
    assert [(r["id"], r["turn"]) for r in rows] == keys
    weighted = sum(r["kl"] * r["tokens"] for r in rows) / sum(r["tokens"] for r in rows)
    assert weighted == pytest.approx(compared["nf4"]["kl"]["by_group"]["answers"]["mean"])


def test_below_ten_dialogues_there_is_no_interval(compared):
    found = compared["nf4"]
    for row in (
        found["perplexity"]["all"],
        *found["kl"]["intervals"].values(),
        found["agreement_interval"],
        *found["correct_token"]["intervals"].values(),
    ):
        assert row["ci_low"] is None and "2 dialogues are fewer than 10" in row["reason"]


def test_states_on_disk_give_the_same_numbers(study, dialogues, compared):
    """Both placements, on the same dialogues: equal to the last digit."""
    apart = fidelity.compare(study, params.read_configuration(study.study, "nf4"), dialogues, side_by_side=False)
    together = compared["nf4"]
    assert "disk" in apart["placement"] and "side by side" in together["placement"]
    assert "weights" not in apart and "fit" in apart["weights_reason"]
    for key in ("perplexity", "kl", "agreement", "correct_token", "per_dialogue", "per_question", "arithmetic"):
        assert apart[key] == together[key]


def test_room_decides_the_placement(load, monkeypatch):
    model = load("fp16").model
    monkeypatch.setattr(fidelity, "free_bytes", lambda device: model.get_memory_footprint() + fidelity.SPARE_BYTES + 1)
    assert fidelity.fits_beside(model)
    monkeypatch.setattr(fidelity, "free_bytes", lambda device: model.get_memory_footprint() + fidelity.SPARE_BYTES)
    assert not fidelity.fits_beside(model)


def test_a_model_that_scales_its_logits_is_refused(load, texts, monkeypatch):
    model = load("fp16").model
    fidelity.check_head(model, texts[0])
    forward = model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    monkeypatch.setattr(model, "forward", scaled)
    with pytest.raises(StudyError, match="changes its logits"):
        fidelity.check_head(model, texts[0])


def made_up_rows(rng, dialogues: int, tokens: int = 80):
    """Per-position metrics with a shift by dialogue."""
    turns = [np.repeat([0, 1, 2], [tokens - 20, 12, 8]) for _ in range(dialogues)]
    rows = []
    for shift in rng.normal(0, 0.1, dialogues):
        full = rng.exponential(2, tokens)
        nll = full + rng.normal(0.2 + shift, 0.3, tokens)
        kl = rng.gamma(0.5, np.exp(shift), tokens)
        rows.append(
            {
                "nll_full": full,
                "nll": nll,
                "kl": kl,
                "agreement": (kl < 0.5).astype(float),
                "change": np.exp(-abs(nll)) - np.exp(-full),
            }
        )
    return [f"d{i}" for i in range(dialogues)], turns, rows


def test_summary_against_numpy(study):
    ids, turns, rows = made_up_rows(np.random.default_rng(1), 12)
    found = divergence.summarize(ids, turns, rows, study)
    kl = np.concatenate([r["kl"] for r in rows])
    expected = [kl.mean(), *np.quantile(kl, [0.5, 0.95, 0.99, 0.999]), kl.max()]
    assert [found["kl"][k] for k in ("mean", "median", "p95", "p99", "p999", "max")] == pytest.approx(expected)
    change = np.concatenate([r["change"] for r in rows])
    assert found["correct_token"]["rms"] == pytest.approx(np.sqrt((change**2).mean()))
    assert [found["correct_token"][f"p{p}"] for p in (1, 25, 50, 99)] == pytest.approx(
        np.quantile(change, [0.01, 0.25, 0.5, 0.99])
    )
    difference = np.concatenate([r["nll"] - r["nll_full"] for r in rows])
    row = found["perplexity"]["all"]
    assert row["ln_ratio"] == pytest.approx(difference.mean()) and row["ci_low"] < row["ln_ratio"] < row["ci_high"]
    assert row["ratio"] == pytest.approx(np.exp(row["ln_ratio"])) and row["ratio"] == pytest.approx(
        row["quantized"] / row["full"]
    )


def test_intervals_of_percentiles_are_those_of_a_plain_bootstrap():
    """Resampling whole dialogues by hand, with numpy's own percentile of the drawn values."""
    rng = np.random.default_rng(2)
    owner = np.repeat(np.arange(15), rng.integers(40, 80, 15))
    values = rng.gamma(1, np.exp(rng.normal(0, 0.5, 15))[owner])
    options = {"confidence": 0.95, "seed": 3}
    ours = divergence.percentile_intervals(values, owner, {"median": 50, "p95": 95}, options, resamples=4000)
    drawn = [np.concatenate([values[owner == g] for g in rng.integers(0, 15, 15)]) for _ in range(4000)]
    for name, percent in (("median", 50), ("p95", 95)):
        plain = np.quantile([np.percentile(d, percent) for d in drawn], [0.025, 0.975])
        assert [ours[name]["ci_low"], ours[name]["ci_high"]] == pytest.approx(plain, rel=0.06)
