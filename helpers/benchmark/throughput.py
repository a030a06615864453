"""Decode: time to first token, time per output token, tokens per second, energy, and whether the modes agree.

*Time to first token* is `generate` from its call to its first token. *Time per output token* is the interval between tokens after the
first, decode alone. *Mode* is how a step is started, always named (`helpers.decode`): "eager" is `model.generate`, greedy, as the
paper ran it; "cuda_graph" the same step captured over a static cache; "compile" that step compiled, then captured.

    found = throughput.eager_pass(loaded, sizes, seed, hardware, kv_bytes)
    found.decode        # a row per batch size

In eager mode a stopping criterion that never stops notes the time after each token, so that prefill and decode are told apart within
one run of `generate` and no two noisy runs are subtracted. Prompts are random token ids from the study's seed: speed does not
depend on what they say, and random weights have no tokenizer. Every cell keeps its samples; a slow one stops early
(`timing.CELL_SECONDS`).
"""

import time
from typing import NamedTuple

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from helpers.benchmark import conditions, decoder, roofline, timing

SAMPLE_SECONDS = {
    "cpu": 0.8,
    "cuda": 0.4,
}  # one sample takes about so long at most, so slow machines decode fewer tokens
LEAST_TOKENS = 5
ENERGY_SECONDS = 1.5  # the counter moves every 0.1 s or so
AGREEMENT_TOKENS = 32
PROFILED_STEPS = 8


class Clocked(NamedTuple):
    """One run of `generate`: ms to the first token, ms per token after it, and the tokens [batch, n] on the CPU."""

    first_ms: float
    ms_per_token: float
    tokens: torch.Tensor


def prompt(model, batch: int, tokens: int, seed: int) -> torch.Tensor:
    """Random token ids, int64 [batch, tokens], the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (batch, tokens), generator=generator).to(model.device)


class _Clock(StoppingCriteria):
    def __init__(self, device, batch):
        self.device, self.stamps, self.never = device, [], torch.zeros(batch, dtype=torch.bool, device=device)

    def __call__(self, input_ids, scores, **kwargs):
        self.stamps.append(timing.stamp(self.device))
        return self.never


def generate(model, ids: torch.Tensor, new_tokens: int, **options):
    """transformers' own greedy `generate`, exactly `new_tokens` long."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        **options,
    )


def clocked(model, ids: torch.Tensor, new_tokens: int) -> Clocked:
    """Time one `generate`. ms per token is (last - first) / (n - 1)."""
    device = ids.device
    clock = _Clock(device, ids.shape[0])
    timing.synchronize(device)
    start = timing.stamp(device)
    out = generate(model, ids, new_tokens, stopping_criteria=StoppingCriteriaList([clock]))
    timing.synchronize(device)
    first, last = clock.stamps[0], clock.stamps[-1]
    return Clocked(timing.between_ms(start, first), per_token_ms(first, last, new_tokens), out[:, ids.shape[1] :].cpu())


def per_token_ms(first, last, tokens: int) -> float:
    """Time per output token (ms) from the stamps after the first and after the last of `tokens` tokens."""
    return timing.between_ms(first, last) / (tokens - 1)


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


def decode_row(mode, batch, prompt_tokens, tokens, samples_ms_per_token, byte_count, hardware) -> dict:
    """One cell of the decode table. tokens: decoded in one sample. byte_count: that a step must move."""
    row = {
        "mode": mode,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "tokens_per_sample": tokens,
        **timing.summary(samples_ms_per_token, "ms_per_token"),
    }
    median = row["median_ms_per_token"]
    limit = roofline.memory_limit_ms(byte_count, hardware["copy_bandwidth_gb_per_second"])
    return row | {
        "tokens_per_second": timing.per_second(batch, median),
        "bytes_per_step": byte_count,
        "limit_ms": limit,
        "achieved_gb_per_second": roofline.rate_gb(byte_count, median),
        "percent_of_bandwidth": timing.percent_of_limit(limit, median),
    }


def eager_samples(model, ids, sizes) -> tuple[list[float], list[float], int]:
    """Samples of (ms to first token, ms per token) of eager `generate`, and the tokens of each sample.

    The number of tokens shrinks from `sizes.decode_tokens` until a sample takes about SAMPLE_SECONDS.
    """
    kind = ids.device.type
    began = time.perf_counter()
    least = max(2, min(LEAST_TOKENS, sizes.decode_tokens))  # decode is the interval between two tokens
    trial = clocked(model, ids, least)
    afford = int(SAMPLE_SECONDS[kind] * 1e3 / trial.ms_per_token)
    tokens = max(min(sizes.decode_tokens, afford), least)
    for _ in range(sizes.warmup - 1):
        if time.perf_counter() - began > timing.CELL_SECONDS[kind] / 3:
            break
        clocked(model, ids, least)
    runs = []
    while len(runs) < sizes.repeats and (
        len(runs) < timing.LEAST_REPEATS or time.perf_counter() - began < timing.CELL_SECONDS[kind]
    ):
        runs.append(clocked(model, ids, tokens))
    return [r.first_ms for r in runs], [r.ms_per_token for r in runs], tokens


def decoder_samples(running: decoder.Decoder, sizes) -> tuple[list[float], int]:
    """Samples (ms per token) of a decoder, each from the end of the prompt, and the tokens that one runs to.

    `decode_tokens` of them, fewer where a sample would take more than SAMPLE_SECONDS: over a static cache every step does the same work.
    """
    device = running.ids.device

    def run(steps: int) -> None:
        for _ in range(steps):
            running.step()

    least = min(LEAST_TOKENS, sizes.decode_tokens) - 1
    trial = timing.repeat(lambda: run(least), device, repeats=1, warmup=1, before=running.reset)[0] / least
    steps = max(least, min(sizes.decode_tokens - 1, int(SAMPLE_SECONDS[device.type] * 1e3 / trial)))
    seconds = timing.CELL_SECONDS[device.type]
    samples = timing.repeat(lambda: run(steps), device, sizes.repeats, sizes.warmup - 1, seconds, before=running.reset)
    return [ms / steps for ms in samples], steps + 1


def agreement(model, ids, running: decoder.Decoder, count: int, mode: str) -> dict:
    """Greedy tokens of a mode against eager's, and, where they first part, whether rounding explains it.

    Returns mode, tokens, identical (leading tokens that agree, first row), first_divergence: None or {index, eager_token, mode_token,
    logit_gap (between the two tokens, eager's logits in float32), rounding (how far eager's logits at that place are from those of one
    pass over the same tokens), explained (the gap is at most twice that)}.
    """
    out = generate(model, ids[:1], count, return_dict_in_generate=True, output_logits=True)
    eager, mine = out.sequences[0, ids.shape[1] :].cpu(), running.tokens(count)[0]
    found = {"mode": mode, "tokens": count, "identical": leading_equal(eager, mine), "first_divergence": None}
    if found["identical"] < count:
        at = found["identical"]
        logits = out.logits[at][0].float().cpu()
        with torch.no_grad():
            again = (
                model(input_ids=out.sequences[:1, : ids.shape[1] + at], logits_to_keep=1).logits[0, -1].float().cpu()
            )
        ours, theirs = int(eager[at]), int(mine[at])
        gap, rounding = float(logits[ours] - logits[theirs]), float((logits - again).abs().max())
        found["first_divergence"] = {
            "index": at,
            "eager_token": ours,
            "mode_token": theirs,
            "logit_gap": gap,
            "rounding": rounding,
            "explained": gap <= 2 * rounding,
        }
    return found


def leading_equal(first: torch.Tensor, second: torch.Tensor) -> int:
    """How many leading entries of two 1-d tensors are equal."""
    same = (first == second).int()
    return int(same.cumprod(0).sum())


def energy_row(mode: str, batch: int, run, tokens_per_run: int, device, includes_prefill: bool) -> dict:
    """Joules per token of `run`, repeated for ENERGY_SECONDS, from the GPU's counter."""
    timing.synchronize(device)
    runs, began, before = 0, time.perf_counter(), conditions.energy_joules(device)
    while time.perf_counter() - began < ENERGY_SECONDS:
        run()
        timing.synchronize(device)
        runs += 1
    joules, seconds = conditions.energy_joules(device) - before, time.perf_counter() - began
    tokens = runs * tokens_per_run * batch
    row = {"mode": mode, "batch": batch, "tokens": tokens, "seconds": seconds, "joules": joules}
    return row | {
        "joules_per_token": joules / tokens,
        "mean_watts": joules / seconds,
        "includes_prefill": includes_prefill,
    }


class Decoded(NamedTuple):
    """What a decode pass found; every field goes into the result by its name."""

    decode: list
    time_to_first_token: list
    energy: list
    agreement: list
    profile: list
    modes: dict
    left_out: list


def eager_pass(loaded, sizes, seed, hardware, kv_bytes, progress=print) -> Decoded:
    """Time to first token and time per output token of `generate`, one row per batch size; profile of one step at batch 1.

    These are the paper's own figures, so that no batch size is left out for time.
    """
    model, found = loaded.model, Decoded([], [], [], [], [], {"eager": {"ok": True, "reason": None}}, [])
    device = model.device
    for batch in sizes.batch_sizes:
        ids = prompt(model, batch, sizes.prompt_tokens, seed)
        first_ms, samples, tokens = eager_samples(model, ids, sizes)
        count = roofline.step_bytes(model, batch, sizes.prompt_tokens + tokens / 2, kv_bytes)
        found.decode.append(decode_row("eager", batch, sizes.prompt_tokens, tokens, samples, count, hardware))
        found.time_to_first_token.append(
            {"mode": "eager", "batch": batch, "prompt_tokens": sizes.prompt_tokens, **timing.summary(first_ms, "ms")}
        )
        progress(f"decode at batch {batch}, eager: {found.decode[-1]['median_ms_per_token']:.2f} ms per token")
        if conditions.energy_reason(device) is None and batch in (1, max(sizes.batch_sizes)):
            run = lambda ids=ids, tokens=tokens: generate(model, ids, tokens)  # noqa: E731
            found.energy.append(energy_row("eager", batch, run, tokens, device, includes_prefill=True))
    _profile_eager(model, sizes, seed, found)
    return found


@torch.no_grad()
def _profile_eager(model, sizes, seed, found: Decoded) -> None:
    ids = prompt(model, 1, sizes.prompt_tokens, seed)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    step = lambda: model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)  # noqa: E731
    step()
    wall = next((r["median_ms_per_token"] for r in found.decode if r["batch"] == 1), None)
    rows, reason = roofline.profile(step, model.device, wall)
    found.profile.extend({"mode": "eager", "batch": 1, **row} for row in rows)
    if reason:
        found.left_out.append({"what": "profile, eager", "reason": reason})


def decoder_pass(loaded, mode, sizes, seed, hardware, kv_bytes, deadline, progress=print) -> Decoded:
    """The same for "cuda_graph" or "compile", with agreement and profile at the first batch size."""
    model, found = loaded.model, Decoded([], [], [], [], [], {}, [])
    why, expected = decoder.obstacle(model, mode), 0.0
    found.modes[mode] = {"ok": why is None, "reason": why}
    for batch in sizes.batch_sizes if why is None else []:
        if time.perf_counter() + expected > deadline:
            reason = f"building it takes some {expected:.0f} s, and the time for this notebook was over"
            found.left_out.append({"what": f"decode at batch {batch}, {mode}", "reason": reason})
            continue
        ids, running = prompt(model, batch, sizes.prompt_tokens, seed), None
        try:
            running = decoder.Decoder(model, ids, sizes.decode_tokens, captured=True, compiled=mode == "compile")
        except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
            if batch == sizes.batch_sizes[0]:
                found.modes[mode] = {"ok": False, "reason": first_line(error)}
                break
            found.left_out.append({"what": f"decode at batch {batch}, {mode}", "reason": first_line(error)})
            continue
        if batch > 1:  # a single row is tuned (decoder.compile_options), which takes far longer than the others
            expected = max(expected, running.build_seconds)
        _decoder_rows(model, mode, ids, running, sizes, hardware, kv_bytes, found)
        progress(f"decode at batch {batch}, {mode}: {found.decode[-1]['median_ms_per_token']:.3f} ms per token")
        running.close()
    if why is None and not found.decode and found.left_out:
        found.modes[mode] = {"ok": False, "reason": found.left_out[0]["reason"]}
    return found


def _decoder_rows(model, mode, ids, running, sizes, hardware, kv_bytes, found: Decoded) -> None:
    device, batch = ids.device, ids.shape[0]
    samples, tokens = decoder_samples(running, sizes)
    count = roofline.step_bytes(model, batch, sizes.prompt_tokens + tokens / 2, kv_bytes)
    row = decode_row(mode, batch, sizes.prompt_tokens, tokens, samples, count, hardware)
    found.decode.append(row | {"build_seconds": running.build_seconds})
    median = row["median_ms_per_token"]

    def run():
        running.reset()
        for _ in range(tokens - 1):
            running.step()

    if conditions.energy_reason(device) is None and batch in (1, max(sizes.batch_sizes)):
        found.energy.append(energy_row(mode, batch, run, tokens - 1, device, includes_prefill=False))
    if batch == sizes.batch_sizes[0]:
        found.agreement.append(agreement(model, ids, running, min(sizes.decode_tokens, AGREEMENT_TOKENS), mode))
        running.reset()
        rows, reason = roofline.profile(
            lambda: [running.step() for _ in range(PROFILED_STEPS)], device, median, steps=PROFILED_STEPS
        )
        found.profile.extend({"mode": mode, "batch": batch, **r} for r in rows)
        if reason:
            found.left_out.append({"what": f"profile, {mode}", "reason": reason})


def join(found: list[Decoded]) -> dict:
    """The passes' rows together, by the names of `Decoded`."""
    joined = {}
    for name in Decoded._fields:
        parts = [getattr(one, name) for one in found]
        joined[name] = (
            {k: v for part in parts for k, v in part.items()}
            if name == "modes"
            else [row for part in parts for row in part]
        )
    return joined
