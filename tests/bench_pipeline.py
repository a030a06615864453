"""How long the pipeline takes, and how much memory: a run of all configurations from nothing, a second run, and the
tests.

Run by `make bench-pipeline` on a quiet machine; writes executed/reference/bench_pipeline.json. Works in a fresh clone
of the last commit. `python tests/bench_pipeline.py test` measures the tests alone and keeps the rest of the file;
every entry names its commit."""

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
    return {
        "command": " ".join(command[:1] + command[2:]),
        "seconds": time.perf_counter() - start,
        "exit": code,
        "peak_mib": peak,
    }


def main(steps: list[str]) -> None:
    target, origin = (
        ROOT / "executed/reference/bench_pipeline.json",
        results.provenance(params.read_study("smollm2-135m"), None),
    )
    if origin["dirty"]:
        raise SystemExit("there are changes that are not committed, and a clone would not have them; commit them first")
    runs = json.loads(target.read_text())["runs"] if target.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "project"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
        (copy / ".cache").mkdir()
        for download in (ROOT / ".cache").glob("*.gguf"):  # downloads are not timed; what is made of them is
            (copy / ".cache" / download.name).symlink_to(download)
        for name in ("run-all", "run-all again", "test"):
            goal, load = name.split()[0], os.getloadavg()[0]
            if goal in steps:
                found = timed(["make", f"PYTHON={sys.executable}", goal], copy)
                runs[name] = found | {"commit": origin["commit"], "load_average_before": load}
    results.write_json(target, {"runs": runs, "provenance": origin})
    print(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:] or ["run-all", "test"])
