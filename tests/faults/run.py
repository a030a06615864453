"""make faults: break a small study on purpose, and see that nothing finished is lost and that the next run completes.

    python -m tests.faults.run [--kills 100] [--out executed/faults.json]
    python -m tests.faults.run --only NAME      # some again, into the table that is there: their rows say the commit

Works in two copies of the project in a temporary folder, at the same time: one for files and programs, one for
signals and the hub. For every fault: inject it, `make measure` (and `report` where a
finished file is damaged), compare every finished result byte by byte, undo the fault or apply the remedy that the
message names, and make it all again; at the end one `make run-all`. A row holds

    fault, repeats; said: the sentence that the user saw; survived: nothing lost, no traceback, the next run complete

Writes JSON and a Markdown table beside it; exits with 1 if a row did not survive. Disk faults mount a tmpfs: root only.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from helpers import ROOT, StudyError, params, results
from tests.faults import hub, inject, tiny
from tests.hub_server import GRANTED

TOKEN = "hf_plantedTokenThatNoFileMayHold"


def make(project: Path, *arguments: str, study="tiny", limit: str = "", **environment: str) -> tuple[int, str]:
    """Exit code and output of make in the project; `limit` is a shell line before it, such as a ulimit."""
    line = [*tiny.command(study), *(arguments or ("run-all",))]
    if limit:
        line = ["bash", "-c", f'{limit}; exec "$@"', "bash", *line]
    surroundings = tiny.environment(HF_TOKEN=TOKEN) | environment
    done = subprocess.run(
        line,
        cwd=project,
        env=surroundings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stdout


def finished(project: Path, study: str = "tiny") -> dict[str, str]:
    """File -> sha256, of every result that is whole and ok, every answer and every executed notebook of 00 to 03."""
    found = {}
    for path in sorted((project / "executed" / study).rglob("*.*")):
        name = str(path.relative_to(project))
        if not re.search(r"/(0[0-3]_\w+\.ipynb|samples_\w+\.jsonl|[a-z_0-9]+\.json)$", f"/{name}"):
            continue
        if path.suffix == ".json" and path.name != "lm_eval.json":
            try:
                if results.read(path).status != "ok":
                    continue
            except StudyError:
                continue
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def lost(project: Path, before: dict[str, str], again: str, study: str = "tiny") -> list[str]:
    """Finished files that are gone or another, but for those that the fault itself has to make again (a pattern)."""
    after = finished(project, study)
    return [name for name, digest in before.items() if after.get(name) != digest and not re.search(again, name)]


def incomplete(project: Path, before: dict[str, str], study: str = "tiny") -> list[str]:
    """What a complete study has and this one has not."""
    report = f"executed/{study}/report.html"
    return [*(set(before) - set(finished(project, study))), *([] if (project / report).is_file() else [report])]


def sentence(output: str) -> str:
    """What a user reads: the reason of the first failure, else the line that names a file."""
    for pattern in (
        r"FAILED: (.+)",
        r"^(?!make|\[|fatal)(\S+(?: and \S+)?: .+)",
        r"\*\*\* (.+?)\s+Stop",
        r"not run: (.+)",
    ):
        if said := re.search(pattern, output, re.M):
            return re.sub(r"; see \S+$", "", said[1])[:300]
    return ""


def follow(project: Path, said: str, study: str) -> str:
    """Apply the remedy that a message names; returns what was deleted."""
    gone = re.match(r"(\S+?): .*delete it", said) or re.search(r"delete (\S+?),", said)
    if not gone:
        return ""
    named = gone[1] if (project / gone[1]).exists() else f"executed/{study}/{gone[1]}"
    path = project / named
    if not path.exists():  # the end of the fault took it away
        return ""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return named


def row(fault: str, **values) -> dict:
    """A row of the table with what a fault has not left at its default."""
    empty = {"repeats": 1, "exit": None, "said": "", "remedy_applied": None, "lost": [], "traceback": False}
    return {"fault": fault} | empty | {"next_exit": None, "survived": False, "seconds": 0.0, "rerun_at": None} | values


def survive(project: Path, fault) -> dict:
    """One row's values: what fails has to say why. A fault yields (options of make, pattern of the files that have to
    be made again).
    """
    start, before = time.monotonic(), {study: finished(project, study) for study in ("tiny", "hardware")}
    with contextmanager(fault)(project) as (options, again):
        study = options.get("study", "tiny")
        then = options.pop("then", ())
        code, output = make(project, "-k", "measure", *then, **options)
        missing = lost(project, before[study], again, study)
    removed = follow(project, said := sentence(output), study)
    last, end = make(project, "check", "measure", *then, study=study)
    missing += lost(project, before[study], f"{again}|{re.escape(removed)}" if removed else again, study)
    missing += incomplete(project, before[study], study)
    broken = "Traceback" in output + end
    return {
        "exit": code,
        "said": said,
        "remedy_applied": removed or None,
        "lost": sorted(set(missing)),
        "traceback": broken,
        "next_exit": last,
        "survived": not missing and not broken and last == 0 and bool(said or code == 0),
        "seconds": round(time.monotonic() - start, 1),
    }


STEPS = {
    "00_setup.ipynb": "setup.json",
    "fp16/02_benchmark.ipynb": "fp16/benchmark.json",
    "nf4/02_benchmark.ipynb": "nf4/benchmark.json",
    "04_analysis.ipynb": "report.html",
    "05_figures.ipynb": None,
}


def killed(project: Path, kind: signal.Signals, times: int, draw: random.Random, whole: Path, longest: float) -> dict:
    """Signals at random points of any step of `make run-all`: one step is taken out of the state that the signal before
    left or, half of the time, of the complete copy in `whole`. `longest`: seconds that a step takes.
    """
    start, completed, missing, spoiled, folder = time.monotonic(), 0, set(), 0, project / "executed/hardware"
    for _ in range(times):
        if draw.random() < 0.5:
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
        taken = draw.choice(list(STEPS))
        for name in filter(None, (taken, STEPS[taken])):
            (folder / name).unlink(missing_ok=True)
        unfinished = {f"executed/hardware/{STEPS[name]}" for name in STEPS if not (folder / name).exists()}
        before = {k: v for k, v in finished(project, "hardware").items() if k not in unfinished}
        running = subprocess.Popen(
            [*tiny.command("hardware"), "run-all"], cwd=project, env=tiny.environment(), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            completed += running.wait(draw.uniform(0.05, longest)) == 0
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, kind)
            running.wait()
        missing |= set(lost(project, before, "^$", "hardware"))
        spoiled += sum(not _readable(path) for path in folder.rglob("[a-z]*.json"))
    code, output = make(project, study="hardware")
    missing |= set(incomplete(project, {f"executed/hardware/{name}": "" for name in list(STEPS)[:3]}, "hardware"))
    return {
        "repeats": times,
        "said": f"{completed} runs were complete before the signal" + (f"; {spoiled} files spoiled" if spoiled else ""),
        "lost": sorted(missing),
        "traceback": "Traceback" in output,
        "next_exit": code,
        "survived": code == 0 and not missing and not spoiled,
        "seconds": round(time.monotonic() - start, 1),
    }


def _readable(path: Path) -> bool:
    try:
        return bool(results.read(path))
    except StudyError:
        return False


def leaked(project: Path) -> dict:
    """No file may hold the planted token or the name of this machine."""
    words, found = (TOKEN.encode(), GRANTED.encode(), os.uname().nodename.encode()), []
    for folder in ("executed", "figures", ".cache/jupyter", ".cache/cards"):
        for path in (p for p in (project / folder).rglob("*") if p.is_file()):
            raw = path.read_bytes()
            found += [str(path.relative_to(project))] if any(w in raw for w in words if len(w) > 5) else []
    return {"lost": found, "survived": not found}


def table(found: dict) -> str:
    lines = ["| fault | times | survived | what was said |", "|---|---|---|---|"]
    for row in found["rows"]:
        said = row["said"].replace("|", "\\|") or "–"
        lines.append(f"| {row['fault']} | {row['repeats']} | {'yes' if row['survived'] else '**no**'} | {said} |")
    return "\n".join(lines) + "\n"


def files(project: Path, given, add) -> None:
    """Faults of files and programs, one after the other in the study `tiny`."""
    wanted = inject.faults("tiny", given.only)
    if not wanted:
        return
    begin(project, "tiny")
    for name, fault in wanted.items():
        add(name, lambda fault=fault: survive(project, fault))
    add("make run-all after all of it", lambda: again(project))
    add("a token in the environment all the time", lambda: leaked(project))


def signals_and_hub(project: Path, given, add) -> None:
    """Meanwhile, in another project on the second core: signals and damaged weights in the study `hardware`, then hubs
    that misbehave.
    """
    signals = [name for name in ("SIGKILL", "SIGTERM", "SIGINT") if given.kills and re.search(given.only, name)]
    wanted, hubs = inject.faults("hardware", given.only), hub.wanted(given.only)
    if not (signals or wanted or hubs):
        return
    seconds = begin(project, "hardware")
    whole, draw = project.with_name("whole"), random.Random(0)
    shutil.copytree(project / "executed/hardware", whole)
    for name in signals:
        times = given.kills if name == "SIGKILL" else given.kills // 10
        options = signal.Signals[name], times, draw, whole, seconds / len(STEPS)
        add(f"{name} to make and all that it started", lambda options=options: killed(project, *options))
    for name, fault in wanted.items():
        add(name, lambda fault=fault: survive(project, fault))
    for name, case in hubs.items():
        add(f"hub: {name}", lambda case=case: hub.survive(project, make, case))
    add("a token that the hub repeats", lambda: leaked(project))


def begin(project: Path, study: str) -> float:
    """Copy the project and run a study without a fault; returns the seconds that its run took."""
    inject.with_own_cache(tiny.copy(project))
    start = time.monotonic()
    code, output = make(project, study=study)
    if code:
        raise SystemExit(f"the study does not run without a fault:\n{output[-2000:]}")
    return time.monotonic() - start


def again(project: Path) -> dict:
    last, output = make(project)
    return {"said": sentence(output), "next_exit": last, "survived": last == 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs; a tenth as many SIGTERMs and Ctrl-Cs")
    parser.add_argument("--only", default="", help="faults whose name matches, into the table that is there")
    parser.add_argument("--out", type=Path, default=ROOT / "executed/faults.json")
    given, start = parser.parse_args(), time.monotonic()
    origin, writing = results.provenance(params.read_study("smollm2-135m"), None), threading.Lock()
    found = {"provenance": origin, "kills": given.kills, "seconds": None, "rows": []}
    more = bool(given.only) and given.out.is_file()
    if more:
        found = json.loads(given.out.read_text())
    failed = []

    def add(name, measure):
        try:
            values = measure()
        except Exception as error:  # of this suite itself: the other rows go on
            values = {"said": f"{type(error).__name__}: {error}"}
        new = row(name, **values, rerun_at=origin["commit"] if more else None)
        word = "survived" if new["survived"] else "LOST    "
        with writing:
            failed.extend([] if new["survived"] else [name])
            print(f"{new['seconds']:6.0f} s  {word}  {name}: {new['said']} {new['lost'] or ''}", flush=True)
            found["rows"] = list(({r["fault"]: r for r in found["rows"]} | {name: new}).values())
            found["seconds"] = found["seconds"] if more else round(time.monotonic() - start)
            results.write_json(given.out, found)
            results.write_text(given.out.with_suffix(".md"), table(found))

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as cores:
        lanes = [cores.submit(lane, Path(scratch) / lane.__name__, given, add) for lane in (files, signals_and_hub)]
        for done in lanes:
            done.result()
    print(f"{sum(r['survived'] for r in found['rows'])} of {len(found['rows'])} survived; {given.out}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
