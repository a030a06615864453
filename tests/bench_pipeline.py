"""How long the pipeline takes, and how much memory: a run of all configurations from nothing, a second run, and the tests.

Run by `make bench-pipeline` on a quiet machine; writes executed/reference/bench_pipeline.json. Works in a fresh clone of the last commit.
`python tests/bench_pipeline.py test` measures the tests alone and keeps the rest of the file; every entry names its commit.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402

from helpers import params, results  # noqa: E402


def timed(command: list[str], folder: Path) -> dict:
    """Run; returns seconds, exit code and the highest resident memory of all its processes together (MiB)."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    start, peak, done = time.perf_counter(), 0.0, threading.Event()
    process = subprocess.Popen(command, cwd=folder, env=environment)

    def watch():
        nonlocal peak
        while not done.wait(0.25):
            total = 0
            for one in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += one.memory_info().rss
            peak = max(peak, total / 2**20)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    code = process.wait()
    done.set()
    return {"command": " ".join(command[:1] + command[2:]), "seconds": time.perf_counter() - start, "exit": code, "peak_mib": peak}


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main(steps: list[str]) -> None:
    if git("status", "--porcelain"):
        raise SystemExit("there are changes that are not committed, and a clone would not have them; commit them first")
    target, commit = ROOT / "executed/reference/bench_pipeline.json", git("rev-parse", "HEAD")
    study = params.read_study("smollm2-135m")
    runs = json.loads(target.read_text())["runs"] if target.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "project"
        git("clone", "-q", str(ROOT), str(copy))
        (copy / ".cache").mkdir()
        for download in (ROOT / ".cache").glob("*.gguf"):  # downloads are not timed; what is made of them is
            (copy / ".cache" / download.name).symlink_to(download)
        for step in steps:
            load = os.getloadavg()[0]
            names = {"run-all": ["run-all", "run-all again"], "test": ["test"]}[step]
            for name in names:
                found = timed(["make", f"PYTHON={sys.executable}", name.split()[0]], copy)
                runs[name] = found | {"commit": commit, "load_average_before": load}
    results.write_json(target, {"runs": runs, "provenance": results.provenance(study, None)})
    print(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:] or ["run-all", "test"])
