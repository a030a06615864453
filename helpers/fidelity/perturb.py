"""Full precision with other weights swapped in: what follows for its predictions?

    floor  each weight moved by its dtype's rounding: what no difference amounts to
    noise  random errors of NF4's size: the paper says that quantization noise regularizes; if so, they help

NF4's error is larger where a block of 64 weights is, so the noise is Gaussian and in each block as large as the error
there.

A CPU reads fewer texts (DIALOGUES, NOISE_TOKENS, BUDGET) and answers no questions; the results say so.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from helpers import StudyError, statistics
from helpers.fidelity import formats
from helpers.fidelity.texts import Text, nll_sums, perplexity
from helpers.setup.layers import linear_layers

DIALOGUES = {"cpu": 10, "cuda": 100}  # for noise: at least 10, below which there is no interval
NOISE_TOKENS = {"cpu": 128, "cuda": None}  # of each; None: all
BUDGET = 2, 128  # texts, and tokens of each, that a CPU reads for the sweep of block sizes
SIZES_ON_CPU = (64, 1024)  # of the sweep of block sizes, with perplexity
NOT_SCORED = "it needs a GPU: the questions are answered again for every row"


@contextmanager
def swapped(model, new: dict[str, torch.Tensor]) -> Iterator[None]:
    """Inside, the layers named in `new` have those weights (in their own dtype); afterwards the old ones are back."""
    layers = {name: model.get_submodule(name) for name in new}
    old = {name: layer.weight.data for name, layer in layers.items()}
    try:
        for name, weight in new.items():
            layers[name].weight.data = weight.to(old[name]).view_as(old[name])
        yield
    finally:
        for name, weight in old.items():
            layers[name].weight.data = weight


def relative_squared_error(model, new: dict[str, torch.Tensor]) -> float:
    """Of replacement weights, over all layers named in `new`."""
    old = {name: model.get_submodule(name).weight.detach() for name in new}
    error = sum(formats.squared_error(old[name], weight) for name, weight in new.items())
    return error / sum(map(formats.squared_size, old.values()))


def rounding(model, seed: int) -> tuple[dict[str, torch.Tensor], str]:
    """Every linear layer's weight plus uniform noise of no more than its dtype's rounding (half of finfo.eps, relative:
    2^-11 for float16, 2^-8 for bfloat16, 2^-24 for float32), which moves about three weights of ten to a neighbouring
    number; and that in words. Less would round back to the weight itself."""
    generator, new, output = torch.Generator().manual_seed(seed), {}, model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is output or not (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"):
            continue
        weight = module.weight.detach()
        noise = torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight.device) * 2 - 1
        new[name] = (weight.double() * (1 + noise * torch.finfo(weight.dtype).eps / 2)).to(weight.dtype)
    if not new:
        raise StudyError(f"{type(model).__name__} has no linear layers besides its output layer")
    dtype = next(iter(new.values())).dtype
    power = round(np.log2(torch.finfo(dtype).eps / 2))
    name = str(dtype).removeprefix("torch.")
    return new, f"uniform noise of at most 2^{power} ({name}'s rounding) in every linear layer's weights, seed {seed}"


# ---- noise ----


def nf4(model) -> dict[str, torch.Tensor]:
    """Every linear layer's weight after NF4 with double quantization, blocks of 64."""
    return {name: formats.round_trip(m.weight, "nf4", double=True) for name, m in linear_layers(model).items()}


def noisy(model, quantized: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Weights plus Gaussian noise, in each block of 64 as large as quantized ones' error. Drawn on the CPU: a seed
    means the same everywhere."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, other in quantized.items():
        weight = model.get_submodule(name).weight.detach()
        error = (other.float() - weight.float()).reshape(-1)
        blocks = torch.nn.functional.pad(error, (0, -error.numel() % formats.BLOCK_SIZE)).view(-1, formats.BLOCK_SIZE)
        noise = torch.randn(blocks.shape, generator=generator).to(error.device)
        noise = noise * blocks.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
        found[name] = (weight.float() + noise.reshape(-1)[: error.numel()].view(weight.shape)).to(weight.dtype)
    return found


def noise(
    model, texts: list[Text], seeds: list[int], options: dict, score: Callable | None = None, progress=None
) -> dict:
    """Perplexity, and on a GPU F1, of full precision, of NF4's weights, and of full precision with noise:
    schema.Noise.

    options: confidence, resamples, seed of the intervals, which are paired by dialogue. score(model) -> (values,
    dialogue ids), one F1 and id per question, always the same questions in the same order; StudyError if they are not.
    """
    start, device = time.perf_counter(), model.device.type
    texts = beginnings(texts, DIALOGUES[device], NOISE_TOKENS[device])
    base, base_f1 = nll_sums(model, texts), score(model) if score else None
    quantized = nf4(model)
    if not quantized:
        raise StudyError(f"{type(model).__name__} has no linear layers besides its output layer")

    names = np.array([f"{t.data_set}/{t.id}" for t in texts])

    def row(kind: str, seed: int | None, new: dict[str, torch.Tensor]) -> dict:
        error = relative_squared_error(model, new)
        with swapped(model, new):
            nll, f1 = nll_sums(model, texts), score(model) if score else None
        found = {"kind": kind, "seed": seed, "relative_squared_error": error, "ppl": perplexity(nll)}
        (before, counts), (after, _) = (np.array(side).T for side in (base, nll))
        ratio = _difference(statistics.log_ppl_ratio(before, after, counts.astype(int), names, **options))
        found |= {"log_ppl_ratio": ratio, "f1": _f1(base_f1, f1, options) if score else None}
        if progress:
            progress(f"{kind}: perplexity {found['ppl']:.3f}, full precision {perplexity(base):.3f}")
        return found

    return {
        "dialogues": len(texts),
        "tokens": sum(n for _, n in base),
        "full": {"ppl": perplexity(base), "f1": None if base_f1 is None else float(np.mean(base_f1[0]))},
        "nf4": row("nf4", None, quantized),
        "seeds": [row("block", seed, noisy(model, quantized, seed)) for seed in seeds],
        "f1_reason": None if score else NOT_SCORED,
        "seconds": time.perf_counter() - start,
    }


def _difference(row: dict) -> dict:
    return {key: row[key] for key in ("difference", "ci_low", "ci_high", "p", "reason")}


def _f1(base, other, options: dict) -> dict:
    if list(base[1]) != list(other[1]):
        raise StudyError(
            "score: the perturbed model was asked other questions than full precision; score the same ones every time"
        )
    return _difference(statistics.paired(base[0], other[0], np.array(base[1]), **options))


# ---- block sizes ----


def block_sizes(model, texts: list[Text], rows: list[dict], progress=None) -> dict:
    """Fills in ppl and ln_ratio of NF4's and FP4's rows of `formats.analyse`'s block_sizes, the whole model's weights
    replaced. A CPU does SIZES_ON_CPU on the beginnings of few texts. Returns schema's BlockSizeTexts."""
    cpu = model.device.type == "cpu"
    some = beginnings(texts, *BUDGET) if cpu else texts[: DIALOGUES["cuda"]]
    base = nll_sums(model, some)
    tokens = sum(n for _, n in base)
    for row in rows:
        kind, size = row["format"], row["block_size"]
        if kind not in ("nf4", "fp4") or (cpu and size not in SIZES_ON_CPU):
            continue
        new = {name: formats.round_trip(m.weight, kind, size) for name, m in linear_layers(model).items()}
        with swapped(model, new):
            nll = nll_sums(model, some)
        row |= {"ppl": perplexity(nll), "ln_ratio": sum(a[0] - b[0] for a, b in zip(nll, base, strict=True)) / tokens}
        if progress:
            progress(f"{kind} in blocks of {size}: perplexity {row['ppl']:.3f}, full precision {perplexity(base):.3f}")
    reason = f"a CPU reads {' and '.join(map(str, SIZES_ON_CPU))} only" if cpu else None
    return {"texts": len(some), "tokens": tokens, "ppl_full": perplexity(base), "reason": reason}


def beginnings(texts: list[Text], count: int, tokens: int | None) -> list[Text]:
    """The first tokens of the first texts."""
    return [t._replace(ids=t.ids[:tokens], turn=t.turn[:tokens]) for t in texts[:count]]
