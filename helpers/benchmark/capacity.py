"""What freed memory buys: the largest batch that decodes within a memory budget, and its tokens per second.

The paper's section 4.3 supposes that the memory which 4 bits free makes room for batches large enough to win the throughput back. Here
torch's allocator is held to the budget (weights, cache, activations and graph; the CUDA context of some hundred MB is outside it), and
the batch is what still decodes.

    rows, reason = capacity.largest_batches(loaded, sizes, [4, 8, 16], seed=1234, deadline=...)
"""

import time

import torch

from helpers.benchmark import decoder, timing
from helpers.benchmark.throughput import decoder_samples, prompt
from helpers.setup.device import MB, reset_peak

DISTINCT_PROMPTS = (
    32  # prefilled; their rows are repeated to the batch, for prefill in one go needs more room than decode
)
CALIBRATION_ROWS = (64, 128)
SHARES = (
    0.97,
    0.92,
    0.87,
    0.8,
    0.7,
    0.5,
    0.25,
)  # of the predicted batch, tried in turn: fragmented memory holds less than is free


def batch_that_fits(budget: float, at: tuple[int, int], peaks: tuple[float, float]) -> int:
    """Batch whose peak, linear through (`at`, `peaks`), is `budget`; 0 if not even one row fits. All in the same unit."""
    slope = (peaks[1] - peaks[0]) / (at[1] - at[0])
    return max(0, int((budget - (peaks[0] - slope * at[0])) / slope))


def _decoder(model, sizes, batch: int, seed: int, captured: bool) -> decoder.Decoder:
    ids = prompt(model, min(batch, DISTINCT_PROMPTS), sizes.prompt_tokens, seed)
    return decoder.Decoder(model, ids, sizes.decode_tokens, captured=captured, repeat_rows=batch)


def _peak_bytes(model, sizes, batch: int, seed: int, captured: bool) -> float:
    reset_peak(model.device)
    running = _decoder(model, sizes, batch, seed, captured)
    running.step()
    peak = torch.cuda.max_memory_allocated()
    running.close()
    return peak


def _attempt(model, sizes, batch: int, seed: int, captured: bool) -> list[float] | None:
    """Samples (ms per token) at this batch; None if it does not fit."""
    reset_peak(model.device)
    running = None
    try:
        running = _decoder(model, sizes, batch, seed, captured)
        return decoder_samples(running, sizes)[0]
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        if running is not None:
            running.close()


def _largest(model, sizes, budget_gib: float, predicted: int, seed: int, captured: bool) -> dict:
    """One row: go down from the predicted batch until it decodes within the budget."""
    row = {
        "budget_gib": budget_gib,
        "mode": "cuda_graph" if captured else "static",
        "batch": 0,
        "predicted_batch": predicted,
    }
    total = torch.cuda.get_device_properties(model.device).total_memory
    reset_peak(model.device)
    row["allocated_before_mb"] = (
        torch.cuda.memory_allocated() / MB
    )  # the weights, and what libraries keep for themselves
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_gib * 2**30 / total))
    try:
        for attempt, share in enumerate(SHARES, start=1):
            batch = int(predicted * share)
            samples = _attempt(model, sizes, batch, seed, captured) if batch else None
            if samples:
                found = timing.summary(samples, "ms_per_token")
                rate = timing.per_second(batch, found["median_ms_per_token"])
                peak = torch.cuda.max_memory_reserved() / MB
                row |= {"batch": batch, "tokens_per_second": rate, "peak_reserved_mb": peak, "attempts": attempt}
                return row | found | {"reason": None}
        reason = f"no batch from {predicted} down to {int(predicted * SHARES[-1])} decoded within {budget_gib} GiB"
        return row | {"tokens_per_second": None, "reason": reason}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@torch.no_grad()
def largest_batches(
    loaded, sizes, budgets_gib: list[float], seed: int, deadline: float, progress=print
) -> tuple[list[dict], str | None]:
    """Rows {budget_gib, mode, batch, tokens_per_second, median_ms_per_token, ..., allocated_before_mb, peak_reserved_mb, reason}, and why
    there are none.

    mode: "cuda_graph", or "static", the same step uncaptured, where it can't be captured. batch 0 with a reason: nothing fits.
    """
    model = loaded.model
    if model.device.type != "cuda":
        return [], "a memory budget is held by the GPU's allocator, and there is no GPU here"
    captured = decoder.obstacle(model, "cuda_graph") is None
    if time.perf_counter() > deadline:
        return [], "the time for this notebook was over"
    try:
        peaks = tuple(_peak_bytes(model, sizes, rows, seed, captured) for rows in CALIBRATION_ROWS)
    except (RuntimeError, NotImplementedError) as error:
        return [], f"decoding over a static cache failed: {str(error).splitlines()[0]}"
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    rows = []
    for budget in budgets_gib:
        row = {
            "budget_gib": budget,
            "mode": "cuda_graph" if captured else "static",
            "batch": 0,
            "tokens_per_second": None,
        }
        if budget * 2**30 > free:
            rows.append(row | {"reason": f"this GPU has {free / 2**30:.1f} GiB free"})
        elif time.perf_counter() > deadline:
            rows.append(row | {"reason": "the time for this notebook was over"})
        else:
            rows.append(
                _largest(model, sizes, budget, batch_that_fits(budget * 2**30, CALIBRATION_ROWS, peaks), seed, captured)
            )
            progress(
                f"largest batch in {budget} GiB: {rows[-1]['batch']}, {rows[-1]['tokens_per_second'] or 0:.0f} tokens per second"
            )
    return rows, None
