"""Notebooks, run headlessly: papermill with progress, failures that leave a trace, and nothing half-done that looks done.

    python -m helpers.notebook run NOTEBOOK OUTPUT -f params/STUDY/study.yaml [-f params/STUDY/CONFIGURATION.yaml] [-p KEY VALUE]
    python -m helpers.notebook render EXECUTED.ipynb REPORT.html
    python -m helpers.notebook status STUDY CONFIGURATION ...

`run` writes to a temporary name and moves it on success, since papermill leaves a partial notebook behind when a cell fails, which
Make would take for a finished one. A failed notebook is kept as OUTPUT with `.failed.ipynb`, and the reason becomes a result.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import yaml

from helpers import ROOT, NotHere, StudyError, params, results

KINDS = {
    "00_setup": "setup",
    "01_evaluate": "evaluation",
    "02_benchmark": "benchmark",
    "03_fidelity": "fidelity",
    "03_weights": "weights",
}


class _Progress:
    """A file that prefixes every line: what a kernel prints, told apart when configurations run side by side."""

    def __init__(self, prefix: str):
        self.prefix, self.start, self.pending = prefix, time.monotonic(), ""

    def write(self, text: str) -> int:
        *lines, self.pending = (self.pending + text).split("\n")
        for line in lines:
            if line.strip():
                self.line(line.split("\r")[-1])
        return len(text)

    def line(self, text: str) -> None:
        print(f"{self.prefix} {time.monotonic() - self.start:5.0f} s | {text}", flush=True)

    def flush(self) -> None:
        sys.stdout.flush()


def _parameters(files: list[str], overrides: list[list[str]]) -> dict:
    merged: dict = {}
    for name in files:
        merged |= params.read_yaml(Path(name))
    return merged | {key: yaml.safe_load(value) for key, value in overrides}


def _reason(error: Exception) -> str:
    """The sentence a reader needs: a StudyError's own text, else the type and text of what was raised."""
    name, text = getattr(error, "ename", type(error).__name__), str(getattr(error, "evalue", error))
    if name == "DeadKernelError" or "Kernel died" in text:
        return "the notebook's process was killed, most likely for lack of memory; free some, or lower the sizes in study.yaml"
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).strip()
    return results.clean(text if name == "StudyError" else f"{name}: {text}")


def run(source: Path, target: Path, files: list[str], overrides: list[list[str]]) -> None:
    """Execute `source` into `target`. Raises SystemExit with the reason if a cell fails; what other notebooks computed is kept."""
    import papermill

    given = _parameters(files, overrides)
    study, configuration, process = params.check(given, " and ".join(files))
    if configuration and not configuration.quantization.method.startswith(("none", "bitsandbytes")):
        # Known before a kernel is started: a package or the hardware is missing.
        from helpers.setup import methods

        try:
            methods.require(configuration)
        except NotHere as missing:
            results.write_without(study, configuration, KINDS[source.stem], "skipped", str(missing), process)
            results.write_text(target, source.read_text(encoding="utf-8"))
            print(f"[{configuration.configuration}/{source.stem}] not run: {missing}", flush=True)
            return
    label = f"{configuration.configuration if configuration else study.study}/{source.stem}"
    progress = _Progress(f"[{label}]")
    scratch, failed = target.with_suffix(".running.ipynb"), target.with_suffix(".failed.ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    failed.unlink(missing_ok=True)
    progress.line("started")
    try:
        papermill.execute_notebook(
            str(source), str(scratch), parameters=given, cwd=str(source.parent), progress_bar=False,
            stdout_file=progress, stderr_file=None, kernel_name="python3", request_save_on_cell_execute=True, autosave_cell_every=0,
            extra_arguments=["--IPKernelApp.log_level=40"],
        )  # fmt: skip
        os.replace(scratch, target)
        progress.line("done")
    except KeyboardInterrupt:
        scratch.unlink(missing_ok=True)
        raise SystemExit(130) from None
    except Exception as error:
        if getattr(error, "ename", None) == "NotHere":  # no failure: this machine has not what the method takes
            results.write_without(study, configuration, KINDS[source.stem], "skipped", _reason(error), process)
            os.replace(scratch, target)
            progress.line(f"not run: {_reason(error)}")
            return
        # An older, finished result must not stand for this run.
        target.unlink(missing_ok=True)
        if scratch.exists():
            os.replace(scratch, failed)
        reason = _reason(error)
        if source.stem in KINDS:
            results.write_without(study, configuration, KINDS[source.stem], "failed", reason, process)
        where = (
            f"; see {failed.relative_to(ROOT) if failed.is_relative_to(ROOT) else failed}" if failed.exists() else ""
        )
        progress.line(f"FAILED: {reason}{where}")
        raise SystemExit(1) from None


def render(source: Path, target: Path) -> None:
    """The report: an executed notebook as one HTML file by notebooks/template, nothing fetched from the network."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="template", extra_template_basedirs=[str(ROOT / "notebooks")])
    title = f"{target.parent.name}: report"  # from_filename would name the page after the notebook
    resources = {"metadata": {"name": title}}
    notebook = ROOT / "notebooks" / source.name
    if target.resolve().is_relative_to(ROOT) and notebook.is_file():
        resources["notebook"] = Path(os.path.relpath(notebook, target.resolve().parent)).as_posix()
    body, _ = exporter.from_notebook_node(nbformat.read(source, 4), resources=resources)
    results.write_text(target, body)
    print(f"{target.relative_to(ROOT) if target.is_relative_to(ROOT) else target}: open it in a browser")


def status(study: str, configurations: list[str]) -> None:
    """Print what Make would do: fresh, stale, failed or missing, per notebook and configuration."""
    out = Path("executed") / study
    rows = [("00_setup", [""]), *((n, configurations) for n in ("01_evaluate", "02_benchmark", "03_fidelity"))]
    rows += [("04_analysis", [""]), ("05_figures", [""]), ("report", [""])]
    width = max(map(len, [*configurations, "study"])) + 2
    print(f"{'':14}" + "".join(f"{c:{width}}" for c in [*configurations, "study"]))
    for name, columns in rows:
        if name != "report" and not (ROOT / "notebooks" / f"{name}.ipynb").exists():
            continue
        cells = {c: _state(out / c / (f"{name}.ipynb" if name != "report" else "report.html"), study) for c in columns}
        print(f"{name:14}" + "".join(f"{cells.get(c, ''):{width}}" for c in [*configurations, ""]))


def _state(target: Path, study: str) -> str:
    if not (ROOT / target).exists():
        return "failed" if (ROOT / target).with_suffix(".failed.ipynb").exists() else "missing"
    make = ["make", "-q", "--no-print-directory", str(target), f"STUDY={study}", f"PYTHON={sys.executable}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return "stale" if subprocess.run(make, cwd=ROOT, capture_output=True, env=environment).returncode else "fresh"


def main() -> None:
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
    three = commands.add_parser("status")
    three.add_argument("study")
    three.add_argument("configurations", nargs="*")
    given = vars(parser.parse_args())
    try:
        {"run": run, "render": render, "status": status}[given.pop("command")](**given)
    except StudyError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
