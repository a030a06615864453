#!/usr/bin/env python3
"""Stands for `python` in make PYTHON=...: where helpers.notebook would run a notebook, it waits, notes when and on
which GPU in $NOOP_LOG, and writes what the notebook would. $NOOP_FAIL: one that fails, with a result that says so.
"""

import json
import os
import sys
import time
from pathlib import Path

RESULTS = {"00": "setup", "01": "evaluation", "02": "benchmark", "03": "fidelity"}


def main(command: str, *arguments: str) -> int:
    if command != "run":
        return 0
    target, start = Path(arguments[1]), time.time()
    time.sleep(float(os.environ.get("NOOP_SECONDS", 0)))
    kind = "weights" if target.stem == "03_weights" else RESULTS.get(target.stem[:2])
    target.parent.mkdir(parents=True, exist_ok=True)
    failed = os.environ.get("NOOP_FAIL", "-") in str(target)
    if kind:
        target.with_name(f"{kind}{target.stem.partition('benchmark')[2]}.json").write_text("failed" if failed else "ok")
    if not failed:
        target.write_text("{}")
    names = ("SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID")
    row = {"target": str(target), "start": start, "end": time.time()} | {name: os.environ.get(name) for name in names}
    if log := os.environ.get("NOOP_LOG"):
        with open(log, "a") as file:
            file.write(json.dumps(row) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[3:]))  # python -m helpers.notebook COMMAND ...
