"""The schema of params/STUDY/study.yaml and of configurations.

A configuration is a format of params/formats, which all studies share, or params/STUDY/CONFIGURATION.yaml, which
replaces its keys or adds one of the study's own. papermill injects whatever the files hold; every notebook checks it:

    case = params.from_notebook(globals())    # case.study, case.configuration

The command line checks the files themselves (`python -m helpers.params STUDY [CONFIGURATION ...]`).
"""

import difflib
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from helpers import ROOT, StudyError
from helpers.checked_yaml import LINE, NAME, validate
from helpers.checked_yaml import read as read_yaml

PARAMS = ROOT / "params"
FORMATS = PARAMS / "formats"
COQA = "EleutherAI/coqa"

Positive = Annotated[int, Field(gt=0, le=10_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes
Share = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=NAME)]
Line = Annotated[str, Field(pattern=LINE)]
Dtype = Literal["auto", "float16", "bfloat16", "float32"]
Mode = Literal["eager", "cuda_graph", "compile"]
Item = TypeVar("Item")
# One value stands for a list of one.
AsList = BeforeValidator(lambda given: given if given is None or isinstance(given, list) else [given])
Several = Annotated[list[Item], AsList, Field(min_length=1)]


class Strict(BaseModel):
    # strict: YAML's yes is no number, and '64' is text
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Model(Strict):
    """Where the full-precision weights come from."""

    source: Literal["package", "hub", "path", "random"]
    name: Line  # package: smollm2-135m; hub: owner/name; path: a folder; random: a name for the report
    revision: Line | None = None  # hub only: a commit or tag
    architecture: dict | None = None  # random only: a transformers configuration, with its model_type
    already_quantized: Line | None = None  # what the weights went through before this study; the report repeats it
    # auto: the model's own on a GPU, float32 on a CPU. Not beside `model`: a configuration's `dtype` is put there.
    dtype: Dtype = "auto"

    @model_validator(mode="after")
    def _complete(self):
        if (self.source == "random") != (self.architecture is not None):
            raise ValueError("architecture belongs to source: random, and to it alone")
        word, owner = r"[A-Za-z0-9][\w.-]*", r"([A-Za-z0-9][\w.-]*/)?" if self.source == "hub" else ""
        if self.source != "path" and not re.fullmatch(owner + word, self.name, re.ASCII):
            raise ValueError(f"'{self.name}' is no name of source: {self.source}; a folder is source: path")
        return self


class Data(Strict):
    """Dialogues in CoQA's format, from one source."""

    name: Name  # in results and tables; by default the last part of the source
    source: Line = "embedded"  # embedded, a data set of the hub (OWNER/NAME), or a path to a file
    revision: Line | None = None  # hub only
    dialogues: Positive | None = None  # the first so many; none: all
    dialogues_on_cpu: Positive | None = None  # without a GPU; none: as many
    licence: Line | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given):
        if not isinstance(given, dict):
            return given
        stem = re.sub(r"\.(jsonl?|ndjson|txt)$", "", Path(str(given.get("source", "embedded"))).name)
        return {"name": re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:64] or "data"} | given

    @model_validator(mode="after")
    def _fewer(self):
        if self.dialogues and self.dialogues_on_cpu and self.dialogues_on_cpu > self.dialogues:
            raise ValueError(f"dialogues_on_cpu is {self.dialogues_on_cpu}, more than dialogues ({self.dialogues})")
        return self


class Evaluation(Strict):
    max_gen_toks: Annotated[int, Field(gt=0, le=2048)] = 256  # lm-eval's default; the metric reads one line
    batch_size: Positive | None = None  # none: found from free memory
    tasks: Annotated[list[Line], AsList] = []  # further lm-eval tasks beside the dialogues
    include_path: Line | None = None  # a folder with lm-eval tasks of your own
    limit: Positive | None = None  # documents of each further task
    samples_text: bool = True  # false: results hold ids, scores, lengths and hashes, and no text


class Sizes(Strict):
    """What 02_benchmark runs on one kind of device; the defaults are a CPU's."""

    prefill_tokens: Several[Positive] = [128, 512]
    batch_sizes: Several[Positive] = [1, 4, 8]
    prompt_tokens: Positive = 16  # context of a decode measurement
    contexts: Annotated[list[Positive], AsList] = [128]  # further ones, at batch size 1
    decode_tokens: Positive = 16  # tokens generated in one repeat
    repeats: Annotated[int, Field(ge=3)] = 5
    warmup: Positive = 1
    modes: Several[Mode] = ["eager"]

    def fitted(self, positions: int | None, where: str) -> "Sizes":
        """Sizes for a model of that many positions (none: any): a default shrinks. StudyError for one asked for."""
        room, changed = (positions or 2**31) - self.decode_tokens, {}
        for name, most in {
            "prefill_tokens": room + self.decode_tokens,
            "contexts": room,
            "prompt_tokens": room,
        }.items():
            given = getattr(self, name)
            tokens = given if isinstance(given, list) else [given]
            if (longest := max(tokens, default=0)) <= most:
                continue
            if name in self.model_fields_set or most < 1:
                said = f"{longest} is too long for the model's {positions} positions; write at most {max(most, 1)}"
                raise StudyError(f"{where}.{name}: {said}")
            fit = [n for n in tokens if n <= most] or [most]
            changed[name] = fit if isinstance(given, list) else fit[0]
        return self.model_copy(update=changed)


class GPUSizes(Sizes):
    prefill_tokens: Several[Positive] = [128, 256, 512, 1024, 4096]
    batch_sizes: Several[Positive] = [1, 4, 8, 64]
    prompt_tokens: Positive = 128
    contexts: Annotated[list[Positive], AsList] = [4096]
    decode_tokens: Positive = 64
    repeats: Annotated[int, Field(ge=3)] = 10
    warmup: Positive = 3
    modes: Several[Mode] = ["eager", "cuda_graph", "compile"]


class Benchmark(Strict):
    # A time is the median of several processes (Make's PROCESSES).
    cpu: Sizes = Sizes()
    cuda: GPUSizes = GPUSizes()
    processes: Annotated[int, Field(gt=0, le=9)] | None = None  # none: 3 on a GPU, 1 without
    memory_budgets_gib: Several[Annotated[float, Field(gt=0)]] = [4, 8, 16]  # largest batch that fits in so much


class Fidelity(Strict):
    dialogues: Positive | None = None  # of each source, at most; none: as many as are evaluated
    text: Line | None = None  # a plain text file, for perplexity as it is published
    noise_seeds: Several[Seed] = [0, 1, 2]
    block_sizes: Several[Positive] = [64, 128, 256, 512, 1024, 2048, 4096]


class Statistics(Strict):
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    resamples: Positive = 10_000
    redraws: Positive = 10_000  # of the paper's 50-question design
    margin: Share = 0.015  # F1: two configurations are equal if their difference surely lies within


class Study(Strict):
    study: Name
    title: Line
    model: Model
    formats: Several[Name] | None = None  # of params/formats; none: all
    data: Annotated[  # one source or a list; none: hardware only
        Annotated[Data, Tag("one")] | Annotated[Several[Data], Tag("several")],
        Discriminator(lambda given: "several" if isinstance(given, list) else "one"),
    ] | None = None  # fmt: skip
    evaluation: Evaluation = Evaluation()
    benchmark: Benchmark = Benchmark()
    fidelity: Fidelity = Fidelity()
    statistics: Statistics = Statistics()
    seed: Seed = 1234
    folder: Line | None = None  # of the results; none: executed/STUDY
    beside: list[Name] = []  # studies of other models, whose formats the report sets beside these

    @model_validator(mode="after")
    def _sound(self):
        if len({d.name for d in self.sources}) < len(self.sources):
            raise ValueError("two sources of data have the same name; give each its own `name`")
        # A link inside the project may lead elsewhere (a larger disk): who made it meant it.
        if self.folder and ROOT not in Path(os.path.normpath(ROOT / self.folder)).parents:
            raise ValueError(f"folder '{self.folder}' leads out of the project; name one under executed/")
        return self

    @property
    def sources(self) -> list[Data]:
        """The study's sources of dialogues; empty if it measures hardware only."""
        return self.data if isinstance(self.data, list) else [self.data] if self.data else []

    @property
    def dtype(self) -> str:
        return self.model.dtype

    def on_cpu(self) -> "Study":
        """The study with as many dialogues of each source as a machine without a GPU is asked for."""
        fewer = [d.model_copy(update={"dialogues": d.dialogues_on_cpu or d.dialogues}) for d in self.sources]
        return self.model_copy(update={"data": fewer if isinstance(self.data, list) else fewer[0]}) if fewer else self


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
    activations: Literal["none", "dynamic"] = "none"  # dynamic: float8 as well, so that the GPU multiplies in float8


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

    source: Line = "auto"  # see `resolved`; or embedded-held-out, EleutherAI/coqa, a path to a file, random-tokens
    revision: Line | None = None  # hub only
    # dialogues; none: four fifths of those there are, so that seeds differ, at most 128; 16 of random tokens
    samples: Positive | None = None
    sequence_length: Positive = 512  # tokens of each, at most
    seed: Seed = 0  # draws them

    def resolved(self, study: Study) -> "Calibration":
        """`auto` decided: random tokens for random weights, CoQA's train split if CoQA is evaluated, else held-out."""
        if self.source != "auto":
            return self
        asked = [data for data in study.sources if data.source == COQA]
        source = "random-tokens" if study.model.source == "random" else COQA if asked else "embedded-held-out"
        revision = {"revision": asked[0].revision} if source == COQA else {}
        return self.model_copy(update={"source": source, **revision})


class GPTQ(Strict):
    method: Literal["gptq"]
    group_size: Positive = 128  # weights of one row that share a scale
    symmetric: bool = True  # false: a zero point as well
    scales: Literal["mse", "minmax"] = "mse"  # of a group: searched for the least error, or the largest weight's
    dampening: Share = 0.01  # added to the Hessian's diagonal, as a share of its mean
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


class Configuration(Strict):
    configuration: Name
    label: Line  # as tables and figures name it
    quantization: Quantization
    dtype: Dtype = "auto"  # of compute and of what is not quantized; auto: the study's (`model.dtype`)


FULL_PRECISION = Configuration(configuration="full", label="Full precision", quantization=Full(method="none"))


def _near(name: str, names, form: str) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {form.format(close[0])}?" if close else ""


def folder(study: str) -> Path:
    if not re.fullmatch(NAME, study):
        raise StudyError(f"STUDY={study}: write the name of one folder of params/, such as STUDY=smollm2-135m")
    if not (PARAMS / study / "study.yaml").is_file():
        hint = _near(study, (p.name for p in PARAMS.iterdir()), "STUDY={}")
        raise StudyError(f"params/{study}/study.yaml: there is no such study{hint}")
    return PARAMS / study


def read_study(study: str) -> Study:
    path = folder(study) / "study.yaml"
    result = validate(Study, read_yaml(path), f"params/{study}/study.yaml")
    if result.study != study:
        raise StudyError(f"params/{study}/study.yaml: 'study' is '{result.study}', not its folder's name '{study}'")
    return result


def configuration_files(study: str, configuration: str) -> list[Path]:
    """What papermill gets with `-f` besides study.yaml: the shared format, then the study's own keys."""
    files = [p for p in (FORMATS / f"{configuration}.yaml", folder(study) / f"{configuration}.yaml") if p.is_file()]
    if (PARAMS / configuration / "study.yaml").is_file():
        raise StudyError(f"'{study}' and '{configuration}' are both studies; name one, STUDY={study}")
    if not files:
        hint = _near(configuration, configurations(study), "{}.yaml")
        raise StudyError(f"params/formats/{configuration}.yaml: there is no such file{hint}")
    return files


def read_configuration(study: str, configuration: str) -> Configuration:
    files = configuration_files(study, configuration)
    values = {key: value for path in files for key, value in read_yaml(path).items()}
    where = " and ".join(f"params/{p.parent.name}/{p.name}" for p in files)
    result = validate(Configuration, values, where)
    if result.configuration != configuration:
        said = f"'configuration' is '{result.configuration}', expected the file's name '{configuration}'"
        raise StudyError(f"{where}: {said}")
    return result


def read_paper() -> dict:
    """The report that every study is held against: its numbers and its claims, from params/paper.yaml."""
    return read_yaml(PARAMS / "paper.yaml")


def configurations(study: str) -> list[str]:
    """A study's configurations, full precision first: the formats that study.yaml names, or all, and its own files."""
    formats = read_study(study).formats
    for path in [*folder(study).iterdir(), *FORMATS.iterdir()]:
        if path.suffix == ".yml" or (path.suffix == ".yaml" and not re.fullmatch(NAME, path.stem)):
            where = f"params/{path.parent.name}/{path.name!r}"
            raise StudyError(f"{where}: rename it to letters, digits, dots, hyphens and underscores, ending in .yaml")
    shared = [p.stem for p in FORMATS.glob("*.yaml")] if formats is None else formats
    own = [p.stem for p in folder(study).glob("*.yaml") if p.stem != "study"]
    return sorted({*shared, *own}, key=lambda name: (name not in ("fp16", "bf16", "fp32"), name))


class Case(NamedTuple):
    """What one notebook runs on; one name, since papermill puts every key of the files into the notebook."""

    study: Study
    configuration: Configuration | None  # none: the notebook is run once per study
    process: int = 1  # which of several that measure times


def check(given: dict, where: str) -> Case:
    """A study's values and a configuration's, merged as papermill merges them. Raises StudyError for wrong keys."""
    given = dict(given)
    process = given.pop("process", 1)
    if type(process) is not int or not 1 <= process <= 9:
        raise StudyError(f"{where}: 'process' is {process!r}, expected a number from 1 to 9")
    mine = {k: v for k, v in given.items() if k in Configuration.model_fields}
    configuration = validate(Configuration, mine, where) if mine else None
    return Case(validate(Study, {k: v for k, v in given.items() if k not in mine}, where), configuration, process)


def from_notebook(namespace: dict) -> Case:
    """What its parameters cell or papermill gave a notebook, checked; by hand only names: the rest is from params/.
    Raises StudyError naming every wrong key."""
    plain = (str, int, float, bool, list, dict, tuple, type(None))
    ours = ("In", "Out", "exit", "quit", "open", "get_ipython")  # IPython's own
    given = {k: v for k, v in namespace.items() if not k.startswith("_") and k not in ours and isinstance(v, plain)}
    if "model" in given:
        return check(given, "notebook parameters")
    name = given.get("configuration")
    configuration = read_configuration(given["study"], name) if name else None
    return Case(read_study(given["study"]), configuration, given.get("process", 1))


def main(argv: list[str]) -> None:
    try:
        read_study(argv[0] if argv else "")
        for name in argv[1:] or configurations(argv[0]):
            read_configuration(argv[0], name)
        configurations(argv[0])  # and every file name
    except StudyError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main(sys.argv[1:])
