"""What made a result: code, packages, hardware, parameters, time. No host name, user or path."""

import hashlib
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil

from helpers import ROOT
from helpers.params import Configuration, Study

PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "lm_eval",
    "numpy",
    "scipy",
    "pandas",
    "accelerate",
    "llmcompressor",
    "torchao",
)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:  # no git here
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    try:
        (name,) = set(re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()))
        return name
    except (OSError, ValueError):
        return platform.processor() or platform.machine()


def code_sha256() -> str:
    """One checksum over the helpers and notebooks: tells two runs of different code apart where git can't."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "helpers").rglob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def provenance(study: Study, configuration: Configuration | None) -> dict:
    """A dict for the envelope of a result; None stands where there is none (no GPU, no git)."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    gpu = None
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        torch = sys.modules["torch"]
        gpu = {
            "name": torch.cuda.get_device_name(),
            "memory_mib": torch.cuda.get_device_properties(0).total_memory // 2**20,
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    # A copied tree may hold a stale .git: GIT_COMMIT overrides it.
    copied = os.environ.get("GIT_COMMIT")
    commit = copied or _git("rev-parse", "HEAD")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        # unknown for a copied tree
        "dirty": bool(_git("status", "--porcelain")) if commit and not copied else None,
        "code_sha256": code_sha256(),
        "python": platform.python_version(),
        "packages": versions,
        "system": platform.system(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu,
        "seed": study.seed,
        "study": study.model_dump(mode="json"),
        "configuration": configuration.model_dump(mode="json") if configuration else None,
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True)
    except OSError:  # a container may have CUDA without it
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None
