"""Parameter files: what is wrong is named, with the file, the key and the nearest right name."""

import ast
from pathlib import Path

import nbformat
import pytest
import yaml

from helpers import ROOT, StudyError, params

STUDY = yaml.safe_load((ROOT / "params/smollm2-135m/study.yaml").read_text())
NF4 = yaml.safe_load((ROOT / "params/formats/nf4.yaml").read_text())
# 06_explore reads what the others wrote; nothing is run in it.
NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").glob("*.ipynb") if p.stem != "06_explore")


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
        ({"data": [{"source": "embedded"}, {"source": "a.json", "dialogue": 3}]}, "unknown key 'data.1.dialogue'"),
        ({"dtype": "float16"}, "unknown key 'dtype'; it is in the wrong section"),
        ({"seed": "many"}, "'seed' is 'many', expected a whole number"),
        ({"model": {"source": "pakage", "name": "x"}}, "did you mean 'package'?"),
        ({"model": {"source": "random", "name": "x"}}, "architecture belongs to source: random"),
        ({"study": "two"}, "'study' is 'two', not its folder's name 'one'"),
    ],
)
def test_a_wrong_study_is_explained(folder, change, said):
    write(folder / "study.yaml", STUDY | {"study": "one"} | change)
    with pytest.raises(StudyError, match=r"^params/one/study\.yaml: ") as error:
        params.read_study("one")
    assert said in str(error.value)


def test_every_mistake_is_named_at_once(folder):
    write(folder / "study.yaml", {"study": "one", "titel": "x", "model": STUDY["model"]})
    with pytest.raises(StudyError) as error:
        params.read_study("one")
    assert "'titel'; did you mean 'title'?" in str(error.value) and "'title' is missing" in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "bitsandbytes-4bit", "quant_type": "nf5"}, "expected 'nf4' or 'fp4'"),
        ({"method": "bitsandbytes-4bit", "quant_type": "nf4", "block_sise": 64}, "did you mean 'block_size'?"),
        ({"method": "bitsandbytes-4bits", "quant_type": "nf4"}, "did you mean 'bitsandbytes-4bit'?"),
        ({"quant_type": "nf4"}, "'quantization.method' is missing"),
    ],
)
def test_a_wrong_configuration_is_explained(folder, monkeypatch, change, said):
    monkeypatch.setattr(params, "FORMATS", folder.parent / "formats")
    write(folder / "study.yaml", STUDY | {"study": "one"})
    write(folder / "nf4.yaml", NF4 | {"quantization": change})
    with pytest.raises(StudyError, match=r"one/nf4\.yaml: ") as error:
        params.read_configuration("one", "nf4")
    assert said in str(error.value)


def test_a_study_replaces_keys_of_a_shared_format():
    shared, own = (params.read_configuration(s, "gptq") for s in ("llama-3.2-1b", "smollm2-135m"))
    assert (shared.quantization.group_size, own.quantization.group_size) == (128, 64)


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
    case = params.from_notebook(STUDY | NF4 | {"In": [], "_i1": "x", "sys": ast})
    assert (case.study.study, case.configuration.configuration, case.process) == ("smollm2-135m", "nf4", 1)
    with pytest.raises(StudyError, match="unknown key 'sede'; did you mean 'seed'"):
        params.from_notebook(STUDY | NF4 | {"sede": 3})
    with pytest.raises(StudyError, match="'process' is True, expected a number"):
        params.from_notebook(STUDY | NF4 | {"process": True})


def test_the_models_dtype_and_a_configurations_do_not_meet():
    """papermill puts study.yaml's keys and the configuration's into one namespace."""
    int4 = yaml.safe_load((ROOT / "params/formats/int4.yaml").read_text())
    half = STUDY | {"model": STUDY["model"] | {"dtype": "float16"}}
    case = params.from_notebook(half | int4)
    assert (case.study.dtype, case.configuration.dtype) == ("float16", "bfloat16")
    assert params.from_notebook(half).configuration is None


def test_calibration_follows_the_data():
    """CoQA's own train split where CoQA is evaluated, no text where there is no tokenizer, else what is held out."""
    chosen = {
        name: params.Calibration().resolved(params.read_study(name))
        for name in ("llama-3.2-1b", "llama-3.2-1b-random", "smollm2-135m")
    }
    coqa = params.read_study("llama-3.2-1b").data
    assert (chosen["llama-3.2-1b"].source, chosen["llama-3.2-1b"].revision) == (coqa.source, coqa.revision)
    assert chosen["llama-3.2-1b-random"].source == "random-tokens"
    assert chosen["smollm2-135m"].source == "embedded-held-out"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_as_it_is_runs_the_embedded_study(path):
    """The parameters cell names a study and a configuration, so the notebook needs no papermill."""
    (cell,) = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    given = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
    case = params.from_notebook(given)
    assert case.study == params.read_study("smollm2-135m")
    assert (case.configuration is not None) == ("configuration" in given)


def test_setup_assigns_no_name_that_papermill_gives():
    """Its parameters would be overwritten, and a cell that is run twice would see another value."""
    cells = [c for c in nbformat.read(ROOT / "notebooks/00_setup.ipynb", 4).cells if c.cell_type == "code"]
    assigned = set()
    for cell in cells:
        if "parameters" not in cell.metadata.get("tags", []):
            stored = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Name)]
            assigned |= {n.id for n in stored if isinstance(n.ctx, ast.Store)}
    assert assigned and not assigned & {*params.Study.model_fields, *params.Configuration.model_fields}
