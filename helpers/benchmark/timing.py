"""Clocks and samples: how one run is timed, and what is said of many.

A CUDA run is timed by two events on its stream, a CPU run by `perf_counter`. Every sample is kept; a cell of a table is
the median of those after a drifting start (`settled`), with quartiles and n.

    samples_ms = timing.repeat(lambda: model(ids), device, repeats=10, warmup=3)
    timing.summary(samples_ms, "ms")    # median_ms, q25_ms, q75_ms, n, dropped, samples_ms
"""

import time
from collections.abc import Callable

import numpy as np
import torch

LEAST_REPEATS = 3
CELL_SECONDS = {"cpu": 1.0, "cuda": 1.5}  # for one cell of a table, LEAST_REPEATS aside
DRIFT = 1.2


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stamp(device: torch.device):
    """A point in time on the device's own clock: a recorded CUDA event, or seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between_ms(start, end) -> float:
    """Milliseconds between two stamps. CUDA events must have been waited for."""
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


def once(function: Callable, device: torch.device) -> float:
    """Milliseconds that one call takes, the device's work included."""
    synchronize(device)
    start = stamp(device)
    function()
    end = stamp(device)
    synchronize(device)
    return between_ms(start, end)


def repeat(
    function: Callable,
    device: torch.device,
    repeats: int,
    warmup: int,
    seconds: float = float("inf"),
    before: Callable = lambda: None,
) -> list[float]:
    """Samples (ms) after `warmup` unrecorded calls of the same path. `before` precedes every call, untimed.

    A slow cell stops early: no further warm-up after a third of `seconds`, no further sample once `seconds` are over,
    but LEAST_REPEATS samples are always taken.
    """
    began = time.perf_counter()
    for _ in range(warmup):
        before()
        once(function, device)
        if time.perf_counter() - began > seconds / 3:
            break
    samples = []
    while len(samples) < repeats and (len(samples) < LEAST_REPEATS or time.perf_counter() - began < seconds):
        before()
        samples.append(once(function, device))
    return samples


def settled(samples: list[float]) -> list[float]:
    """Samples without a drifting start: from the front, those over DRIFT times the median of the later half are
    dropped, at most half, and never below LEAST_REPEATS: where nothing settles, nothing is hidden."""
    later = float(np.median(samples[len(samples) // 2 :]))
    at_most = max(0, min(len(samples) // 2, len(samples) - LEAST_REPEATS))
    dropped = 0
    while dropped < at_most and samples[dropped] > DRIFT * later:
        dropped += 1
    return samples[dropped:]


def summary(samples: list[float], unit: str) -> dict:
    """Median and quartiles of the settled samples, n of them, how many were dropped, and all samples; by `unit`."""
    kept = settled(samples)
    q25, median, q75 = map(float, np.percentile(kept, [25, 50, 75]))
    found = {f"median_{unit}": median, f"q25_{unit}": q25, f"q75_{unit}": q75, "n": len(kept)}
    return found | {"dropped": len(samples) - len(kept), f"samples_{unit}": [float(s) for s in samples]}
