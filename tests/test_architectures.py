"""Every architecture that hf-dialogue runs answers and scores as lm-eval's HFLM does; every other one is left to it."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from engine import SHOTS, both, byte_tokenizer, choices, conversation, requests, small
from lm_eval.models.huggingface import HFLM

from helpers.evaluate import attention
from helpers.evaluate.architectures import REASONS, SUPPORTED, unsupported
from helpers.evaluate.hf_dialogue import HFDialogue

EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ALL_HEADS = {"num_key_value_heads": None, "head_dim": None}
OPTIONS = {
    "gemma2": {"query_pre_attn_scalar": 16, "final_logit_softcapping": 2.0},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": EXPERTS,
    "gpt_oss": EXPERTS,
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "gpt2": ALL_HEADS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neox": ALL_HEADS,
    "opt": ALL_HEADS | {"ffn_dim": 64, "word_embed_proj_dim": 64},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
}
# With a window that is shorter than the texts, in every way in which a configuration asks for one.
WINDOW = {"sliding_window": 24}
WINDOWS = {
    "mistral": WINDOW,
    "qwen2": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    **{kind: OPTIONS.get(kind, {}) | WINDOW for kind in ("cohere2", "gemma2", "gemma3_text", "gpt_oss", "mixtral")},
    **{kind: WINDOW | {"layer_types": ["sliding_attention", "full_attention"]} for kind in ("ministral", "olmo3")},
    "phi3": WINDOW,
    "starcoder2": WINDOW,
}
# What tiny configurations must be told that big ones are not.
LEFT = {
    "falcon": {"head_dim": None},
    "bloom": {},
    "mamba": {"state_size": 4},
    "lfm2": {"full_attn_idxs": [1]},
}
TEXTS = [*conversation(3, "Rain. "), *SHOTS[:3], "Nothing shared."]
ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 10000.0},
}
PAIRS = [(shot, choice) for shot in SHOTS[:2] for choice in (" A", " a longer choice")]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def assert_alike(model, tokenizer) -> HFDialogue:
    """Answers, packed and static, and log-likelihoods are stock's; returns hf-dialogue."""
    expected, found, mine = both(model, tokenizer, TEXTS, max_gen_toks=8)
    assert found == expected and len(set(expected)) > 3
    static = HFDialogue(pretrained=model, tokenizer=tokenizer, static=True)
    assert static.generate_until(requests(TEXTS, max_gen_toks=8), disable_tqdm=True) == expected
    scores = HFLM(pretrained=model, tokenizer=tokenizer).loglikelihood(choices(PAIRS), True)
    for (value, greedy), (wanted, likely) in zip(mine.loglikelihood(choices(PAIRS), True), scores, strict=True):
        assert value == pytest.approx(wanted, rel=1e-5, abs=1e-5) and greedy == likely
    return mine


@pytest.mark.parametrize("kind", sorted(SUPPORTED))
def test_a_supported_architecture_answers_and_scores_as_stock_does(kind, tokenizer):
    mine = assert_alike(small(kind, tokenizer, **OPTIONS.get(kind, {})), tokenizer)
    assert not mine.fallbacks and mine.counts["prefill_tokens"] < mine.counts["context_tokens"]


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_window_is_looked_through_as_stock_does(kind, tokenizer):
    model = small(kind, tokenizer, **WINDOWS[kind])
    assert not assert_alike(model, tokenizer).fallbacks
    wide = small(kind, tokenizer, **(WINDOWS[kind] | {"sliding_window": 500}))
    tokens = torch.tensor([tokenizer.encode(TEXTS[0])])
    assert not torch.allclose(model(tokens).logits[0, -1], wide(tokens).logits[0, -1]), "the window changes nothing"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_cap_on_scores_holds_where_stocks_attention_has_it(implementation, tokenizer):
    model = small("gemma2", tokenizer, query_pre_attn_scalar=16, attn_logit_softcapping=0.5)
    model.set_attn_implementation(implementation)
    assert not assert_alike(model, tokenizer).fallbacks
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("rope", ROPES)
def test_positions_that_depend_on_the_longest_text_are_left_to_stock(rope, tokenizer):
    limit = max(len(tokenizer.encode(text)) + 8 for text in TEXTS[:-1]) - 1
    setting = ROPES[rope] | {"original_max_position_embeddings": limit}
    model = small("llama", tokenizer, rope_parameters=setting)
    mine = HFDialogue(pretrained=model, tokenizer=tokenizer)
    found = mine.generate_until(requests(TEXTS, max_gen_toks=8), disable_tqdm=True)
    one = HFLM(pretrained=model, tokenizer=tokenizer)
    assert found == [one.generate_until(requests([text], max_gen_toks=8), disable_tqdm=True)[0] for text in TEXTS]
    (reason,) = mine.fallbacks
    assert rope in reason and 0 < mine.fallbacks[reason] < len(TEXTS)


@pytest.mark.parametrize("kind", LEFT)
def test_other_architectures_are_left_to_stock_with_the_reason(kind, tokenizer):
    expected, found, mine = both(small(kind, tokenizer, **LEFT[kind]), tokenizer, TEXTS[:2], stock_batch=8)
    assert found == expected and mine.fallbacks == {f"architecture {kind}: {REASONS[kind]}": 2}


def test_an_argument_of_attention_that_is_not_known_is_never_passed_over(tokenizer):
    with pytest.raises(TypeError, match="Linear passes position_bias to its attention"):
        attention.shared_context(torch.nn.Linear(1, 1), *[None] * 4, position_bias=torch.ones(1))


def test_models_that_can_t_be_run_say_why(tokenizer, tmp_path):
    split = small("llama", tokenizer)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        whole = split.lm_head.weight
        split.lm_head.weight = torch.nn.Parameter(torch.distributed.tensor.distribute_tensor(whole.data, mesh))
        assert "tensor parallel" in unsupported(split)
    finally:
        torch.distributed.destroy_process_group()
    apart = small("llama", tokenizer)
    apart.lm_head.to("meta")
    assert "offloaded" in unsupported(apart)
    apart.parameters = lambda: iter([SimpleNamespace(device=torch.device("cuda", n)) for n in (0, 1)])
    assert unsupported(apart) == "weights on 2 devices"
    both_ways = small("gemma3_text", tokenizer, use_bidirectional_attention=True)
    assert unsupported(both_ways) == "attention to later tokens"
    assert "layers of type chunked_attention" in unsupported(
        small("llama", tokenizer, layer_types=["full_attention", "chunked_attention"])
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the weights fit on the GPU")
def test_weights_that_are_offloaded_are_left_to_stock(tokenizer, tmp_path):
    small("llama", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = {"pretrained": str(tmp_path / "model"), "device": "cpu", "parallelize": True}
    given |= {"offload_folder": str(tmp_path / "disk"), "batch_size": 8}
    stock, mine = HFLM(**given), HFDialogue(**given)
    assert mine.generate_until(requests(SHOTS), True) == stock.generate_until(requests(SHOTS), True)
    pairs = choices([(shot, " because") for shot in SHOTS])
    assert mine.loglikelihood(pairs, True) == stock.loglikelihood(pairs, True)
    assert mine.fallbacks == {"weights that are fetched when they are needed (offloaded)": 2 * len(SHOTS)}


def varlen(query, key, value, queries, keys, most_queries, most_keys, scale, window_size):
    """What torch.nn.attention.varlen.varlen_attn computes on a GPU: texts one behind the other, each query's last key
    its own token."""
    assert most_queries == queries.diff().max() and most_keys == keys.diff().max() and window_size[1] == 0
    mixed = []
    for (a, b), (c, d) in zip(pairwise(queries.tolist()), pairwise(keys.tolist()), strict=True):
        back = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        part = (t.transpose(0, 1) for t in (query[a:b], key[c:d], value[c:d]))
        mixed.append(torch.nn.functional.scaled_dot_product_attention(*part, attn_mask=seen, scale=scale))
    return torch.cat(mixed, 1).transpose(0, 1)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_the_kernel_for_texts_of_different_lengths_is_given_the_right_ones(kind, tokenizer, monkeypatch):
    monkeypatch.setattr(attention, "fast", lambda device, dtype: True)
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    assert not assert_alike(small(kind, tokenizer, **WINDOWS.get(kind, {})), tokenizer).fallbacks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "mistral", "gpt2"])
def test_on_a_gpu_too(kind, tokenizer):
    model = small(kind, tokenizer, **WINDOWS.get(kind, OPTIONS.get(kind, {}))).cuda()
    assert not assert_alike(model, tokenizer).fallbacks
    half = model.bfloat16()  # through FlashAttention's kernel
    wanted = HFLM(pretrained=half, tokenizer=tokenizer).loglikelihood(choices(PAIRS), True)
    found = HFDialogue(pretrained=half, tokenizer=tokenizer).loglikelihood(choices(PAIRS), True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], rel=0.03)
