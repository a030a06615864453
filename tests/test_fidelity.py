"""Predictions compared on two short dialogues, against direct computations."""

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from scipy.special import log_softmax, rel_entr

from helpers import StudyError, params, results
from helpers.fidelity import compare, formats, perturb, texts
from helpers.schema import DATA
from helpers.setup import coqa, methods, models
from helpers.setup.layers import linear_layers

OPTIONS = {"confidence": 0.95, "resamples": 500, "seed": 3}


@pytest.fixture(scope="module")
def dialogues():
    """The beginnings of two shipped dialogues, of unequal length."""
    found = []
    for dialogue, words in zip(coqa.read("embedded", 2), (70, 90), strict=True):
        columns = {key: {k: v[:4] for k, v in dialogue[key].items()} for key in ("questions", "answers")}
        found.append(dialogue | columns | {"story": " ".join(dialogue["story"].split()[:words]), "data_set": "ours"})
    return found


@pytest.fixture(scope="module")
def read(load, dialogues):
    return texts.encode(dialogues, load("fp16").tokenizer)[0]


@pytest.fixture(scope="module")
def run(study, load, dialogues, tmp_path_factory):
    """`compare` of a configuration with the session's models and a cache of this module's."""
    loaded = {name: load(name) for name in ("fp16", "int8", "nf4", "fp4")} | {"full": load("fp16")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(models, "load", lambda _, configuration: loaded[configuration.configuration])
        yield lambda name, **update: compare.compare(
            study.model_copy(update=update), params.read_configuration(study.study, name), dialogues
        )


@pytest.fixture(scope="module")
def compared(run):
    return {name: run(name) for name in ("fp16", "int8", "nf4", "fp4")}


def test_text_is_what_lm_eval_asks(load, dialogues, read):
    from lm_eval.tasks.coqa.utils import doc_to_text

    text = load("fp16").tokenizer.decode(read[0].ids)
    assert text == f"{doc_to_text(dialogues[0])} {dialogues[0]['answers']['input_text'][-1]}\n\n"


def test_every_story_and_answer_token_is_marked(load, dialogues, read):
    tokenizer = load("fp16").tokenizer
    for dialogue, text in zip(dialogues, read, strict=True):
        answers = dialogue["answers"]["input_text"]
        assert set(text.turn) == {-1, 0, *range(1, len(answers) + 1)} and text.data_set == "ours"
        for turn, answer in enumerate(answers, 1):
            assert tokenizer.decode(text.ids[text.turn == turn]).strip() == answer.strip()
        assert text.turn[0] == -1  # nothing comes before the very first token
        first = (text.turn == 0) | (np.arange(len(text.turn)) == 0)
        assert tokenizer.decode(text.ids[first]).strip() == dialogue["story"].strip()


def test_too_long_a_dialogue_is_left_out_and_said(load, dialogues, read):
    sizes = [len(text.ids) for text in read]
    kept, left_out = texts.encode(dialogues, load("fp16").tokenizer, limit=max(sizes) - 1)
    assert [t.id for t in kept] == [read[int(np.argmin(sizes))].id]
    assert [(r["tokens"], r["data_set"]) for r in left_out] == [(max(sizes), "ours")]
    assert f"more than the model takes ({max(sizes) - 1})" in left_out[0]["reason"]
    with pytest.raises(StudyError, match=r"all 2 dialogues are longer.*30 tokens"):
        texts.encode(dialogues, load("fp16").tokenizer, limit=30)


def test_position_metrics_against_scipy():
    rng = np.random.default_rng(0)
    full, other = (torch.tensor(rng.normal(0, 4, (19, 50)), dtype=torch.float32) for _ in range(2))
    targets = torch.tensor(rng.integers(0, 50, 19))
    found = compare.position_metrics(full, other, targets)
    p, q = (log_softmax(x.double().numpy(), axis=1) for x in (full, other))
    rows = np.arange(19)
    np.testing.assert_allclose(found["kl"], rel_entr(np.exp(p), np.exp(q)).sum(1), rtol=1e-10)
    np.testing.assert_allclose(found["nll"], -q[rows, targets], rtol=1e-12)
    np.testing.assert_allclose(found["nll_full"], -p[rows, targets], rtol=1e-12)
    np.testing.assert_allclose(found["confidence"], np.exp(p).max(1), rtol=1e-12)
    np.testing.assert_array_equal(found["agreement"], p.argmax(1) == q.argmax(1))


def test_kl_of_bernoullis_in_closed_form():
    full, other = torch.tensor([[np.log(0.25), np.log(0.75)]]), torch.tensor([[0.0, 0.0]])
    found = compare.position_metrics(full, other, torch.tensor([0]))
    assert found["kl"][0] == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5))
    assert found["agreement"][0] == 0


def test_perplexity_is_the_models_own_loss(load, read, compared):
    """transformers' own cross entropy, over the same tokens; in float32, which is wrong by 2e-5 on a CPU."""
    model = load("fp16").model
    total = count = 0
    with torch.inference_mode():
        for text in read:
            labels = torch.where(torch.from_numpy(text.turn) >= 0, text.ids, -100)
            n = int((labels != -100).sum())
            total, count = total + model(text.ids[None], labels=labels[None]).loss.item() * n, count + n
    ours = compared["nf4"]["perplexity"]["all"]
    assert ours["full"] == pytest.approx(np.exp(total / count), rel=1e-4) and ours["tokens"] == count
    assert np.log(ours["full"]) * count == pytest.approx(sum(s for s, _ in texts.nll_sums(model, read)), rel=1e-7)


def test_chunks_change_nothing(load, read, monkeypatch):
    full, nf4 = load("fp16").model, load("nf4").model
    states = [texts.hidden_states(m, read[:1])[0] for m in (full, nf4)]
    heads = [m.get_output_embeddings() for m in (full, nf4)]
    whole = compare.compare_text(read[0], states[0], heads[0], states[1], heads[1])
    monkeypatch.setattr(compare, "chunk_positions", lambda vocabulary: 37)
    parts = compare.compare_text(read[0], states[0], heads[0], states[1], heads[1])
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-4)


def test_a_padded_batch_reads_the_same(load, read):
    model = load("fp16").model
    assert len({len(t.ids) for t in read}) == 2  # so that one is padded
    alone = [texts.hidden_states(model, [t])[0] for t in read]
    torch.testing.assert_close(alone, texts.hidden_states(model, read), atol=2e-3, rtol=1e-3)


def test_more_bits_are_closer(compared):
    kl = {name: row["kl"]["mean"] for name, row in compared.items()}
    assert kl["fp16"] == 0 < kl["int8"] < kl["nf4"] < kl["fp4"]
    agreement = {name: row["agreement"] for name, row in compared.items()}
    assert agreement["fp16"] == 1 > agreement["int8"] > agreement["nf4"]
    ppl = {name: row["perplexity"]["all"] for name, row in compared.items()}
    assert ppl["fp16"]["full"] == ppl["fp16"]["quantized"] < ppl["nf4"]["quantized"] < ppl["fp4"]["quantized"]


def test_results_are_what_the_schema_says(compared):
    for found in compared.values():
        DATA["fidelity"].model_validate(found, context="writing")
    found = compared["nf4"]
    with pytest.raises(ValidationError, match="surprise"):
        DATA["fidelity"].model_validate(found | {"kl": found["kl"] | {"surprise": 1}}, context="writing")
    less = {key: value for key, value in found["kl"].items() if key != "by_confidence"}
    with pytest.raises(ValidationError, match="by_confidence"):
        DATA["fidelity"].model_validate(found | {"kl": less}, context="writing")
    DATA["fidelity"].model_validate(found | {"kl": less})  # as schema 1 wrote it


def test_results_of_the_first_round_are_readable(study):
    from helpers import ROOT

    (path,) = (ROOT / "executed/reference").glob("*/smollm2-135m/nf4/fidelity.json")
    assert results.read(path).data["kl"]["mean"] > 0


def test_sums_by_dialogue_give_the_whole_back(compared):
    found = compared["nf4"]
    parts = [d[g] for d in found["per_dialogue"] for g in ("story", "answers")]
    count = sum(p["count"] for p in parts)
    assert count == found["tokens"]
    assert sum(p["kl"] for p in parts) / count == pytest.approx(found["kl"]["mean"])
    assert sum(p["agreement"] for p in parts) / count == pytest.approx(found["agreement"])
    assert sum(p["nll"] - p["nll_full"] for p in parts) / count == pytest.approx(found["perplexity"]["all"]["ln_ratio"])
    story = [d["story"] for d in found["per_dialogue"]]
    ppl = np.exp(sum(s["nll"] for s in story) / sum(s["count"] for s in story))
    assert ppl == pytest.approx(found["perplexity"]["story"]["quantized"])


def test_confidence_splits_all_positions(compared):
    found = compared["nf4"]
    rows = found["kl"]["by_confidence"]
    assert [(r["low"], r["high"]) for r in rows] == [(0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1)]
    assert sum(r["count"] for r in rows) == found["tokens"]
    assert sum(r["count"] * (r["kl"] or 0) for r in rows) == pytest.approx(found["kl"]["mean"] * found["tokens"])
    assert rows[-1]["agreement"] > rows[0]["agreement"]


def test_questions_join_with_scores(compared, dialogues):
    rows = compared["nf4"]["per_question"]
    keys = [("ours", d["id"], t) for d in dialogues for t in d["answers"]["turn_id"]]
    assert [(r["data_set"], r["id"], r["turn"]) for r in rows] == keys
    weighted = sum(r["kl"] * r["tokens"] for r in rows) / sum(r["tokens"] for r in rows)
    assert weighted == pytest.approx(compared["nf4"]["kl"]["by_group"]["answers"]["mean"])


def test_below_ten_dialogues_there_is_no_interval(compared):
    found = compared["nf4"]
    for row in [found["perplexity"]["all"], *found["kl"]["intervals"].values()]:
        assert row["ci_low"] is None and "2 dialogues are fewer than 10" in row["reason"]


def test_full_precision_says_what_no_difference_is(compared):
    batch, rounding = compared["fp16"]["floor"]
    assert (batch["kind"], rounding["kind"]) == ("batch shape", "weight rounding") and "2^-24" in rounding["detail"]
    assert 0 <= batch["kl"] < 1e-9 and 0 < rounding["kl"] < 1e-3 * compared["int8"]["kl"]["mean"]
    assert rounding["tokens"] == compared["fp16"]["tokens"] and compared["nf4"]["floor"] is None


def test_full_precision_is_read_once_for_all_configurations(run, compared):
    assert compared["nf4"]["baseline"] == {"dtype": "float32"}
    (path,) = (compare.CACHE / "fidelity").glob("*")
    before = path.stat().st_mtime_ns
    run("int8")
    assert path.stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:1000])  # half a file is read again, not believed
    again = run("int8")
    assert path.stat().st_size > 1000
    for key in ("perplexity", "kl", "agreement", "per_dialogue"):
        assert again[key] == compared["int8"][key]


def test_other_tokens_are_read_anew(study, load, read):
    full = load("fp16")
    first = compare.reference(study, full, read[:1], "test")
    (path,) = (compare.CACHE / "fidelity").glob("*-test-*")
    compare.reference(study, full, [read[0]._replace(ids=read[0].ids.flip(0))], "test")
    assert [other != path for other in (compare.CACHE / "fidelity").glob("*-test-*")] == [True]
    torch.testing.assert_close(first[0], texts.hidden_states(full.model, read[:1])[0])


def test_without_room_for_two_models_only_the_weights_are_missing(run, compared, load, monkeypatch):
    size = load("fp16").model.get_memory_footprint() + compare.SPARE_BYTES
    for free, fits in ((size + 1, True), (size, False)):
        memory = type("Memory", (), {"available": free})
        monkeypatch.setattr(compare.psutil, "virtual_memory", lambda memory=memory: memory)
        assert compare.fits_beside(load("fp16").model) == fits
    found = run("int8")
    assert "did not fit" in found["weights"]["formats"]["int8"]["reason"]
    assert found["kl"] == compared["int8"]["kl"]
    assert compared["int8"]["weights"]["formats"]["int8"]["relative_squared_error"] > 0


def test_a_model_that_scales_its_logits_is_refused(load, read, monkeypatch):
    model = load("fp16").model
    texts.check_head(model, read[0])
    forward = model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    monkeypatch.setattr(model, "forward", scaled)
    with pytest.raises(StudyError, match="changes its logits"):
        texts.check_head(model, read[0])


def made_up(rng, dialogues: int, tokens: int = 80):
    """Texts, and per-position metrics with a shift by dialogue."""
    turn = np.repeat([-1, 0, 1, 2], [1, tokens - 20, 12, 8])
    rows = []
    for shift in rng.normal(0, 0.1, dialogues):
        full = rng.exponential(2, tokens)
        nll = full + rng.normal(0.2 + shift, 0.3, tokens)
        kl = rng.gamma(0.5, np.exp(shift), tokens)
        row = {"nll_full": full, "nll": nll, "kl": kl, "agreement": (kl < 0.5).astype(float)}
        rows.append(row | {"confidence": rng.uniform(0, 1, tokens)})
    ids = torch.zeros(tokens + 1, dtype=torch.long)
    return [texts.Text("set", f"d{i}", ids, turn) for i in range(dialogues)], rows


def test_summary_against_numpy():
    found = compare.summarize(*(parts := made_up(np.random.default_rng(1), 12)), OPTIONS)
    kl, nll, full = (np.concatenate([r[k] for r in parts[1]]) for k in ("kl", "nll", "nll_full"))
    expected = [kl.mean(), *np.quantile(kl, [0.5, 0.99], method="inverted_cdf"), kl.max()]
    assert [found["kl"][k] for k in ("mean", "median", "p99", "max")] == pytest.approx(expected)
    assert set(found["kl"]["intervals"]) == {"mean", "median", "p99"}
    for name in ("mean", "median"):
        assert found["kl"]["intervals"][name]["ci_low"] < found["kl"][name] < found["kl"]["intervals"][name]["ci_high"]
    row = found["perplexity"]["all"]
    assert row["ln_ratio"] == pytest.approx((nll - full).mean()) and row["ci_low"] < row["ln_ratio"] < row["ci_high"]
    assert row["ratio"] == pytest.approx(row["quantized"] / row["full"])


def test_a_text_file_is_cut_as_llama_cpp_cuts_it(load, tmp_path):
    tokenizer, path = load("fp16").tokenizer, tmp_path / "wiki.raw"
    path.write_text("One day a fox came by. " * 250, encoding="utf-8")
    ids = tokenizer(path.read_text())["input_ids"]
    found = texts.windows(str(path), tokenizer)
    assert len(found) == len(ids) // 512 and found[1].ids.tolist() == ids[512:1024]
    # n_ctx 512: predictions 256 to 510, of tokens 257 to 511
    assert texts.scored(found[0]).tolist() == list(range(257, 512)) and found[0].data_set == "wiki.raw"
    assert len(texts.windows(str(path), tokenizer, limit=100)[0].ids) == 100


def test_a_window_begins_with_the_tokenizers_first_token(tmp_path):
    class Tokenizer:
        def __call__(self, text, **_):
            return {"input_ids": [1, *range(2, 2 + len(text))]}

    path = tmp_path / "text"
    path.write_text("x" * 40)
    assert [t.ids[0].item() for t in texts.windows(str(path), Tokenizer(), limit=10)] == [1, 1, 1, 1]


def test_full_precision_is_read_in_the_dtype_of_a_packed_kernel(monkeypatch):
    """GPTQ's and AWQ's kernel computes in bfloat16 on a GPU, whatever the study's dtype is."""
    monkeypatch.setattr(methods, "kernel_dtype", lambda options: "bfloat16" if options.method == "gptq" else None)
    for name, dtype in (("gptq", "bfloat16"), ("nf4", "auto"), ("int4", "bfloat16")):
        full = compare.full_precision(params.read_configuration("smollm2-135m", name))
        assert (full.dtype, full.quantization.method) == (dtype, "none")


def test_text_files_that_cannot_be_read_are_reasons(load, tmp_path):
    tokenizer = load("fp16").tokenizer
    assert "no file missing.txt" in results.or_reason(texts.windows, "missing.txt", tokenizer)["reason"]
    (tmp_path / "short").write_text("a few words")
    assert "at least 1024" in results.or_reason(texts.windows, str(tmp_path / "short"), tokenizer)["reason"]
    (tmp_path / "latin").write_bytes(b"caf\xe9 " * 2000)
    assert "not UTF-8" in results.or_reason(texts.windows, str(tmp_path / "latin"), tokenizer)["reason"]


def test_a_text_file_in_the_result(run, tmp_path, monkeypatch):
    path = tmp_path / "wiki.raw"
    path.write_text("One day a fox came by. " * 20)
    monkeypatch.setattr(texts, "WINDOW", 40)
    monkeypatch.setitem(compare.WINDOWS, "cpu", 2)
    found = run("int8", fidelity=type("F", (), {"text": str(path)}))["text"]
    assert (found["file"], found["window"], found["windows"], found["tokens"]) == ("wiki.raw", 40, 2, 38)
    assert found["windows_in_file"] > 2 and found["kl"] > 0 and "2 dialogues" in found["reason"]
    assert found["ln_ratio"] == pytest.approx(np.log(found["quantized"] / found["full"]))


# ---- models of other kinds ----


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=100, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def test_what_conv1d_layers_do_not_allow_has_a_reason(gpt2):
    text = texts.Text("set", "d", torch.arange(20), np.r_[-1, np.zeros(19, int)])
    for part in (
        lambda: formats.analyse(gpt2, [64]),
        lambda: perturb.noise(gpt2, [text], [0], OPTIONS),
    ):
        assert "GPT2LMHeadModel has no" in results.or_reason(part)["reason"]
    assert texts.nll_sums(gpt2, [text])[0][1] == 19
    floor = compare.noise_floor(gpt2, [text], texts.hidden_states(gpt2, [text]), 0)
    assert [row["kind"] for row in floor] == ["batch shape", "weight rounding"] and floor[1]["kl"] > 0


def test_the_error_of_conv1d_layers_is_that_of_their_linear_image(gpt2, study):
    """bitsandbytes turns Conv1D (in, out) into linear layers (out, in)."""

    class Quantized(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = torch.nn.Module()
            self.transformer.wpe = torch.nn.Linear(64, 192, bias=False)
            self.transformer.wpe.weight.data = gpt2.transformer.h[0].attn.c_attn.weight.T * 1.1

        def get_output_embeddings(self):
            return None

    original = torch.nn.Module()
    original.transformer = torch.nn.Module()
    original.transformer.wpe = gpt2.transformer.h[0].attn.c_attn
    nf4 = params.read_configuration(study.study, "nf4")
    assert formats.own_error(original, Quantized(), nf4)["relative_squared_error"] == pytest.approx(0.01, rel=1e-4)


def test_awq_has_no_error_of_its_own(load, study):
    awq, model = params.read_configuration(study.study, "awq"), load("fp16").model
    assert "not comparable" in results.or_reason(formats.own_error, model, model, awq)["reason"]
    assert linear_layers(model)


def test_a_part_that_raises_is_a_reason():
    def fails():
        raise RuntimeError("CUDA out of memory\nmore")

    assert results.or_reason(fails) == {"reason": "RuntimeError: CUDA out of memory"}
    assert results.or_reason(lambda: {"a": 1}) == {"a": 1}
