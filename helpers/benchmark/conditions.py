"""The machine while it measures: its name, clocks, temperature, energy, and who else is using it.

    before = conditions.conditions(torch.device("cuda"))
    ...
    conditions.warnings(before, conditions.conditions(torch.device("cuda")))    # [] on a quiet machine

Where NVML is missing its values are None and `nvml_reason` says why.
"""

import os
import platform
import re
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil
import torch

try:
    import pynvml
except ImportError:  # `make PYTHON=...`: an environment that is not ours may lack it
    pynvml = None

BUSY_SHARE = 0.10  # of the machine's cores in use by others: above it, a CPU timing is not to be trusted
POLL_SECONDS = 0.002
SM_CLOCK, MEMORY_CLOCK = 1, 2  # nvml.h
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


def _read(function: str, *arguments):
    """One value, or None where this driver or device has none."""
    handle, reason = nvml()
    if reason:
        return None
    try:
        return getattr(pynvml, function)(handle, *arguments)
    except (pynvml.NVMLError, AttributeError):
        return None


def name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def energy_joules(device: torch.device) -> float | None:
    """The GPU's energy counter (J since the driver was loaded), or None where there is none."""
    if device.type != "cuda":
        return None
    millijoules = _read("nvmlDeviceGetTotalEnergyConsumption")
    return None if millijoules is None else millijoules / 1e3


def energy_reason(device: torch.device) -> str | None:
    """Why there is no energy figure, or None if there is one."""
    if device.type != "cuda":
        return "energy is read from a GPU's NVML counter, and there is no GPU here"
    if nvml()[1]:
        return nvml()[1]
    return None if energy_joules(device) is not None else "this GPU has no energy counter"


def mean_watts(device: torch.device, work: Callable[[], None]) -> tuple[float, float]:
    """Mean power (W) while `work` runs, and the seconds it stands for: between the first and the last move of the GPU's
    energy counter, which moves about ten times a second. Raises RuntimeError if it did not move three times."""
    moves, done = [], threading.Event()

    def watch():
        last = energy_joules(device)
        while not done.wait(POLL_SECONDS):
            now = energy_joules(device)
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
    return (last - first) / (end - begin), end - begin


def conditions(device: torch.device) -> dict:
    """State of the machine now. CPU: seconds of work so far by this process and by all; GPU: clocks (MHz), temperature
    (C), power (W)."""
    busy = psutil.cpu_times()
    own = os.times()
    found = {
        "unix_seconds": time.time(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "load_average_1_min": os.getloadavg()[0],
        "cpu_seconds_all": sum(busy)
        - busy.idle
        - getattr(busy, "iowait", 0)
        - getattr(busy, "guest", 0)
        - getattr(busy, "guest_nice", 0),
        "cpu_seconds_own": own.user + own.system + own.children_user + own.children_system,
    }
    if device.type == "cuda":
        power = _read("nvmlDeviceGetPowerUsage")
        bits = _read("nvmlDeviceGetCurrentClocksThrottleReasons")
        processes = _read("nvmlDeviceGetComputeRunningProcesses")
        found |= {
            "nvml_reason": nvml()[1],
            "sm_clock_mhz": _read("nvmlDeviceGetClockInfo", SM_CLOCK),
            "memory_clock_mhz": _read("nvmlDeviceGetClockInfo", MEMORY_CLOCK),
            "sm_clock_max_mhz": _read("nvmlDeviceGetMaxClockInfo", SM_CLOCK),
            "temperature_celsius": _read("nvmlDeviceGetTemperature", 0),
            "power_watts": None if power is None else power / 1e3,
            "throttle_reasons": None if bits is None else [text for bit, text in THROTTLE.items() if bits & bit],
            "gpu_processes": None if processes is None else len(processes),
        }
    return found


def warnings(before: dict, after: dict) -> list[str]:
    """What may have disturbed a measurement between two `conditions`, one sentence each."""
    found = []
    seconds = after["unix_seconds"] - before["unix_seconds"]
    total, own = (after[k] - before[k] for k in ("cpu_seconds_all", "cpu_seconds_own"))
    share = max(0.0, total - own) / (seconds * after["cpu_count"]) if seconds > 0 else 0.0
    if share > BUSY_SHARE:
        found.append(f"other processes used {share:.0%} of this machine's {after['cpu_count']} cores meanwhile")
    if (after.get("gpu_processes") or 1) > 1 or (before.get("gpu_processes") or 1) > 1:
        most = max(before["gpu_processes"] or 0, after["gpu_processes"] or 0)
        found.append(f"{most} processes computed on this GPU, not this one alone")
    for reason in after.get("throttle_reasons") or []:
        found.append(f"the GPU was slowed down at the end of the measurement: {reason}")
    return found
