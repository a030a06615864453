"""How far a quantized model's predictions are from full precision's, token by token.

Both models read the same text and predict the same tokens: each dialogue as lm-eval's CoQA task writes it (`story`, then `Q: ...` and
`A: ...` with the gold answers). Compared are the predictions of

    story      the story's tokens (all but the first, if the tokenizer puts nothing before it)
    answers    the gold answers' tokens
    all        both; not the questions and the marks `Q:` and `A:`

    found = fidelity.compare(study, configuration, dialogues)

    kl                  KL(full || quantized) of the next token's distribution, nats
    agreement           share of positions with the same most likely token
    correct_token       p_quantized - p_full of the token that stands in the text
    ln_ratio            ln(perplexity quantized / perplexity full), paired

Full precision compared with itself, read in padded batches of NOISE_FLOOR_BATCH instead of one dialogue at a time, is the noise floor: what
rounding alone does. The models' own logits are compared, in the dtype they compute in. helpers.divergence holds the arithmetic.

The full-precision model is kept beside the quantized one if both fit. If not, its last hidden states go to disk in the dtype that it
computes in, and its output layer stays loaded: that gives the same logits again to the last bit, in a hundredth of the space of the
log-probabilities. `placement` says which.
"""

import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helpers import CACHE, StudyError
from helpers.fidelity import formats as weights
from helpers.fidelity.divergence import position_metrics, summarize
from helpers.params import Configuration, Full, Study
from helpers.setup import models
from helpers.setup.device import free
from helpers.setup.layers import repacked

NOISE_FLOOR_BATCH = 4
WORKING_BYTES = (
    2**28
)  # five float64 arrays over the vocabulary for one chunk of positions; larger chunks leave the cache and are slower
SPARE_BYTES = 3 * 2**29  # what comparing needs beside the models


class Text(NamedTuple):
    """One dialogue's tokens, and what each of them is."""

    id: str
    ids: torch.Tensor  # (tokens,)
    turn: (
        np.ndarray
    )  # (tokens,): 0 in the story, t in the gold answer of turn t, -1 elsewhere and where nothing comes before


def encode(dialogues: list[dict], tokenizer, limit: int | None = None) -> list[Text]:
    """Dialogues as tokens. A token belongs to an answer if any of its characters does, and to the story likewise.

    Raises StudyError if the tokenizer can't tell where tokens come from, or a dialogue has more than `limit` tokens.
    """
    if not tokenizer.is_fast:
        raise StudyError(
            f"{type(tokenizer).__name__} gives no character offsets; use a model whose tokenizer has a fast version"
        )
    return [_encode(dialogue, tokenizer, limit) for dialogue in dialogues]


def _encode(dialogue: dict, tokenizer, limit: int | None) -> Text:
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
    turn[0] = -1
    if limit is not None and len(turn) > limit:
        raise StudyError(
            f"dialogue {dialogue['id']} has {len(turn)} tokens, but the model takes {limit}; leave it out of data.source"
        )
    return Text(dialogue["id"], torch.tensor(encoded["input_ids"]), turn)


@torch.inference_mode()
def hidden_states(model, batch: list[Text]) -> list[torch.Tensor]:
    """The last hidden states (tokens, width) of each text, read as one batch padded on the right."""
    longest = max(len(t.ids) for t in batch)
    ids = torch.zeros((len(batch), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(batch):
        ids[row, : len(text.ids)], mask[row, : len(text.ids)] = text.ids, 1
    padded = {"attention_mask": mask.to(model.device)} if len(batch) > 1 else {}
    states = model.base_model(ids.to(model.device), use_cache=False, **padded).last_hidden_state
    return [states[row, : len(text.ids)] for row, text in enumerate(batch)]


@torch.inference_mode()
def check_head(model, text: Text) -> None:
    """Raises StudyError if the model's logits are not its output layer of its last hidden states (some models scale or cap them)."""
    ids = text.ids[None, :8].to(model.device)
    ours = model.get_output_embeddings()(model.base_model(ids, use_cache=False).last_hidden_state).float()
    theirs = model(ids, use_cache=False).logits.float()
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
        raise StudyError(
            f"{type(model).__name__} changes its logits after the output layer, which 03_fidelity does not follow; leave it out"
        )


def scored(text: Text) -> np.ndarray:
    """Places of the tokens whose prediction counts; each is predicted from the hidden state before it."""
    return np.flatnonzero(text.turn >= 0)


def chunk_positions(vocabulary: int) -> int:
    """How many positions are compared at once, so that they take WORKING_BYTES."""
    return max(1, WORKING_BYTES // (40 * vocabulary))


@torch.inference_mode()
def compare_text(text: Text, full_states, full_head, states, head) -> dict[str, np.ndarray]:
    """`position_metrics` of a text's scored tokens, from the hidden states (tokens, width) and output layers of both models."""
    places = torch.from_numpy(scored(text))
    step = chunk_positions(full_head.weight.shape[0])
    parts = []
    for i in range(0, len(places), step):
        some = places[i : i + step]
        before = (some - 1).to(full_states.device)
        targets = text.ids[some].to(full_states.device)
        logits = head(states[before.to(states.device)]).to(full_states.device)
        parts.append(position_metrics(full_head(full_states[before]), logits, targets))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@torch.inference_mode()
def nll_sums(model, texts: list[Text]) -> list[tuple[float, int]]:
    """Per text: summed negative log-probability of its scored tokens (nats, in float64), and their number."""
    head, found = model.get_output_embeddings(), []
    for text in texts:
        places = torch.from_numpy(scored(text))
        states = hidden_states(model, [text])[0]
        total = 0.0
        for some in places.split(chunk_positions(head.weight.shape[0])):
            p = head(states[(some - 1).to(states.device)]).double().log_softmax(-1)
            total -= p.gather(-1, text.ids[some].to(p.device)[:, None]).sum().item()
        found.append((total, len(places)))
    return found


def full_precision(configuration: Configuration) -> Configuration:
    """The same configuration without quantization: same dtype, so that only the weights differ."""
    return configuration.model_copy(update={"configuration": "full", "quantization": Full(method="none")})


def free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def fits_beside(model) -> bool:
    """Is there room for a second model of this size and the comparison?"""
    return free_bytes(model.device) > model.get_memory_footprint() + SPARE_BYTES


def token_limit(model) -> int | None:
    return getattr(model.config, "max_position_embeddings", None)


def compare(
    study: Study, configuration: Configuration, dialogues: list[dict], side_by_side: bool | None = None, progress=None
) -> dict:
    """Compare a configuration with full precision on the same tokens; full precision with itself (method none) is the noise floor.

    side_by_side: both models at once; none: if they fit. Returns `summarize`'s keys and
        placement       where the full-precision model was, in words
        seconds         loading, reading (forward passes), comparing
        weights         {"formats": {configuration: helpers.weights.own_error}}, where both models were loaded; absent for full precision
        weights_reason  why there is no weight error; none if there is
        arithmetic      dtype of the computation; where bitsandbytes repacked 4-bit layers for this CPU, bfloat16 inside them
    Raises StudyError if the texts don't suit the model.
    """
    clock = _Clock()
    full = models.load(study, full_precision(configuration))
    clock("loading")
    texts = encode(dialogues, full.tokenizer, token_limit(full.model))
    check_head(full.model, texts[0])
    itself = configuration.quantization.method == "none"
    dtype = full.info["dtype"]
    more = {"weights_reason": "full precision is the reference" if itself else None, "arithmetic": dtype}
    if itself:
        placement = f"one model, read twice: a dialogue at a time, and in padded batches of {NOISE_FLOOR_BATCH}"
        rows = _compare_all(texts, _live(full.model), full.model, NOISE_FLOOR_BATCH, clock, progress)
    elif fits_beside(full.model) if side_by_side is None else side_by_side:
        placement = f"both models side by side on the {full.model.device.type}"
        other = models.load(study, configuration)
        clock("loading")
        more["weights"] = {"formats": {configuration.configuration: weights.own_error(full.model, other.model)}}
        clock("comparing")
        rows = _compare_all(texts, _live(full.model), other.model, 1, clock, progress)
    else:
        placement = (
            f"one after the other: full precision's last hidden states on disk in {dtype}, its logits exact from them"
        )
        more["weights_reason"] = "the two models did not fit side by side"
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            path = _store(texts, full.model, Path(scratch), clock)
            head = full.model.get_output_embeddings()
            del full
            free()
            other = models.load(study, configuration)
            clock("loading")
            rows = _compare_all(texts, _stored(path, head), other.model, 1, clock, progress)
    if not itself and any(map(repacked, other.model.modules())):
        more["arithmetic"] = (
            f"{dtype}; inside the 4-bit layers bfloat16, to which bitsandbytes repacks them on this CPU"
        )
    turns = [text.turn[scored(text)] for text in texts]
    return (
        summarize([text.id for text in texts], turns, rows, study)
        | {"placement": placement, "seconds": clock.seconds}
        | more
    )


class _Clock:
    """Adds the seconds since the last call to a named sum."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def __call__(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


def _live(model):
    """A function of a text's index and the text that gives hidden states, and the output layer for them."""
    return lambda i, text: hidden_states(model, [text])[0], model.get_output_embeddings()


def _store(texts: list[Text], model, scratch: Path, clock: _Clock) -> Path:
    states = {str(i): hidden_states(model, [text])[0].cpu().contiguous() for i, text in enumerate(texts)}
    save_file(states, scratch / "states.safetensors")
    clock("reading")
    return scratch / "states.safetensors"


def _stored(path: Path, head):
    def states(i: int, text: Text) -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(str(i)).to(head.weight.device)

    return states, head


def _compare_all(texts, reference, model, batch: int, clock: _Clock, progress) -> list[dict[str, np.ndarray]]:
    (full_states, full_head), head, rows = reference, model.get_output_embeddings(), []
    for i in range(0, len(texts), batch):
        some = texts[i : i + batch]
        pairs = list(
            zip(
                some, hidden_states(model, some), [full_states(i + k, text) for k, text in enumerate(some)], strict=True
            )
        )
        clock("reading")
        rows += [compare_text(text, before, full_head, states, head) for text, states, before in pairs]
        clock("comparing")
        if progress and (i + batch) % 12 < batch:
            progress(f"{min(i + batch, len(texts))} of {len(texts)} dialogues compared")
    return rows
