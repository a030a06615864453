"""The machine while it measures: its name, its energy, who else is using it, and whether it was slowed down.

    before = conditions.conditions(torch.device("cuda"))
    ...
    conditions.warnings(before, conditions.conditions(torch.device("cuda")))    # [] on a quiet machine

Where NVML is missing its values are None.
"""

import os
import threading
import time
from collections.abc import Callable
from functools import cache

import psutil
import torch

from helpers import provenance

try:
    import pynvml
except ImportError:  # `make PYTHON=...`: an environment that is not ours may lack it
    pynvml = None

BUSY_SHARE = 0.10  # of the machine's cores in use by others: above it, a CPU timing is not to be trusted
POLL_SECONDS = 0.002
# Bits of nvmlDeviceGetCurrentClocksThrottleReasons that mean "slower than it could be" (nvml.h).
THROTTLE = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "temperature",
    0x40: "hardware temperature",
    0x80: "power brake",
}


@cache
def nvml() -> tuple[object, str | None]:
    """NVML's handle of torch's current device, and why there is none."""
    if pynvml is None:
        return None, "NVML can't be used: nvidia-ml-py is not installed (pip install nvidia-ml-py)"
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"), None
    except (pynvml.NVMLError, AttributeError, RuntimeError, AssertionError) as error:
        return None, f"NVML can't be used: {error}"


def _read(function: str):
    """One value, or None where this driver or device has none."""
    handle, reason = nvml()
    if reason:
        return None
    try:
        return getattr(pynvml, function)(handle)
    except (pynvml.NVMLError, AttributeError):
        return None


def name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return provenance.processor()


def energy_joules() -> float | None:
    """The GPU's energy counter (J since the driver was loaded), or None where there is none."""
    millijoules = _read("nvmlDeviceGetTotalEnergyConsumption")
    return None if millijoules is None else millijoules / 1e3


def energy_reason(device: torch.device) -> str | None:
    """Why there is no energy figure, or None if there is one."""
    if device.type != "cuda":
        return "energy is read from a GPU's NVML counter, and there is no GPU here"
    return nvml()[1] or (None if energy_joules() is not None else "this GPU has no energy counter")


def mean_watts(work: Callable[[], None]) -> float:
    """Mean power (W) while `work` runs, between the first and the last move of the GPU's energy counter, which moves
    about ten times a second. Raises RuntimeError if it did not move three times."""
    moves, done = [], threading.Event()

    def watch():
        last = energy_joules()
        while not done.wait(POLL_SECONDS):
            now = energy_joules()
            if now != last:
                moves.append((time.perf_counter(), now))
                last = now

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    if len(moves) < 3:
        raise RuntimeError("the GPU's energy counter hardly moved while it was read")
    (begin, first), (end, last) = moves[0], moves[-1]
    return (last - first) / (end - begin)


def conditions(device: torch.device) -> dict:
    """What `warnings` compares: seconds of work so far by this process and by all; a GPU's processes and throttling."""
    busy, own = psutil.cpu_times(), os.times()
    idle = sum(getattr(busy, name, 0) for name in ("idle", "iowait", "guest", "guest_nice"))
    found = {
        "unix_seconds": time.time(),
        "cpu_count": os.cpu_count(),
        "cpu_seconds_all": sum(busy) - idle,
        "cpu_seconds_own": own.user + own.system + own.children_user + own.children_system,
    }
    if device.type == "cuda":
        bits = _read("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        found["throttle_reasons"] = [text for bit, text in THROTTLE.items() if bits & bit]
        found["gpu_processes"] = len(_read("nvmlDeviceGetComputeRunningProcesses") or [])
    return found


def warnings(before: dict, after: dict) -> list[str]:
    """What may have disturbed a measurement between two `conditions`, one sentence each."""
    found = []
    seconds = after["unix_seconds"] - before["unix_seconds"]
    total, own = (after[k] - before[k] for k in ("cpu_seconds_all", "cpu_seconds_own"))
    share = max(0.0, total - own) / (seconds * after["cpu_count"]) if seconds > 0 else 0.0
    if share > BUSY_SHARE:
        found.append(f"other processes used {share:.0%} of this machine's {after['cpu_count']} cores meanwhile")
    most = max(state.get("gpu_processes", 0) for state in (before, after))
    if most > 1:
        found.append(f"{most} processes computed on this GPU, not this one alone")
    slowed = "the GPU was slowed down at the end of the measurement"
    return found + [f"{slowed}: {reason}" for reason in after.get("throttle_reasons", [])]
