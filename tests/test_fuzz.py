"""Whatever stands in a parameter, dialogue or result file: it is accepted, or refused in sentences that name the file.

FUZZ=10000 pytest tests/test_fuzz.py: so many inputs of each kind.
"""

import copy
import json
import os

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from helpers import ROOT, StudyError, checked_yaml, params, results
from helpers.setup import coqa

ODD = st.sampled_from(
    [None, True, 0, -1, 2**70, 1e999, float("nan"), "", " ", "\ud800", "\x1b[31m", "../x", "a\nb", "<b>", "1e5", [], {}]
)
VALUES = st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
fuzzed = settings(
    max_examples=int(os.environ.get("FUZZ", 60)),
    derandomize="FUZZ" not in os.environ,  # the same inputs at every run, unless more are asked for
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=(Phase.generate,),  # no shrinking: a failure prints its input soon
)


@st.composite
def changed(draw, tree):
    """A copy of a good tree with up to three places replaced, removed, renamed or doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while True:
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3)):
                node = node[key]
                continue
            what = draw(st.sampled_from(("replace", "replace", "remove", "rename", "double")))
            if what == "replace":
                node[key] = draw(VALUES)
            elif what == "remove" and len(node) > 1:
                del node[key]
            elif what == "rename" and isinstance(node, dict):
                node[draw(st.text(max_size=6))] = node.pop(key)
            elif isinstance(node, list):
                node.append(node[key])
            break
        if not isinstance(tree, dict | list) or not tree:
            break
    return tree


@st.composite
def scratched(draw, raw: bytes):
    """Bytes of a good file with a piece cut out, doubled or replaced."""
    start = draw(st.integers(0, len(raw)))
    piece = draw(st.binary(max_size=6) | st.sampled_from([b"&a ", b"*a", b"!!int ", b"? ", b"\xff", b"{" * 300, b"- "]))
    return raw[:start] + piece + raw[start + draw(st.integers(0, 40)) :]


def accepted(path, read):
    """What `read` makes of the file, or None if it was refused: a line for each thing that is wrong."""
    try:
        return read(path)
    except StudyError as error:
        assert all(path.name in line and line.isprintable() for line in str(error).split("\n")), error
        return None


def _study(path):
    case = params.check(checked_yaml.read(path), str(path))
    json.dumps(case.study.model_dump(mode="json"), allow_nan=False).encode()  # results keep it
    return case


STUDY = (ROOT / "params/smollm2-135m/study.yaml").read_bytes()
FULL = params.read_study("smollm2-135m").model_dump(mode="json", exclude_none=True)


@fuzzed
@given(tree=changed(FULL), raw=scratched(STUDY), which=st.booleans())
def test_parameters(tmp_path_factory, tree, raw, which):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    try:
        path.write_bytes(raw if which else yaml.safe_dump(tree, allow_unicode=True).encode())
    except (UnicodeEncodeError, yaml.YAMLError):
        return
    accepted(path, _study)


DIALOGUES = {p.name: p.read_bytes() for p in sorted((ROOT / "tests/inputs/dialogues").glob("*.json"))}


@fuzzed
@given(data=st.data(), which=st.booleans(), name=st.sampled_from(sorted(DIALOGUES)))
def test_dialogues(tmp_path_factory, data, which, name):
    path, raw = tmp_path_factory.getbasetemp() / "fuzzed.json", DIALOGUES[name]
    path.write_bytes(data.draw(scratched(raw)) if which else json.dumps(data.draw(changed(json.loads(raw)))).encode())
    for dialogue in accepted(path, coqa.read_file) or []:
        json.dumps(dialogue, ensure_ascii=False).encode()  # as the samples keep it: no half characters
        questions = dialogue["questions"]["input_text"]
        assert questions and len(questions) == len(dialogue["answers"]["input_text"])


RESULTS = sorted((ROOT / "executed/reference/hopper/llama-3.2-1b-random").glob("**/*.json"))[:2]


@fuzzed
@given(data=st.data(), which=st.booleans(), source=st.sampled_from(RESULTS))
def test_results(tmp_path_factory, data, which, source):
    path, raw = tmp_path_factory.getbasetemp() / "result.json", source.read_bytes()
    if which:
        path.write_bytes(data.draw(scratched(raw)))
    else:  # schema 1 had no checksum: its readers see whatever the file says
        old = {key: value for key, value in json.loads(raw).items() if key != "sha256"} | {"schema_version": 1}
        path.write_text(json.dumps(data.draw(changed(old))))
    result = accepted(path, results.read)
    assert result is None or isinstance(result, results.Result)


def test_the_good_ones_are_accepted(tmp_path):
    (tmp_path / "study.yaml").write_bytes(STUDY)
    assert _study(tmp_path / "study.yaml").study.study == "smollm2-135m" and len(RESULTS) == 2 and len(DIALOGUES) > 4
    for source in RESULTS:
        assert results.read(source).status == "ok"
    with pytest.raises(StudyError, match=r"no\.json"):
        results.read(tmp_path / "no.json")
