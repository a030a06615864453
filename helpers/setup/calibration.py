"""Calibration text for the methods that look at activations (GPTQ, AWQ): never a dialogue that is evaluated.

    samples, record = calibration.samples(study, options.calibration, tokenizer)

Every sample is one dialogue, written as lm-eval's CoQA prompt writes it (story, then all questions with their answers), cut to
`sequence_length` tokens. A model with random weights has no tokenizer: `source: random-tokens` draws token ids from the study's seed.
"""

import hashlib

import torch

from helpers import StudyError
from helpers.params import Calibration, Study
from helpers.setup import coqa

RANDOM = "random-tokens"


def text(dialogue: dict) -> str:
    """A dialogue as text: lm-eval's `coqa` prompt (lm_eval/tasks/coqa/utils.py, doc_to_text), with the last answer as well."""
    turns = zip(dialogue["questions"]["input_text"], dialogue["answers"]["input_text"], strict=True)
    return dialogue["story"] + "\n\n" + "".join(f"Q: {question}\n\nA: {answer}\n\n" for question, answer in turns)


def _plain(story: str) -> str:
    """A story as it is compared: white space and case do not make it another one."""
    return " ".join(story.lower().split())


def check_unseen(dialogues: list[dict], study: Study) -> None:
    """Raises StudyError if one of `dialogues` is evaluated in this study, by its id or by its story."""
    if study.data is None:
        return
    evaluated = coqa.read(study.data.source, study.data.dialogues, study.data.revision)
    ids, stories = {d["id"] for d in evaluated}, {_plain(d["story"]) for d in evaluated}
    for dialogue in dialogues:
        if dialogue["id"] in ids or _plain(dialogue["story"]) in stories:
            raise StudyError(
                f"calibration.source: dialogue {dialogue['id']} is also evaluated in this study ({study.data.source}); calibrate on other "
                "dialogues, such as embedded-held-out or a hub data set's train split"
            )


def _dialogues(study: Study, calibration: Calibration) -> list[dict]:
    # The hub's evaluated split is validation. A file or an embedded set has no splits.
    found = coqa.read(calibration.source, revision=calibration.revision, split="train")
    if calibration.samples > len(found):
        raise StudyError(
            f"calibration.samples: {calibration.samples} asked for, but {calibration.source} has {len(found)} dialogues; "
            "ask for at most that many"
        )
    # Sources are sorted by domain: take the samples evenly from the whole of it.
    chosen = [found[i * len(found) // calibration.samples] for i in range(calibration.samples)]
    check_unseen(chosen, study)
    return chosen


def samples(study: Study, calibration: Calibration, tokenizer, vocabulary: int) -> tuple[list[list[int]], dict]:
    """Token ids of every sample, and the record of them: source, samples, tokens, sha256 (of the ids).

    Raises StudyError if a dialogue is evaluated too, if there are too few, or if there is no tokenizer for text.
    """
    if calibration.source == RANDOM:
        generator = torch.Generator().manual_seed(study.seed)
        shape = (calibration.samples, calibration.sequence_length)
        ids = torch.randint(vocabulary, shape, generator=generator).tolist()
    elif tokenizer is None:
        raise StudyError(
            f"calibration.source: {study.model.name} has random weights and no tokenizer to read {calibration.source} with; write {RANDOM}"
        )
    else:
        ids = [tokenizer(text(d))["input_ids"][: calibration.sequence_length] for d in _dialogues(study, calibration)]
    return ids, {
        "source": calibration.source,
        "samples": len(ids),
        "tokens": sum(map(len, ids)),
        "sha256": hashlib.sha256(repr(ids).encode()).hexdigest(),
    }
