"""What result files hold, kind by kind: every key, with its unit.

A writer's data must fit its model exactly (`schema_base.Exact`); `results.read` also takes what schema 1 wrote, whose
missing keys are then None.
Nothing here imports torch: the analysis reads these models on any machine.
"""

from typing import Literal

from helpers.schema_base import Data, Exact
from helpers.schema_benchmark import Benchmark
from helpers.schema_fidelity import Fidelity, Weights

Kind = Literal["setup", "evaluation", "benchmark", "fidelity", "weights"]


class Setup(Exact):
    weights: dict  # source, folder's files with sha256 and bytes, parameters
    # dialogues, questions, data_sets (a row per domain: name, source, revision, licence, domain, dialogues, questions,
    # story_words_mean); None for a hardware study
    data: dict | None
    environment: dict  # what 00_setup showed: device, dtype and its reason


class Evaluation(Exact):
    tasks: dict  # task -> metric -> value, and "samples": its file name
    files: dict  # file name -> {"lines", "sha256"}
    questions: int  # in coqa_turns
    dialogues: int
    seconds: float  # answering them all, loading excluded
    engine: dict  # hf-dialogue's timings and counts
    floor: dict | None = None  # full precision on a GPU: what the batch alone changes (evaluate.run.floor)
    loading: dict  # models.load's info


DATA: dict[str, type[Data]] = {
    "setup": Setup,
    "evaluation": Evaluation,
    "benchmark": Benchmark,
    "fidelity": Fidelity,
    "weights": Weights,
}
