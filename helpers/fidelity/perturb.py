"""Full precision with other weights swapped in: what follows for its predictions?

    floor        each weight moved by its dtype's rounding: what no difference amounts to
    noise        random errors of NF4's size: the paper says that quantization noise regularizes; if so, they help
    sensitivity  every layer in one format, and one block of layers at a time: does the error foretell the loss?

NF4's error is larger where a block of 64 weights is. So noise is matched to it in one of four ways:

    block      Gaussian, in each block of 64 as large as NF4's error there
    layer      Gaussian, in each layer as large as NF4's error there, spread evenly over its blocks
    signs      NF4's own errors with random signs
    permuted   NF4's own errors in another order within each block

A CPU reads fewer texts (DIALOGUES, NOISE_TOKENS, BUDGET) and answers no questions; the results say so.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy import stats

from helpers import StudyError, statistics
from helpers.fidelity import codebooks, formats
from helpers.fidelity.texts import Text, hidden_states, nll_sums, perplexity, scored
from helpers.setup.layers import linear_layers

DIALOGUES = {"cpu": 10, "cuda": 100}  # for noise: at least 10, below which there is no interval
NOISE_TOKENS = {"cpu": 128, "cuda": None}  # of each; None: all
BUDGET = {"cpu": (2, 128), "cuda": (20, 256)}  # texts, and tokens of each, for sensitivity
SIZES_ON_CPU = (64, 1024)  # of the sweep of block sizes, with perplexity
NOT_SCORED = "it needs a GPU: the questions are answered again for every row"
FORMATS = ("int8", "lloyd_max", "gaussian_lloyd_max", "nf4", "uniform", "asymmetric", "fp4")


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


def _noise(kind: str, error: torch.Tensor, generator) -> torch.Tensor:
    """Noise of the size of `error` (blocks, 64)."""
    if kind == "signs":
        return error * (torch.randint(0, 2, error.shape, generator=generator).to(error) * 2 - 1)
    if kind == "permuted":
        return error.gather(1, torch.rand(error.shape, generator=generator).to(error.device).argsort(1))
    noise = torch.randn(error.shape, generator=generator).to(error.device)
    over = {"dim": 1, "keepdim": True} if kind == "block" else {}
    return noise * error.norm(**over) / noise.norm(**over)


NOISE = ("block", "layer", "signs", "permuted")


def noisy(model, quantized: dict[str, torch.Tensor], kind: str, seed: int) -> dict[str, torch.Tensor]:
    """Weights plus noise of the size of quantized ones' error. Drawn on the CPU: a seed means the same everywhere."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, other in quantized.items():
        weight = model.get_submodule(name).weight.detach()
        error = (other.float() - weight.float()).reshape(-1)
        blocks = torch.nn.functional.pad(error, (0, -error.numel() % formats.BLOCK_SIZE)).view(-1, formats.BLOCK_SIZE)
        noise = _noise(kind, blocks, generator).reshape(-1)[: error.numel()]
        found[name] = (weight.float() + noise.view(weight.shape)).to(weight.dtype)
    return found


def noise(
    model, texts: list[Text], seeds: list[int], options: dict, score: Callable | None = None, progress=None
) -> dict:
    """Perplexity, and on a GPU F1, of full precision, of NF4's weights, and of full precision with noise:
    schema.Noise. Matched by block with every seed, in the other ways with the first, and perplexity alone.

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
        error, scoring = relative_squared_error(model, new), score and kind in ("nf4", "block")
        with swapped(model, new):
            nll, f1 = nll_sums(model, texts), score(model) if scoring else None
        found = {"kind": kind, "seed": seed, "relative_squared_error": error, "ppl": perplexity(nll)}
        (before, counts), (after, _) = (np.array(side).T for side in (base, nll))
        ratio = _difference(statistics.log_ppl_ratio(before, after, counts.astype(int), names, **options))
        found |= {"log_ppl_ratio": ratio, "f1": _f1(base_f1, f1, options) if scoring else None}
        if progress:
            progress(f"{kind}: perplexity {found['ppl']:.3f}, full precision {perplexity(base):.3f}")
        return found

    rows = [row("nf4", None, quantized)]
    for kind in NOISE:
        rows += [row(kind, s, noisy(model, quantized, kind, s)) for s in (seeds if kind == "block" else seeds[:1])]
    return {
        "dialogues": len(texts),
        "tokens": sum(n for _, n in base),
        "full": {"ppl": perplexity(base), "f1": None if base_f1 is None else float(np.mean(base_f1[0]))},
        "nf4": rows[0],
        "seeds": rows[1:],
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


# ---- sensitivity ----


def sensitivity(model, texts: list[Text], books: dict[str, list[float]], progress=None) -> dict:
    """Quantize one block's linear layers at a time, and the whole model in one format at a time: schema.Sensitivity.

    The loss is the mean KL(full || quantized) of the next token, and ln of the perplexity ratio, over the beginnings of
    the first texts; float32 suffices (wrong by 1e-5 nats). books: format -> 16 levels of our own codebooks
    (`formats.analyse`). int8 quantizes the weights alone; LLM.int8() quantizes activations as well. Raises StudyError
    if the model has no list of blocks.
    """
    start, some = time.perf_counter(), beginnings(texts, *BUDGET[model.device.type])
    blocks, layers = _blocks(model), linear_layers(model)
    entering, reference = _reference(model, blocks, some)
    rows, by_format = [], []
    for kind in FORMATS:
        new = {name: _quantized(m.weight.detach(), kind, books.get(kind)) for name, m in layers.items()}
        by_format.append({"format": kind} | _swapped_loss(model, new, some, reference))
        for depth in range(len(blocks)) if kind in ("nf4", "fp4") else ():
            mine = {name: weight for name, weight in new.items() if formats.kind_and_depth(name)[1] == depth}
            with _starting_at(blocks, depth, entering):
                rows.append({"depth": depth, "format": kind} | _swapped_loss(model, mine, some, reference))
        if progress:
            progress(f"{kind}: KL {by_format[-1]['kl']:.3g} nats")
    a, b = ([row for row in rows if row["format"] == kind] for kind in ("nf4", "fp4"))
    return {
        "texts": len(some),
        "tokens": sum(len(scored(t)) for t in some),
        "layers": rows,
        "formats": by_format,
        "spearman": {"layers_nf4": spearman(a), "layers_fp4": spearman(b), "formats": spearman(by_format)},
        "fp4_loses_more": sign_test([y["kl"] - x["kl"] for x, y in zip(a, b, strict=True)]),
        "seconds": time.perf_counter() - start,
    }


def block_sizes(model, texts: list[Text], rows: list[dict], progress=None) -> dict:
    """Fills in ppl and ln_ratio of NF4's and FP4's rows of `formats.analyse`'s block_sizes, the whole model's weights
    replaced. A CPU does SIZES_ON_CPU on the beginnings of few texts. Returns schema's BlockSizeTexts."""
    cpu = model.device.type == "cpu"
    some = beginnings(texts, *BUDGET["cpu"]) if cpu else texts[: DIALOGUES["cuda"]]
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


def spearman(rows: list[dict]) -> dict:
    """schema.Correlation over rows."""
    found = {"n": len(rows)}
    error = [row["relative_squared_error"] for row in rows]
    for key in ("kl", "ln_ratio"):
        values = [row[key] for row in rows]
        varies = len(set(error)) > 1 and len(set(values)) > 1
        found[key] = float(stats.spearmanr(error, values).statistic) if varies else None
    return found


def sign_test(differences: list[float]) -> dict:
    """How many are positive, of those that are not 0, and the two-sided p of an exact sign test (None without any)."""
    count, n = sum(d > 0 for d in differences), sum(d != 0 for d in differences)
    return {"count": count, "n": n, "p": float(stats.binomtest(count, n).pvalue) if n else None}


def _blocks(model) -> torch.nn.ModuleList:
    blocks = getattr(model.base_model, "layers", None)
    if not isinstance(blocks, torch.nn.ModuleList) or not linear_layers(model):
        raise StudyError(f"{type(model).__name__} has no list of blocks of linear layers in base_model.layers")
    return blocks


@torch.inference_mode()
def _reference(model, blocks, texts: list[Text]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What enters every block, and the log-probabilities (scored, vocabulary) of each text, float32."""
    entering = []
    hooks = [block.register_forward_pre_hook(lambda _, given: entering.append(given[0])) for block in blocks]
    try:
        states = hidden_states(model, texts)
    finally:
        for hook in hooks:
            hook.remove()
    return entering, [_log_probabilities(model, s) for s in states]


def _log_probabilities(model, states: torch.Tensor) -> torch.Tensor:
    return model.get_output_embeddings()(states).log_softmax(-1, dtype=torch.float32)


@contextmanager
def _starting_at(blocks, depth: int, entering: list[torch.Tensor]) -> Iterator[None]:
    """Inside, the blocks before `depth`, which have not changed, do nothing, and it gets what full precision gives."""
    skipped = list(blocks[:depth])
    before = [block.__dict__.get("forward") for block in skipped]
    for block in skipped:
        block.forward = lambda *_, **__: entering[depth]
    try:
        yield
    finally:
        for block, forward in zip(skipped, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


@torch.inference_mode()
def _loss(model, texts: list[Text], reference: list[torch.Tensor]) -> dict:
    """ln(perplexity / full precision's) and mean KL(full || this), from the full-precision log-probabilities."""
    kl = change = count = 0
    for text, states, p in zip(texts, hidden_states(model, texts), reference, strict=True):
        q = _log_probabilities(model, states)
        targets = text.ids[torch.from_numpy(scored(text))].to(p.device)[:, None]
        change += (p.gather(-1, targets) - q.gather(-1, targets)).sum(dtype=torch.float64).item()
        kl += p.exp().mul_(q.neg_().add_(p)).sum(dtype=torch.float64).item()
        count += len(p)
    return {"ln_ratio": change / count, "kl": kl / count}


def _swapped_loss(model, new: dict[str, torch.Tensor], texts: list[Text], reference: list[torch.Tensor]) -> dict:
    error = relative_squared_error(model, new)
    with swapped(model, new):
        return {"relative_squared_error": error} | _loss(model, texts, reference)


def _quantized(weight: torch.Tensor, kind: str, levels: list[float] | None) -> torch.Tensor:
    if kind == "int8":
        return formats.round_trip_int8(weight)
    if kind == "asymmetric":
        return formats.round_trip_asymmetric(weight)
    if kind in ("nf4", "fp4"):
        return formats.round_trip(weight, kind)
    return codebooks.round_to(weight, torch.tensor(levels), formats.BLOCK_SIZE)
