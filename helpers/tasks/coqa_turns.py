"""The tasks coqa_turns and coqa_last_turns: lm-eval's own CoQA, prompt and metric, over any sources of dialogues and
any turn.

Their data comes from helpers.setup.coqa. `source`, `dialogues` and `revision`, or several `sources` as a study's
`data`, may be given through lm-eval's --metadata, through `TaskManager(metadata=...)` or as the task's
`dataset_kwargs`. On lm-eval's command line the metadata holds the model's own arguments as well, so that `revision`
is the model's there: the data's is called `data_revision`.

    python -m helpers.evaluate.hf_dialogue run --model hf-dialogue --model_args pretrained=MODEL,answer_line=True
    --tasks coqa_turns \\
        --include_path helpers/tasks --metadata '{"source": "EleutherAI/coqa", "dialogues": 100}'
"""

import json
from functools import lru_cache

from datasets import Dataset
from lm_eval.tasks.coqa import utils as upstream

from helpers.params import Data
from helpers.setup import coqa


def _columns(columns: dict, turns: int) -> dict:
    return {name: column[:turns] for name, column in columns.items()}


def cut(dialogue: dict, turns: int) -> dict:
    """The dialogue as if it ended after `turns` turns."""
    return {
        **dialogue,
        "questions": _columns(dialogue["questions"], turns),
        "answers": _columns(dialogue["answers"], turns),
        "additional_answers": {
            k: _columns(v, turns) for k, v in (dialogue.get("additional_answers") or {}).items() if v
        },
    }


def turns(dialogues: list[dict]) -> list[dict]:
    """Every turn as a document: `id`, `turn` (from 1), `last_turn`, and the dialogue up to it, gold history
    included."""
    documents = []
    for dialogue in dialogues:
        count = len(dialogue["questions"]["input_text"])
        for turn in range(1, count + 1):
            documents.append({**cut(dialogue, turn), "turn": turn, "last_turn": turn == count})
    return documents


@lru_cache(maxsize=4)
def _documents(sources: str, last: bool) -> Dataset:
    """Documents of `sources` (a study's `data` as JSON): id, turn, data_set (the source's name), source (the
    domain)."""
    documents = turns(coqa.read_sources([Data.model_validate(data) for data in json.loads(sources)]))
    # A document is a row of its own text: prompt and references are computed here, once, so that a row stays small.
    return Dataset.from_list(
        [
            {key: d[key] for key in ("id", "data_set", "source", "turn", "last_turn")}
            | {
                "question": d["questions"]["input_text"][-1],
                "text": upstream.doc_to_text(d),
                "references": upstream.doc_to_target(d),
            }
            for d in documents
            if d["last_turn"] or not last
        ]
    )


def _sources(metadata: dict) -> str:
    if "sources" in metadata:
        return json.dumps(metadata["sources"])
    revision = metadata.get("data_revision") or (None if "pretrained" in metadata else metadata.get("revision"))
    one = {"source": metadata.get("source", "embedded"), "dialogues": metadata.get("dialogues"), "revision": revision}
    return json.dumps([one])


def dataset(**metadata) -> dict[str, Dataset]:
    """lm-eval's `custom_dataset` for coqa_turns. Raises StudyError if a source can't be read."""
    return {"validation": _documents(_sources(metadata), last=False)}


def last_turns(**metadata) -> dict[str, Dataset]:
    """lm-eval's `custom_dataset` for coqa_last_turns: what the stock task `coqa` asks."""
    return {"validation": _documents(_sources(metadata), last=True)}


def doc_to_text(doc: dict) -> str:
    return doc["text"]


def doc_to_target(doc: dict) -> list[str]:
    return doc["references"]


def process_results(doc: dict, results: list[str]) -> dict:
    """Exact match and F1 of the prediction's first line, leave-one-out over references
    (lm_eval/tasks/coqa/utils.py)."""
    prediction = results[0].strip().split("\n")[0]
    return upstream.compute_scores(doc["references"], prediction)
