"""How far a quantized model's predictions are from full precision's, token by token on the same text (`texts`).

    found = compare(study, configuration, dialogues)

    kl                  KL(full || quantized) of the next token's distribution, nats
    agreement           share of positions with the same most likely token
    ln_ratio            ln(perplexity quantized / perplexity full), paired

Full precision is the same model without quantization in the configuration's own dtype (INT4's kernel computes in
bfloat16), and `baseline` says which. What it computes, its last hidden states, is kept under .cache for the study's
other configurations: its output layer makes the same logits of them again, in a hundredth of their space.

Full precision's own row is 0 by definition. Its `floor` says what no difference amounts to: the same model read in
batches of another shape, and with every weight moved by no more than its dtype's rounding. On an H100 the first is 0.
"""

import hashlib
import itertools
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from helpers import CACHE, StudyError, ranks, results, statistics
from helpers.fidelity import formats, perturb
from helpers.fidelity.texts import (
    WINDOWS,
    Text,
    check_head,
    chunk_positions,
    encode,
    hidden_states,
    scored,
    token_limit,
    windows,
)
from helpers.params import Configuration, Full, Study
from helpers.setup import methods, models
from helpers.setup.device import free

GROUPS = ("story", "answers")
QUANTILES = {"median": 0.5, "p99": 0.99}
BUCKETS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of full precision's largest probability
SUMS = ("nll_full", "nll", "kl", "agreement")
FLOOR_BATCH = 4
FLOOR_DIALOGUES = {"cpu": 2, "cuda": 100}
SPARE_BYTES = 3 * 2**29  # what comparing needs beside the models
ROWS = {"cpu": 4, "cuda": 2048}  # positions in float64 at once: on a CPU they have to stay in the cache


def compare(study: Study, configuration: Configuration, dialogues: list[dict], progress=None) -> dict:
    """Compare a configuration with full precision on the same tokens. Returns what schema.Fidelity lists.

    Raises StudyError if the texts don't suit the model. What is optional (errors of the weights, floor, text file) and
    cannot be done has a reason in its place.
    """
    start = time.perf_counter()
    full = models.load(study, full_precision(configuration))
    texts, left_out = encode(dialogues, full.tokenizer, token_limit(full.model))
    check_head(full.model, texts[0])
    itself, dtype = configuration.quantization.method == "none", full.info["dtype"]
    file = study.fidelity.text
    parts = results.or_reason(windows, file, full.tokenizer, token_limit(full.model)) if file else []
    some = parts[: WINDOWS[full.info["device"]]] if isinstance(parts, list) else []
    before = reference(study, full, texts, "dialogues")
    before_some = results.or_reason(reference, study, full, some, "text") if some else []
    if isinstance(before_some, dict):
        parts, some = before_some, []
    model, head, own = full.model, full.model.get_output_embeddings(), None
    floor = results.or_reason(noise_floor, model, texts, before, study.seed) if itself else None
    if not itself:
        beside = fits_beside(model)
        del model
        full = full if beside else None
        free()
        model = models.load(study, configuration).model
        own = {"reason": "the two models did not fit side by side"}
        own = results.or_reason(formats.own_error, full.model, model, configuration) if beside else own
        full = None
    same = before if itself else None
    rows = _compare_all(texts, before, head, model, same, progress)
    options = {"confidence": study.statistics.confidence, "resamples": study.statistics.resamples, "seed": study.seed}
    found = summarize(texts, rows, options)
    if some:
        same = before_some if itself else None
        rows = results.or_reason(_compare_all, some, before_some, head, model, same)
        parts = file_summary(some, rows, len(parts), options) if isinstance(rows, list) else rows
    return found | {
        "left_out": left_out,
        "baseline": {"dtype": dtype},
        "weights": None if itself else {"formats": {configuration.configuration: own}},
        "floor": floor,
        "text": parts or None,
        "seconds": time.perf_counter() - start,
    }


def full_precision(configuration: Configuration) -> Configuration:
    """The same configuration without quantization: same dtype, so that only the weights differ."""
    changed = {"configuration": "full", "quantization": Full(method="none")}
    return configuration.model_copy(update=changed | {"dtype": methods.wanted_dtype(configuration) or "auto"})


def fits_beside(model) -> bool:
    """Is there room for a second model of this size and the comparison?"""
    cuda = model.device.type == "cuda"
    room = torch.cuda.mem_get_info(model.device)[0] if cuda else psutil.virtual_memory().available
    return room > model.get_memory_footprint() + SPARE_BYTES


def reference(study: Study, full, texts: list[Text], part: str) -> list[torch.Tensor]:
    """Full precision's hidden states before each text's scored tokens, in order; kept under .cache.

    The file's name holds a checksum over the weights' files, dtype, device, versions and tokens; `part` names what was
    read. A file of other tokens or weights is replaced.
    """
    weights = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(Path(models.prepare(study)).iterdir())]
    device = torch.cuda.get_device_name() if full.info["device"] == "cuda" else "cpu"
    digest = hashlib.sha256(repr([weights, device, torch.__version__, transformers.__version__]).encode())
    for text in texts:
        digest.update(text.ids.numpy().tobytes() + text.turn.tobytes())
    name = f"{study.study}-{full.info['dtype']}-{device.split()[0].lower()}-{part}"
    path = CACHE / "fidelity" / f"{name}-{digest.hexdigest()[:16]}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            return [file.get_tensor(str(i)).to(full.model.device) for i in range(len(texts))]
    except (OSError, SafetensorError):  # not there, or not whole
        states = [hidden_states(full.model, [text])[0] for text in texts]
    try:
        with results.atomically(path) as scratch:
            save_file({str(i): s.cpu().contiguous() for i, s in enumerate(states)}, scratch)
        for old in set(path.parent.glob(f"{name}-*")) - {path}:
            old.unlink(missing_ok=True)
    except (StudyError, SafetensorError):  # a full disk only costs time
        pass
    return states


def position_metrics(full: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
    """From logits (n, vocabulary) and the tokens that follow (n,), per position: kl, nll_full and nll (nats), agreement
    (0 or 1), confidence (largest probability in full precision).
    In float64: in float32 a sum over a vocabulary is wrong by 1e-7, which is above the noise floor."""
    parts = []
    for p, q, at in zip(*(x.split(ROWS[full.device.type]) for x in (full, other, targets[:, None])), strict=True):
        p, q = p.double(), q.double()
        (top, best), (other_top, other_best) = p.max(-1, keepdim=True), q.max(-1, keepdim=True)
        odds = (p - top).exp_()
        size = odds.sum(-1)
        log_full = size.log() + top[:, 0]
        log_other = (q - other_top).exp_().sum(-1).log() + other_top[:, 0]
        nll_full, nll = log_full - p.gather(-1, at)[:, 0], log_other - q.gather(-1, at)[:, 0]
        kl = (odds.mul_(p.sub_(q)).sum(-1) / size - log_full + log_other).clamp_min_(0)
        parts.append(torch.stack([kl, nll_full, nll, (best == other_best)[:, 0].double(), 1 / size]).cpu())
    names = ("kl", "nll_full", "nll", "agreement", "confidence")
    return dict(zip(names, torch.cat(parts, dim=1).numpy(), strict=True))


@torch.inference_mode()
def compare_text(text: Text, full_states, full_head, states, head) -> dict[str, np.ndarray]:
    """`position_metrics` of a text's scored tokens, from hidden states (scored, width) and both output layers."""
    step, parts = chunk_positions(full_head.weight.shape[0]), []
    targets = text.ids[torch.from_numpy(scored(text))].to(full_states.device)
    for i in range(0, len(targets), step):
        logits = full_head(full_states[i : i + step])
        other = logits if states is full_states else head(states[i : i + step]).to(logits.device)
        parts.append(position_metrics(logits, other, targets[i : i + step]))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _compare_all(texts, before, full_head, model, states, progress=None) -> list[dict[str, np.ndarray]]:
    """`states`: the model's own, where they are known already."""
    head, rows = model.get_output_embeddings(), []
    for i, text in enumerate(texts):
        mine = states[i] if states else hidden_states(model, [text])[0]
        rows.append(compare_text(text, before[i], full_head, mine, head))
        if progress and (i + 1) % 10 == 0:
            progress(f"{i + 1} of {len(texts)} dialogues compared")
    return rows


def noise_floor(model, texts: list[Text], before: list[torch.Tensor], seed: int) -> list[dict]:
    """What no difference amounts to: schema.Floor of padded batches, and of `perturb.rounding`."""
    texts, head = texts[: FLOOR_DIALOGUES[model.device.type]], model.get_output_embeddings()

    def row(kind: str, detail: str, size: int) -> dict:
        batches = [texts[i : i + size] for i in range(0, len(texts), size)]
        states = [s for batch in batches for s in hidden_states(model, batch)]
        rows = [compare_text(t, b, head, s, head) for t, b, s in zip(texts, before, states)]
        kl, agreement, ln = (
            np.concatenate(x) for x in zip(*((r["kl"], r["agreement"], r["nll"] - r["nll_full"]) for r in rows))
        )
        shape = {f"kl_{name}": float(np.quantile(kl, q)) for name, q in QUANTILES.items()}
        means = {"kl": float(kl.mean()), "agreement": float(agreement.mean()), "ln_ratio": float(ln.mean())}
        found = {"kind": kind, "detail": detail, "dialogues": len(texts), "tokens": int(kl.size)}
        return found | means | shape | {"kl_max": float(kl.max())}

    rows = [row("batch shape", f"padded batches of {FLOOR_BATCH} instead of one dialogue at a time", FLOOR_BATCH)]
    new, detail = perturb.rounding(model, seed)
    with perturb.swapped(model, new):
        return [*rows, row("weight rounding", detail, 1)]


def summarize(texts: list[Text], rows: list[dict[str, np.ndarray]], options: dict) -> dict:
    """Each text's `position_metrics` summed up: tokens to per_question of schema.Fidelity. Intervals resample
    dialogues."""
    turns = [text.turn[scored(text)] for text in texts]
    groups = {"story": lambda turn: turn == 0, "answers": lambda turn: turn > 0, "all": lambda turn: turn >= 0}
    sums = {name: [_sums(row, of(turn)) for row, turn in zip(rows, turns, strict=True)] for name, of in groups.items()}
    names = [f"{text.data_set}/{text.id}" for text in texts]
    owner, turn = np.repeat(np.arange(len(texts)), [len(t) for t in turns]), np.concatenate(turns)
    value = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    by_group = {g: kl_summary(value["kl"][groups[g](turn)], owner[groups[g](turn)], options) for g in GROUPS}
    kl = kl_summary(value["kl"], owner, options)
    return {
        "tokens": int(owner.size),
        "dialogues": len(texts),
        "perplexity": {group: _perplexity(names, found, options) for group, found in sums.items()},
        "kl": kl | {"by_group": by_group, "by_confidence": by_confidence(value)},
        "agreement": float(value["agreement"].mean()),
        "per_dialogue": [
            {"id": text.id, "data_set": text.data_set} | {group: sums[group][i] for group in GROUPS}
            for i, text in enumerate(texts)
        ],
        "per_question": [
            {
                "id": text.id,
                "data_set": text.data_set,
                "turn": int(number),
                "tokens": int((turn == number).sum()),
                "kl": float(row["kl"][turn == number].mean()),
            }
            for text, turn, row in zip(texts, turns, rows, strict=True)
            for number in np.unique(turn[turn > 0])
        ],
    }


def file_summary(texts: list[Text], rows: list[dict[str, np.ndarray]], of: int, options: dict) -> dict:
    """schema.FilePerplexity of a text file's windows, which the interval resamples; `of`: how many the file has."""
    found = _perplexity([text.id for text in texts], [_sums(row, ...) for row in rows], options)
    sizes = {"file": texts[0].data_set, "window": len(texts[0].ids), "windows": len(texts), "windows_in_file": of}
    return sizes | found | {"kl": float(np.concatenate([row["kl"] for row in rows]).mean())}


def _sums(row: dict[str, np.ndarray], mask) -> dict:
    return {"count": int(row["kl"][mask].size)} | {name: float(row[name][mask].sum()) for name in SUMS}


def _perplexity(names: list[str], sums: list[dict], options: dict) -> dict:
    named = {"full": "ppl_a", "quantized": "ppl_b", "ratio": "ppl_ratio", "ln_ratio": "difference"}
    named |= {key: key for key in ("ci_low", "ci_high", "p", "reason")}
    counted = [(name, s) for name, s in zip(names, sums, strict=True) if s["count"]]
    if not counted:
        return {"tokens": 0} | dict.fromkeys(named) | {"reason": "no token to predict"}
    tokens, nll_full, nll = (np.array([s[key] for _, s in counted]) for key in ("count", "nll_full", "nll"))
    row = statistics.log_ppl_ratio(nll_full, nll, tokens, np.array([name for name, _ in counted]), **options)
    return {"tokens": int(tokens.sum())} | {ours: row[theirs] for ours, theirs in named.items()}


def kl_summary(kl: np.ndarray, owner: np.ndarray, options: dict) -> dict:
    """schema.Divergence of KL (n,); owner (n,): each one's dialogue. A bootstrap says nothing of the maximum."""
    if not kl.size:
        return dict.fromkeys(("mean", *QUANTILES, "max", "intervals"))
    rows = dict(zip(QUANTILES, ranks.quantiles(kl, owner, list(QUANTILES.values()), **options), strict=True))
    found = {"mean": float(kl.mean()), "max": float(kl.max())} | {name: r["quantile"] for name, r in rows.items()}
    rows["mean"] = statistics.interval(kl, owner, **options)
    return found | {"intervals": {name: _limits(row) for name, row in rows.items()}}


def by_confidence(value: dict[str, np.ndarray]) -> list[dict]:
    """Rows of low, high (full precision's largest probability), count, kl (mean, nats), agreement: where full precision
    is undecided, KL is large whatever the format (ExLlamaV3's qbench splits it so)."""
    bucket = np.digitize(value["confidence"], BUCKETS[1:-1])
    rows = []
    for k, (low, high) in enumerate(itertools.pairwise(BUCKETS)):
        mine = bucket == k
        means = {key: float(value[key][mine].mean()) if mine.any() else None for key in ("kl", "agreement")}
        rows.append({"low": low, "high": high, "count": int(mine.sum())} | means)
    return rows


def _limits(row: dict) -> dict:
    return {name: row[name] for name in ("ci_low", "ci_high", "reason")}
