"""What both models read, as tokens, and reading it.

A dialogue is written as lm-eval's CoQA task writes it: the story, then `Q: ...` and `A: ...` with the gold answers. Its
stories' and gold answers' tokens count (`Text.turn`), not the questions and the marks `Q:` and `A:`. A text file is cut
into windows as llama.cpp's llama-perplexity cuts it, and the second half of each window counts.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from helpers import ROOT, StudyError

WINDOW = 512  # llama.cpp's default context
WINDOWS = {"cpu": 10, "cuda": None}  # of a text file, at most; None: all of them
WORKING_BYTES = 2**26  # a chunk of float32 logits


class Text(NamedTuple):
    """A dialogue or a window of a file: its tokens, and what each of them is."""

    data_set: str
    id: str
    ids: torch.Tensor  # (tokens,)
    turn: np.ndarray  # (tokens,): 0 in the story or file, t in the gold answer of turn t, -1: does not count


def encode(dialogues: list[dict], tokenizer, limit: int | None = None) -> tuple[list[Text], list[dict]]:
    """Dialogues as tokens, and schema.LeftOut's rows of those with more than `limit` tokens.

    A token belongs to an answer if any of its characters does, and to the story likewise. Raises StudyError if the
    tokenizer gives no character offsets, or no dialogue is left.
    """
    if not tokenizer.is_fast:
        raise StudyError(f"{type(tokenizer).__name__} gives no character offsets; use a model with a fast tokenizer")
    texts, left_out = [], []
    for dialogue in dialogues:
        text = _encode(dialogue, tokenizer)
        if limit is None or len(text.ids) <= limit:
            texts.append(text)
            continue
        row = {"data_set": text.data_set, "dialogue": text.id, "tokens": len(text.ids)}
        left_out.append(row | {"reason": f"{len(text.ids):,} tokens are more than the model takes ({limit:,})"})
    if not texts:
        raise StudyError(
            f"data.source: all {len(dialogues)} dialogues are longer than the model takes ({limit:,} tokens), which "
            "leaves nothing to compare; add shorter ones"
        )
    return texts, left_out


def _encode(dialogue: dict, tokenizer) -> Text:
    text, spans = dialogue["story"] + "\n\n", [(0, len(dialogue["story"]))]
    for question, answer in zip(dialogue["questions"]["input_text"], dialogue["answers"]["input_text"], strict=True):
        text += f"Q: {question}\n\nA: "
        spans.append((len(text), len(text) + len(answer)))
        text += f"{answer}\n\n"
    encoded = tokenizer(text, return_offsets_mapping=True)
    starts, ends = np.array(encoded["offset_mapping"]).T
    turn = np.full(len(starts), -1)
    for number, (start, end) in enumerate(spans):
        turn[(starts < end) & (ends > start) & (ends > starts)] = number
    turn[0] = -1  # nothing comes before it
    data_set = str(dialogue.get("data_set", "dialogues"))
    return Text(data_set, str(dialogue["id"]), torch.tensor(encoded["input_ids"]), turn)


def windows(path: str, tokenizer, limit: int | None = None) -> list[Text]:
    """A text file in windows of WINDOW tokens (or `limit`, if the model takes fewer), the rest at its end left out.

    As in llama.cpp (tools/perplexity/perplexity.cpp): windows don't overlap, a tokenizer that starts texts with a token
    puts it in place of each window's first one, and of 512 tokens the last 255 count, each with at least 257 before it.
    Raises StudyError if the file is missing, no UTF-8 or shorter than two windows.
    """
    file = Path(path) if Path(path).is_absolute() else ROOT / path
    try:
        content = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise StudyError(
            f"fidelity.text: there is no file {file.name}; give a path from the project's folder"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise StudyError(f"fidelity.text: {file.name} cannot be read ({why}); give a plain text file") from None
    size = min(WINDOW, limit or WINDOW)
    bos = tokenizer("a")["input_ids"][0] if tokenizer("")["input_ids"] else None
    ids = torch.tensor(tokenizer(content, verbose=False)["input_ids"])
    parts = ids[: len(ids) // size * size].view(-1, size).clone()
    if len(parts) < 2:
        raise StudyError(f"fidelity.text: {file.name} has {len(ids)} tokens; give a file of at least {2 * size}")
    if bos is not None:
        parts[:, 0] = bos
    turn = np.where(np.arange(size) > size // 2, 0, -1)
    return [Text(file.name, str(i), part, turn) for i, part in enumerate(parts)]


def token_limit(model) -> int | None:
    return getattr(model.config, "max_position_embeddings", None)


def scored(text: Text) -> np.ndarray:
    """Places of the tokens that count; each is predicted from the hidden state before it."""
    return np.flatnonzero(text.turn >= 0)


def chunk_positions(vocabulary: int) -> int:
    """How many positions' logits are held at once."""
    return max(1, WORKING_BYTES // (4 * vocabulary))


@torch.inference_mode()
def hidden_states(model, batch: list[Text]) -> list[torch.Tensor]:
    """The last hidden states (scored, width) before each text's scored tokens, read in one right-padded batch."""
    longest = max(len(t.ids) for t in batch)
    ids = torch.zeros((len(batch), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(batch):
        ids[row, : len(text.ids)], mask[row, : len(text.ids)] = text.ids, 1
    padded = {"attention_mask": mask.to(model.device)} if len(batch) > 1 else {}
    states = model.base_model(ids.to(model.device), use_cache=False, **padded).last_hidden_state
    return [states[row, torch.from_numpy(scored(text) - 1)] for row, text in enumerate(batch)]


@torch.inference_mode()
def check_head(model, text: Text) -> None:
    """Raises StudyError unless the model's logits are its output layer of its last hidden states (some scale them)."""
    ids = text.ids[None, :8].to(model.device)
    ours = model.get_output_embeddings()(model.base_model(ids, use_cache=False).last_hidden_state).float()
    theirs = model(ids, use_cache=False).logits.float()
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
        raise StudyError(
            f"{type(model).__name__} changes its logits after the output layer, which 03_fidelity cannot follow; "
            "leave 03_fidelity out for this model"
        )


@torch.inference_mode()
def nll_sums(model, texts: list[Text]) -> list[tuple[float, int]]:
    """Per text: summed negative log-probability of its scored tokens (nats), and their number."""
    head, found = model.get_output_embeddings(), []
    for text in texts:
        states, targets = hidden_states(model, [text])[0], text.ids[torch.from_numpy(scored(text))]
        step, total = chunk_positions(head.weight.shape[0]), 0.0
        for some, target in zip(states.split(step), targets.to(states.device).split(step), strict=True):
            # in float64: in float32 the CPU's sum over a vocabulary is wrong by 2e-5 nats
            total += torch.nn.functional.cross_entropy(head(some).double(), target, reduction="sum").item()
        found.append((total, len(targets)))
    return found


def perplexity(sums: list[tuple[float, int]]) -> float:
    return float(np.exp(sum(s for s, _ in sums) / sum(n for _, n in sums)))
