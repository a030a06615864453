"""A stand-in for the model hub over real HTTP on 127.0.0.1, since tests must not need a network or an account.

It answers what huggingface_hub 1.33 asks for: repository information, file listing, and HEAD and GET of a file at a
revision, with the hub's status codes and headers (X-Repo-Commit, ETag, X-Error-Code). Large files answer with a
redirect, as the hub's do. As on the hub, information about a gated repository is public and only its files are
refused.

    with Hub([Repository("tiny/llama", {"config.json": b"{}"})]) as hub:
        ... HF_ENDPOINT=hub.url ...

`fault` makes a repository misbehave: "stall" (says nothing for a minute), "drip" (a byte now and then), "page" (a
login page with status 200), "echo" (an error that repeats the token), "flip" (other content than its sha256), "cut"
(half of a large file, never more)."""

import contextlib
import functools
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

GRANTED, NOT_GRANTED = "hf_granted", "hf_notgranted"
ROUTES = (
    (re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?"), "information"),
    (re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)"), "tree"),
    (re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)"), "resolve"),
    (re.compile(r"/cdn/([0-9a-f]{64})"), "cdn"),
)


@dataclass
class Repository:
    """`files`: name to content (bytes, or a file on disk), or to a size for a file that is only ever listed.
    `status`: an error that every request gets. `commit`: made up from the names unless a study pins one.
    """

    name: str
    files: dict[str, bytes | Path | int]
    kind: str = "model"
    gated: bool = False
    status: int | None = None
    fault: str | None = None
    commit: str | None = None

    def __post_init__(self):
        self.commit = self.commit or hashlib.sha1(f"{self.kind}{self.name}{sorted(self.files)}".encode()).hexdigest()


def _size(content: bytes | Path | int) -> int:
    return (
        content if isinstance(content, int) else content.stat().st_size if isinstance(content, Path) else len(content)
    )


@functools.cache
def _sha256(content: bytes | Path) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Hub:
    """The server; `url` is for HF_ENDPOINT, `log` holds (method, path, token) of every request, in order."""

    def __init__(self, repositories: list[Repository]):
        self.repositories = {(r.kind, r.name): r for r in repositories}
        self.log: list[tuple[str, str, str | None]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # Another host name, as the hub\'s large files have: no token goes there.
        self.cdn = f"http://localhost:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        scheme, _, value = self.headers.get("Authorization", "").partition(" ")
        token = value if scheme == "Bearer" else None  # Basic: a mirror's own user and password
        self.hub.log.append((self.command, path, token))
        if token not in (None, GRANTED, NOT_GRANTED):
            return self._refuse(401, None, "Invalid credentials in Authorization header")
        for pattern, what in ROUTES:
            if match := pattern.fullmatch(path):
                return self._cdn(match[1]) if what == "cdn" else self._repository(what, token, *match.groups())
        return self._refuse(404, None, f"no route {path}")

    do_HEAD = do_GET

    def _repository(self, what, token, kind, name, revision, file=None):
        repository = self.hub.repositories.get(("dataset" if (kind or "").startswith("datasets") else "model", name))
        if repository is None:
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if repository.status:
            return self._refuse(repository.status, None, "Not now")
        if repository.fault == "stall":
            time.sleep(60)
        if repository.fault == "page":
            return self._send(200, b"<html>Log in</html>", {"Content-Type": "text/html"})
        if repository.fault == "echo":
            return self._refuse(400, None, f"bad request: Authorization: Bearer {token}")
        if revision not in (None, "main", repository.commit):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if what == "information":
            return self._json(
                {
                    "id": name,
                    "sha": repository.commit,
                    "gated": "manual" if repository.gated else False,
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "siblings": [{"rfilename": f} for f in repository.files],
                }
            )
        if what == "tree":
            return self._json([self._entry(f, c) for f, c in repository.files.items()])
        if repository.gated and token != GRANTED:
            return self._refuse(403 if token else 401, "GatedRepo", f"Access to {name} is restricted.")
        if file not in repository.files:
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repository.commit})
        return self._file(repository, repository.files[file])

    def _file(self, repository, content):
        commit = {"X-Repo-Commit": repository.commit}
        if isinstance(content, int):
            return self._send(200, b"", commit | {"ETag": '"listed"', "Content-Length": str(content)})
        if _size(content) > 100_000:  # as files in large file storage
            sha256 = _sha256(content)
            linked = {
                "X-Linked-Etag": f'"{sha256}"',
                "X-Linked-Size": str(_size(content)),
                "Location": f"{self.hub.cdn}/cdn/{sha256}",
            }
            return self._send(302, b"", commit | linked)
        content = content.read_bytes() if isinstance(content, Path) else content
        return self._send(200, content, commit | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _cdn(self, sha256):
        for repository in self.hub.repositories.values():
            for content in repository.files.values():
                if not isinstance(content, int) and _size(content) > 100_000 and _sha256(content) == sha256:
                    return self._send(200, content, {"ETag": f'"{sha256}"'}, repository.fault)
        return self._refuse(404, None, "no such blob")

    @staticmethod
    def _entry(file, content):
        oid = hashlib.sha1(str(content)[:99].encode()).hexdigest()
        return {"type": "file", "path": file, "size": _size(content), "oid": oid}

    def _json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status, code, message, headers=None):
        extra = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        self._send(status, json.dumps({"error": message}).encode(), extra | {"Content-Type": "application/json"})

    def _send(self, status, body, headers, fault=None):
        self.send_response(status)
        for key, value in ({"Content-Length": str(_size(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "GET":
            return
        if isinstance(body, Path):
            with open(body, "rb") as file:
                while block := file.read(2**20):
                    self.wfile.write(block)
        elif fault == "drip":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked had enough of it
                for start in range(0, len(body), 1000):
                    self.wfile.write(body[start : start + 1000])
                    time.sleep(0.2)
        elif fault == "cut":
            self.wfile.write(b"" if self.headers.get("Range") else body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(bytes([body[0] ^ 1]) + body[1:] if fault == "flip" else body)
