"""Few-shot tasks of the shape of MMLU and GSM8K for tests/bench_eval.py, from the dialogues that ship: no download.

few_shot_choices: a subject is a dialogue; its header is the story and five answered questions with four choices each,
its questions are the rest. few_shot_answers: one header of five answered questions with their passages, then a passage
and a question of another dialogue, to be answered at length."""

from datasets import Dataset

from helpers.setup import coqa

SHOTS = 5
LETTERS = "ABCD"


def _turns(dialogue: dict) -> list[tuple[str, str]]:
    return list(zip(dialogue["questions"]["input_text"], dialogue["answers"]["input_text"], strict=True))


def _choices(turns: list[tuple[str, str]], n: int) -> tuple[str, int]:
    """A question with four choices, and which is right: the others are the answers to the questions after it."""
    right = n % 4
    others = [turns[(n + k) % len(turns)][1] for k in (1, 2, 3)]
    offered = [*others[:right], turns[n][1], *others[right:]]
    lines = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, offered, strict=True))
    return f"{turns[n][0]}\n{lines}\nAnswer:", right


def choices(**metadata) -> dict[str, Dataset]:
    documents = []
    for dialogue in coqa.read("embedded", metadata.get("dialogues")):
        turns = _turns(dialogue)
        asked = [_choices(turns, n) for n in range(len(turns))]
        header = "\n\n".join([dialogue["story"], *(f"{text} {LETTERS[right]}" for text, right in asked[:SHOTS])])
        documents += [{"text": f"{header}\n\n{text}", "right": right} for text, right in asked[SHOTS:]]
    return {"validation": Dataset.from_list(documents)}


def answers(**metadata) -> dict[str, Dataset]:
    found = coqa.read("embedded")
    dialogues = found[: (metadata.get("dialogues") or len(found)) + SHOTS]
    passages = [" ".join(d["story"].split()[:80]) for d in dialogues]
    shots = [f"{p}\nQ: {_turns(d)[0][0]}\nA: {_turns(d)[0][1]}" for p, d in zip(passages, dialogues, strict=True)]
    documents = []
    for passage, dialogue in list(zip(passages, dialogues, strict=True))[SHOTS:]:
        for question, answer in _turns(dialogue)[:2]:
            text = "\n\n".join([*shots[:SHOTS], f"{passage}\nQ: {question}\nA:"])
            documents.append({"text": text, "answer": answer})
    return {"validation": Dataset.from_list(documents)}
