"""Inputs as other people have them (tests/inputs): read, or refused in one sentence that names place and remedy."""

import json
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT, StudyError, checked_yaml, notebook, params
from helpers.setup import coqa, hub

INPUTS = Path(__file__).parent / "inputs"
QUESTIONS = ["What did Mia have?", "Where did it land?", "Who fetched it?"]
ANSWERS = ["a red kite", "in an oak", "her uncle Ben"]


def ids(paths):
    return [path.name for path in paths]


def files(folder: str) -> list[Path]:
    return sorted((INPUTS / folder).iterdir())


# ---- dialogues ----


@pytest.mark.parametrize("path", files("dialogues"), ids=ids(files("dialogues")))
def test_dialogues_in_every_shape(path):
    first = coqa.read(str(path))[0]
    if path.name == "numbers.json":
        assert (first["questions"]["input_text"][2], first["answers"]["input_text"][1:]) == ("3", ["1", "2.5"])
        return
    assert (first["questions"]["input_text"], first["answers"]["input_text"]) == (QUESTIONS, ANSWERS)
    assert first["questions"]["turn_id"] == first["answers"]["turn_id"] == [1, 2, 3]
    assert set(first) == {"id", "source", "story", "questions", "answers", "additional_answers"}
    if path.name in ("coqa_official.json", "annotators.json"):
        further = [columns["input_text"] for columns in first["additional_answers"].values()]
        assert further == [["a kite", "an oak", "Ben"], ["kite", "oak", "her uncle"]]


def test_ids_are_kept_or_made():
    given = {"one_object.json": "0", "columns.json": "1.5", "coqa_official.json": "kite", "strings.json": "strings-1"}
    assert {name: coqa.read(str(INPUTS / "dialogues" / name))[0]["id"] for name in given} == given
    assert [d["id"] for d in coqa.read(str(INPUTS / "dialogues/lines.txt"))] == ["0", "1"]


@pytest.mark.parametrize("path", files("broken_dialogues"), ids=ids(files("broken_dialogues")))
def test_broken_dialogues_are_named(path, capsys):
    """By the reader that every notebook uses, and by the check on the command line, in the same words."""
    says = json.loads(path.read_text())["says"]
    with pytest.raises(StudyError) as error:
        coqa.read(str(path))
    assert str(error.value).startswith(f"{path}: ") and says in str(error.value)
    assert not coqa.report(path)
    said = capsys.readouterr().out
    assert f"WRONG: {error.value}" in said and said.endswith("it cannot be used yet\n")


RECORD = {"story": "A story.", "questions": ["Q?"], "answers": ["A"]}
LINES = "\n".join(json.dumps(RECORD | {"story": f"A\u2028story\u0085{n}"}, ensure_ascii=False) for n in range(3))


@pytest.mark.parametrize(
    ("name", "content", "count"),
    [
        ("bom.json", b"\xef\xbb\xbf" + json.dumps(RECORD).encode(), 1),
        ("separators.jsonl", LINES.encode(), 3),
        ("windows.jsonl", LINES.replace("\n", "\r\n").encode() + b"\r\n\r\n", 3),
        ("lines.json", LINES.encode(), 3),
        ("no_suffix", LINES.encode(), 3),
        ("My data, 2026.dat", json.dumps([RECORD]).encode(), 1),
    ],
)
def test_text_files_as_the_world_has_them(tmp_path, name, content, count):
    (tmp_path / name).write_bytes(content)
    found = coqa.read(str(tmp_path / name))
    assert len(found) == count and found[0]["story"].startswith("A")
    assert not hub.is_hub_data(str(tmp_path / name))
    assert params.Data(source=str(tmp_path / name)).name in (
        "bom",
        "separators",
        "windows",
        "lines",
        "no_suffix",
        "My-data-2026.dat",
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps(RECORD).encode("utf-16"), "not UTF-8 text; save it as UTF-8"),
        (b"[" * 100_000, "brackets too deep"),
        (b'{"story": ' + b"9" * 5000 + b"}", "a number too long"),
        (json.dumps(RECORD).encode() + b"\n{oops\n", "line 2: not JSON"),
        (b"story,question,answer\n", "convert FILE OUT.json` makes one from CSV"),
        (b"", "not JSON"),
        (b"[]", "holds no dialogue"),
    ],
)
def test_files_that_are_no_dialogues(tmp_path, content, said):
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(StudyError, match="mine") as error:
        coqa.read(str(path))
    assert said in str(error.value)


def test_a_path_that_is_not_there_or_a_folder_is_no_name_of_the_hub(tmp_path):
    for path in (tmp_path, tmp_path / "mine.data", "dialogues/mine.json", "embeded"):
        with pytest.raises(StudyError, match="cannot be read"):
            coqa.read(str(path))
    assert hub.is_hub_data("EleutherAI/coqa") and hub.is_hub_data("me/data.v2") and not hub.is_hub_data("helpers/tasks")


def test_the_check_of_a_good_file_fits_on_a_screen(capsys):
    with pytest.raises(SystemExit) as done:
        coqa.main([str(INPUTS / "dialogues/coqa_official.json")])
    said = capsys.readouterr().out
    assert done.value.code == 0 and len(said.splitlines()) < 12
    assert "1 dialogues, 3 questions" in said and "answers to a question 3 to 3" in said and "use it: data:" in said


# ---- conversion ----


@pytest.mark.parametrize(
    ("name", "dialogues", "turns", "references"),
    [
        ("squad.json", 1, 3, [["a red kite", "in an oak", "unknown"], ["a kite", "in an oak", "unknown"]]),
        ("squad_flat.jsonl", 1, 3, [ANSWERS]),
        ("table.csv", 1, 3, [ANSWERS, ["a kite", *ANSWERS[1:]]]),
        ("semicolons.csv", 1, 3, [ANSWERS]),
        ("the-kite-questions.csv", 3, 1, [["a red kite"], ["a kite"]]),
        ("script.json", 1, 1, [["in the oak"], ["oak"]]),
    ],
)
def test_other_layouts_become_coqas(tmp_path, capsys, name, dialogues, turns, references):
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as done:
        coqa.main(["convert", str(INPUTS / "conversion" / name), str(out)])
    assert done.value.code == 0
    assert ("1 questions left out" in capsys.readouterr().out) == (name == "table.csv")
    found = coqa.read(str(out))
    assert (len(found), len(found[0]["questions"]["input_text"])) == (dialogues, turns)
    sets = [found[0]["answers"], *found[0]["additional_answers"].values()]
    assert [columns["input_text"] for columns in sets] == references
    before = out.read_bytes()
    with pytest.raises(SystemExit, match="is there already"):
        coqa.main(["convert", str(INPUTS / "conversion" / name), str(out)])
    assert out.read_bytes() == before


def test_stories_of_converted_layouts(tmp_path):
    """FriendsQA's speakers stand before their lines; a question about two sections of a fairy tale gets both."""
    coqa.convert(INPUTS / "conversion/script.json", tmp_path / "a.json")
    assert coqa.read(str(tmp_path / "a.json"))[0]["story"] == "Mia: My kite is in the oak!\nBen, Ann: We will climb up."
    coqa.convert(INPUTS / "conversion", tmp_path / "b.json")  # a folder of X-questions.csv
    found = {d["id"]: d["story"] for d in coqa.read(str(tmp_path / "b.json"))}
    assert list(found) == ["the-kite-1", "the-kite-2", "the-kite-1-2"]
    assert found["the-kite-1-2"] == found["the-kite-1"] + "\n" + found["the-kite-2"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "story,q,answer\nx,y,z\n", "no column for the question; call it question"),
        ("b.csv", "question,answer\ny,z\n", "no column for the story; call it story or context or passage"),
        ("c.csv", "story,question,answer\n,,\n", "no question with a story and an answer was found"),
        ("x-questions.csv", "cor_section,question,answer1\n1,y,z\n", "put x-story.csv beside it"),
        ("d.json", json.dumps([RECORD]), "in CoQA's format already"),
        ("e.json", '[{"context": 3, "qas": 3}]', "neither SQuAD's layout nor FriendsQA's"),
    ],
)
def test_what_can_not_be_converted_is_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(StudyError, match=name) as error:
        coqa.convert(tmp_path / name, tmp_path / "out.json")
    assert said in str(error.value) and not (tmp_path / "out.json").exists()


# ---- several sources ----


@pytest.fixture
def several(study):
    data = [
        {"source": "embedded", "dialogues": 3, "dialogues_on_cpu": 2},
        {"source": str(INPUTS / "dialogues/lines.txt"), "licence": "CC0 1.0"},
        {"source": str(INPUTS / "dialogues/columns.json"), "name": "kite"},
    ]
    return params.check(study.model_dump(mode="json") | {"data": data}, "test").study


def test_all_sources_of_a_study_are_read(several):
    found = coqa.read_all(several)
    assert [d["data_set"] for d in found] == ["embedded"] * 3 + ["lines"] * 2 + ["kite"]
    assert found[3]["id"] == "lines/0" and len({d["id"] for d in found}) == 6
    assert len(coqa.read_all(several, at_most=1)) == 3 and len(coqa.read_all(several.on_cpu())) == 5
    about = coqa.describe(several)
    assert (about["dialogues"], [row["name"] for row in about["data_sets"]][-2:]) == (6, ["lines", "kite"])
    assert about["data_sets"][-2]["source"] == "lines.txt", "no folder of this machine"


def test_counts_that_nobody_asked_for_do_not_fail(study):
    """A file of two dialogues, with every default; only what is asked for can be too much."""
    source = str(INPUTS / "dialogues/lines.txt")
    given = study.model_dump(mode="json") | {"data": {"source": source}}
    two = params.check(given, "test").study
    assert len(coqa.read_all(two)) == len(coqa.read_all(two, at_most=100)) == len(coqa.read_all(two.on_cpu())) == 2
    asked = params.check(given | {"data": {"source": source, "dialogues": 3}}, "test").study
    with pytest.raises(StudyError, match=r"3 asked for, but .*lines\.txt has 2; ask for at most that many"):
        coqa.read_all(asked)


def test_lm_evals_documents_name_their_source(several):
    from lm_eval.tasks import TaskManager

    metadata = {"sources": [data.model_dump() for data in several.sources]}
    manager = TaskManager(include_path=str(ROOT / "helpers/tasks"), include_defaults=False, metadata=metadata)
    (task,) = manager.load_task_or_group("coqa_last_turns").values()
    documents = list(task.validation_docs())
    assert [d["data_set"] for d in documents] == ["embedded"] * 3 + ["lines"] * 2 + ["kite"]
    assert documents[-1]["source"] == "columns" and documents[-1]["references"] == ["her uncle Ben"]


# ---- parameters ----


@pytest.mark.parametrize("path", files("broken_params"), ids=ids(files("broken_params")))
def test_broken_parameters_are_named(path):
    says = path.read_text().partition("\n")[0].removeprefix("# says: ")
    with pytest.raises(StudyError) as error:
        checked_yaml.validate(params.Study, checked_yaml.read(path), str(path))
    assert str(error.value).startswith(f"{path}: ") and says in str(error.value)


BASE = "study: one\ntitle: <b>One</b>\nmodel: {source: package, name: smollm2-135m}\n"


@pytest.mark.parametrize(
    ("text", "attribute", "value"),
    [
        ("evaluation: {tasks: hellaswag}", "evaluation.tasks", ["hellaswag"]),
        ("benchmark: {cpu: {batch_sizes: 4}}", "benchmark.cpu.batch_sizes", [4]),
        ("statistics: {margin: 1.0e-2}", "statistics.margin", 0.01),
        ("statistics: {resamples: 10_000}", "statistics.resamples", 10_000),
        ("data: null", "sources", []),
        ("folder: executed/reference/hopper/one", "folder", "executed/reference/hopper/one"),
        ("evaluation: {samples_text: false}", "evaluation.samples_text", False),
    ],
)
def test_what_is_meant_is_taken(tmp_path, text, attribute, value):
    (tmp_path / "study.yaml").write_text("\ufeff" + BASE + text + "\n", encoding="utf-8")
    found = checked_yaml.validate(params.Study, checked_yaml.read(tmp_path / "study.yaml"), "test")
    for name in attribute.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize("text", ['"a\\nb": .nan\n', '"a\\nb":\n', "a: !%0A b\n"])
def test_a_sentence_stays_on_its_line(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(StudyError, match=r"^[^\n]*study\.yaml: line 1: [^\n]*\\n[^\n]*$"):
        checked_yaml.read(path)


def test_yaml_that_is_no_utf8_text_or_no_file(tmp_path):
    (tmp_path / "a.yaml").write_text(BASE, encoding="utf-16")
    (tmp_path / "b.yaml").write_bytes(b"study: \x07\n")
    (tmp_path / "c.yaml").write_text("")
    (tmp_path / "d.yaml").mkdir()
    said = {
        "a": "not UTF-8 text; save it as UTF-8",
        "b": "not YAML: unacceptable",
        "c": "expected keys and values",
        "d": "cannot be read",
    }
    for name, expected in said.items():
        with pytest.raises(StudyError, match=rf"{name}\.yaml: {expected}"):
            checked_yaml.read(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "STUDY=: write the name of one folder"),
        ([""], "STUDY=: write the name"),
        (["smollm2-135m/"], "STUDY=smollm2-135m/: write the name"),
        (["../params"], "STUDY=../params: write the name"),
        (["smollm2-135m qwen2.5-0.5b"], "write the name of one folder"),
        (["smollm2-135m", "qwen2.5-0.5b"], "are both studies; name one"),
    ],
)
def test_names_of_studies_on_the_command_line(arguments, said):
    with pytest.raises(SystemExit) as error:
        params.main(arguments)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["my format.yaml", "`touch x`.yaml", "-x.yaml", "nf4.yml"])
def test_file_names_in_a_study(tmp_path, monkeypatch, name):
    monkeypatch.setattr(params, "PARAMS", tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one/study.yaml").write_text(BASE)
    params.main(["one"])
    (tmp_path / "one" / name).write_text("configuration: x\n")
    with pytest.raises(SystemExit, match="rename it to letters, digits"):
        params.main(["one", "nf4"])


# ---- what a run prints ----


def test_noise_is_left_out_and_time_left_is_said(capsys, monkeypatch):
    progress = notebook._Progress("[x]")
    progress.write(
        "asked\nUSDT: profiler_start\nPassed unknown parameter: title\n[IPKernelApp] ERROR | Keyboard\nlast\n"
    )
    bar = "\rRunning requests:  10%|#         | 5/50 [00:03<00:30,  1.4it/s]"
    progress.bar(bar)
    now = time.monotonic()
    monkeypatch.setattr(notebook.time, "monotonic", lambda: now + 11)
    progress.bar("a warning\n" + bar + bar.replace(" 5/", " 9/"))
    said = [line.partition("| ")[2] for line in capsys.readouterr().out.splitlines()]
    assert said == ["asked", "last", "9 of 50 done, 00:30 left"]


def test_reasons_are_sentences():
    assert notebook._reason(hub.HubError("gated", "x is gated")) == "x is gated"
    assert notebook._reason(ValueError("\x1b[31mred\x1b[0m")) == "ValueError: red"
    assert "most likely for lack of memory" in notebook._reason(RuntimeError("Kernel died"))


def test_the_kernel_is_this_interpreter(tmp_path, monkeypatch):
    monkeypatch.setattr(notebook, "CACHE", tmp_path)
    kernel = json.loads((notebook._kernels() / "kernels/python3/kernel.json").read_text())
    assert kernel["argv"][0] == sys.executable


def test_columns_of_the_status_stand_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notebook, "ROOT", tmp_path)
    notebook.status("none", ["fp16", "nf4"])
    assert capsys.readouterr().out.splitlines()[2].split() == ["01_evaluate", "missing", "missing"]


def test_a_title_with_markup_is_escaped(monkeypatch):
    from helpers.analysis import style

    shown = []
    monkeypatch.setattr(style, "display", lambda html: shown.append(html.data))
    style.say("<b>One</b>")
    assert shown == ["<p>&lt;b&gt;One&lt;/b&gt;</p>"]
