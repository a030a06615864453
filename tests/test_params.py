"""Parameter files: what is wrong is named, with the file, the key and the nearest right name."""

import ast
from pathlib import Path

import nbformat
import pytest
import yaml

from helpers import ROOT, StudyError, params

STUDY = yaml.safe_load((ROOT / "params/smollm2-135m/study.yaml").read_text())
NF4 = yaml.safe_load((ROOT / "params/formats/nf4.yaml").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(params, "PARAMS", tmp_path)
    (tmp_path / "one").mkdir()
    return tmp_path / "one"


def write(path: Path, values) -> None:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*/study.yaml")), ids=lambda p: p.parent.name)
def test_every_study_in_the_project_is_valid(path):
    study = params.read_study(path.parent.name)
    names = params.configurations(study.study)
    assert names[0] == "fp16"
    assert len({params.read_configuration(study.study, n).label for n in names}) == len(names)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"benchmrk": {}}, "unknown key 'benchmrk'; did you mean 'benchmark'?"),
        ({"data": {"source": "embedded", "dialogue": 3}}, "unknown key 'data.dialogue'; did you mean 'dialogues'?"),
        ({"data": {"source": "embedded", "dialogues": -3}}, "'data.dialogues' is -3: input should be greater than 0"),
        ({"seed": "many"}, "'seed' is 'many'"),
        ({"model": {"source": "pakage", "name": "x"}}, "did you mean 'package'?"),
        ({"model": {"source": "random", "name": "x"}}, "architecture belongs to source: random"),
        ({"study": "two"}, "'study' is 'two', expected the folder's name 'one'"),
    ],
)
def test_a_wrong_study_is_explained(folder, change, said):
    write(folder / "study.yaml", STUDY | {"study": "one"} | change)
    with pytest.raises(StudyError, match=r"^params/one/study\.yaml: ") as error:
        params.read_study("one")
    assert said in str(error.value)


def test_every_mistake_is_named_at_once(folder):
    write(
        folder / "study.yaml", {"study": "one", "titel": "x", "model": STUDY["model"], "benchmark": STUDY["benchmark"]}
    )
    with pytest.raises(StudyError) as error:
        params.read_study("one")
    assert "'titel'; did you mean 'title'?" in str(error.value) and "'title' is missing" in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "bitsandbytes-4bit", "quant_type": "nf5"}, "expected 'nf4' or 'fp4'"),
        ({"method": "bitsandbytes-4bit", "quant_type": "nf4", "block_sise": 64}, "did you mean 'block_size'?"),
        ({"method": "bitsandbytes-4bits", "quant_type": "nf4"}, "did you mean 'bitsandbytes-4bit'?"),
    ],
)
def test_a_wrong_configuration_is_explained(folder, change, said):
    write(folder / "study.yaml", STUDY | {"study": "one"})
    write(folder / "nf4.yaml", NF4 | {"quantization": change})
    with pytest.raises(StudyError, match=r"^params/one/nf4\.yaml: ") as error:
        params.read_configuration("one", "nf4")
    assert said in str(error.value)


def test_broken_yaml_names_the_line(folder):
    write(folder / "study.yaml", "study: one\ntitle: [x\nmodel: 3\n")
    with pytest.raises(StudyError, match=r"study\.yaml, line 3: not YAML"):
        params.read_study("one")


def test_a_missing_study_or_configuration_suggests_the_nearest():
    with pytest.raises(StudyError, match="did you mean STUDY=smollm2-135m"):
        params.read_study("smollm-135m")
    with pytest.raises(StudyError, match=r"did you mean nf4\.yaml"):
        params.read_configuration("smollm2-135m", "nf44")


def test_a_notebook_refuses_a_key_that_papermill_only_warned_about():
    study, configuration = params.from_notebook(STUDY | NF4 | {"In": [], "_i1": "x", "sys": ast})
    assert (study.study, configuration.configuration) == ("smollm2-135m", "nf4")
    with pytest.raises(StudyError, match="unknown key 'sede'; did you mean 'seed'"):
        params.from_notebook(STUDY | NF4 | {"sede": 3})
    with pytest.raises(StudyError, match="'benchmark' was overwritten by a module"):
        params.from_notebook(STUDY | NF4 | {"benchmark": ast})


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_as_it_is_runs_the_embedded_study(path):
    """The parameters cell holds the values of the embedded study's files, so the notebook needs no papermill."""
    (cell,) = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
    name = values.get("configuration")
    expected = STUDY | (yaml.safe_load((ROOT / f"params/smollm2-135m/{name}.yaml").read_text()) if name else {})
    assert values == expected
