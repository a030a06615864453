"""Notebooks, run headlessly: papermill with progress, and nothing half-done that looks done.

    python -m helpers.notebook run NOTEBOOK OUTPUT -f params/STUDY/study.yaml -f params/formats/F.yaml [-p KEY VALUE]
    python -m helpers.notebook render EXECUTED.ipynb REPORT.html
    python -m helpers.notebook status STUDY CONFIGURATION ...
    python -m helpers.notebook check STUDY CONFIGURATION ...

`run` is `papermill NOTEBOOK OUTPUT -f ... -p ...`, written to a temporary name and moved on success: papermill leaves a
partial notebook behind when a cell fails, which Make would take for a finished one. A failed notebook is kept as OUTPUT
with `.failed.ipynb`, and the reason becomes a result.
"""

import argparse
import contextlib
import fcntl
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import yaml

from helpers import CACHE, ROOT, NotHere, StudyError, cards, params, results

# Notebook -> its result, in the order in which they run; `status` shows them, and Make has a rule for each.
KINDS = {
    "00_setup": "setup",
    "01_evaluate": "evaluation",
    "02_benchmark": "benchmark",
    "03_fidelity": "fidelity",
    "03_weights": "weights",
    "04_analysis": None,
    "05_figures": None,
}
ON_A_CARD = {"01_evaluate": False, "02_benchmark": True, "03_fidelity": False, "03_weights": False}  # True: alone
PER_CONFIGURATION = ("01_evaluate", "02_benchmark", "03_fidelity")
NOISE = ("USDT", "profiler_start", "IPKernelApp", "is an Enum subclass", "Passed unknown parameter")
OURS = ("StudyError", "NotHere", "HubError")  # their text is the sentence that a reader needs


class _Progress:
    """A file that prefixes every line: what a kernel prints, told apart when configurations run side by side."""

    def __init__(self, prefix: str):
        self.prefix, self.start, self.pending = prefix, time.monotonic(), ""
        self.told = self.start

    def write(self, text: str) -> int:
        *lines, self.pending = (self.pending + text).split("\n")
        for line in lines:
            if line.strip() and not any(text in line for text in NOISE):
                self.line(line.split("\r")[-1])
        return len(text)

    def bar(self, text: str) -> int:
        """A progress bar of tqdm's, as a line every ten seconds."""
        if (found := re.findall(r"(\d+)/(\d+) \[[^\r]*?<([\d:]+)", text)) and time.monotonic() - self.told > 10:
            self.told = time.monotonic()
            self.line("{} of {} done, {} left".format(*found[-1]))
        return len(text)

    def line(self, text: str) -> None:
        print(f"{self.prefix} {time.monotonic() - self.start:5.0f} s | {results.clean(text)}", flush=True)

    def flush(self) -> None:
        sys.stdout.flush()


def _parameters(files: list[str], overrides: list[list[str]]) -> dict:
    merged: dict = {}
    for name in files:
        merged |= params.read_yaml(Path(name))
    return merged | {key: yaml.safe_load(value) for key, value in overrides}


# What to do about an error of CUDA's, by words of it.
ADVICE = {
    "out of memory": "free the GPU of other programs, or lower the sizes in study.yaml",
    "no kernel image": "install a PyTorch that was built for this card (make setup TORCH_INDEX=...)",
}


def _reason(error: Exception) -> str:
    """The sentence a reader needs: a StudyError's own text, else the type and text of what was raised."""
    name, text = getattr(error, "ename", type(error).__name__), str(getattr(error, "evalue", error))
    if name == "DeadKernelError" or "Kernel died" in text:
        return (
            "the notebook's process was killed, most likely for lack of memory; "
            "free some, or lower the sizes in study.yaml"
        )
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).strip()
    if name in OURS:
        return results.clean(text)
    said = f"{name}: {text}"
    advice = next((advice for sign, advice in ADVICE.items() if sign in said), None)
    return results.clean(f"{said.rstrip('.')}; {advice}" if advice else said)


def run(source: Path, target: Path, files: list[str], overrides: list[list[str]]) -> None:
    """Execute `source` into `target`.

    Raises SystemExit with the reason if a cell fails; what other notebooks computed is kept.
    """
    given = _parameters(files, overrides)
    study, configuration, process = params.check(given, " and ".join(files))
    kind, case = KINDS[source.stem], (study, configuration)
    if configuration and not configuration.quantization.method.startswith(("none", "bitsandbytes")):
        # Known before a kernel is started: a package or the hardware is missing.
        from helpers.setup import methods

        try:
            methods.require(configuration)
        except NotHere as missing:
            results.write_text(target, source.read_text(encoding="utf-8"))
            results.write_without(*case, kind, "skipped", str(missing), process)
            print(f"[{configuration.configuration}/{source.stem}] not run: {missing}", flush=True)
            return
    number = f"_{process}" if process > 1 else ""
    progress = _Progress(f"[{configuration.configuration if configuration else study.study}/{source.stem}{number}]")
    scratch, failed = target.with_suffix(f".{os.getpid()}.ipynb"), target.with_suffix(".failed.ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    alone = ON_A_CARD.get(source.stem)  # None: needs none
    with (
        _only(target),
        cards.reserved(alone, lambda: progress.line("waits: another notebook measures, or the GPUs are taken")),
    ):
        failed.unlink(missing_ok=True)
        progress.line("started")
        started = time.time()
        try:
            _execute(source, scratch, given, progress)
            os.replace(scratch, target)
            progress.line("done")
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except Exception as error:
            reason = _reason(error)
            if getattr(error, "ename", None) == "NotHere":  # no failure: this machine has not what the method takes
                os.replace(scratch, target)
                results.write_without(*case, kind, "skipped", reason, process)
                progress.line(f"not run: {reason}")
                return
            target.unlink(missing_ok=True)  # an older, finished notebook must not stand for this run
            if scratch.exists():
                results.write_text(failed, results.clean(scratch.read_text(encoding="utf-8")))
            if kind and not _newer(results.path(*case, kind, process), started):
                results.write_without(*case, kind, "failed", reason, process)
            where = f"; see {results.clean(str(failed))}" if failed.exists() else ""
            progress.line(f"FAILED: {reason}{where}")
            raise SystemExit(1) from None
        finally:
            scratch.unlink(missing_ok=True)


def _newer(path: Path, when: float) -> bool:
    """Did this run write the result (all of it, or finished parts of 03_weights) before it failed?"""
    return path.is_file() and path.stat().st_mtime >= when


def _execute(source: Path, target: Path, given: dict, progress: _Progress) -> None:
    import papermill
    from jupyter_core.utils import ensure_event_loop

    # nbclient would take a signal to this process for a kernel that died: without its handlers it ends the run.
    ensure_event_loop().add_signal_handler = _no_handler
    logging.getLogger("papermill").setLevel(logging.ERROR)  # every key that a notebook's parameters cell does not name
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own announcements
    os.environ["JUPYTER_PATH"] = os.pathsep.join([str(_kernels()), os.environ.get("JUPYTER_PATH", "")])
    papermill.execute_notebook(
        str(source),
        str(target),
        parameters=given,
        cwd=str(source.parent),
        kernel_name="python3",
        progress_bar=False,
        stdout_file=progress,
        stderr_file=SimpleNamespace(write=progress.bar, flush=progress.flush),
        request_save_on_cell_execute=True,
        autosave_cell_every=0,
        extra_arguments=["--IPKernelApp.log_level=50"],
    )


def _no_handler(*_):
    raise RuntimeError


def _kernels() -> Path:
    """A Jupyter path whose python3 is this interpreter, ahead of a kernel of that name that the user installed."""
    home = CACHE / "jupyter"
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = {"argv": command, "display_name": "Python 3", "language": "python"}
    results.write_json(home / "kernels" / "python3" / "kernel.json", kernel)
    return home


@contextlib.contextmanager
def _only(target: Path):
    """Two runs of one notebook would overwrite each other. Raises SystemExit if another process makes `target` now."""
    with open(target.with_name(f".{target.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{results.clean(str(target))}: another run makes it now; wait for that one") from None
        yield


def _tell_empty(executed) -> None:
    """A heading whose cells show nothing says so: a study without a GPU, dialogues or results has such."""
    sections = []
    for cell in executed.cells:
        if cell.cell_type == "markdown":
            sections.append((cell, []))
        elif sections:
            sections[-1][1].append(any(map(_visible, cell.outputs)))
    for heading, shown in sections:
        if heading.source.startswith("##") and shown and not any(shown):
            heading.source += "\n\nNot measured in this study."


def _visible(output) -> bool:
    """Whether a cell's output is text or a picture on the page; streams are left out there."""
    page = output.get("data", {}).get("text/html", "")
    return bool(re.search(r"<(img|svg)\b", page) or re.sub(r"<[^>]*>", "", page).strip())


def render(source: Path, target: Path) -> None:
    """The report: an executed notebook as one HTML file by notebooks/template, nothing fetched from the network.
    Raises StudyError if the notebook was cut off; an older report stays."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="template", extra_template_basedirs=[str(ROOT / "notebooks")])
    title = f"{target.parent.name}: report"  # from_filename would name the page after the notebook
    resources = {"metadata": {"name": title}}
    notebook = ROOT / "notebooks" / source.name
    if target.resolve().is_relative_to(ROOT) and notebook.is_file():
        resources["notebook"] = Path(os.path.relpath(notebook, target.resolve().parent)).as_posix()
    try:
        executed = nbformat.read(source, 4)
    except ValueError:
        raise StudyError(f"{source}: not a whole notebook; delete it and run make report again") from None
    _tell_empty(executed)
    body, _ = exporter.from_notebook_node(executed, resources=resources)
    results.write_text(target, body)
    print(f"{target.relative_to(ROOT) if target.is_relative_to(ROOT) else target}: open it in a browser")


def check(study: str, configurations: list[str]) -> None:
    """Check the parameters, and remove notebooks that were cut off or are dated in the future: they are made again.
    What a killed run wrote half goes too, an hour later: its process may live on another machine.
    """
    params.read_study(study)
    for name in configurations or params.configurations(study):
        params.read_configuration(study, name)
    for path in (ROOT / "executed" / study).rglob("*.*"):
        status, why = path.stat(), None
        if re.search(r"\.\d+\.ipynb$|^\.\d+\.", path.name):
            why = "half-written by a run that was killed" if time.time() - status.st_mtime > 3600 else None
        elif path.suffix != ".ipynb" or path.stem.endswith(".failed"):
            continue
        elif not path.read_bytes().rstrip().endswith(b"}"):
            why = "was cut off; it is made again"
        elif status.st_mtime > time.time() + 60:
            why = "dated in the future, which Make takes for fresh; made again"
        if why:
            print(f"{results.clean(str(path))}: {why}")
            path.unlink()


def status(study: str, configurations: list[str]) -> None:
    """Print what Make would do: fresh, stale, failed or missing, per notebook and configuration."""
    out = Path("executed") / study
    more = sorted({p.stem for p in (ROOT / out).glob("*/02_benchmark_*.ipynb") if p.stem[-1].isdigit()})
    rows = [(name, configurations if name in PER_CONFIGURATION else [""]) for name in KINDS]
    rows[3:3] = [(name, configurations) for name in more]
    rows.append(("report", [""]))
    files = {
        (name, c): out / c / (f"{name}.ipynb" if name != "report" else "report.html") for name, cs in rows for c in cs
    }
    stale = _stale([path for path in files.values() if (ROOT / path).exists()], study, len(more) + 1)
    width = max(map(len, [*configurations, "missing"])) + 2
    print(f"{'':16}" + "".join(f"{c:{width}}" for c in [*configurations, "study"]))
    for name, columns in rows:
        cells = {c: _state(files[name, c], stale) for c in columns}
        print(f"{name:16}" + "".join(f"{cells.get(c, ''):{width}}" for c in [*configurations, ""]))


def _state(target: Path, stale: set[str]) -> str:
    if (ROOT / target).exists():
        return "stale" if str(target) in stale else "fresh"
    return "failed" if (ROOT / target).with_suffix(".failed.ipynb").exists() else "missing"


def _stale(targets: list[Path], study: str, processes: int) -> set[str]:
    """The words of what Make would run for these files, all asked at once."""
    make = ["make", "-nk", "--no-print-directory", f"STUDY={study}", f"PYTHON={sys.executable}"]
    make += [f"PROCESSES={processes}", *map(str, targets)]
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, env=environment) if targets else None
    words = set(done.stdout.replace('"', " ").split()) if done else set()
    readers = [str(target) for target in targets if target.name.startswith(("04", "05", "report"))]
    return words | set(readers if words else ())  # -n does not follow a result to what reads it


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(prog="python -m helpers.notebook")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("source", type=Path)
    one.add_argument("target", type=Path)
    one.add_argument("-f", dest="files", action="append", default=[])
    one.add_argument("-p", dest="overrides", action="append", nargs=2, default=[])
    two = commands.add_parser("render")
    two.add_argument("source", type=Path)
    two.add_argument("target", type=Path)
    for name in ("status", "check"):
        three = commands.add_parser(name)
        three.add_argument("study")
        three.add_argument("configurations", nargs="*")
    given = vars(parser.parse_args())
    try:
        {"run": run, "render": render, "status": status, "check": check}[given.pop("command")](**given)
    except StudyError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:  # a folder that is read-only or full before anything runs
        raise SystemExit(
            f"{results.clean(str(error.filename))}: {error.strerror}; make it writable, free some space, then run again"
        ) from None


if __name__ == "__main__":
    main()
