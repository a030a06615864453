"""How long the pipeline takes, and how much memory: a fresh run of all configurations, a second run, and the tests.

Run by `make bench-pipeline` on a quiet machine; writes executed/reference/bench_pipeline.json. Works in a copy without results.
"""

import contextlib
import json
import os
import shutil
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


def main() -> None:
    study = params.read_study("smollm2-135m")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "project"
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)
        (copy / ".cache").mkdir()
        for download in (ROOT / ".cache").glob("*.gguf"):  # downloads are not timed; what is made of them is
            (copy / ".cache" / download.name).symlink_to(download)
        make = ["make", f"PYTHON={sys.executable}"]
        load = os.getloadavg()[0]
        runs = [timed([*make, target], copy) for target in ("run-all", "run-all", "test")]
    value = {"runs": runs, "load_average_before": load, "provenance": results.provenance(study, None)}
    results.write_json(ROOT / "executed/reference/bench_pipeline.json", value)
    print(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
