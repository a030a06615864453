"""Result files: whole or refused, with provenance and without secrets."""

import errno
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import ROOT, StudyError, params, provenance, results

DATA = {"weights": {}, "data": None, "environment": {}}
asked = os.environ.get("FUZZ")  # so many inputs; by default the same few at every run
fuzzed = settings(
    max_examples=int(asked or 200), derandomize=not asked, deadline=None, suppress_health_check=list(HealthCheck)
)


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
        (lambda text: text.replace('"schema_version": 2', '"schema_version": 99'), "has schema 99"),
        (lambda text: text.replace('"weights"', '"wieghts"'), "key 'weights'"),
        (lambda text: text.replace('"reason"', '"raeson"'), "reason"),
        (lambda text: text.replace('"environment": {}', '"environment": {"a": 1}'), "was changed since it was written"),
        (lambda text: text.replace('"environment": {}', '"environment": {"a": NaN}'), "not a result file"),
        (lambda text: text.replace('"environment": {}', f'"environment": {{"a": {"9" * 5000}}}'), "not a result file"),
        (lambda text: text.replace('"environment": {}', '"environment": {"a": 1e999}'), "not a result file"),
        (lambda text: text.replace('"environment": {}', '"environment": ' + "[" * 2000 + "]" * 2000), "setup.json"),
        (lambda text: text.replace('"environment": {}', '"environment": ' + "[" * 10**5), "not a result file"),
        (lambda text: text.replace('"environment": {}', '"environment": null'), "key 'environment'"),
        (lambda text: text.replace('"schema_version": 2', '"schema_version": [2]'), "has schema"),
        (lambda text: "", "truncated"),
    ],
)
def test_a_damaged_file_is_named_and_refused(here, damage, said):
    results.write(here, None, "setup", DATA)
    path = results.path(here, None, "setup")
    path.write_text(damage(path.read_text()))
    with pytest.raises(StudyError, match=said) as error:
        results.read(path)
    assert "setup.json" in str(error.value)


def test_a_directory_in_its_place_is_named(here):
    path = results.path(here, None, "setup")
    path.mkdir(parents=True)
    with pytest.raises(StudyError, match=r"setup\.json: cannot be read"):
        results.read(path)


def test_a_file_of_schema_1_is_read(here):
    results.write(here, None, "setup", DATA)
    path = results.path(here, None, "setup")
    old = json.loads(path.read_text()) | {"schema_version": 1}
    del old["sha256"]
    path.write_text(json.dumps(old))
    assert results.read(path).data == DATA


def test_keys_that_are_numbers_survive_the_checksum(here):
    results.write(here, None, "setup", DATA | {"weights": {10: 1.5, 9: 0.1 + 0.2}})
    assert results.read(results.path(here, None, "setup")).data["weights"] == {"10": 1.5, "9": 0.1 + 0.2}


@fuzzed
@given(where=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
def test_no_flipped_bit_and_no_cut_is_read_as_a_result(here, where, bit, cut):
    path = results.path(here, None, "setup")
    if not path.exists() or not hasattr(test_no_flipped_bit_and_no_cut_is_read_as_a_result, "whole"):
        results.write(here, None, "setup", DATA | {"weights": {"mean": 0.12345678, "text": "a story"}})
        test_no_flipped_bit_and_no_cut_is_read_as_a_result.whole = path.read_bytes()
    whole = test_no_flipped_bit_and_no_cut_is_read_as_a_result.whole
    where %= len(whole)
    path.write_bytes(whole[:where] if cut else whole[:where] + bytes([whole[where] ^ 1 << bit]) + whole[where + 1 :])
    try:
        read = results.read(path)
    except StudyError as error:
        assert "\n" not in str(error) and "again" in str(error)
    else:  # white space, or a letter of "schema_version": 1 that nothing checks
        assert read.data == json.loads(whole)["data"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@fuzzed
@given(key=st.sampled_from(["schema_version", "kind", "study", "status", "provenance", "data", "sha256"]), value=JSON)
def test_any_value_for_any_key_is_a_result_or_a_sentence(here, key, value):
    path = results.path(here, None, "setup")
    envelope = {"schema_version": 1, "kind": "setup", "study": "s", "configuration": None, "status": "ok"}
    envelope |= {"reason": None, "provenance": {}, "data": DATA, key: value}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(envelope))
    try:
        assert isinstance(results.read(path), results.Result)
    except StudyError as error:
        assert "setup.json" in str(error)


@pytest.mark.parametrize("home", ["/", "", None])
def test_a_home_that_is_the_root_or_unknown_leaves_messages_readable(home, monkeypatch):
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    else:
        monkeypatch.setenv("HOME", home)
    assert results.clean("see /tmp/a/b and c/d") == "see /tmp/a/b and c/d"


def test_secrets_are_cleaned(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.setenv("HF_TOKEN", "secret-of-another-form")
    said = "Authorization: Bearer abcdefgh1234 https://me:pw@hub/x /home/anna/y /home/annabel secret-of-another-form"
    assert results.clean(said) == "Authorization: Bearer *** https://***@hub/x ~/y /home/annabel ***"


def test_a_read_only_place_is_a_sentence(here, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("pathlib.Path.mkdir", refused)
    with pytest.raises(StudyError, match="cannot be written \\(Read-only file system\\)"):
        results.write(here, None, "setup", DATA)


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
    result = results.write_without(here, None, "setup", "failed", f"{ROOT}/params: 401 for hf_abcdefghijklmnop")
    assert result.reason == "params: 401 for hf_***"
    assert os.uname().nodename not in json.dumps(result.provenance)
    assert str(ROOT) not in json.dumps(result.provenance)


def test_the_commit_of_a_copied_tree_is_the_one_that_was_copied(here, monkeypatch):
    monkeypatch.setenv("GIT_COMMIT", "abc123")
    found = results.write_without(here, None, "setup", "failed", "no").provenance
    assert (found["commit"], found["dirty"]) == ("abc123", None)


def test_no_results_says_what_to_run(here):
    with pytest.raises(StudyError, match="run make run-all STUDY=smollm2-135m first"):
        results.read_all(here)


def test_a_result_is_written_where_nvidia_smi_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance._driver() is None


def test_an_error_without_a_message_is_a_reason():
    def fails():
        raise RuntimeError

    assert results.or_reason(fails) == {"reason": "RuntimeError: no message"}


def test_a_setup_with_a_key_too_many_is_not_written(here):
    with pytest.raises(ValueError, match="unknown keys"):
        results.write(here, None, "setup", DATA | {"odd": 1})
