"""Requests to the model hub that end: a time-out on each, a limit on all of a call, no web page taken for an answer.

    with http.within(120):                      # seconds, for all requests inside
        huggingface_hub.snapshot_download(...)  # raises Late or NoHub, beside huggingface_hub's own exceptions

huggingface_hub itself sends some requests without a time-out, and follows a server that sends a byte a second for ever.
"""

import time
from contextlib import contextmanager

import httpx
import huggingface_hub
from huggingface_hub.utils._http import default_client_factory

TIMEOUT = 30  # s without a byte
_end = float("inf")  # of the call that is running, by time.monotonic()


class Late(Exception):
    """The time for all requests of a call is up. Not one of httpx's, which huggingface_hub would try again."""


class NoHub(Exception):
    """A web page came with status 200: a proxy's, a firewall's or a login page."""


class _Bounded(httpx.SyncByteStream):
    """A response's bytes, as long as there is time."""

    def __init__(self, stream):
        self.stream = stream

    def __iter__(self):
        for chunk in self.stream:
            _check_time()
            yield chunk

    def close(self):
        self.stream.close()


def _check_time() -> None:
    if time.monotonic() > _end:
        raise Late


def _before(request: httpx.Request) -> None:
    _check_time()
    asked = request.extensions.get("timeout") or {}
    phases = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {phase: min(asked.get(phase) or TIMEOUT, TIMEOUT) for phase in phases}


def _after(response: httpx.Response) -> None:
    if response.status_code == 200 and response.headers.get("content-type", "").startswith("text/html"):
        raise NoHub
    response.stream = _Bounded(response.stream)


def _client() -> httpx.Client:
    client = default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = {"request": [*hooks["request"], _before], "response": [*hooks["response"], _after]}
    return client


huggingface_hub.set_client_factory(_client)


@contextmanager
def within(seconds: float):
    """All requests inside take at most so long together. Raises Late."""
    global _end
    _end = time.monotonic() + seconds
    try:
        yield
    finally:
        _end = float("inf")
