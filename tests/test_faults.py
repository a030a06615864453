"""What the fault suite itself sees: a lost file, a sentence and its remedy. Its faults run by `make faults`."""

import shutil

import pytest

from helpers import ROOT
from tests.faults import inject, run

REFERENCE = ROOT / "executed/reference/hopper/llama-3.2-1b-random"


@pytest.fixture
def project(tmp_path):
    """Two finished configurations of committed results."""
    for name in ("fp16", "nf4"):
        shutil.copytree(REFERENCE / name, tmp_path / "executed/tiny" / name)
    return tmp_path


def test_a_file_that_is_gone_changed_or_unreadable_is_lost(project):
    before = run.finished(project)
    assert len(before) == 6 and not run.lost(project, before, "^$")
    (project / "executed/tiny/nf4/benchmark.json").unlink()
    second, third = (project / f"executed/tiny/{name}.json" for name in ("fp16/benchmark_2", "fp16/benchmark_3"))
    second.write_bytes(inject._flipped(second.read_bytes()))
    third.write_bytes(inject._half(third.read_bytes()))
    gone = ["fp16/benchmark_2.json", "fp16/benchmark_3.json", "nf4/benchmark.json"]
    assert sorted(run.lost(project, before, "^$")) == [f"executed/tiny/{name}" for name in gone]
    assert run.lost(project, before, "nf4/|_3") == ["executed/tiny/fp16/benchmark_2.json"]
    assert len(run.incomplete(project, before)) == 4  # and there is no report


DAMAGED = "executed/tiny/nf4/benchmark.json: is truncated; delete it, then make run-all makes it again"
ANSWERS = "x.jsonl: is truncated; delete nf4/benchmark.json, then make run-all answers the questions again"
BOTH = "params/formats/nf4.yaml and params/tiny/nf4.yaml: 'double_qaunt' is no key"
OTHER = "no room for the weights"


@pytest.mark.parametrize(
    ("output", "said", "deleted"),
    [
        (f"make[1]: x\n[nf4/01] 2 s | FAILED: {OTHER}; see executed/a.failed.ipynb\n", OTHER, ""),
        (f"fatal: no git\n{DAMAGED}\n", DAMAGED, "executed/tiny/nf4/benchmark.json"),
        (f"{BOTH}\nmake: *** [Makefile:99: check] Error 1\n", BOTH, ""),
        (f"[a] FAILED: {ANSWERS}\n", ANSWERS, "executed/tiny/nf4/benchmark.json"),
    ],
)
def test_the_remedy_that_a_message_names_is_applied(project, output, said, deleted):
    assert run.sentence(output) == said
    assert run.follow(project, run.sentence(output), "tiny") == deleted
    assert not deleted or not (project / deleted).exists()


def test_a_row_that_did_not_survive_stands_out_in_the_table():
    rows = [run.row("full disk", survived=True, said="a|b"), run.row("a kill")]
    assert run.table({"rows": rows}).count("**no**") == 1 and "a\\|b" in run.table({"rows": rows})
