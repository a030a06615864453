"""A stand-in for the model hub over real HTTP on 127.0.0.1, since tests must not need a network or an account.

It answers what huggingface_hub 1.33 asks for: repository information, file listing, and HEAD and GET of a file at a revision, with the
hub's status codes and headers (X-Repo-Commit, ETag, X-Error-Code). Large files answer with a redirect, as the hub's do. As on the hub,
information about a gated repository is public and only its files are refused.

    with Hub([Repository("tiny/llama", {"config.json": b"{}"})]) as hub:
        ... HF_ENDPOINT=hub.url ...
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    """`files`: name to content, or to a size in bytes for a file that is only ever listed. `status`: an error that every request gets."""

    name: str
    files: dict[str, bytes | int]
    kind: str = "model"
    gated: bool = False
    status: int | None = None
    commit: str = field(init=False)

    def __post_init__(self):
        self.commit = hashlib.sha1(f"{self.kind}{self.name}{sorted(self.files)}".encode()).hexdigest()


class Hub:
    """The server; `url` is for HF_ENDPOINT, `log` holds (method, path, token) of every request, in order."""

    def __init__(self, repositories: list[Repository]):
        self.repositories = {(r.kind, r.name): r for r in repositories}
        self.log: list[tuple[str, str, str | None]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}"  # another host name, as the hub's large files have: no token goes there

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
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
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
        sha256 = hashlib.sha256(content).hexdigest()
        if len(content) > 100_000:  # as files in large file storage
            linked = {
                "X-Linked-Etag": f'"{sha256}"',
                "X-Linked-Size": str(len(content)),
                "Location": f"{self.hub.cdn}/cdn/{sha256}",
            }
            return self._send(302, b"", commit | linked)
        return self._send(200, content, commit | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _cdn(self, sha256):
        for repository in self.hub.repositories.values():
            for content in repository.files.values():
                if isinstance(content, bytes) and hashlib.sha256(content).hexdigest() == sha256:
                    return self._send(200, content, {"ETag": f'"{sha256}"'})
        return self._refuse(404, None, "no such blob")

    @staticmethod
    def _entry(file, content):
        size = content if isinstance(content, int) else len(content)
        return {"type": "file", "path": file, "size": size, "oid": hashlib.sha1(str(content)[:99].encode()).hexdigest()}

    def _json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status, code, message, headers=None):
        extra = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        self._send(status, json.dumps({"error": message}).encode(), extra | {"Content-Type": "application/json"})

    def _send(self, status, body, headers):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
