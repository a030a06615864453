"""A GPU for each running notebook, by locks between real processes; the cards are names here."""

import json
import os
import subprocess
import sys
import time

import pytest

from helpers import ROOT, cards

HOLD = """
import json, sys, time
from pathlib import Path
from helpers import cards
cards.CACHE, cards.WAIT_SECONDS = Path(sys.argv[1]), 0.02
with cards.reserved(sys.argv[2] == "alone", lambda: print('"waits"', flush=True)) as card:
    import os
    print(json.dumps([card, os.environ.get("CUDA_VISIBLE_DEVICES"), time.time()]), flush=True)
    time.sleep(float(sys.argv[3]))
    print(json.dumps(time.time()), flush=True)
"""


@pytest.fixture
def start(tmp_path):
    """Start a process that holds a card for so long; `held` reads which one, and when it got and left it."""
    running = []

    def hold(how: str, seconds: float = 0.3, visible: str = "0,1"):
        environment = {k: v for k, v in os.environ.items() if k != "SLURM_JOB_ID"} | {"CUDA_VISIBLE_DEVICES": visible}
        command = [sys.executable, "-c", HOLD, str(tmp_path), how, str(seconds)]
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield hold
    for process in running:
        process.kill()
        process.wait()


def held(process) -> dict:
    *_, first, last = map(json.loads, process.communicate(timeout=30)[0].splitlines())
    return dict(zip(("card", "visible", "start"), first)) | {"end": last}


def overlap(a: dict, b: dict) -> bool:
    return a["card"] == b["card"] and a["start"] < b["end"] and b["start"] < a["end"]


def test_two_benchmarks_have_a_card_each_and_the_third_waits(start):
    rows = [held(process) for process in [start("alone") for _ in range(3)]]
    assert {row["card"] for row in rows} == {"0", "1"} and all(row["card"] == row["visible"] for row in rows)
    assert not any(overlap(a, b) for i, a in enumerate(rows) for b in rows[:i])


def test_others_share_a_card_but_never_with_a_benchmark(start):
    rows = [held(p) for p in [start(how, visible="0") for how in ("shared", "alone", "shared", "shared")]]
    shared, (benchmark,) = [rows[0], *rows[2:]], [rows[1]]
    assert not any(overlap(benchmark, row) for row in shared)


def test_a_killed_process_leaves_its_card_free(start):
    first = start("alone", 60, visible="0")
    first.stdout.readline()  # it holds the card
    second = start("alone", 0, visible="0")
    assert json.loads(second.stdout.readline()) == "waits"
    first.kill()
    assert held(second)["card"] == "0"


def test_without_a_gpu_a_benchmark_is_alone_too(start):
    rows = [held(process) for process in [start("alone", 0.2, visible="") for _ in range(2)]]
    assert {(row["card"], row["visible"]) for row in rows} == {("cpu", "")} and not overlap(*rows)


@pytest.mark.parametrize(("alone", "job"), [(None, None), (True, "7")])
def test_no_lock_is_taken_where_no_card_is_needed_or_slurm_gave_one(tmp_path, monkeypatch, alone, job):
    monkeypatch.setattr(cards, "CACHE", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    with cards.reserved(alone):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert not list(tmp_path.iterdir())


def test_the_surroundings_are_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "CACHE", tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    start = time.monotonic()
    with cards.reserved(True) as card:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == card in ("5", "6")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,6" and time.monotonic() - start < 5
