"""Forty configurations over eight fake GPUs of a real Slurm, through Make's RUN prefix: `python -m tests.slurm.run`.

Starts daemons of its own (start.sh), sends configurations that only wait, and reads from their log: did two ever share
a GPU, and what did Make and srun cost beside the waiting? Then a queue that takes twelve jobs, a cancelled job and a
node that dies; a second `make` has to complete what is missing and nothing else. Writes executed/slurm.json. Raises
NotHere where the daemons can't start.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import yaml

from helpers import ROOT, NotHere, params, results
from tests.faults import tiny

HERE = Path(__file__).parent
GPUS = 8
PROFILE = ("PROFILE=slurm", "SLURM_OPTIONS=")  # this cluster has neither memory nor time limits


@contextmanager
def daemons(folder: Path, jobs: int = 10000):
    """slurmctld, two slurmd and munged, a queue of so many jobs. Raises NotHere with the reason."""
    missing = [name for name in ("slurmctld", "slurmd", "srun", "munged") if not shutil.which(name)]
    if missing or os.geteuid():
        raise NotHere(f"Slurm's daemons: {', '.join(missing) or 'not root'}; apt-get install slurm-wlm munge, as root")
    start = ["bash", str(HERE / "start.sh"), str(folder)]
    try:
        queue = os.environ | {"MAX_JOBS": str(jobs)}
        done = subprocess.run(start, env=queue, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise NotHere(f"Slurm's daemons do not start here: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        yield
    finally:
        subprocess.run([*start, "stop"], check=True)
        os.environ.pop("SLURM_CONF", None)


def project(root: Path, configurations: int) -> Path:
    """A project with a hardware study of so many configurations."""
    for name in ("helpers", "notebooks", "params"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copy(ROOT / "Makefile", root)
    folder = root / "params/many"
    folder.mkdir()
    study = {"study": "many", "title": "Many", "formats": ["fp16"], "model": tiny.MODEL}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    for number in range(1, configurations):
        (folder / f"c{number:02}.yaml").write_text("quantization: {}\n")
    return root


def start(root: Path, seconds: float) -> subprocess.Popen:
    command = ["make", "-k", "-j40", "measure", "STUDY=many", "PROCESSES=1", f"PYTHON={HERE / 'noop.py'}", *PROFILE]
    environment = tiny.environment(NOOP_SECONDS=str(seconds), NOOP_LOG=str(root / "log"))
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def log(root: Path) -> list[dict]:
    lines = (root / "log").read_text().splitlines() if (root / "log").exists() else []
    return [row for row in map(json.loads, lines) if "02_" in row["target"]]


def shared(rows: list[dict]) -> int:
    """Pairs that were on one GPU of one node at the same time."""
    key = lambda row: (row["SLURMD_NODENAME"], row["CUDA_VISIBLE_DEVICES"])  # noqa: E731
    pairs = ((a, b) for i, a in enumerate(rows) for b in rows[:i] if key(a) == key(b))
    return sum(a["start"] < b["end"] and b["start"] < a["end"] for a, b in pairs)


def at_once(rows: list[dict]) -> int:
    return max(sum(a["start"] <= b["start"] < a["end"] for a in rows) for b in rows)


def _forget(root: Path) -> None:
    shutil.rmtree(root / "executed", ignore_errors=True)
    (root / "log").unlink(missing_ok=True)


def many(root: Path, configurations: int, seconds: float) -> dict:
    """All of them, undisturbed: seconds of Make, srun and Slurm for each beside the waiting."""
    _forget(root)
    began = time.monotonic()
    running = start(root, seconds)
    output = running.communicate()[0]
    wall, rows = time.monotonic() - began, log(root)
    ideal = seconds * (1 + -(-configurations // GPUS))  # 00_setup first, then rounds of eight
    cards = {(row["SLURMD_NODENAME"], row["CUDA_VISIBLE_DEVICES"]) for row in rows}
    return {
        "configurations": len(rows),
        "exit": running.returncode,
        "seconds_each": seconds,
        "wall_seconds": round(wall, 2),
        "overhead_seconds_each": round((wall - ideal) / configurations, 3),
        "most_at_once": at_once(rows),
        "gpus_used": len(cards),
        "two_on_one_gpu": shared(rows),
        "queue_was_full": "retrying" in output,
    }


def disturbed(root: Path, what: str, disturb) -> dict:
    """Something happens to running jobs; the same command again has to make what is missing, and nothing else."""
    _forget(root)
    running = start(root, 3)
    while len(list((root / "executed/many").glob("00_*"))) == 0:
        time.sleep(0.2)
    time.sleep(1.5)
    mend = disturb()
    output = running.communicate()[0]
    before = {path: path.stat().st_mtime_ns for path in root.glob("executed/many/*/02_benchmark.ipynb")}
    mend()
    again = start(root, 0)
    again.communicate()
    done = list(root.glob("executed/many/*/02_benchmark.ipynb"))
    return {
        "what": what, "exit": running.returncode, "finished_meanwhile": len(before), "said": output.count("error: "),
        "redone": sum(path.stat().st_mtime_ns != when for path, when in before.items()),
        "next_exit": again.returncode, "finished": len(done), "two_on_one_gpu": shared(log(root)),
    }  # fmt: skip


def cancel():
    listed = subprocess.run(["squeue", "-h", "-t", "R", "-o", "%i"], capture_output=True, text=True, check=True)
    subprocess.run(["scancel", *listed.stdout.split()[:2]], check=True)
    return lambda: None


def kill_node(folder: Path):
    """A node dies: its slurmd and the steps that it runs. The mend starts it again."""
    children = subprocess.run(["pgrep", "-f", f"slurmstepd.*{folder}|noop.py"], capture_output=True, text=True)
    node = int((folder / "slurmd.n2.pid").read_text())
    os.kill(node, 9)
    for pid in map(int, children.stdout.split()):
        try:
            if b"SLURMD_NODENAME=n2" in Path(f"/proc/{pid}/environ").read_bytes():
                os.kill(pid, 9)
        except OSError:
            continue  # it has ended meanwhile

    def mend():
        subprocess.run(["slurmd", "-c", "-N", "n2", "-f", str(folder / "slurm.conf")], check=True)
        for _ in range(60):
            listed = subprocess.run(["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], capture_output=True, text=True)
            if "n2" in listed.stdout:
                return
            time.sleep(0.5)

    return mend


def measure(configurations: int, seconds: float, disturbances: bool = True) -> dict:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder, root = Path(scratch) / "slurm", project(Path(scratch) / "project", configurations)
        with daemons(folder):
            version = subprocess.run(["srun", "--version"], capture_output=True, text=True).stdout.strip()
            found = {"slurm": version, "many": many(root, configurations, seconds), "disturbed": []}
        if disturbances:
            with daemons(Path(scratch) / "short", jobs=12):
                found["short_queue"] = many(root, configurations, seconds)
                found["disturbed"] = [
                    disturbed(root, "two running jobs are cancelled", cancel),
                    disturbed(root, "a node dies", lambda: kill_node(Path(scratch) / "short")),
                ]
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--configurations", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=1.0, help="that each configuration waits")
    parser.add_argument("--out", type=Path, default=ROOT / "executed/slurm.json")
    given = parser.parse_args()
    found = {"provenance": results.provenance(params.read_study("smollm2-135m"), None)}
    results.write_json(given.out, found | measure(given.configurations, given.seconds))
    print(given.out.read_text().partition('"slurm"')[2])


if __name__ == "__main__":
    main()
