"""Does noise of NF4's size help? The paper says that quantization noise regularizes.

    found = noise.measure(model, texts, seeds=[0, 1, 2], score=noise.f1_scorer(study, loaded))

Every linear layer gets Gaussian noise whose squared size, over that of the weights, is exactly the relative squared error that NF4 with
double quantization has in that layer. What distinguishes it from NF4's own error is only that it does not depend on the weights.

The full-precision model's weights are swapped for others in the same dtype and put back. The texts are `helpers.fidelity.encode`'s; a CPU
reads fewer of them (DIALOGUES), and the result says how many it was.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from helpers import StudyError, params, statistics
from helpers.fidelity import compare as fidelity
from helpers.fidelity import formats as weights
from helpers.fidelity.compare import Text
from helpers.params import Study
from helpers.setup.layers import linear_layers
from helpers.setup.models import Loaded

ANSWER_TOKENS = 32  # a perturbed model may talk on; a line longer than this is no answer in CoQA
DIALOGUES = {"cpu": 10, "cuda": 100}  # at least 10, below which statistics gives no interval


@contextmanager
def swapped(model, new: dict[str, torch.Tensor]) -> Iterator[None]:
    """Inside, the linear layers named in `new` have those weights (in the dtype of their own). Afterwards the old ones are back."""
    layers = linear_layers(model)
    old = {name: layers[name].weight.data for name in new}
    try:
        for name, weight in new.items():
            layers[name].weight.data = weight.to(old[name]).view_as(old[name])
        yield
    finally:
        for name, weight in old.items():
            layers[name].weight.data = weight


def relative_squared_error(model, new: dict[str, torch.Tensor]) -> float:
    """Of replacement weights, over all layers named in `new`."""
    layers = linear_layers(model)
    error = sum(weights.squared_error(layers[name].weight, weight) for name, weight in new.items())
    return error / sum(weights.squared_size(layers[name].weight) for name in new)


def nf4(model) -> dict[str, torch.Tensor]:
    """Every linear layer's weight after NF4 with double quantization, blocks of 64."""
    return {name: weights.round_trips(m.weight, "nf4")[1] for name, m in linear_layers(model).items()}


def gaussian(model, errors: dict[str, float], seed: int) -> dict[str, torch.Tensor]:
    """Weights plus Gaussian noise, scaled to the relative squared error that `errors` names for each layer. Drawn on the CPU, so that a
    seed means the same everywhere."""
    generator, found, layers = torch.Generator().manual_seed(seed), {}, linear_layers(model)
    for name, error in errors.items():
        weight = layers[name].weight.detach().float()
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        scale = (error * weights.squared_size(weight) / weights.squared_size(noise)) ** 0.5
        found[name] = (weight + noise * scale).to(layers[name].weight.dtype)
    return found


def measure(
    model,
    texts: list[Text],
    seeds: list[int],
    score: Callable | None = None,
    seed: int = 1234,
    progress=None,
) -> dict:
    """Perplexity, and F1 where it can be scored, of full precision, of NF4's weights and of full precision plus noise of NF4's size.

    score(model) -> (values, dialogue ids), one F1 and id per question, always the same questions in the same order. Intervals are paired by
    dialogue; `seed` is the bootstrap's.

    Returns dialogues, tokens (scored), relative_squared_error (NF4's, over all layers), seconds, and
        full    ppl; f1 (mean; none without `score`)
        nf4     relative_squared_error, ppl, log_ppl_ratio and f1 (rows of difference, ci_low, ci_high, p, reason; f1 none without `score`)
        seeds   rows of seed and the same keys
    """
    start = time.perf_counter()
    texts = texts[: DIALOGUES[model.device.type]]
    base, base_f1 = fidelity.nll_sums(model, texts), score(model) if score else None

    def row(new: dict[str, torch.Tensor]) -> dict:
        error = relative_squared_error(model, new)
        with swapped(model, new):
            nll, f1 = fidelity.nll_sums(model, texts), score(model) if score else None
        return (
            {"relative_squared_error": error} | _compared(base, nll, texts, seed) | {"f1": _f1_row(base_f1, f1, seed)}
        )

    new = nf4(model)
    layers = linear_layers(model)
    errors = {
        name: weights.squared_error(layers[name].weight, w) / weights.squared_size(layers[name].weight)
        for name, w in new.items()
    }
    quantized = row(new)
    del new
    rows = []
    for number in seeds:
        rows.append({"seed": number} | row(gaussian(model, errors, number)))
        if progress:
            progress(f"noise, seed {number}: perplexity {rows[-1]['ppl']:.3f}, full precision {_ppl(base):.3f}")
    return {
        "dialogues": len(texts),
        "tokens": sum(n for _, n in base),
        "relative_squared_error": quantized["relative_squared_error"],
        "full": {"ppl": _ppl(base), "f1": None if base_f1 is None else float(np.mean(base_f1[0]))},
        "nf4": quantized,
        "seeds": rows,
        "seconds": time.perf_counter() - start,
    }


def f1_scorer(study: Study, loaded: Loaded) -> Callable:
    """A `score` for `measure`: F1 of every turn of as many dialogues, by helpers.evaluation, answers cut at ANSWER_TOKENS."""
    from helpers.evaluate import run as evaluation

    count = min(study.data.dialogues or DIALOGUES[loaded.info["device"]], DIALOGUES[loaded.info["device"]])
    data = study.data.model_copy(update={"dialogues": count})
    smaller = study.model_copy(
        update={
            "data": data,
            "evaluation": study.evaluation.model_copy(update={"tasks": [], "max_gen_toks": ANSWER_TOKENS}),
        }
    )

    def score(model) -> tuple[list[float], list[str]]:
        rows = evaluation.evaluate(smaller, loaded._replace(model=model))["samples"][evaluation.DIALOGUES]
        return [row["f1"] for row in rows], [str(row["doc"]["id"]) for row in rows]

    return score


def _ppl(sums: list[tuple[float, int]]) -> float:
    return float(np.exp(sum(s for s, _ in sums) / sum(n for _, n in sums)))


def _options(seed: int) -> dict:
    standard = params.Statistics()
    return {"confidence": standard.confidence, "resamples": standard.resamples, "seed": seed}


def _compared(base, nll, texts: list[Text], seed: int) -> dict:
    tokens = np.array([n for _, n in base])
    sides = (np.array([s for s, _ in side]) for side in (base, nll))
    return {
        "ppl": _ppl(nll),
        "log_ppl_ratio": statistics.log_ppl_ratio(*sides, tokens, np.array([t.id for t in texts]), **_options(seed)),
    }


def _f1_row(base, other, seed: int) -> dict | None:
    if base is None:
        return None
    if list(base[1]) != list(other[1]):
        raise StudyError(
            "score: the perturbed model was asked other questions than full precision; score the same ones every time"
        )
    return statistics.paired(base[0], other[0], np.array(base[1]), **_options(seed))
