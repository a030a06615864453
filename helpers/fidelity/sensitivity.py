"""Does the error of the weights foretell the loss? One block at a time, and one format at a time.

    found = sensitivity.measure(model, texts, books)

The full-precision model reads the beginnings of a few stories with one block's linear layers quantized (NF4, FP4), then with all layers in
each format. The loss is the mean KL(full || quantized) of the next token, and ln of the perplexity ratio; KL is the steadier of the
two on few tokens. A CPU reads fewer (BUDGET), and the result says how many it was. float32 suffices here: it is wrong by 1e-6 nats.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from scipy import stats

from helpers import StudyError
from helpers.fidelity import codebooks
from helpers.fidelity import compare as fidelity
from helpers.fidelity import formats as weights
from helpers.fidelity.compare import Text
from helpers.fidelity.noise import relative_squared_error, swapped
from helpers.setup.layers import linear_layers

BUDGET = {"cpu": {"texts": 4, "tokens": 128}, "cuda": {"texts": 20, "tokens": 256}}
FORMATS = ("int8", "lloyd_max", "gaussian_lloyd_max", "nf4", "uniform", "fp4")


def measure(model, texts: list[Text], books: dict[str, list[float]], progress=None) -> dict:
    """Quantize one block's linear layers at a time, and the whole model in one format at a time; what follows for the predictions?

    books: format -> 16 levels, of our own codebooks (helpers.weights.analyse's). For int8 only the weights are quantized here, as for the
    others: LLM.int8() quantizes activations as well.

    Returns texts, tokens (scored; the beginnings of the first texts), seconds, and
        layers      rows of depth, format (nf4, fp4), relative_squared_error (of the block's weights), ln_ratio (of perplexity), kl (nats)
        formats     rows of format and the same
        spearman    between relative_squared_error and kl or ln_ratio, over layers_nf4, layers_fp4 and formats ->
                    kl, ln_ratio (rho), kl_p, ln_ratio_p (none below 10), n
        fp4_loses_more   in how many blocks FP4, whose error is larger, has the larger KL: count, n, p (sign test)
    """
    start, budget = time.perf_counter(), BUDGET[model.device.type]
    some = [Text(t.id, t.ids[: budget["tokens"]], t.turn[: budget["tokens"]]) for t in texts[: budget["texts"]]]
    blocks, layers = _blocks(model), linear_layers(model)
    entering, reference = _reference(model, blocks, some)
    rows = []
    for depth in range(len(blocks)):
        mine = {name: m for name, m in layers.items() if weights.kind_and_depth(name)[1] == depth}
        for kind in ("nf4", "fp4"):
            new = {name: weights.round_trips(m.weight, kind)[0] for name, m in mine.items()}
            error = relative_squared_error(model, new)
            with swapped(model, new), _starting_at(blocks, depth, entering):
                rows.append(
                    {"depth": depth, "format": kind, "relative_squared_error": error} | _loss(model, some, reference)
                )
        if progress and depth % 10 == 9:
            progress(f"{depth + 1} of {len(blocks)} blocks quantized one at a time")
    del entering
    formats = [_format_row(model, kind, books.get(kind), some, reference) for kind in FORMATS]
    by_format = {kind: [row for row in rows if row["format"] == kind] for kind in ("nf4", "fp4")}
    return {
        "texts": len(some),
        "tokens": sum(len(fidelity.scored(t)) for t in some),
        "layers": rows,
        "formats": formats,
        "spearman": {f"layers_{kind}": spearman(mine) for kind, mine in by_format.items()}
        | {"formats": spearman(formats)},
        "fp4_loses_more": sign_test(
            [b["kl"] - a["kl"] for a, b in zip(by_format["nf4"], by_format["fp4"], strict=True)]
        ),
        "seconds": time.perf_counter() - start,
    }


def spearman(rows: list[dict]) -> dict:
    """Spearman's rank correlations of relative_squared_error with kl and ln_ratio over rows; none where one of them does not vary."""
    found = {"n": len(rows)}
    error = [row["relative_squared_error"] for row in rows]
    for key in ("kl", "ln_ratio"):
        values = [row[key] for row in rows]
        varies = len(set(error)) > 1 and len(set(values)) > 1
        rho, p = stats.spearmanr(error, values) if varies else (None, None)
        found |= {
            key: None if rho is None else float(rho),
            f"{key}_p": float(p) if varies and len(rows) >= 10 else None,
        }
    return found


def sign_test(differences: list[float]) -> dict:
    """How many are positive, of those that are not 0, and the two-sided p of an exact sign test (none without any)."""
    count, n = sum(d > 0 for d in differences), sum(d != 0 for d in differences)
    return {"count": count, "n": n, "p": float(stats.binomtest(count, n).pvalue) if n else None}


def _blocks(model) -> torch.nn.ModuleList:
    blocks = getattr(model.base_model, "layers", None)
    if not isinstance(blocks, torch.nn.ModuleList):
        raise StudyError(
            f"{type(model).__name__} has no list of blocks in base_model.layers, which the sensitivity of layers needs"
        )
    return blocks


@torch.inference_mode()
def _reference(model, blocks, texts: list[Text]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What enters every block, and the log-probabilities (scored, vocabulary) of each text, float32."""
    entering, hooks = (
        [],
        [block.register_forward_pre_hook(lambda _, given: entering.append(given[0])) for block in blocks],
    )
    try:
        states = fidelity.hidden_states(model, texts)
    finally:
        for hook in hooks:
            hook.remove()
    return entering, [_log_probabilities(model, text, s) for text, s in zip(texts, states, strict=True)]


def _log_probabilities(model, text: Text, states: torch.Tensor) -> torch.Tensor:
    before = torch.from_numpy(fidelity.scored(text) - 1).to(states.device)
    return model.get_output_embeddings()(states[before]).log_softmax(-1, dtype=torch.float32)


@contextmanager
def _starting_at(blocks, depth: int, entering: list[torch.Tensor]) -> Iterator[None]:
    """Inside, the blocks before `depth` do nothing and it gets what it gets in full precision. They have not changed, so this is exact."""
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
    for text, states, p in zip(texts, fidelity.hidden_states(model, texts), reference, strict=True):
        q = _log_probabilities(model, text, states)
        targets = text.ids[torch.from_numpy(fidelity.scored(text))].to(p.device)[:, None]
        change += (p.gather(-1, targets) - q.gather(-1, targets)).sum(dtype=torch.float64).item()
        kl += p.exp().mul_(q.neg_().add_(p)).sum(dtype=torch.float64).item()
        count += len(p)
    return {"ln_ratio": change / count, "kl": kl / count}


def _format_row(model, kind: str, levels: list[float] | None, texts, reference) -> dict:
    new = {}
    for name, module in linear_layers(model).items():
        weight = module.weight.detach()
        if kind == "int8":
            new[name] = weights.round_trip_int8(weight)
        elif kind in ("nf4", "fp4"):
            new[name] = weights.round_trips(weight, kind)[0]
        else:
            new[name] = codebooks.round_to(weight, torch.tensor(levels), weights.BLOCK_SIZE)
    error = relative_squared_error(model, new)
    with swapped(model, new):
        return {"format": kind, "relative_squared_error": error} | _loss(model, texts, reference)
