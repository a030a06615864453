"""Decoding that is timed: prompts, transformers' own `generate`, and the samples of both ways to decode.

Prompts are random token ids from the study's seed: speed does not depend on what they say, and random weights have no
tokenizer.
"""

import time

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from helpers.benchmark import decoder, timing

# One sample takes about so long at most, so that slow machines decode fewer tokens.
SAMPLE_SECONDS = {"cpu": 0.25, "cuda": 0.4}
LEAST_TOKENS = 5


def prompt(model, batch: int, tokens: int, seed: int) -> torch.Tensor:
    """Random token ids, int64 [batch, tokens], the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (batch, tokens), generator=generator).to(model.device)


def generate(model, ids: torch.Tensor, new_tokens: int, **options):
    """transformers' own greedy `generate`, exactly `new_tokens` long."""
    lengths = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **lengths, **options
    )


class _Clock(StoppingCriteria):
    """Never stops; notes the time after each token, so that no two noisy runs are subtracted."""

    def __init__(self, device, batch):
        self.device, self.stamps, self.never = device, [], torch.zeros(batch, dtype=torch.bool, device=device)

    def __call__(self, input_ids, scores, **kwargs):
        self.stamps.append(timing.stamp(self.device))
        return self.never


def clocked(model, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """One `generate`: ms to the first token, and ms per token after it."""
    device = ids.device
    clock = _Clock(device, ids.shape[0])
    timing.synchronize(device)
    start = timing.stamp(device)
    generate(model, ids, new_tokens, stopping_criteria=StoppingCriteriaList([clock]))
    timing.synchronize(device)
    first, last = clock.stamps[0], clock.stamps[-1]
    return timing.between_ms(start, first), per_token_ms(first, last, new_tokens)


def per_token_ms(first, last, tokens: int) -> float:
    """Time per output token (ms) from the stamps after the first and after the last of `tokens` tokens."""
    return timing.between_ms(first, last) / (tokens - 1)


def eager_samples(model, ids, sizes) -> tuple[list[float], list[float], int]:
    """Samples of (ms to first token, ms per token) of eager `generate`, and the tokens of each sample.

    The number of tokens shrinks from `sizes.decode_tokens` until a sample takes about SAMPLE_SECONDS.
    """
    kind = ids.device.type
    began = time.perf_counter()
    least = max(2, min(LEAST_TOKENS, sizes.decode_tokens))  # decode is the interval between two tokens
    tokens = max(min(sizes.decode_tokens, int(SAMPLE_SECONDS[kind] * 1e3 / clocked(model, ids, least)[1])), least)
    for _ in range(sizes.warmup - 1):
        if time.perf_counter() - began > timing.CELL_SECONDS[kind] / 3:
            break
        clocked(model, ids, least)
    runs = []
    while len(runs) < sizes.repeats and (
        len(runs) < timing.LEAST_REPEATS or time.perf_counter() - began < timing.CELL_SECONDS[kind]
    ):
        runs.append(clocked(model, ids, tokens))
    return *map(list, zip(*runs, strict=True)), tokens


def decoder_samples(running: decoder.Decoder, sizes) -> tuple[list[float], int]:
    """Samples (ms per token) of a decoder, each from the end of the prompt, and the tokens that one runs to.

    `decode_tokens` of them, fewer where a sample would take more than SAMPLE_SECONDS: over a static cache every step
    does the same work.
    """
    device, run = running.ids.device, running.steps
    least = min(LEAST_TOKENS, sizes.decode_tokens) - 1
    trial = timing.repeat(lambda: run(least), device, repeats=1, warmup=1, before=running.reset)[0] / least
    steps = max(least, min(sizes.decode_tokens - 1, int(SAMPLE_SECONDS[device.type] * 1e3 / trial)))
    seconds = timing.CELL_SECONDS[device.type]
    samples = timing.repeat(lambda: run(steps), device, sizes.repeats, sizes.warmup - 1, seconds, before=running.reset)
    return [ms / steps for ms in samples], steps + 1


def agreement(model, ids, running: decoder.Decoder, count: int, mode: str) -> dict:
    """Greedy tokens of a mode beside eager's, and, where they first part, whether rounding explains it.

    Returns mode, tokens, identical (leading tokens that agree, first row), explained: None if all agree, else whether
    the gap between the two tokens' logits is at most twice what rounding does to eager's own (one pass over the same
    tokens).
    """
    out = generate(model, ids[:1], count, return_dict_in_generate=True, output_logits=True)
    eager, mine = out.sequences[0, ids.shape[1] :].cpu(), running.tokens(count)[0]
    at = leading_equal(eager, mine)
    row = {"mode": mode, "tokens": count, "identical": at, "explained": None}
    if at < count:
        logits = out.logits[at][0].float().cpu()
        with torch.no_grad():
            again = model(input_ids=out.sequences[:1, : ids.shape[1] + at], logits_to_keep=1).logits[0, -1]
        gap = float(logits[int(eager[at])] - logits[int(mine[at])])
        row["explained"] = gap <= 2 * float((logits - again.float().cpu()).abs().max())
    return row


def leading_equal(first: torch.Tensor, second: torch.Tensor) -> int:
    """How many leading entries of two 1-d tensors are equal."""
    same = (first == second).int()
    return int(same.cumprod(0).sum())
