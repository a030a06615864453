"""Models and data sets of the model hub: fetched once into the user's cache, and read from there as local folders.

    folder = hub.snapshot("meta-llama/Llama-3.2-1B", "4e20de3...")     # a Path; the rest of the project sees no hub
    hub.check(study)                                                   # before any work: can it be had, does it fit on the disk

huggingface_hub does the work and its environment variables hold: HF_HOME (where the cache is), HF_TOKEN (or `hf auth login`), HF_ENDPOINT
(a mirror), HF_HUB_OFFLINE=1 (cache only). A snapshot with a commit as its revision that is in the cache needs no network at all.

Whatever goes wrong is one `HubError`: a StudyError whose sentence names the model and the remedy, and whose `reason` is one of

| reason | what happened |
|---|---|
| `gated` | the owner grants access by hand, and this user has no token or no grant |
| `token` | the token is not valid |
| `missing` | no such repository, or a private one |
| `revision` | no such revision |
| `format` | no safetensors weights, or no configuration |
| `network` | the hub can't be reached, or answers with an error |
| `offline` | HF_HUB_OFFLINE is set and the cache lacks it |
| `disk` | no room, or no permission to write |
"""

import errno
import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import httpx
import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from helpers import StudyError

COMMIT = re.compile(r"[0-9a-f]{40}")
# Weights are read from safetensors only: no pickle, no second copy in another format, nothing that lies in a subfolder (original/, onnx/).
FILES = {
    "model": (
        ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"],
        ["*/*", "consolidated*", "LICENSE*", "USE_POLICY*"],
    ),
    "dataset": (["*.parquet", "*.json", "*.jsonl", "README.md"], []),
}


class HubError(StudyError):
    """The hub did not give what the study needs. `reason` is one of the words in this module's table."""

    def __init__(self, reason: str, sentence: str):
        super().__init__(sentence)
        self.reason = reason


def plan(name: str, revision: str | None = None, kind: str = "model") -> dict:
    """What `snapshot` would do, from a request for each file's head (or from the cache alone): nothing is downloaded.

    Returns commit, pinned (the revision is a commit), files (a list of names), bytes, bytes_to_download, cache (its folder), and from_cache
    (the hub was not asked, or could not be reached). Raises HubError.
    """
    with _explained(name, revision, kind):
        files = _dry_run(name, revision, kind)
    if files is None:
        folder = _from_cache(name, revision, kind)
        sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        commit, missing = folder.name, 0
    else:
        sizes = {f.filename: f.file_size or 0 for f in files}
        commit, missing = (
            (files[0].commit_hash if files else None),
            sum(f.file_size or 0 for f in files if f.will_download),
        )
    _check_format(name, kind, list(sizes))
    free = shutil.disk_usage(_existing(Path(constants.HF_HUB_CACHE))).free
    if missing > free:
        raise HubError(
            "disk",
            f"{name} needs {missing / 1e9:.1f} GB and the disk of {constants.HF_HUB_CACHE} has {free / 1e9:.1f} GB free; "
            "free some space, or set HF_HOME to a folder on a larger disk",
        )
    return {
        "commit": commit,
        "pinned": bool(revision and COMMIT.fullmatch(revision)),
        "files": sorted(sizes),
        "bytes": sum(sizes.values()),
        "bytes_to_download": missing,
        "cache": str(constants.HF_HUB_CACHE),
        "from_cache": files is None,
    }


def snapshot(name: str, revision: str | None = None, kind: str = "model") -> Path:
    """The local folder of a model (or `kind="dataset"`), fetched if it is not in the cache. Its name is the commit.

    Raises HubError before anything is downloaded if it can't be had or does not fit on the disk.
    """
    planned = plan(name, revision, kind)
    commit = planned["commit"]
    if planned["from_cache"]:
        return _from_cache(name, revision, kind)
    allow, ignore = FILES[kind]
    with _explained(name, revision, kind), _without_bars(planned["bytes_to_download"] == 0):
        # The commit, so that a branch that moves meanwhile can't mix two versions; the branch, so that it is found offline.
        folder = huggingface_hub.snapshot_download(
            name, repo_type=kind, revision=commit, allow_patterns=allow, ignore_patterns=ignore
        )
        if revision != commit:
            _remember(Path(folder).parents[1], revision or constants.DEFAULT_REVISION, commit)
    return Path(folder)


def resolved_revision(path_or_name: str | Path, revision: str | None = None, kind: str = "model") -> str | None:
    """The commit of a snapshot's folder, or of a name and revision that are in the cache; none for anything else. No network."""
    parts = Path(path_or_name).parts
    if len(parts) >= 2 and parts[-2] == "snapshots" and COMMIT.fullmatch(parts[-1]):
        return parts[-1]
    if revision and COMMIT.fullmatch(revision):
        return revision
    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{str(path_or_name).replace('/', '--')}"
    reference = folder / "refs" / (revision or constants.DEFAULT_REVISION)
    return reference.read_text().strip() if reference.is_file() else None


def is_hub_data(source: str) -> bool:
    """Whether `data.source` names a data set of the hub (helpers.coqa reads the rest from files)."""
    return not source.startswith("embedded") and not source.endswith((".json", ".jsonl"))


def check(study) -> dict:
    """Everything of a study that comes from the hub, without downloading it: {"model": plan, "data": plan}, only what applies.

    Raises HubError, so that a study stops before its first long step.
    """
    found = {}
    if study.model.source == "hub":
        found["model"] = plan(study.model.name, study.model.revision)
    if study.data and is_hub_data(study.data.source):
        found["data"] = plan(study.data.source, study.data.revision, "dataset")
    return found


def _dry_run(name: str, revision: str | None, kind: str) -> list | None:
    """huggingface_hub's list of files, or none if only the cache can answer (offline, or unreachable with a filled cache)."""
    if constants.HF_HUB_OFFLINE:
        return None
    allow, ignore = FILES[kind]
    try:
        with _without_bars(True):
            return huggingface_hub.snapshot_download(
                name, repo_type=kind, revision=revision, allow_patterns=allow, ignore_patterns=ignore, dry_run=True
            )
    except (errors.DryRunError, errors.LocalEntryNotFoundError, httpx.TransportError):
        if _cached_folder(name, revision, kind) is None:
            raise
        return None


@contextmanager
def _without_bars(quiet: bool):
    """No progress bars while nothing is downloaded."""
    quiet = quiet and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            enable_progress_bars()


def _cached_folder(name: str, revision: str | None, kind: str) -> Path | None:
    """The cache's folder if it holds all that is needed."""
    commit = resolved_revision(name, revision, kind)
    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots" / (commit or "none")
    return folder if folder.is_dir() and not _lacking(folder, kind) else None


def _from_cache(name: str, revision: str | None, kind: str) -> Path:
    folder = _cached_folder(name, revision, kind)
    if folder is None:
        why = "HF_HUB_OFFLINE is set and" if constants.HF_HUB_OFFLINE else "the hub can't be reached and"
        raise HubError(
            "offline" if constants.HF_HUB_OFFLINE else "network", f"{why} {_not_cached(name, revision)}; {_FILL}"
        )
    return folder


def _lacking(folder: Path, kind: str) -> list[str]:
    """Files that a snapshot ought to have and lacks: another program may have fetched only some, or a download was cut off."""
    if kind == "dataset":
        return [] if any(folder.rglob("*.parquet")) or any(folder.rglob("*.json*")) else ["data files"]
    lacking = [] if (folder / "config.json").is_file() else ["config.json"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        lacking += sorted(s for s in shards if not (folder / s).is_file())
    elif not any(folder.glob("*.safetensors")):
        lacking += ["model.safetensors"]
    if not any(folder.glob("tokenizer*")):
        lacking += ["tokenizer.json"]
    return lacking


def _check_format(name: str, kind: str, files: list[str]) -> None:
    if kind == "dataset" and not any(f.endswith((".parquet", ".json", ".jsonl")) for f in files):
        raise HubError(
            "format",
            f"data.source: {name} has no Parquet or JSON files; name one that has, or give a path to a CoQA file",
        )
    if kind == "model":
        for suffix, what in (("config.json", "config.json"), (".safetensors", "safetensors weights")):
            if not any(f.endswith(suffix) for f in files):
                raise HubError(
                    "format", f"model.name: {name} has no {what}, and other formats are not read; name a model that has"
                )


def _remember(storage: Path, revision: str, commit: str) -> None:
    """Note in the cache which commit a branch or tag stands for, as huggingface_hub does."""
    reference = storage / "refs" / revision
    if not reference.is_file() or reference.read_text() != commit:
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


_FILL = "run once with a network, or copy a filled cache from another machine and set HF_HOME to it"


def _not_cached(name: str, revision: str | None) -> str:
    return f"{name} ({revision or constants.DEFAULT_REVISION}) is not complete in the cache {constants.HF_HUB_CACHE}"


@contextmanager
def _explained(name: str, revision: str | None, kind: str):
    """Turn whatever huggingface_hub raises inside into a HubError."""
    try:
        yield
    except HubError:
        raise
    except (errors.HFValidationError, OSError, RuntimeError, httpx.HTTPError) as error:  # RuntimeError: hf_xet's
        raise explain(error, name, revision, kind) from error


def explain(error: BaseException, name: str, revision: str | None = None, kind: str = "model") -> HubError:
    """The one sentence for an exception of huggingface_hub or the system, found along its causes."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    for make in (_of_name, _of_answer, _of_system, _of_network):
        for link in chain:
            if found := make(link, name, revision, kind):
                return HubError(*found)
    return HubError(
        "network",
        f"{name} could not be fetched from {constants.ENDPOINT} ({_first_line(error)}); try again, or report this",
    )


def _of_name(error, name, revision, kind):
    if isinstance(error, errors.HFValidationError):
        key = "model.name" if kind == "model" else "data.source"
        return "missing", f"{key}: '{name}' is not a hub name; write OWNER/NAME, or give a path"
    return None


def _of_answer(error, name, revision, kind):
    """Answers of the hub. 401 and 403 with the code GatedRepo: no token, no grant; 401 otherwise: also a repository that does not exist."""
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    token = huggingface_hub.get_token()
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        if token is None:
            return "gated", (
                f"{name} is gated and you are not logged in: ask for access on {page}, then run `.venv/bin/hf auth login` or set HF_TOKEN "
                "(the study smollm2-135m needs no account)"
            )
        return "gated", (
            f"{name} is gated and your token has no access: ask for access on {page}, then run again once it is granted; a fine-grained "
            "token also needs the permission to read gated repositories"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            "revision",
            f"{name} has no revision '{revision}': take one from {page}/commits/main, or leave `revision` out",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        who = (
            "your token may not see it"
            if token
            else "it is private: then run `.venv/bin/hf auth login` or set HF_TOKEN"
        )
        key = "model.name" if kind == "model" else "data.source"
        return "missing", f"{key}: the hub has no {kind} {name}, or {who}; check the name on {page}"
    if isinstance(error, errors.DisabledRepoError):
        return "missing", f"{name} has been disabled on the hub; name another {kind}"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return (
            "format",
            f"{name} lacks a file that is listed there ({_first_line(error)}); take another revision from {page}/commits/main",
        )
    if status == 401:
        return "token", "your token for the hub is not valid: run `.venv/bin/hf auth login` again, or correct HF_TOKEN"
    if status == 429:
        return (
            "network",
            f"{constants.ENDPOINT} refuses more requests for now (429); wait some minutes, or run `.venv/bin/hf auth login`",
        )
    if status and status >= 500:
        return (
            "network",
            f"{constants.ENDPOINT} answers with error {status} and {_not_cached(name, revision)}; try again later",
        )
    if status and status >= 400:
        return (
            "network",
            f"{constants.ENDPOINT} refuses {name} with error {status}; check the token's permissions, and HF_ENDPOINT",
        )
    return None


def _of_system(error, name, revision, kind):
    if not isinstance(error, OSError) or isinstance(error, errors.HfHubHTTPError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            "disk",
            f"the disk of {constants.HF_HUB_CACHE} is full before {name} is complete; free some space, or move HF_HOME",
        )
    if (
        error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename is not None
    ):  # not a forbidden connection
        return (
            "disk",
            f"{constants.HF_HUB_CACHE} can't be written ({error.strerror}); set HF_HOME to a folder of your own",
        )
    return None


def _of_network(error, name, revision, kind):
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "offline", f"HF_HUB_OFFLINE is set and {_not_cached(name, revision)}; {_FILL}"
    if isinstance(error, errors.FileMetadataError):
        return (
            "network",
            f"{constants.ENDPOINT} does not answer like a model hub; check HF_ENDPOINT, and a proxy or firewall between",
        )
    if isinstance(error, httpx.TransportError | ConnectionError):
        return "network", (
            f"the hub at {constants.ENDPOINT} can't be reached ({type(error).__name__}) and {_not_cached(name, revision)}: check network "
            "and proxy, set HF_ENDPOINT to a mirror, or copy a filled cache from another machine and set HF_HOME to it and HF_HUB_OFFLINE=1"
        )
    return None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no text'])[0]}"
