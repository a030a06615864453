"""The faults. Each is a generator: what stands before `yield` breaks something, what stands after it mends it again.

It yields (options for make: study, limit, environment; a pattern of the files that have to be made again).
"""

import json
import os
import re
import shutil
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

FAULTS = {}
NF4 = Path("executed/tiny/nf4")


def fault(name: str):
    def keep(function):
        FAULTS[name] = function
        return function

    return keep


def faults(study: str, only: str) -> dict:
    """Those of a study whose name matches: damaged weights and setup.json are `hardware`'s, all others `tiny`'s."""
    found = {name: fault for name, fault in FAULTS.items() if re.search(only, name)}
    return {n: f for n, f in found.items() if bool(re.search("cached weights|setup.json", n)) == (study == "hardware")}


def with_own_cache(project: Path) -> Path:
    """Give the project a cache of its own: it is going to be damaged."""
    shutil.rmtree(project / ".cache")  # its links, not what they lead to
    (project / ".cache").mkdir()
    return project


def forget(project: Path, notebook: str) -> str:
    """Make one notebook of NF4's run again; returns the pattern of what it writes."""
    (project / NF4 / f"{notebook}.ipynb").unlink()
    kind = {"01_evaluate": "evaluation|samples|lm_eval", "02_benchmark": "benchmark", "03_fidelity": "fidelity"}
    return rf"nf4/({notebook}|{kind[notebook]})"


@contextmanager
def _mounted(folder: Path, *options: str):
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"disk faults mount a tmpfs, which needs root: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _cell(notebook: str, before: str, code: str):
    """A cell of NF4's notebook that goes wrong, without a change of the notebook's date: only this run sees it."""

    def broken(project: Path):
        failing = f"if case.configuration.configuration == 'nf4':\n    {code}"
        again, path = forget(project, notebook), project / f"notebooks/{notebook}.ipynb"
        whole, status = path.read_text(), path.stat()
        values = json.loads(whole)
        cell = next(c for c in values["cells"] if re.search(f"^{before}", "".join(c["source"]), re.M))
        cell["source"] = re.sub(f"^{before}", lambda _: f"{failing}\n{before}", "".join(cell["source"]), flags=re.M)
        path.write_text(json.dumps(values))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        yield {}, again
        path.write_text(whole)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    return broken


OUT_OF_MEMORY = "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')"
KILL = "import os; os.kill(os.getpid(), 9)"
for where, notebook, before in (
    ("loading", "01_evaluate", "loaded ="),
    ("prefill", "02_benchmark", "prefill ="),
    ("decode", "02_benchmark", "decode = "),
):
    FAULTS[f"out of GPU memory while {where}"] = _cell(notebook, before, OUT_OF_MEMORY)
FAULTS["the system kills a process for memory while loading"] = _cell("01_evaluate", "loaded =", KILL)
FAULTS["the system kills a process for memory while decoding"] = _cell("02_benchmark", "decode =", KILL)
FAULTS["a CUDA error that ends the process"] = _cell("03_fidelity", "found = ", "import os; os.abort()")
FAULTS["a GPU kernel that was not built for this card"] = _cell(
    "01_evaluate",
    "found =",
    "raise RuntimeError('CUDA error: no kernel image is available for execution on the device')",
)


@fault("an address space of 3 GB (ulimit -v)")
def small_address_space(project):
    yield {"limit": "ulimit -v 3000000"}, forget(project, "01_evaluate")


@fault("the disk is full")
def full_disk(project):
    again, folder, copy = forget(project, "01_evaluate"), project / NF4, project / "copy"
    shutil.copytree(folder, copy)
    size = sum(path.stat().st_size // 4096 + 1 for path in copy.rglob("*")) + 6
    with _mounted(folder, "-t", "tmpfs", "-o", f"size={4 * size}k", "none"):
        shutil.copytree(copy, folder, dirs_exist_ok=True)
        yield {}, again
    shutil.rmtree(copy)


@fault("executed/ is read-only")
def read_only_results(project):
    again, folder = forget(project, "01_evaluate"), project / "executed/tiny"
    with _mounted(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        yield {}, again


@contextmanager
def _other_cache(project: Path, remount: str):
    cache, aside = project / ".cache", project / ".cache-aside"
    cache.rename(aside)
    cache.mkdir()
    with _mounted(cache, "-t", "tmpfs", "-o", "size=64k", "none"):
        for path in aside.iterdir():
            (cache / path.name).symlink_to(path)
        (cache / "cards").unlink(missing_ok=True)
        (cache / "jupyter").unlink(missing_ok=True)
        with suppress(OSError), open(cache / "filler", "wb") as file:
            file.write(b"0" * 2**17)
        if remount:
            subprocess.run(["mount", "-o", f"remount,{remount}", str(cache)], check=True)
        yield
    cache.rmdir()
    aside.rename(cache)


@fault(".cache is full")
def full_cache(project):
    with _other_cache(project, ""):
        yield {}, forget(project, "03_fidelity")


@fault(".cache is read-only")
def read_only_cache(project):
    with _other_cache(project, "ro"):
        yield {}, forget(project, "02_benchmark")


@fault("no temporary folder")
def no_temporary_folder(project):
    yield {"TMPDIR": "/nonexistent", "TEMP": "/nonexistent"}, forget(project, "01_evaluate")


def _damage(name: str, change):
    """Bytes of a finished file replaced, its date as it was."""

    def damaged(project):
        path = project / name
        status, whole = path.stat(), path.read_bytes()
        path.write_bytes(change(whole))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        study = Path(name).parts[1]
        (project / f"executed/{study}/04_analysis.ipynb").unlink(missing_ok=True)  # the analysis has to read it
        yield {"then": ["report"], "study": study}, NEIGHBOURS[Path(name).name]

    return damaged


# A notebook and its results are one: who makes one again makes all.
NEIGHBOURS = {
    "evaluation.json": "nf4/(evaluation|01_evaluate|samples|lm_eval)",
    "01_evaluate.ipynb": "nf4/(evaluation|01_evaluate|samples|lm_eval)",
    "samples_coqa_turns.jsonl": "nf4/(evaluation|01_evaluate|samples|lm_eval)",
    "benchmark.json": "nf4/(benchmark|02_benchmark)",
    "fidelity.json": "nf4/(fidelity|03_fidelity)",
    "setup.json": "setup",
    "04_analysis.ipynb": "04_analysis",
}


def _half(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def _flipped(raw: bytes) -> bytes:
    where = [found.end() for found in re.finditer(rb"\d", raw)][-1] - 1  # a digit
    return raw[:where] + bytes([raw[where] ^ 1]) + raw[where + 1 :]


def _of_another(raw: bytes) -> bytes:
    return raw.replace(b'"kind": "fidelity"', b'"kind": "benchmark"')


for what, change in (("cut off", _half), ("empty", lambda raw: b""), ("one bit flipped", _flipped)):
    FAULTS[f"evaluation.json: {what}"] = _damage(f"{NF4}/evaluation.json", change)
FAULTS["benchmark.json: one bit flipped"] = _damage(f"{NF4}/benchmark.json", _flipped)
FAULTS["setup.json: cut off"] = _damage("executed/hardware/setup.json", _half)
FAULTS["fidelity.json: of another kind"] = _damage(f"{NF4}/fidelity.json", _of_another)
FAULTS["answers: one bit flipped"] = _damage(f"{NF4}/samples_coqa_turns.jsonl", _flipped)
FAULTS["an executed notebook: cut off"] = _damage(f"{NF4}/01_evaluate.ipynb", _half)


@fault("04_analysis.ipynb: cut off")
def cut_analysis(project):
    path = project / "executed/tiny/04_analysis.ipynb"
    path.write_bytes(_half(path.read_bytes()))
    yield {"then": ["report"]}, "04_analysis"


@fault("a result is deleted")
def deleted(project):
    (project / NF4 / "benchmark.json").unlink()
    yield {}, NEIGHBOURS["benchmark.json"]


@fault("a result of another configuration")
def foreign(project):
    shutil.copy(project / "executed/tiny/fp16/fidelity.json", project / NF4 / "fidelity.json")
    yield {"then": ["report"]}, NEIGHBOURS["fidelity.json"]


@fault("a configuration's folder twice")
def duplicate(project):
    copy = project / "executed/tiny/copy"
    shutil.copytree(project / NF4, copy)
    (project / "executed/tiny/04_analysis.ipynb").unlink()  # copied dates are old: the analysis has to read it
    yield {"then": ["report"]}, "^$"
    shutil.rmtree(copy)


@fault("the clock jumps: a notebook of next year")
def future(project):
    ahead = time.time() + 4e7
    os.utime(project / NF4 / "03_fidelity.ipynb", (ahead, ahead))
    yield {"then": ["check"]}, NEIGHBOURS["fidelity.json"]


@fault("the clock jumps: a result of 1980")
def past(project):
    os.utime(project / NF4 / "benchmark.json", (315532800, 315532800))
    yield {}, NEIGHBOURS["benchmark.json"]


def _weights(project: Path) -> Path:
    (path,) = (project / ".cache/models").glob("two-layers*/model*.safetensors")
    (project / "executed/hardware/nf4/02_benchmark.ipynb").unlink()
    return path


@fault("one byte of the cached weights is another")
def weights(project):
    with open(_weights(project), "r+b") as file:
        file.seek(-1000, 2)
        byte = file.read(1)
        file.seek(-1000, 2)
        file.write(bytes([byte[0] ^ 1]))
    yield {"study": "hardware"}, NEIGHBOURS["benchmark.json"]


@fault("the cached weights are cut off")
def cut_weights(project):
    path = _weights(project)
    os.truncate(path, path.stat().st_size // 2)
    yield {"study": "hardware"}, NEIGHBOURS["benchmark.json"]


@fault("a wrong key in a parameter file")
def wrong_key(project):
    path = project / "params/tiny/nf4.yaml"
    path.write_text("quantization:\n  double_qaunt: true\n")
    yield {"then": ["check"]}, "^$"
    path.unlink()


@fault("the user's own Jupyter kernel is broken")
def missing_kernel(project):
    home = project / "jupyter/kernels/python3"
    home.mkdir(parents=True)
    (home / "kernel.json").write_text('{"argv": ["/nonexistent", "{connection_file}"], "display_name": "P"}')
    yield {"JUPYTER_PATH": str(project / "jupyter")}, forget(project, "02_benchmark")


@fault("the same study twice at once")
def twice(project):
    from tests.faults import tiny

    again = forget(project, "01_evaluate")
    first = subprocess.Popen(
        [*tiny.command(), "run-all"],
        cwd=project,
        env=tiny.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield {}, again
    first.wait()
