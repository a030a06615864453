"""A GPU for each running notebook: `make -j` on a machine with several of them.

A card has SHARES lock files. A benchmark takes all of one card, so that nothing else runs there; any other notebook
takes one. The system drops a lock with the process that holds it, so none is ever stale. On a machine with one GPU a
benchmark still waits until it is alone; without a GPU benchmarks wait for each other, and nothing else does. Under
Slurm each job has cards of its own: nothing is locked.
"""

import contextlib
import fcntl
import os
import subprocess
import time

from helpers import CACHE

SHARES = 6  # notebooks that may share a card while none of them measures time: as many as make -j starts, at most
WAIT_SECONDS = 0.5


def visible() -> list[str]:
    """Cards that this process may use: CUDA_VISIBLE_DEVICES if it is set, else all that the driver lists."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [card for card in chosen.split(",") if card]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listed.stdout.split() if listed.returncode == 0 else []


def _lock(path):
    """An open file that this process alone has locked, or None if another has."""
    file = path.open("w")  # stays open as long as it is locked
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _take(card: str, alone: bool) -> list:
    """Locks on a card: all of its shares, or one; none if that is not to be had now."""
    held = []
    for share in range(SHARES):
        if lock := _lock(CACHE / "cards" / f"{card.replace('/', '-')}-{share}"):
            held.append(lock)
            if not alone:
                return held
        elif alone:
            break
    if len(held) == SHARES:
        return held
    for lock in held:
        lock.close()
    return []


@contextlib.contextmanager
def reserved(alone: bool | None, waiting=lambda: None):
    """A card, alone or shared, in CUDA_VISIBLE_DEVICES; None: no card. `waiting` is called once if none is free yet."""
    if alone is None or "SLURM_JOB_ID" in os.environ:
        yield None
        return
    cards = visible() or (["cpu"] if alone else [])
    if not cards:
        yield None
        return
    (CACHE / "cards").mkdir(parents=True, exist_ok=True)
    started, held = False, []
    while not held:
        for offset in range(len(cards)):
            card = cards[(os.getpid() + offset) % len(cards)]
            if held := _take(card, alone):
                break
        else:
            if not started:
                waiting()
                started = True
            time.sleep(WAIT_SECONDS)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if card != "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = card
    try:
        yield card
    finally:
        for lock in held:
            lock.close()
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
