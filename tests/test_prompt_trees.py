"""Random trees of prompts through hf-dialogue and stock lm-eval, in float32: no answer and no score may differ.

By hand, with as many requests as wanted: `python tests/test_prompt_trees.py 5000 --seed 1`."""

import argparse
import logging
import random
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import byte_tokenizer, choices, requests, small
from lm_eval.models.huggingface import HFLM

from helpers.evaluate.hf_dialogue import HFDialogue

WORDS = ["the ", "cat ", "Q: ", "\n", "A:", "blue ", "é", "日本 ", "0", " ", "\n\nQ:", "and so on " * 8, "x" * 70]
STOPS = [["\nQ:"], ["e"], [" "], ["\n", "A"], [], ["\n\n"], ["é"], ["xx", "0"]]
KINDS = {
    "llama": {},
    "mistral": {"sliding_window": 30},
    "gemma3_text": {"sliding_window": 20, "query_pre_attn_scalar": 16},
    "gpt_oss": {"sliding_window": 40, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"num_key_value_heads": None, "head_dim": None, "n_embd": 64, "n_layer": 2, "n_head": 4},
}
CASE = 24  # prompts of a case; as many are scored


def prompts(draw: random.Random) -> list[str]:
    """Texts that grow out of one another, or out of nothing."""
    texts = [draw.choice(WORDS)]
    while len(texts) < CASE:
        stem = draw.choice([*texts, ""])[: draw.choice([None, None, 40, 150])]
        text = stem + "".join(draw.choices(WORDS, k=draw.randint(0, 6)))
        if text and len(text.encode()) < 400:
            texts.append(text)
    return draw.sample(texts, CASE)


def case(seed: int) -> list[str]:
    """What differs in one case of 2 * CASE requests, in words."""
    draw = random.Random(seed)
    tokenizer, kind = byte_tokenizer(bos=draw.random() < 0.5), draw.choice(list(KINDS))
    model, texts = small(kind, tokenizer, **KINDS[kind]), prompts(draw)
    reads = {"max_length": draw.choice([None, None, 170])}
    options = {"static": draw.random() < 0.5, "prefill_tokens": draw.choice([None, 1, 200])}
    options |= {"max_slots": draw.choice([None, 1, 3]), "max_rows": draw.choice([None, 1, 5])}
    asked = {"until": draw.choice(STOPS), "max_gen_toks": draw.randint(1, 24)}
    pairs = [(draw.choice([text, text, ""]), "".join(draw.choices(WORDS, k=draw.randint(1, 2)))) for text in texts]
    pairs = [(a if a.strip() else "", b if b.strip() else "b") for a, b in pairs]  # else stock refuses them
    # Without its cache, which misreads a continuation where another one splits the same text elsewhere.
    stock = HFLM(pretrained=model, tokenizer=tokenizer, logits_cache=False, **reads)
    mine = HFDialogue(pretrained=model, tokenizer=tokenizer, **reads, **options)
    wanted = stock.generate_until(requests(texts, **asked), disable_tqdm=True)
    given = mine.generate_until(requests(texts, **asked), disable_tqdm=True)
    told = [
        f"{kind} {options} {asked} {t!r}: {a!r}, not {b!r}"
        for t, a, b in zip(texts, given, wanted, strict=True)
        if a != b
    ]
    wanted, given = stock.loglikelihood(choices(pairs), True), mine.loglikelihood(choices(pairs), True)
    for pair, (score, greedy), (right, likely) in zip(pairs, given, wanted, strict=True):
        if greedy != likely or score != pytest.approx(right, rel=1e-5, abs=1e-5):
            told.append(f"{kind} {options} {pair}: {score} {greedy}, not {right} {likely}")
    return told + [f"{kind}: {reason}" for reason in mine.fallbacks]


@pytest.mark.parametrize("seed", range(8))
def test_random_trees_of_prompts(seed):
    assert case(seed) == []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("requests", type=int)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=60, help="stop after so long")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    start, done, different = time.time(), 0, 0
    while done < given.requests and time.time() - start < 60 * given.minutes:
        for line in case(given.seed + done):
            different += 1
            print(line, flush=True)
        done += 2 * CASE
    print(f"{done} requests in {time.time() - start:.0f} s, {different} differences")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
