"""Result files: one versioned schema, provenance and a checksum in every file, atomic writes.

    executed/STUDY/setup.json
    executed/STUDY/CONFIGURATION/{evaluation,benchmark,fidelity}.json
    executed/STUDY/CONFIGURATION/benchmark_N.json       the hardware measured in a further process
    executed/STUDY/weights.json
    executed/STUDY/CONFIGURATION/samples_TASK.jsonl     lm-eval's own format, a line per question
    executed/STUDY/CONFIGURATION/lm_eval.json           lm-eval's own results

Every JSON file but lm-eval's is an envelope (`Result`) around `data`, whose keys `DATA` lists by kind. A file that is
truncated, changed, foreign or of another schema is named and refused. Schema 1 (no checksum, fewer keys) is still read.

    result = results.write(study, configuration, "benchmark", data)
    for name, parts in results.read_all(study).items(): ...
"""

import contextlib
import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from helpers import EXECUTED, FIGURES, ROOT, StudyError
from helpers.params import Configuration, Study
from helpers.provenance import provenance
from helpers.schema import DATA, Kind

SCHEMA = 2


class Result(BaseModel):
    """The envelope of every result file."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")  # else NaN would quietly become null

    schema_version: Literal[1, 2]
    kind: Kind
    study: str
    configuration: str | None  # None: of the whole study
    status: Literal["ok", "failed", "skipped"]
    reason: str | None  # why it failed or was skipped, one sentence
    provenance: dict
    data: dict | None  # None unless ok
    sha256: str | None = None  # of all the other keys; schema 1 had none


def first_line(error: Exception) -> str:
    """An error's class and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


def or_reason(part, *arguments, **named):
    """What an optional part returns, or why it could not be done: {"reason": one sentence}."""
    try:
        return part(*arguments, **named)
    except StudyError as error:
        return {"reason": str(error)}
    except Exception as error:  # an optional part never takes with it what is already computed
        return {"reason": clean(first_line(error))}


def clean(text: str) -> str:
    """Text without tokens, passwords in URLs, and paths of this machine."""
    text = re.sub(r"\bhf_[A-Za-z0-9]{8,}", "hf_***", text)
    text = re.sub(r"(?i)\b(bearer\s+)[\w.~+/-]{8,}=*", r"\1***", text)
    text = re.sub(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)", "***", text)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        token = os.environ.get(name, "")
        text = text.replace(token, "***") if len(token) >= 8 else text
    text = text.replace(f"{ROOT}/", "").replace(str(ROOT), ".")
    home = os.path.expanduser("~")  # stays "~" for a user without HOME and without an entry in passwd
    return re.sub(re.escape(home) + r"(?![\w.-])", "~", text) if home.count("/") > 1 or len(home) > 5 else text


def folder(study: Study) -> Path:
    """Where a study's results are: `folder` in its parameters, else executed/STUDY."""
    return ROOT / study.folder if study.folder else EXECUTED / study.study


def figures_folder(study: Study) -> Path:
    """figures/STUDY, or the place under figures/ that mirrors the results' place under executed/."""
    here = folder(study)
    return FIGURES / here.relative_to(EXECUTED) if here.is_relative_to(EXECUTED) else here / "figures"


def path(study: Study, configuration: Configuration | None, kind: Kind, process: int = 1) -> Path:
    name = f"{kind}_{process}" if process > 1 else kind
    return folder(study) / (configuration.configuration if configuration else "") / f"{name}.json"


@contextlib.contextmanager
def atomically(target: Path):
    """A path of this process to write to, which becomes `target` at the end: a reader never sees half a file.

    Raises StudyError when the disk is full, read-only or otherwise refuses the file.
    """
    scratch = target.with_name(f".{os.getpid()}.{target.name}")  # keeps the suffix, which says the format to matplotlib
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        os.replace(scratch, target)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full; free some space" if full else f"cannot be written ({error.strerror}); allow it"
        raise StudyError(f"{clean(str(target))}: {what}, then run again: finished results are kept") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 through `atomically`; text that has no UTF-8 form (lone surrogates) gets escapes."""
    with atomically(target) as scratch, open(scratch, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(target: Path, value, paths: bool = True) -> None:
    """Any JSON; what has no JSON form (functions in lm-eval's task configurations) becomes text without local paths.
    paths=False: `clean` goes over its strings as well."""
    plain = json.dumps(value, ensure_ascii=False, allow_nan=False, default=lambda v: clean(str(v)))
    write_text(target, (plain if paths else clean(plain)) + "\n")


def write(study: Study, configuration: Configuration | None, kind: Kind, data: dict, process: int = 1) -> Result:
    """Check and write a finished result.

    Raises ValidationError if `data` lacks keys of its kind or has others, ValueError on NaN, StudyError if the disk
    refuses.
    """
    DATA[kind].model_validate(data, context="writing")
    return _write(study, configuration, kind, process, "ok", None, data)


def write_without(
    study: Study, configuration: Configuration | None, kind: Kind, status: str, reason: str, process: int = 1
) -> Result:
    """Write why there is no result: status `failed` or `skipped`."""
    return _write(study, configuration, kind, process, status, clean(reason), None)


def _write(study, configuration, kind, process, status, reason, data) -> Result:
    name = configuration.configuration if configuration else None
    head = {"schema_version": SCHEMA, "kind": kind, "study": study.study, "configuration": name, "status": status}
    result = Result(**head, reason=reason, provenance=provenance(study, configuration), data=data)
    plain = json.dumps(result.model_dump(mode="json"), allow_nan=False, default=lambda v: clean(str(v)))
    values = json.loads(plain)  # as a reader will see it: every key is text
    result.sha256 = values["sha256"] = checksum(values)
    write_json(path(study, configuration, kind, process), values)
    return result


def checksum(envelope: dict) -> str:
    """sha256 of an envelope's JSON without its own checksum, keys sorted: the same before writing and after reading."""
    values = {key: value for key, value in envelope.items() if key != "sha256"}
    plain = json.dumps(values, sort_keys=True, allow_nan=False)
    return hashlib.sha256(plain.encode()).hexdigest()


def write_lines(target: Path, rows: list[dict]) -> dict:
    """Write JSONL; returns {"lines", "sha256"} for the envelope, so that a truncated file is noticed."""
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_text(target, text)
    return {"lines": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_lines(source: Path, expected: dict) -> list[dict]:
    """Read JSONL that `write_lines` wrote. Raises StudyError if it is not the file that its result speaks of."""
    remedy = f"delete {source.parent.name}/evaluation.json, then make run-all answers the questions again"
    try:
        raw = source.read_bytes()
    except OSError as error:
        raise StudyError(f"{clean(str(source))}: cannot be read ({error.strerror}); {remedy}") from None
    if hashlib.sha256(raw).hexdigest() != expected["sha256"]:
        raise StudyError(f"{clean(str(source))}: is truncated or changed since it was written; {remedy}")
    return [json.loads(line) for line in raw.decode().split("\n") if line]


def _not_finite(text: str):
    raise ValueError(f"{text} is no number")


def read(source: Path) -> Result:
    """Read one result file. Raises StudyError that names the file if it is missing, truncated, changed, foreign or of
    another version.
    """
    name, remedy = clean(str(source)), "delete it, then make run-all makes it again"
    try:
        values = json.loads(source.read_text(encoding="utf-8"), parse_constant=_not_finite)
    except FileNotFoundError:
        raise StudyError(f"{name}: is missing; make run-all makes it") from None
    except OSError as error:
        raise StudyError(f"{name}: cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError):  # not JSON, not UTF-8, NaN, thousands of digits, a thousand brackets
        raise StudyError(f"{name}: is truncated or not a result file; {remedy}") from None
    if not isinstance(values, dict) or "schema_version" not in values:
        raise StudyError(f"{name}: is not a result file of this project; {remedy}")
    if values["schema_version"] not in (1, SCHEMA):
        version = str(values["schema_version"])[:20]
        raise StudyError(f"{name}: has schema {version}, this code reads 1 and {SCHEMA}; {remedy}")
    try:
        result = Result.model_validate(values)
        if result.status == "ok":
            DATA[result.kind].model_validate(result.data)
        changed = result.schema_version > 1 and result.sha256 != checksum(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))[:100]
        raise StudyError(f"{name}: key '{key}': {first['msg'].lower()}; {remedy}") from None
    except (ValueError, RecursionError):  # 1e999, and nesting that only the way back to text refuses
        raise StudyError(f"{name}: is not a result file of this project; {remedy}") from None
    if changed:
        raise StudyError(f"{name}: was changed since it was written (its checksum differs); {remedy}")
    return result


def _read_own(study: Study, kind: Kind, pattern: str) -> dict[str, Result]:
    """configuration -> result, of the study's files of that kind. Raises StudyError if one belongs elsewhere."""
    found = {}
    for source in sorted(folder(study).glob(pattern)):
        result = read(source)
        if (result.kind, result.study, result.configuration) != (kind, study.study, source.parent.name):
            owner, name = f"{result.study}/{result.configuration}/{result.kind}", clean(str(source))
            raise StudyError(f"{name}: belongs to {owner}; delete it, then make run-all makes this one")
        found[source.parent.name] = result
    return found


def read_processes(study: Study) -> dict[str, list[Result]]:
    """configuration -> its benchmarks, one of each process. `again/` is where earlier versions put the second."""
    found: dict[str, list[Result]] = {}
    further = [f"*/benchmark_{number}.json" for number in range(2, 10)]
    for pattern in ("*/benchmark.json", "again/*/benchmark.json", *further):
        for name, result in _read_own(study, "benchmark", pattern).items():
            found.setdefault(name, []).append(result)
    return found


def read_all(study: Study) -> dict[str, dict[str, Result]]:
    """configuration -> kind -> result, of all that a study has."""
    found: dict[str, dict[str, Result]] = {}
    for kind in ("evaluation", "benchmark", "fidelity"):
        for name, result in _read_own(study, kind, f"*/{kind}.json").items():
            found.setdefault(name, {})[kind] = result
    if not found:
        name = clean(str(folder(study)))
        raise StudyError(f"{name}: holds no results yet; run make run-all STUDY={study.study} first")
    return found
