"""The schema of params/STUDY/study.yaml and of configurations.

A configuration is a format of params/formats, which all studies share, or params/STUDY/CONFIGURATION.yaml, which replaces its keys or
adds one of the study's own.

papermill injects whatever the files hold and only warns about a key that no notebook knows. So every notebook checks what it
was given before it computes anything:

    case = params.from_notebook(globals())    # case.study, case.configuration

and the command line checks the files themselves (`python -m helpers.params STUDY [CONFIGURATION ...]`).
"""

import difflib
import sys
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from helpers import ROOT, StudyError

PARAMS = ROOT / "params"
FORMATS = PARAMS / "formats"
Positive = Annotated[int, Field(gt=0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(Strict):
    """Where the full-precision weights come from."""

    source: Literal["package", "hub", "path", "random"]
    name: str  # package: smollm2-135m; hub: owner/name; path: a folder; random: a name for the report
    revision: str | None = None  # hub only: a commit or tag
    architecture: dict | None = None  # random only: a transformers configuration, with its model_type
    already_quantized: str | None = None  # what the weights went through before this study; the report repeats it

    @model_validator(mode="after")
    def _complete(self):
        if (self.source == "random") != (self.architecture is not None):
            raise ValueError("architecture belongs to source: random, and to it alone")
        return self


class Data(Strict):
    """Dialogues in CoQA's format."""

    source: str = "embedded"  # embedded, EleutherAI/coqa, or a path to a JSON or JSONL file
    revision: str | None = None  # hub only
    dialogues: Positive | None = None  # the first so many; none: all
    dialogues_on_cpu: Positive | None = None  # without a GPU; none: as many

    @model_validator(mode="after")
    def _fewer(self):
        if self.dialogues and self.dialogues_on_cpu and self.dialogues_on_cpu > self.dialogues:
            raise ValueError(f"dialogues_on_cpu is {self.dialogues_on_cpu}, more than dialogues ({self.dialogues})")
        return self


class Evaluation(Strict):
    max_gen_toks: Positive = 256  # lm-eval's default
    batch_size: Positive | None = None  # none: found from free memory
    tasks: list[str] = []  # further lm-eval tasks beside the dialogues
    limit: Positive | None = None  # documents of each further task


class Sizes(Strict):
    """What 02_benchmark runs on one kind of device."""

    prefill_tokens: list[Positive]
    batch_sizes: list[Positive]
    prompt_tokens: Positive = 128  # context of a decode measurement
    contexts: list[Positive] = []  # further ones, at batch size 1
    decode_tokens: Positive  # tokens generated in one repeat
    repeats: Annotated[int, Field(ge=3)]
    warmup: Positive
    modes: list[Literal["eager", "cuda_graph", "compile"]]


class CPUSizes(Sizes):
    prefill_tokens: list[Positive] = [128, 512]
    batch_sizes: list[Positive] = [1, 4, 8]
    prompt_tokens: Positive = 16
    contexts: list[Positive] = [128]
    decode_tokens: Positive = 16
    repeats: Annotated[int, Field(ge=3)] = 5
    warmup: Positive = 1
    modes: list[Literal["eager", "cuda_graph", "compile"]] = ["eager"]


class GPUSizes(Sizes):
    prefill_tokens: list[Positive] = [128, 256, 512, 1024, 4096]
    batch_sizes: list[Positive] = [1, 4, 8, 64]
    contexts: list[Positive] = [4096]
    decode_tokens: Positive = 64
    repeats: Annotated[int, Field(ge=3)] = 10
    warmup: Positive = 3
    modes: list[Literal["eager", "cuda_graph", "compile"]] = ["eager", "cuda_graph", "compile"]


class Benchmark(Strict):
    """Sizes by device. A time is the median of several processes (Make's PROCESSES)."""

    cpu: CPUSizes = CPUSizes()
    cuda: GPUSizes = GPUSizes()
    processes: Positive | None = None  # none: 3 on a GPU, 1 without
    memory_budgets_gib: list[float] = [4, 8, 16]  # largest batch that fits in so much


class Fidelity(Strict):
    dialogues: Positive | None = None  # none: as many as are evaluated
    noise_seeds: list[int] = [0, 1, 2]
    block_sizes: list[Positive] = [64, 128, 256, 512, 1024, 2048, 4096]


class Statistics(Strict):
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    resamples: Positive = 10_000
    redraws: Positive = 10_000  # of the paper's 50-question design
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.015  # F1 and exact match: what counts as equal


class Study(Strict):
    study: str
    title: str
    model: Model
    formats: list[str] | None = None  # of params/formats; none: all
    data: Data | None = None  # none: hardware only
    evaluation: Evaluation = Evaluation()
    benchmark: Benchmark = Benchmark()
    fidelity: Fidelity = Fidelity()
    statistics: Statistics = Statistics()
    seed: int = 1234
    folder: str | None = None  # of the results; none: executed/STUDY


class Full(Strict):
    method: Literal["none"]


class BitsAndBytes4(Strict):
    method: Literal["bitsandbytes-4bit"]
    quant_type: Literal["nf4", "fp4"]
    double_quant: bool = True
    block_size: Literal[64] = 64  # the only one that transformers passes on


class BitsAndBytes8(Strict):
    method: Literal["bitsandbytes-int8"]
    threshold: Annotated[float, Field(ge=0)] = 6.0  # of activations that are computed in 16 bit (LLM.int8())


class Float8(Strict):
    """torchao. Weights in float8 (e4m3, a scale per row); not LLM.int8(), which is another 8-bit method."""

    method: Literal["torchao-float8"]
    activations: Literal["none", "dynamic"] = (
        "none"  # dynamic: rounded to float8 as well, so that the GPU multiplies in float8
    )


class Int4(Strict):
    """torchao. 4-bit integers rounded to nearest, packed, with a kernel of their own (tinygemm); a GPU only."""

    method: Literal["torchao-int4"]
    group_size: Literal[32, 64, 128, 256] = 128
    algorithm: Literal["tinygemm", "hqq"] = "tinygemm"  # scales from extremes, or HQQ's search


class Int8(Strict):
    """torchao. 8-bit integers, a scale per row, weights only: neither calibrated nor LLM.int8()."""

    method: Literal["torchao-int8"]


class Calibration(Strict):
    """Text that GPTQ and AWQ see: never a dialogue that is evaluated."""

    source: str = "embedded-held-out"  # or EleutherAI/coqa (its train split), a path to a CoQA file, random-tokens
    revision: str | None = None  # hub only
    samples: Positive = 16  # dialogues
    seed: Annotated[int, Field(ge=0)] = 0  # draws them
    sequence_length: Positive = 512  # tokens of each, at most


class GPTQ(Strict):
    method: Literal["gptq"]
    group_size: Positive = 128  # weights of one row that share a scale
    symmetric: bool = True  # false: a zero point as well
    scales: Literal["mse", "minmax"] = "mse"  # of a group: searched for the least error, or the largest weight's
    dampening: Annotated[float, Field(gt=0, lt=1)] = 0.01  # added to the Hessian's diagonal, as a share of its mean
    calibration: Calibration = Calibration()


class AWQ(Strict):
    method: Literal["awq"]
    group_size: Positive = 128
    symmetric: bool = False
    grid_points: Positive = 20  # scales tried for each layer
    calibration: Calibration = Calibration()


Quantization = Annotated[
    Full | BitsAndBytes4 | BitsAndBytes8 | Float8 | Int8 | Int4 | GPTQ | AWQ, Field(discriminator="method")
]
METHOD_NAMES = (
    "none",
    "bitsandbytes-4bit",
    "bitsandbytes-int8",
    "torchao-float8",
    "torchao-int8",
    "torchao-int4",
    "gptq",
    "awq",
)


class Configuration(Strict):
    configuration: str
    label: str  # as tables and figures name it
    quantization: Quantization
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = (
        "auto"  # of weights that are not quantized, and of compute
    )


FULL_PRECISION = Configuration(configuration="full", label="Full precision", quantization=Full(method="none"))


def _names(schema: dict, defs: dict) -> set[str]:
    """All key names in a JSON schema, for 'did you mean'."""
    names = set(schema.get("properties", {}))
    for part in [*defs.values(), schema]:
        names |= set(part.get("properties", {}))
    return names


def _explain(error: ValidationError, where: str, kind: type[BaseModel]) -> str:
    schema = kind.model_json_schema()
    lines = []
    for e in error.errors():
        path = [str(p) for p in e["loc"] if p not in METHOD_NAMES] or ["(file)"]
        key = ".".join(path)
        if e["type"] == "extra_forbidden":
            near = difflib.get_close_matches(path[-1], _names(schema, schema.get("$defs", {})), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            lines.append(f"{where}: unknown key '{key}'{hint}")
        elif e["type"] in ("literal_error", "union_tag_invalid"):
            expected = e["ctx"].get("expected") or e["ctx"].get("expected_tags")
            given = e["input"].get("method") if isinstance(e["input"], dict) else e["input"]
            near = difflib.get_close_matches(
                str(given), [w.strip("' ") for w in expected.replace(" or ", ",").split(",")], n=1
            )
            hint = f"; did you mean '{near[0]}'?" if near else ""
            lines.append(f"{where}: '{key}' is {given!r}, expected {expected}{hint}")
        elif e["type"] == "missing":
            lines.append(f"{where}: '{key}' is missing")
        else:
            lines.append(f"{where}: '{key}' is {e['input']!r}: {e['msg'][0].lower() + e['msg'][1:]}")
    return "\n".join(lines)


def _validate(kind: type[BaseModel], values: dict, where: str):
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise StudyError(_explain(error, where, kind)) from None


def read_yaml(path: Path) -> dict:
    """A YAML file's mapping. Raises StudyError that names file and line if it is missing or malformed."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {near[0]}.yaml?" if near else ""
        raise StudyError(f"{path}: there is no such file{hint}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise StudyError(
            f"{path}{f', line {mark.line + 1}' if mark else ''}: not YAML: {getattr(error, 'problem', error)}"
        ) from None
    if not isinstance(values, dict):
        raise StudyError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def folder(study: str) -> Path:
    path = PARAMS / study
    if not (path / "study.yaml").is_file():
        near = difflib.get_close_matches(study, [p.name for p in PARAMS.iterdir()], n=1)
        raise StudyError(
            f"params/{study}/study.yaml: there is no such study" + (f"; did you mean STUDY={near[0]}?" if near else "")
        )
    return path


def read_study(study: str) -> Study:
    path = folder(study) / "study.yaml"
    result = _validate(Study, read_yaml(path), f"params/{study}/study.yaml")
    if result.study != study:
        raise StudyError(
            f"params/{study}/study.yaml: 'study' is '{result.study}', expected the folder's name '{study}'"
        )
    return result


def configuration_files(study: str, configuration: str) -> list[Path]:
    """What papermill gets with `-f` for a configuration, besides study.yaml: the shared format, then the study's own keys."""
    found = [p for p in (FORMATS / f"{configuration}.yaml", folder(study) / f"{configuration}.yaml") if p.is_file()]
    if not found:
        near = difflib.get_close_matches(configuration, configurations(study), n=1)
        hint = f"; did you mean {near[0]}.yaml?" if near else ""
        raise StudyError(f"params/formats/{configuration}.yaml: there is no such file{hint}")
    return found


def read_configuration(study: str, configuration: str) -> Configuration:
    files = configuration_files(study, configuration)
    values: dict = {}
    for path in files:
        values |= read_yaml(path)
    where = " and ".join(str(p.relative_to(ROOT)) for p in files)
    result = _validate(Configuration, values, where)
    if result.configuration != configuration:
        raise StudyError(
            f"{where}: 'configuration' is '{result.configuration}', expected the file's name '{configuration}'"
        )
    return result


def read_paper() -> dict:
    """The report that every study is held against: its numbers and its claims, from params/paper.yaml."""
    return read_yaml(PARAMS / "paper.yaml")


def configurations(study: str) -> list[str]:
    """Names of a study's configurations, full precision first: the formats that study.yaml names (none named: all), and its own files."""
    formats = read_study(study).formats
    shared = [p.stem for p in FORMATS.glob("*.yaml")] if formats is None else formats
    own = [p.stem for p in folder(study).glob("*.yaml") if p.stem != "study"]
    return sorted({*shared, *own}, key=lambda name: (name not in ("fp16", "bf16", "fp32"), name))


class Case(NamedTuple):
    """What one notebook runs on. One name, since papermill puts every key of the files beside it into the notebook."""

    study: Study
    configuration: Configuration | None  # none: the notebook is run once per study
    process: int = 1  # which of several that measure times


def check(given: dict, where: str) -> Case:
    """Check the merged values of a study's file and, where there is one, a configuration's. Raises StudyError naming every wrong key."""
    given = dict(given)
    process = given.pop("process", 1)
    if not isinstance(process, int) or process < 1:
        raise StudyError(f"{where}: 'process' is {process!r}, expected 1, 2, 3 ...")
    mine = {k: v for k, v in given.items() if k in Configuration.model_fields}
    configuration = _validate(Configuration, mine, where) if mine else None
    return Case(_validate(Study, {k: v for k, v in given.items() if k not in mine}, where), configuration, process)


def from_notebook(namespace: dict) -> Case:
    """Check what a notebook was given: the names that its parameters cell, or papermill, put into `namespace`.

    A notebook that is run by hand holds only the names of a study and a configuration: the rest is then read from params/.
    Raises StudyError naming every unknown or wrong key.
    """
    plain = (str, int, float, bool, list, dict, tuple, type(None))
    ours = ("In", "Out", "exit", "quit", "open", "get_ipython")  # IPython's own
    given = {k: v for k, v in namespace.items() if not k.startswith("_") and k not in ours and isinstance(v, plain)}
    if "model" not in given:
        configuration = (
            read_configuration(namespace["study"], given["configuration"]) if "configuration" in given else None
        )
        return Case(read_study(namespace["study"]), configuration, given.get("process", 1))
    return check(given, "notebook parameters")


def main(argv: list[str]) -> None:
    if not argv:
        raise SystemExit("usage: python -m helpers.params STUDY [CONFIGURATION ...]")
    try:
        read_study(argv[0])
        for name in argv[1:] or configurations(argv[0]):
            read_configuration(argv[0], name)
    except StudyError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main(sys.argv[1:])
