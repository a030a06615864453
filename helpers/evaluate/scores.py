"""Log-likelihoods of given continuations, as lm-eval's HFLM has them (`_loglikelihood_tokens`), over shared prefixes.

A request is a path through its group; its continuation's tokens are read off the logits at the path's last columns.
Nothing is generated, so groups need no slots: a pass is over when its logits are read. One difference: where two
requests split the same text into context and continuation at different places, HFLM with its `logits_cache` (the
default) reads the shorter continuation off the longer one's first columns; here each has its own."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from helpers.evaluate import limits as limits_of
from helpers.evaluate.prefixes import Group, ends, group_by_prefix
from helpers.evaluate.slots import HEAD_ROWS, Slots


@dataclass
class Scored:
    """`tokens`: of context and continuation but the last; `targets`: the continuation's. answer: the sum of their
    log-probabilities, and whether each is the likeliest."""

    index: int
    tokens: list[int]
    targets: list[int]
    answer: tuple[float, bool] | None = None


def score(lm, requests: list[Scored], done: Callable[[Scored], None]) -> None:
    """Score all requests; `done` is called with each. Out of memory, what is left is run in passes of half the size."""
    lm.count(group_by_prefix(requests, len(requests), least=1, most=limits_of.scored_tokens(lm)))
    slots = Slots(lm.model, 0)

    def attempt(tokens: int) -> None:
        left = [request for request in requests if request.answer is None]
        # The longest first: memory runs out at once or not at all.
        queue = group_by_prefix(left, len(left) if tokens > 1 else 1, least=1, most=tokens)[::-1]
        while queue:
            batch = [queue.pop()]
            while queue and sum(g.weight for g in batch) + queue[-1].weight <= tokens:
                batch.append(queue.pop())
            with lm.timed("prefill"):
                found = scores(slots, batch, lm.softmax_dtype)
            lm.counts["prefill_tokens"] += sum(g.columns for g in batch)
            for request, answer in zip((r for g in batch for r in g.requests), found, strict=True):
                request.answer = answer
                done(request)

    limits_of.halving(lm, limits_of.scored_tokens(lm), attempt)


@torch.inference_mode()
def scores(slots: Slots, groups: list[Group], dtype=None) -> list[tuple[float, bool]]:
    """The answers to groups' requests, in order. dtype: of the softmax, as HFLM's softmax_dtype."""
    at, targets, sizes, start = [], [], [], 0
    for group in groups:
        for request, path in zip(group.requests, group.paths, strict=True):
            sizes.append(len(request.targets))
            targets += request.targets
            at += [start + column for column in ends(path, sizes[-1])]
        start += group.columns
    # Choices that differ in their last token are read off the same logits, which are computed once.
    columns, which = torch.tensor(at, device=slots.device).unique(return_inverse=True)
    hidden, targets = slots.run(groups)[columns], torch.tensor(targets, device=slots.device)
    found, likeliest = None, torch.empty_like(targets, dtype=torch.bool)
    for first in range(0, len(columns), HEAD_ROWS):
        logits = F.log_softmax(slots.logits(hidden[first : first + HEAD_ROWS]), dim=-1, dtype=dtype)
        mine = ((which >= first) & (which < first + HEAD_ROWS)).nonzero()[:, 0]
        rows, wanted = which[mine] - first, targets[mine]
        found = logits.new_empty(len(targets)) if found is None else found
        found[mine] = logits[rows, wanted]
        likeliest[mine] = logits.argmax(-1)[rows] == wanted
    parts = zip(found.cpu().split(sizes), likeliest.cpu().split(sizes), strict=True)
    return [(float(part.sum()), bool(right.all())) for part, right in parts]
