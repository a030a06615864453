"""The RUN prefix on real Slurm daemons: SLURM=1, root, slurm-wlm and munge; a minute. Forty: tests/slurm/run.py."""

import os

import pytest

from helpers import NotHere
from tests.slurm import run


@pytest.mark.skipif(not os.environ.get("SLURM"), reason="starts Slurm's daemons: SLURM=1 pytest tests/slurm")
def test_configurations_spread_over_the_gpus_and_survive_cancelled_jobs_and_a_dead_node():
    try:
        found = run.measure(16, 0.5)
    except NotHere as missing:
        pytest.skip(str(missing))
    for name in ("many", "short_queue"):
        assert (found[name]["configurations"], found[name]["exit"]) == (16, 0)
        assert found[name]["two_on_one_gpu"] == 0 and found[name]["gpus_used"] == run.GPUS
    assert found["many"]["overhead_seconds_each"] < 0.5 and found["short_queue"]["queue_was_full"]
    for row in found["disturbed"]:
        assert row["exit"] != 0 and row["finished_meanwhile"] < 16  # it did disturb
        assert (row["redone"], row["next_exit"], row["finished"], row["two_on_one_gpu"]) == (0, 0, 16, 0)


def test_a_log_with_two_on_one_gpu_is_noticed():
    row = {"SLURMD_NODENAME": "n1", "CUDA_VISIBLE_DEVICES": "0", "start": 0.0, "end": 2.0}
    later, other = row | {"start": 2.5, "end": 3.0}, row | {"SLURMD_NODENAME": "n2"}
    assert run.shared([row, later, other]) == 0 and run.at_once([row, later, other]) == 2
    assert run.shared([row, row | {"start": 1.0}]) == 1
