"""Models and data sets of the model hub: fetched once into the user's cache, and read from there as local folders.

    folder = hub.snapshot("meta-llama/Llama-3.2-1B", "4e20de3...")     # a Path; the rest of the project sees no hub
    hub.check(study)                                                   # before any work: access, format, disk

huggingface_hub does the work and its environment variables hold: HF_HOME (where the cache is), HF_TOKEN (or `hf auth
login`), HF_ENDPOINT (a mirror), HF_HUB_OFFLINE=1 (cache only). A commit that is in the cache needs no network. Every
request has a time-out, every call an end; a file whose sha256 is not the one that the hub names is deleted and
refused.

Whatever goes wrong is one `HubError`: a StudyError whose sentence names the model and the remedy, without token or
password, and whose `reason` is one of

| reason | what happened |
|---|---|
| `gated` | the owner grants access by hand, and this user has no token or no grant |
| `token` | the token is not valid |
| `missing` | no such repository, or a private one |
| `revision` | no such revision |
| `format` | no safetensors weights, or no configuration |
| `network` | the hub can't be reached, does not answer in time, or answers with an error or a web page |
| `damaged` | a file arrived with another content than the hub names |
| `offline` | HF_HUB_OFFLINE is set and the cache lacks it |
| `disk` | no room, or no permission to write |
"""

import errno
import hashlib
import os
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from helpers import ROOT, StudyError
from helpers.setup import http

COMMIT = re.compile(r"[0-9a-f]{40}")
LOOKUP = 120  # s for all requests that only look something up
SLOWEST = 200_000  # bytes/s; a download may take LOOKUP and as long as it takes at this rate
# No pickle, no second copy of the weights in another format, nothing of a subfolder (original/, onnx/).
MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
FILES = {"model": (MODEL_FILES, ["*/*", "consolidated*", "LICENSE*", "USE_POLICY*"])}
FILES |= {"dataset": (["*.parquet", "*.json", "*.jsonl", "README.md"], [])}
NEEDED = {"model": {"config.json": "config.json", ".safetensors": "safetensors weights"}}
NEEDED |= {"dataset": {(".parquet", ".json", ".jsonl"): "Parquet or JSON files"}}


class HubError(StudyError):
    """The hub did not give what the study needs. `reason` is one of the words in this module's table."""

    def __init__(self, reason: str, sentence: str):
        super().__init__(sentence)
        self.reason = reason


def _endpoint() -> str:
    """The hub's address without user and password."""
    return re.sub(r"//[^/]*@", "//", constants.ENDPOINT)


@contextmanager
def _call(name: str, revision: str | None, kind: str, seconds: float, quiet: bool):
    """At most so long, without progress bars if quiet; every exception a HubError that holds none of its text, since a
    server may echo the token."""
    quiet = quiet and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        with http.within(seconds):
            yield
    except Exception as error:  # huggingface_hub's, httpx's, hf_xet's RuntimeError, and those of parsing whatever came
        raise explain(error, name, revision, kind) from None
    finally:
        if quiet:
            enable_progress_bars()


# ---- repositories ----


def plan(name: str, revision: str | None = None, kind: str = "model") -> dict:
    """What `snapshot` would do, from a request for each file's head (or from the cache alone): nothing is downloaded.

    Returns commit, pinned (the revision is a commit), files (a list of names), bytes, bytes_to_download, and from_cache
    (the hub was not asked, or could not be reached). Raises HubError."""
    try:
        with _call(name, revision, kind, LOOKUP, quiet=True):
            files = _dry_run(name, revision, kind)
        folder = _from_cache(name, revision, kind) if files is None else None
    except HubError as error:
        owner, _, own = name.partition("/")
        if error.reason == "gated" or not (ROOT / owner).is_dir():
            raise
        said = f"{_key(kind)}: there is a folder {owner}/ here, but no {own} in it; correct the path"
        raise HubError("missing", f"{said} (as a {kind} of the hub: {error})") from None
    if folder:
        sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    else:
        sizes = {f.filename: f.file_size or 0 for f in files}
    missing = sum(f.file_size or 0 for f in files or () if f.will_download)
    for suffix, what in NEEDED[kind].items():
        if not any(file.endswith(suffix) for file in sizes):
            said = f"{name} has no {what}, and other formats are not read; name one that has"
            raise HubError("format", f"{_key(kind)}: {said}")
    free = shutil.disk_usage(_existing(Path(constants.HF_HUB_CACHE))).free
    if missing > free:
        said = f"{name} needs {missing / 1e9:.1f} GB and the disk of {_cache()} has {free / 1e9:.1f} GB free"
        raise HubError("disk", f"{said}; free some space, or set HF_HOME to a folder on a larger disk")
    return {
        "commit": folder.name if folder else files[0].commit_hash,
        "pinned": bool(revision and COMMIT.fullmatch(revision)),
        "files": sorted(sizes),
        "bytes": sum(sizes.values()),
        "bytes_to_download": missing,
        "from_cache": bool(folder),
    }


def snapshot(name: str, revision: str | None = None, kind: str = "model") -> Path:
    """The local folder of a model (or `kind="dataset"`), fetched if it is not in the cache. Its name is the commit.

    Raises HubError before anything is downloaded if it can't be had or does not fit on the disk."""
    planned = plan(name, revision, kind)
    if planned["from_cache"]:
        return _from_cache(name, revision, kind)
    size, commit = planned["bytes_to_download"], planned["commit"]
    with _call(name, revision, kind, LOOKUP + size / SLOWEST, quiet=size == 0):
        started = time.time()
        # The commit, so that a branch that moves meanwhile can't mix two versions.
        folder = Path(_download(name, commit, kind))
        if revision != commit:  # the branch or tag, so that it is found offline
            reference = folder.parents[1] / "refs" / (revision or constants.DEFAULT_REVISION)
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(commit)
    if size:
        _check_content(name, folder, started)
    return folder


def _download(name: str, revision: str | None, kind: str, **options):
    allow, ignore = FILES[kind]
    return huggingface_hub.snapshot_download(
        name, repo_type=kind, revision=revision, allow_patterns=allow, ignore_patterns=ignore, **options
    )


def _check_content(name: str, folder: Path, since: float) -> None:
    """Large files are stored under the sha256 that the hub names; those that have just arrived are compared with it."""
    for path in sorted(folder.rglob("*")):
        blob = path.resolve()
        if not re.fullmatch(r"[0-9a-f]{64}", blob.name) or blob.stat().st_mtime < since - 1:
            continue
        with open(blob, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != blob.name:
            path.unlink()
            blob.unlink(missing_ok=True)
            said = f"arrived with another content than {_endpoint()} names (sha256 {found[:12]}..., expected"
            said = f"{path.name} of {name} {said} {blob.name[:12]}...) and was deleted; run again, and if it happens"
            raise HubError("damaged", f"{said} again, use another mirror")


def resolved_revision(path_or_name: str | Path, revision: str | None = None, kind: str = "model") -> str | None:
    """The commit of a snapshot's folder, or of a name and revision that are in the cache; None for anything else."""
    parts = Path(path_or_name).parts
    if len(parts) >= 2 and parts[-2] == "snapshots" and COMMIT.fullmatch(parts[-1]):
        return parts[-1]
    if revision and COMMIT.fullmatch(revision):
        return revision
    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{str(path_or_name).replace('/', '--')}"
    reference = folder / "refs" / (revision or constants.DEFAULT_REVISION)
    return reference.read_text().strip() if reference.is_file() else None


def is_hub_data(source: str) -> bool:
    """Whether `data.source` is a data set of the hub (OWNER/NAME): not what ships, nor a file, there or mistyped."""
    is_file = Path(source).suffix.lower() in (".json", ".jsonl", ".ndjson", ".txt", ".csv") or (ROOT / source).exists()
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source)) and not is_file


def check(study) -> dict:
    """The plan of everything of a study that comes from the hub, by its name there; nothing is downloaded.

    Raises HubError, so that a study stops before its first long step."""
    wanted = [(study.model.name, study.model.revision)] if study.model.source == "hub" else []
    wanted += [(data.source, data.revision, "dataset") for data in study.sources if is_hub_data(data.source)]
    return {call[0]: plan(*call) for call in wanted}


def _dry_run(name: str, revision: str | None, kind: str) -> list | None:
    """huggingface_hub's files; None if only the cache can answer (offline, or unreachable with a filled cache)."""
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return _download(name, revision, kind, dry_run=True)
    except (errors.DryRunError, errors.LocalEntryNotFoundError, httpx.TransportError, http.NoHub):
        if _cached(name, revision, kind) is None:
            raise
        return None


def _cached(name: str, revision: str | None, kind: str) -> Path | None:
    """The cache's folder, if it holds all that is needed as far as the cache's own listing tells."""
    try:
        return Path(_download(name, revision, kind, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return None


def _from_cache(name: str, revision: str | None, kind: str) -> Path:
    if folder := _cached(name, revision, kind):
        return folder
    offline = constants.HF_HUB_OFFLINE
    why = "HF_HUB_OFFLINE is set" if offline else "the hub can't be reached"
    raise HubError("offline" if offline else "network", f"{why} and {_not_cached(name, revision)}; {FILL}")


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


# ---- sentences ----

FILL = "run once with a network, or copy a filled cache from another machine and set HF_HOME to it"


def _cache() -> str:
    """The cache's folder as the user writes it."""
    folder, home = Path(constants.HF_HUB_CACHE), os.environ.get("HOME", "/")
    return f"~/{folder.relative_to(home)}" if home != "/" and folder.is_relative_to(home) else str(folder)


def _key(kind: str) -> str:
    return "model.name" if kind == "model" else "data.source"


def _not_cached(name: str, revision: str | None) -> str:
    return f"{name} ({revision or constants.DEFAULT_REVISION}) is not complete in the cache {_cache()}"


def explain(error: BaseException, name: str, revision: str | None = None, kind: str = "model") -> HubError:
    """The one sentence for an exception of huggingface_hub or the system, found along its causes."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    hub, key, cached = _endpoint(), _key(kind), _not_cached(name, revision)
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    login, later = "run `.venv/bin/hf auth login` or set HF_TOKEN", "try again later, or set HF_ENDPOINT to a mirror"
    ask, another = f"ask for access on {page}, then", f"take one from {page}/commits/main"
    if huggingface_hub.get_token():
        private = "your token may not see it"
        gated = f"your token has no access: {ask} run again once it is granted; a fine-grained token also needs the "
        gated += "permission to read gated repositories"
    else:
        private = f"it is private: then {login}"
        gated = f"you are not logged in: {ask} {login} (the study smollm2-135m needs no account)"
    late = f"network {hub} did not answer in {http.TIMEOUT} s and {cached}; {later}"
    no_hub = f"{hub} does not answer like a model hub; check HF_ENDPOINT, and a proxy, firewall or login page between"
    told = {  # the first word is the reason
        http.Late: f"network {hub} is too slow: the time for this is up; {later}",
        (http.NoHub, errors.FileMetadataError): f"network {no_hub}",
        errors.HFValidationError: f"missing {key}: '{name}' is not a hub name; write OWNER/NAME, or give a path",
        errors.GatedRepoError: f"gated {name} is gated and {gated}",
        errors.RevisionNotFoundError: f"revision {name} has no revision '{revision}': {another}, or leave it out",
        errors.RepositoryNotFoundError: f"missing {key}: the hub has no {kind} {name}, or {private}; check {page}",
        errors.DisabledRepoError: f"missing {name} has been disabled on the hub; name another {kind}",
        errors.RemoteEntryNotFoundError: f"format this revision of {name} lacks a file that is listed; {another}",
        (httpx.ConnectTimeout, httpx.ReadTimeout): late,
        errors.OfflineModeIsEnabled: f"offline HF_HUB_OFFLINE is set and {cached}; {FILL}",
    }
    answers = {
        401: "token your token for the hub is not valid: run `.venv/bin/hf auth login` again, or correct HF_TOKEN",
        429: f"network {hub} refuses more requests for now (429); wait some minutes, or {login}",
    }
    for expected, said in told.items():
        if any(isinstance(link, expected) for link in chain):
            return HubError(*said.split(" ", 1))
    for link in chain:
        if isinstance(link, errors.HfHubHTTPError) and (status := link.response.status_code) >= 400:
            remedy = later if status >= 500 else "check the token's permissions and HF_ENDPOINT"
            said = answers.get(status, f"network {hub} answers with error {status} and {cached}; {remedy}")
            return HubError(*said.split(" ", 1))
        number = getattr(link, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT):
            return HubError("disk", f"the disk of {_cache()} is full before {name} is complete; free some space")
        # A file name: a connection can be forbidden as well.
        if number in (errno.EACCES, errno.EPERM, errno.EROFS) and getattr(link, "filename", None):
            said = f"{_cache()} can't be written ({link.strerror}); set HF_HOME to a folder of your own"
            return HubError("disk", said)
    lost = next((link for link in chain if isinstance(link, httpx.TransportError | ConnectionError)), None)
    if lost is None:
        return HubError("network", f"{name} could not be fetched ({type(error).__name__}): {no_hub}")
    said = f"the hub at {hub} can't be reached ({type(lost).__name__}) and {cached}: check network and proxy, set "
    return HubError("network", f"{said}HF_ENDPOINT to a mirror, or {FILL.split(', or ')[1]}, with HF_HUB_OFFLINE=1")
