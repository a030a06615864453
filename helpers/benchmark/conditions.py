"""The machine while it measures: its name, clocks, temperature, energy, and who else is using it.

    before = device.conditions(torch.device("cuda"))
    ...
    device.warnings(before, device.conditions(torch.device("cuda")))    # [] on a quiet machine

NVML is called through ctypes, so that no further package is needed; where it is missing every value is None and
`nvml_reason` says why.
"""

import ctypes
import os
import platform
import re
import time
from functools import cache
from pathlib import Path

import psutil
import torch

BUSY_SHARE = 0.10  # of the machine's cores in use by others: above it, a CPU timing is not to be trusted
# Bits of nvmlDeviceGetCurrentClocksThrottleReasons that mean "slower than it could be" (nvml.h).
THROTTLE = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "temperature",
    0x40: "hardware temperature",
    0x80: "power brake",
}


class _Nvml:
    """The few NVML calls that are needed, for one device. `reason` says why there is none."""

    def __init__(self):
        self.reason, self.handle = None, ctypes.c_void_p()
        try:
            self.library = ctypes.CDLL("libnvidia-ml.so.1")
            code = self.library.nvmlInit_v2()
            if code == 0:
                uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}".encode()
                code = self.library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(self.handle))
            if code:
                self.reason = f"NVML answered with error {code}"
        except (OSError, AttributeError) as error:
            self.reason = f"NVML can't be used: {error}"

    def read(self, function: str, kind, *arguments):
        """One value, or None where this driver or device has none."""
        if self.reason:
            return None
        value = kind()
        try:
            code = getattr(self.library, function)(self.handle, *arguments, ctypes.byref(value))
        except AttributeError:
            return None
        return None if code else value.value

    def processes(self) -> int | None:
        """Number of processes that compute on the device, this one included."""
        if self.reason:
            return None
        count = ctypes.c_uint(0)
        try:
            code = self.library.nvmlDeviceGetComputeRunningProcesses_v3(self.handle, ctypes.byref(count), None)
        except AttributeError:
            return None
        return count.value if code in (0, 7) else None  # 7: the list is longer than the room given for it


@cache
def nvml() -> _Nvml:
    return _Nvml()


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
    millijoules = nvml().read("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong)
    return None if millijoules is None else millijoules / 1e3


def energy_reason(device: torch.device) -> str | None:
    """Why there is no energy figure, or None if there is one."""
    if device.type != "cuda":
        return "energy is read from a GPU's NVML counter, and there is no GPU here"
    if nvml().reason:
        return nvml().reason
    return None if energy_joules(device) is not None else "this GPU has no energy counter"


def conditions(device: torch.device) -> dict:
    """State of the machine now. CPU: seconds of work so far by this process and by all; GPU: clocks (MHz), temperature (C), power (W)."""
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
        read = nvml().read
        uint, ulonglong = ctypes.c_uint, ctypes.c_ulonglong
        power = read("nvmlDeviceGetPowerUsage", uint)
        bits = read("nvmlDeviceGetCurrentClocksThrottleReasons", ulonglong)
        found |= {
            "nvml_reason": nvml().reason,
            "sm_clock_mhz": read("nvmlDeviceGetClockInfo", uint, 1),
            "memory_clock_mhz": read("nvmlDeviceGetClockInfo", uint, 2),
            "sm_clock_max_mhz": read("nvmlDeviceGetMaxClockInfo", uint, 1),
            "temperature_celsius": read("nvmlDeviceGetTemperature", uint, 0),
            "power_watts": None if power is None else power / 1e3,
            "throttle_reasons": None if bits is None else [text for bit, text in THROTTLE.items() if bits & bit],
            "gpu_processes": nvml().processes(),
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
        found.append(
            f"{max(before['gpu_processes'] or 0, after['gpu_processes'] or 0)} processes computed on this GPU, not this one alone"
        )
    for reason in after.get("throttle_reasons") or []:
        found.append(f"the GPU was slowed down at the end of the measurement: {reason}")
    return found
