"""Result files: whole or refused, with provenance and without secrets."""

import errno
import json
import os

import pytest

from helpers import ROOT, StudyError, params, results

DATA = {"weights": {}, "data": None, "environment": {}}


@pytest.fixture
def here(tmp_path, study, monkeypatch):
    monkeypatch.setattr(results, "EXECUTED", tmp_path)
    return study


def test_what_is_written_is_read_back(here):
    written = results.write(here, None, "setup", DATA)
    assert results.read(results.path(here, None, "setup")) == written
    assert written.provenance["packages"]["torch"] and written.provenance["seed"] == here.seed


def test_missing_keys_and_nan_are_refused(here):
    with pytest.raises(Exception, match="environment"):
        results.write(here, None, "setup", {"weights": {}, "data": None})
    with pytest.raises(ValueError, match="JSON"):
        results.write(here, None, "setup", DATA | {"weights": {"x": float("nan")}})
    assert not results.path(here, None, "setup").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "truncated"),
        (lambda text: "[1, 2]", "not a result file"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 99'), "has schema 99"),
        (lambda text: text.replace('"weights"', '"wieghts"'), "key 'weights'"),
        (lambda text: text.replace('"reason"', '"raeson"'), "reason"),
    ],
)
def test_a_damaged_file_is_named_and_refused(here, damage, said):
    results.write(here, None, "setup", DATA)
    path = results.path(here, None, "setup")
    path.write_text(damage(path.read_text()))
    with pytest.raises(StudyError, match=said) as error:
        results.read(path)
    assert "setup.json" in str(error.value)


def test_a_truncated_sample_file_is_noticed(here, tmp_path):
    expected = results.write_lines(tmp_path / "samples.jsonl", [{"a": 1}, {"a": 2}])
    assert results.read_lines(tmp_path / "samples.jsonl", expected) == [{"a": 1}, {"a": 2}]
    (tmp_path / "samples.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(StudyError, match=r"samples\.jsonl: is truncated"):
        results.read_lines(tmp_path / "samples.jsonl", expected)


def test_a_full_disk_leaves_the_old_file_and_no_scrap(here, monkeypatch):
    results.write(here, None, "setup", DATA)
    path = results.path(here, None, "setup")
    before = path.read_text()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StudyError, match="the disk is full"):
        results.write(here, None, "setup", DATA)
    assert path.read_text() == before and list(path.parent.iterdir()) == [path]


def test_a_result_of_another_configuration_is_refused(here):
    nf4 = params.read_configuration("smollm2-135m", "nf4")
    results.write_without(here, nf4, "evaluation", "failed", "no")
    moved = results.path(here, nf4, "evaluation")
    (moved.parent.parent / "fp4").mkdir()
    os.replace(moved, moved.parent.parent / "fp4" / "evaluation.json")
    with pytest.raises(StudyError, match="belongs to smollm2-135m/nf4/evaluation"):
        results.read_all(here)


def test_no_token_and_no_path_gets_into_a_result(here):
    result = results.write_without(here, None, "analysis", "failed", f"{ROOT}/params: 401 for hf_abcdefghijklmnop")
    assert result.reason == "params: 401 for hf_***"
    assert os.uname().nodename not in json.dumps(result.provenance)
    assert str(ROOT) not in json.dumps(result.provenance)


def test_the_commit_of_a_copied_tree_is_the_one_that_was_copied(here, monkeypatch):
    monkeypatch.setenv("GIT_COMMIT", "abc123")
    found = results.write_without(here, None, "analysis", "failed", "no").provenance
    assert (found["commit"], found["dirty"]) == ("abc123", None)


def test_no_results_says_what_to_run(here):
    with pytest.raises(StudyError, match="run make run-all STUDY=smollm2-135m first"):
        results.read_all(here)
