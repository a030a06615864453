"""What freed memory buys: the largest batch that decodes within a memory budget, and its tokens per second.

The paper's section 4.3 supposes that the memory which 4 bits free makes room for batches large enough to win the
throughput back. Here torch's allocator is held to the budget (weights, cache, activations and graph; the CUDA context
of some hundred MB is outside it), and the batch is bisected between one that decodes and one that does not.

    rows, reason = capacity.largest_batches(loaded, sizes, [4, 8, 16], seed=1234, deadline=...)
"""

import re
import time
from collections.abc import Callable

import torch

from helpers import results
from helpers.benchmark import decoder, timing
from helpers.benchmark.generation import decoder_samples, prompt
from helpers.setup.device import reset_peak

# Prompts prefilled; their rows are repeated to the batch, for prefill in one go needs more room than decode.
DISTINCT_PROMPTS = 32
CALIBRATION_ROWS = (64, 128)
WITHIN = 0.01  # the interval's width, as a share of the batch that fits
STEP = 0.06  # of the first steps up and down
NO_MEMORY = r"out of memory|ALLOC_FAILED"


def batch_that_fits(budget: float, at: tuple[int, int], peaks: tuple[float, float]) -> int:
    """Batch whose peak, linear through (`at`, `peaks`), is `budget`; 0 if not even one row fits. All in the same
    unit."""
    slope = (peaks[1] - peaks[0]) / (at[1] - at[0])
    return max(0, int((budget - (peaks[0] - slope * at[0])) / slope))


def interval(
    fits: Callable[[int], bool], start: int, more: Callable[[], bool] = lambda: True
) -> tuple[int, int | None, int]:
    """(largest batch that fits, smallest that does not, tries), found from `start` up or down and then by bisection, to
    WITHIN or one row. Once `more` is false the interval stands as it is; None: no failure was seen."""
    low, high, batch, tries, step = 0, None, max(1, start), 0, STEP
    while batch and more() and (high is None or high - low > max(1, WITHIN * low)):
        tries += 1
        if fits(batch):
            low = batch
        else:
            high = batch
        if low and high:
            batch = (low + high) // 2
        else:  # further each time, so that a wrong start costs few tries
            down, up = max(1, int((high or 0) * max(0.1, 1 - step))), max(low + 1, int(low * (1 + step)))
            batch = min(down, high - 1) if high else up
            step *= 2
    return low, high, tries


def _decoder(model, sizes, batch: int, seed: int, mode: str) -> decoder.Decoder:
    ids = prompt(model, min(batch, DISTINCT_PROMPTS), sizes.prompt_tokens, seed)
    how = {"captured": mode != "static", "compiled": mode == "compile", "repeat_rows": batch}
    return decoder.Decoder(model, ids, sizes.decode_tokens, **how)


def _peak_bytes(model, sizes, batch: int, seed: int, mode: str) -> float:
    reset_peak(model.device)
    running = _decoder(model, sizes, batch, seed, mode)
    running.step()
    peak = torch.cuda.max_memory_allocated()
    running.close()
    return peak


def _attempt(model, sizes, batch: int, seed: int, mode: str, timed: bool) -> list[float] | None:
    """Samples (ms per token) at this batch, one step unless `timed`; None if it does not fit."""
    reset_peak(model.device)
    running = None
    try:
        running = _decoder(model, sizes, batch, seed, mode)
        return decoder_samples(running, sizes)[0] if timed else [timing.once(running.step, model.device)]
    except RuntimeError as error:  # OutOfMemoryError, or what a library makes of it
        if not re.search(NO_MEMORY, str(error)):
            raise
        return None
    finally:
        if running is not None:
            running.close()


def _timed(model, sizes, batch: int, seed: int, modes: list[str]) -> dict:
    """The fastest mode at a batch: mode, tokens_per_second, samples_ms_per_token; {} if none fits."""
    best = {}
    for mode in modes:
        try:
            samples = _attempt(model, sizes, batch, seed, mode, timed=True)
        except Exception:  # Inductor raises what it likes: a mode that fails is measured, and explained, elsewhere
            if mode == modes[0]:
                raise
            samples = None
        if samples:
            speed = batch / timing.summary(samples, "ms")["median_ms"] * 1e3
            row = {"mode": mode, "tokens_per_second": speed, "samples_ms_per_token": samples}
            best = max(best, row, key=lambda r: r.get("tokens_per_second", 0.0))
    return best


def _largest(model, sizes, budget_gib: float, predicted: int, seed: int, modes: list[str], deadline: float) -> dict:
    """One row: the batches around the budget's edge, in the first of `modes`, and the time of the largest that fits."""
    total = torch.cuda.get_device_properties(model.device).total_memory
    reset_peak(model.device)

    def in_time() -> bool:
        return time.perf_counter() < deadline

    row = EMPTY | {"budget_gib": budget_gib}
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_gib * 2**30 / total))
    try:
        row["batch"], row["fails"], tries = interval(
            lambda batch: bool(_attempt(model, sizes, batch, seed, modes[0], timed=False)),
            predicted,
            in_time,
        )
        timed = {}
        while row["batch"] and not (timed := _timed(model, sizes, row["batch"], seed, modes)) and in_time():
            # At the edge a second decoder may find the allocator's blocks cut otherwise: that batch does not fit.
            row["fails"], row["batch"] = row["batch"], int(row["batch"] * (1 - WITHIN))
        if not timed:
            row["batch"], row["reason"] = 0, f"no batch decoded within {budget_gib} GiB in {tries} tries"
        return row | timed
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# A row of which nothing is known yet.
EMPTY = {"mode": None, "batch": 0, "fails": None, "reason": None, "tokens_per_second": None, "samples_ms_per_token": []}


@torch.no_grad()
def largest_batches(
    loaded, sizes, budgets_gib: list[float], seed: int, deadline: float, progress=print
) -> tuple[list[dict], str | None]:
    """A row per budget (helpers.schema_benchmark.Largest), and why there are none.

    The edge is found with a CUDA graph ("static", the same step uncaptured, where it can't be captured); times are of
    the fastest mode that fits there. deadline: of time.perf_counter(); after it no further batch is tried.
    """
    model = loaded.model
    if model.device.type != "cuda":
        return [], "a memory budget is held by the GPU's allocator, and there is no GPU here"
    modes = ["static"]
    if decoder.obstacle(model, "cuda_graph") is None:
        modes = ["cuda_graph"] + ["compile"] * ("compile" in sizes.modes and not decoder.obstacle(model, "compile"))
    try:
        peaks = tuple(_peak_bytes(model, sizes, rows, seed, modes[0]) for rows in CALIBRATION_ROWS)
    except Exception as error:  # another architecture's own code raises any class
        return [], f"decoding over a static cache failed: {results.first_line(error)}"
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    rows = []
    for budget in budgets_gib:
        row = EMPTY | {"budget_gib": budget}
        if budget * 2**30 > free:
            row["reason"] = f"this GPU has {free / 2**30:.1f} GiB free"
        elif time.perf_counter() > deadline:
            row["reason"] = "the time for this notebook was over"
        else:
            try:
                predicted = batch_that_fits(budget * 2**30, CALIBRATION_ROWS, peaks)
                row = _largest(model, sizes, budget, predicted, seed, modes, deadline)
            except Exception as error:
                row["reason"] = results.first_line(error)
        rows.append(row)
        progress(f"largest batch in {budget} GiB: {row['batch']}, {row['tokens_per_second'] or 0:.0f} tokens/s")
    return rows, None
