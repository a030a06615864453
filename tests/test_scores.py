"""Log-likelihoods by hf-dialogue: HFLM's to 1e-5 in float32, over shared headers, choices, cut and empty contexts."""

import pytest
import torch
from engine import HEADER, SHOTS, byte_tokenizer, choices, small
from lm_eval.models.huggingface import HFLM

from helpers.evaluate.hf_dialogue import HFDialogue
from helpers.evaluate.scores import scores

QUESTIONS = [(shot, choice) for shot in SHOTS for choice in (" A", " B", " a longer choice", " a longer one")]
ODD = [("", "no context"), ("one", " "), ("the end is a space  ", "word"), *[("the same", " twice")] * 2]


def compared(model, tokenizer, pairs, kind="loglikelihood", **options):
    """Stock's and hf-dialogue's answers, and hf-dialogue."""
    mine = HFDialogue(pretrained=model, tokenizer=tokenizer, **options)
    options.pop("prefill_tokens", None)
    stock = getattr(HFLM(pretrained=model, tokenizer=tokenizer, **options), kind)(choices(pairs, kind), True)
    return stock, getattr(mine, kind)(choices(pairs, kind), True), mine


def assert_same(expected, found):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module", params=[False, True], ids=["", "bos"])
def tokenizer(request):
    return byte_tokenizer(bos=request.param)


@pytest.fixture(scope="module")
def tiny(tokenizer):
    return small("llama", tokenizer)


@pytest.mark.parametrize("prefill_tokens", [None, 1, 300])
def test_choices_under_one_header_are_scored_as_stock_does_and_the_header_runs_once(prefill_tokens, tiny, tokenizer):
    expected, found, mine = compared(tiny, tokenizer, QUESTIONS + ODD, prefill_tokens=prefill_tokens)
    assert_same(expected, found)
    if prefill_tokens is None:
        whole = sum(len(tokenizer.encode(a + b)) for a, b in QUESTIONS)
        assert mine.counts["prefill_tokens"] < len(HEADER) + whole // 4 and mine.counts["context_tokens"] > whole


def test_a_greedy_continuation_is_known(tiny, tokenizer):
    mine = HFDialogue(pretrained=tiny, tokenizer=tokenizer)
    tokens = tokenizer.encode(SHOTS[0])
    for _ in range(3):
        tokens.append(int(tiny(torch.tensor([tokens])).logits[0, -1].argmax()))
    made = [((SHOTS[0], ""), tokens[:-3], tokens[-3:]), ((SHOTS[0], ""), tokens[:-3], [*tokens[-3:-1], 5])]
    assert [greedy for _, greedy in mine._loglikelihood_tokens(made, disable_tqdm=True)] == [True, False]


def test_what_is_longer_than_the_model_reads_is_cut_as_stock_cuts_it_and_counted(tiny, tokenizer):
    expected, found, mine = compared(tiny, tokenizer, QUESTIONS, max_length=100)
    assert_same(expected, found)
    assert mine.counts["truncated"] == sum(len(tokenizer.encode(a + b)) > 101 for a, b in QUESTIONS) > 0


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_rolling_windows_add_up_to_stocks(batch_size, tiny, tokenizer):
    texts = [(HEADER * 3,), ("short",), (HEADER + "but not the same",)]
    stock = HFLM(pretrained=tiny, tokenizer=tokenizer, max_length=64)
    mine = HFDialogue(pretrained=tiny, tokenizer=tokenizer, max_length=64, batch_size=batch_size)
    kind = "loglikelihood_rolling"
    expected = stock.loglikelihood_rolling(choices(texts, kind), True)
    assert mine.loglikelihood_rolling(choices(texts, kind), True) == pytest.approx(expected, rel=1e-5)
    assert mine.batch_size == batch_size and mine.counts["requests"] == 8


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_model_that_is_handed_to_stock_is_scored_by_it(batch_size):
    tokenizer = byte_tokenizer()
    expected, found, mine = compared(small("bloom", tokenizer), tokenizer, QUESTIONS, batch_size=batch_size)
    assert_same(expected, found)
    assert list(mine.fallbacks.values()) == [len(QUESTIONS)] and mine.seconds["stock"] > 0


def test_what_stock_refuses_it_refuses_here(tiny, tokenizer):
    mine = HFDialogue(pretrained=tiny, tokenizer=tokenizer)
    with pytest.raises(AssertionError):
        mine.loglikelihood(choices([("a context", "")]), True)


def test_out_of_memory_halves_the_pass_and_scores_nothing_twice(tiny, tokenizer, monkeypatch):
    calls, told = [], []

    def fail_once(slots, groups, dtype=None):
        calls.append(sum(g.weight for g in groups))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return scores(slots, groups, dtype)

    monkeypatch.setattr("helpers.evaluate.scores.scores", fail_once)
    mine = HFDialogue(pretrained=tiny, tokenizer=tokenizer, prefill_tokens=400)
    mine.cache_hook = type("Hook", (), {"add_partial": lambda self, kind, pair, answer: told.append(pair)})()
    found = mine.loglikelihood(choices(QUESTIONS), True)
    assert_same(HFLM(pretrained=tiny, tokenizer=tokenizer).loglikelihood(choices(QUESTIONS), True), found)
    assert mine.counts["out_of_memory"] == 1 and sorted(told) == sorted(QUESTIONS) and calls[0] > max(calls[1:])
