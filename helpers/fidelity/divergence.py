"""The difference between two models' predictions: per position, and what is reported of it.

`position_metrics` compares two sets of logits; `summarize` turns all positions of all texts into results, with intervals that resample
dialogues (helpers.statistics). Differences of distributions are computed in float64: in float32 the sum over a vocabulary has
an error of 1e-7, above the noise floor. The percentiles of KL are those of llama.cpp's llama-perplexity --kl-divergence.
"""

import math

import numpy as np
import torch

from helpers import statistics
from helpers.params import Study

GROUPS = ("story", "answers")
KL_PERCENTILES = {"median": 50, "p95": 95, "p99": 99, "p999": 99.9}
CHANGE_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
SUMS = ("nll_full", "nll", "kl", "agreement", "change", "change_squared")


def position_metrics(full: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
    """From logits (n, vocabulary) and the tokens that follow (n,), per position: kl, nll_full and nll (nats), agreement (0 or 1), and
    change (of the following token's probability)."""
    p, q = (logits.log_softmax(-1, dtype=torch.float64) for logits in (full, other))
    at = targets[:, None]
    nll_full, nll = -p.gather(-1, at)[:, 0], -q.gather(-1, at)[:, 0]
    kl = p.exp().mul_(q.neg_().add_(p)).sum(-1)
    found = {
        "kl": kl,
        "nll_full": nll_full,
        "nll": nll,
        "agreement": (full.argmax(-1) == other.argmax(-1)).double(),
        "change": (-nll).exp() - (-nll_full).exp(),
    }
    return {name: values.cpu().numpy() for name, values in found.items()}


def _sums(row: dict[str, np.ndarray], mask: np.ndarray) -> dict:
    values = row | {"change_squared": row["change"] ** 2}
    return {"count": int(mask.sum())} | {name: float(values[name][mask].sum()) for name in SUMS}


def summarize(ids: list[str], turns: list[np.ndarray], rows: list[dict[str, np.ndarray]], study: Study) -> dict:
    """Results from each text's `position_metrics`, given its dialogue's id and the turn of each position (0: story).

    Returns
        tokens, dialogues
        perplexity      story, answers, all -> tokens, full, quantized, ratio, ln_ratio, ci_low, ci_high, p (of ln_ratio), reason
        kl              mean, median, p95, p99, p999, max over all positions; by_group (the same for story, answers); intervals (key ->
                        ci_low, ci_high, reason)
        agreement       share; agreement_interval
        correct_token   mean, rms, p1 ... p99 of the change; intervals
        per_dialogue    rows of id, and of story and answers: count (tokens) and sums of nll_full, nll, kl, agreement, change,
                        change_squared
        per_question    rows of id, turn (from 1), tokens, kl, nll_full, nll (means over the gold answer's tokens)
    """
    masks = [{"story": turn == 0, "answers": turn > 0, "all": turn >= 0} for turn in turns]
    dialogues = [
        {"id": name} | {group: _sums(row, mask[group]) for group in GROUPS}
        for name, row, mask in zip(ids, rows, masks, strict=True)
    ]
    whole = [_sums(row, mask["all"]) for row, mask in zip(rows, masks, strict=True)]
    options = {"confidence": study.statistics.confidence, "resamples": study.statistics.resamples, "seed": study.seed}
    by_group = {group: [d[group] for d in dialogues] for group in GROUPS} | {"all": whole}
    values = {name: np.concatenate([row[name] for row in rows]) for name in ("kl", "change")}
    owner = np.repeat(np.arange(len(ids)), [len(turn) for turn in turns])
    turn = np.concatenate(turns)
    by_turn = {"story": kl_summary(values["kl"][turn == 0]), "answers": kl_summary(values["kl"][turn > 0])}
    kl_intervals = {"mean": _mean_interval(whole, "kl", options)} | percentile_intervals(
        values["kl"], owner, KL_PERCENTILES, options
    )
    return {
        "tokens": int(owner.size),
        "dialogues": len(ids),
        "perplexity": {group: _perplexity(ids, found, options) for group, found in by_group.items()},
        "kl": kl_summary(values["kl"]) | {"by_group": by_turn, "intervals": kl_intervals},
        "agreement": sum(s["agreement"] for s in whole) / owner.size,
        "agreement_interval": _mean_interval(whole, "agreement", options),
        "correct_token": _change_summary(values["change"], whole, owner, options),
        "per_dialogue": dialogues,
        "per_question": _per_question(ids, turns, rows),
    }


def _perplexity(ids: list[str], sums: list[dict], options: dict) -> dict:
    found = [(name, s) for name, s in zip(ids, sums, strict=True) if s["count"]]
    if not found:
        return {"tokens": 0, "reason": "no token to predict"}
    tokens = np.array([s["count"] for _, s in found])
    nll_full, nll = (np.array([s[key] for _, s in found]) for key in ("nll_full", "nll"))
    row = statistics.log_ppl_ratio(nll_full, nll, tokens, np.array([name for name, _ in found]), **options)
    named = {"full": "ppl_a", "quantized": "ppl_b", "ratio": "ppl_ratio", "ln_ratio": "difference"}
    return {"tokens": int(tokens.sum())} | {ours: row[theirs] for ours, theirs in named.items()} | {
        key: row[key] for key in ("ci_low", "ci_high", "p", "reason")
    }  # fmt: skip


def kl_summary(kl: np.ndarray) -> dict:
    """mean, median, p95, p99, p999 and max (nats) of KL divergences (n,); empty without any."""
    if not kl.size:
        return {}
    quantiles = {name: float(np.percentile(kl, percent)) for name, percent in KL_PERCENTILES.items()}
    return {"mean": float(kl.mean())} | quantiles | {"max": float(kl.max())}


def _mean_interval(sums: list[dict], key: str, options: dict) -> dict:
    counts = np.array([s["count"] for s in sums])
    row = statistics.interval(
        np.array([s[key] for s in sums]) / counts, np.arange(len(sums)), weights=counts, **options
    )
    return {name: row[name] for name in ("ci_low", "ci_high", "reason")}


def _change_summary(change: np.ndarray, whole: list[dict], owner: np.ndarray, options: dict) -> dict:
    named = {f"p{percent}": percent for percent in CHANGE_PERCENTILES}
    square = _mean_interval(whole, "change_squared", options)
    # the bootstrap's limits go through a monotone function as they are
    rms = {key: None if square[key] is None else math.sqrt(max(0.0, square[key])) for key in ("ci_low", "ci_high")}
    return (
        {"mean": float(change.mean()), "rms": float(np.sqrt((change**2).mean()))}
        | {name: float(np.percentile(change, percent)) for name, percent in named.items()}
        | {"intervals": {"mean": _mean_interval(whole, "change", options), "rms": rms | {"reason": square["reason"]}}
           | percentile_intervals(change, owner, named, options)}
    )  # fmt: skip


def percentile_intervals(
    values: np.ndarray, owner: np.ndarray, percentiles: dict, options: dict, resamples: int = 1000
) -> dict:
    """Percentile intervals of percentiles over positions (n,), resampling dialogues: name -> ci_low, ci_high, reason.

    owner (n,): each position's dialogue, 0 .. G-1. In a resample a percentile is the smallest value whose cumulated weight reaches its
    share. None for a maximum: the bootstrap can't say anything about it.
    """
    groups = int(owner.max()) + 1
    if groups < statistics.MIN_DIALOGUES:
        reason = f"no interval: {groups} dialogues are fewer than {statistics.MIN_DIALOGUES}"
        return {name: {"ci_low": None, "ci_high": None, "reason": reason} for name in percentiles}
    order = np.argsort(values, kind="stable")
    ordered, owners = values[order], owner[order]
    counts = statistics.resample_counts(groups, resamples, options["seed"])
    drawn = np.empty((resamples, len(percentiles)))
    for r in range(resamples):
        cumulated = np.cumsum(counts[r][owners])
        drawn[r] = ordered[np.searchsorted(cumulated, np.array(list(percentiles.values())) / 100 * cumulated[-1])]
    tail = (1 - options["confidence"]) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return {
        name: {"ci_low": float(low[k]), "ci_high": float(high[k]), "reason": None} for k, name in enumerate(percentiles)
    }


def _per_question(ids, turns, rows) -> list[dict]:
    found = []
    for name, turn, row in zip(ids, turns, rows, strict=True):
        for number in np.unique(turn[turn > 0]):
            mask = turn == number
            means = {key: float(row[key][mask].mean()) for key in ("kl", "nll_full", "nll")}
            found.append({"id": name, "turn": int(number), "tokens": int(mask.sum())} | means)
    return found
