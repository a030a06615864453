"""Result files: one versioned schema, provenance in every file, atomic writes.

    executed/STUDY/setup.json
    executed/STUDY/CONFIGURATION/{evaluation,benchmark,fidelity}.json
    executed/STUDY/CONFIGURATION/benchmark_N.json       the hardware measured in a further process
    executed/STUDY/weights.json
    executed/STUDY/CONFIGURATION/samples_TASK.jsonl     lm-eval's own format, a line per question
    executed/STUDY/CONFIGURATION/lm_eval.json           lm-eval's own results

Every JSON file but lm-eval's is an envelope (`Result`) around `data`, whose keys `DATA` lists by kind. A file that is truncated, foreign or
of another schema is named and refused.

    result = results.write(study, configuration, "benchmark", data)
    for name, parts in results.read_all(study).items(): ...
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from helpers import EXECUTED, FIGURES, ROOT, StudyError
from helpers.params import Configuration, Study
from helpers.schema import DATA, Kind

SCHEMA = 1
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


class Result(BaseModel):
    """The envelope of every result file."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")  # else NaN would quietly become null

    schema_version: Literal[1]
    kind: Kind
    study: str
    configuration: str | None  # none: of the whole study
    status: Literal["ok", "failed", "skipped"]
    reason: str | None  # why it failed or was skipped, one sentence
    provenance: dict
    data: dict | None  # none unless ok


def clean(text: str) -> str:
    """Text without tokens and without paths of this machine."""
    text = re.sub(r"\bhf_[A-Za-z0-9]{8,}", "hf_***", text)
    text = text.replace(f"{ROOT}/", "").replace(str(ROOT), ".")
    home = os.environ.get("HOME", "")  # Path.home() raises for a user without an entry
    return text.replace(home, "~") if len(home) > 1 else text


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
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
    """What made a result: code, packages, hardware, parameters, time. No host name, user or path."""
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
    # A copy of the tree on another machine may have no git there, or one that knows an older commit: who copied it says which it is.
    copied = os.environ.get("GIT_COMMIT")
    commit = copied or _git("rev-parse", "HEAD")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        # of a copy nobody can tell: none, not false
        "dirty": bool(_git("status", "--porcelain")) if commit and not copied else None,
        "code_sha256": code_sha256(),
        "python": platform.python_version(),
        "packages": versions,
        "system": platform.system(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu,
        "seed": study.seed,
        "study": study.model_dump(mode="json"),
        "configuration": configuration.model_dump(mode="json") if configuration else None,
    }


def _driver() -> str | None:
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def folder(study: Study) -> Path:
    """Where a study's results are: `folder` in its parameters, else executed/STUDY."""
    return ROOT / study.folder if study.folder else EXECUTED / study.study


def figures_folder(study: Study) -> Path:
    """figures/STUDY, or the place under figures/ that mirrors the results' place under executed/."""
    return (
        FIGURES / folder(study).relative_to(EXECUTED)
        if folder(study).is_relative_to(EXECUTED)
        else folder(study) / "figures"
    )


def path(study: Study, configuration: Configuration | None, kind: Kind, process: int = 1) -> Path:
    name = f"{kind}_{process}" if process > 1 else kind
    return folder(study) / (configuration.configuration if configuration else "") / f"{name}.json"


@contextlib.contextmanager
def atomically(target: Path):
    """A path to write to, which becomes `target` at the end: a reader never sees half a file. Raises StudyError on a full disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield scratch
        os.replace(scratch, target)
    except OSError as error:
        what = (
            "the disk is full; free some space"
            if error.errno == errno.ENOSPC
            else f"cannot be written ({error.strerror})"
        )
        raise StudyError(f"{clean(str(target))}: {what}, then run again: what is done is kept") from error
    finally:
        scratch.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    with atomically(target) as scratch, open(scratch, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(target: Path, value) -> None:
    """Any JSON; what it has no form for (functions in lm-eval's task configurations) as text, without paths of this machine."""
    write_text(
        target, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=lambda v: clean(str(v))) + "\n"
    )


def _write(target: Path, result: Result) -> Result:
    write_json(target, result.model_dump(mode="json"))
    return result


def write(study: Study, configuration: Configuration | None, kind: Kind, data: dict, process: int = 1) -> Result:
    """Check and write a finished result. Raises ValidationError if keys of its kind are missing, ValueError on NaN."""
    DATA[kind].model_validate(data, context="writing")
    return _write(path(study, configuration, kind, process), _envelope(study, configuration, kind, "ok", None, data))


def write_without(
    study: Study, configuration: Configuration | None, kind: Kind, status: str, reason: str, process: int = 1
) -> Result:
    """Write why there is no result: status `failed` or `skipped`."""
    return _write(
        path(study, configuration, kind, process), _envelope(study, configuration, kind, status, clean(reason), None)
    )


def _envelope(study, configuration, kind, status, reason, data) -> Result:
    return Result(
        schema_version=SCHEMA,
        kind=kind,
        study=study.study,
        configuration=configuration.configuration if configuration else None,
        status=status,
        reason=reason,
        provenance=provenance(study, configuration),
        data=data,
    )


def write_lines(target: Path, rows: list[dict]) -> dict:
    """Write JSONL; returns {"lines", "sha256"} for the envelope, so that a truncated file is noticed."""
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_text(target, text)
    return {"lines": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_lines(source: Path, expected: dict) -> list[dict]:
    """Read JSONL that `write_lines` wrote. Raises StudyError if it is not the file that the envelope speaks of."""
    try:
        raw = source.read_bytes()
    except FileNotFoundError:
        raise StudyError(
            f"{clean(str(source))}: is missing, though a result speaks of it; delete the result and run again"
        ) from None
    if hashlib.sha256(raw).hexdigest() != expected["sha256"]:
        raise StudyError(f"{clean(str(source))}: is truncated or changed since it was written; delete it and run again")
    return [json.loads(line) for line in raw.decode().split("\n") if line]


def read(source: Path) -> Result:
    """Read one result file. Raises StudyError that names the file if it is missing, truncated, foreign or of another version."""
    name = clean(str(source))
    try:
        values = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"{name}: is missing; make run-all makes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise StudyError(f"{name}: is truncated or not a result file; delete it and run make run-all again") from None
    if not isinstance(values, dict) or "schema_version" not in values:
        raise StudyError(f"{name}: is not a result file of this project; delete it and run make run-all again")
    if values["schema_version"] != SCHEMA:
        raise StudyError(
            f"{name}: has schema {values['schema_version']}, this code reads {SCHEMA}; delete it and run make run-all again"
        )
    try:
        result = Result.model_validate(values)
        if result.status == "ok":
            DATA[result.kind].model_validate(result.data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise StudyError(f"{name}: key '{key}': {first['msg'].lower()}; delete it and run make run-all again") from None
    return result


def _read_own(study: Study, kind: Kind, pattern: str) -> dict[str, Result]:
    """configuration -> result, of the study's files of that kind. Raises StudyError if one belongs elsewhere."""
    found = {}
    for source in sorted(folder(study).glob(pattern)):
        result = read(source)
        if (result.kind, result.study, result.configuration) != (kind, study.study, source.parent.name):
            raise StudyError(
                f"{clean(str(source))}: belongs to {result.study}/{result.configuration}/{result.kind}; delete it"
            )
        found[source.parent.name] = result
    return found


def read_processes(study: Study) -> dict[str, list[Result]]:
    """configuration -> its benchmarks, one of each process. `again/` is where earlier versions put the second."""
    found: dict[str, list[Result]] = {}
    for pattern in ("*/benchmark.json", "again/*/benchmark.json", "*/benchmark_[0-9].json"):
        for name, result in _read_own(study, "benchmark", pattern).items():
            found.setdefault(name, []).append(result)
    return found


def read_all(study: Study) -> dict[str, dict[str, Result]]:
    """configuration -> kind -> result, of all that a study has; full precision first."""
    found: dict[str, dict[str, Result]] = {}
    for kind in ("evaluation", "benchmark", "fidelity"):
        for name, result in _read_own(study, kind, f"*/{kind}.json").items():
            found.setdefault(name, {})[kind] = result
    if not found:
        raise StudyError(
            f"{clean(str(folder(study)))}: holds no results yet; run make run-all STUDY={study.study} first"
        )
    order = {"fp16": 0, "int8": 1, "fp8": 2, "gptq": 3, "awq": 4, "nf4": 5, "fp4": 6}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], 9), item[0])))
