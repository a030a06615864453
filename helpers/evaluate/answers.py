"""Greedy answers to many requests: groups take turns in the slots; rows that are done leave, others take their
place."""

from collections.abc import Callable
from dataclasses import dataclass, field

from helpers.evaluate import limits as limits_of
from helpers.evaluate.limits import (
    CHEAP_TOKENS,
    CPU_GUESSED_TOKENS,
    CUDA_GUESSED_TOKENS,
    GUESSES,
    MAX_TURNS,
    Limits,
    halving,
)
from helpers.evaluate.prefixes import Group, group_by_prefix
from helpers.evaluate.requests import Request, guess
from helpers.evaluate.slots import PackedSlots, Row, Slots
from helpers.evaluate.static_slots import OutOfColumns, StaticSlots
from helpers.setup.layers import end_tokens


def answer(lm, requests: list[Request], done: Callable[[Request], None]) -> None:
    """Generate all requests' answers; `done` is called with each when it has ended. Out of memory, a round begins anew
    with half the limits and what is not yet answered."""

    def grouped(limits: Limits | None) -> list[Group]:
        rows = min(MAX_TURNS, limits.rows if limits else int(lm.wanted["rows"] or MAX_TURNS))
        with lm.timed("tokenization"):
            return group_by_prefix([r for r in requests if not r.done], rows)

    if not requests:
        return
    groups = grouped(None)
    lm.count(groups)

    def attempt(limits: Limits) -> None:
        lm.limits = limits
        Round(lm, grouped(limits), limits, done).run()

    halving(lm, limits_of.find(lm, groups), attempt)


@dataclass
class Round:
    """One way through the groups with the same slots. active: by slot, the rows being generated and their requests."""

    lm: object
    queue: list[Group]
    limits: Limits
    done: Callable[[Request], None]
    active: dict[int, list[tuple[Row, Request]]] = field(default_factory=dict)

    def run(self) -> None:
        turns = max(len(g.requests) for g in self.queue)
        self.eos = end_tokens(self.lm.model)
        self.slots = self._slots(turns)
        self.queue.reverse()  # the longest at the end: memory runs out at once or not at all
        for group in self.queue:
            for request in group.requests:
                request.made.clear()
        try:
            while self.queue or self.active:
                self._refill()
                if self.active:
                    self._decode()
        finally:
            self.lm.counts["graphs"] += self.slots.captures
            for reason in self.slots.fallbacks:
                self.lm.fallbacks[reason] = 1

    def _slots(self, turns: int) -> Slots:
        lm, count = self.lm, min(self.limits.slots, len(self.queue))
        if lm.packed():
            return PackedSlots(lm.model, count)
        captured = lm.cuda_graph and lm.device.type == "cuda"
        return StaticSlots(lm.model, count, turns, limits_of.columns(self.queue, turns), captured=captured)

    def _refill(self) -> None:
        """Prefill groups into free slots, a quarter of the slots at a time."""
        slots, active, limits = self.slots, self.active, self.limits
        free = [n for n in range(slots.first, slots.count) if n not in active]
        rows, held = sum(len(pairs) for pairs in active.values()), sum(slots.used[n] for n in active)
        if not self.queue or (active and (len(free) < -(-(slots.count - slots.first) // 4) or rows >= limits.rows)):
            return
        slots.forget(free)
        while self.queue and free:
            batch = []
            while self.queue and free[len(batch) :]:
                group = self.queue[-1]
                # One group is run whatever its size: there is no other way.
                tokens = sum(g.weight for g in batch) + group.weight
                too_long = batch and tokens > limits.prefill_tokens
                too_many = rows + len(group.requests) > limits.rows
                if self.lm.packed():
                    running = limits_of.running(self.lm.model, tokens)
                    too_many = too_many or held + group.columns + running > limits.columns
                if too_long or ((batch or active) and too_many):
                    break
                batch.append(self.queue.pop())
                rows += len(group.requests)
                held += group.columns
            if not batch:
                return
            with self.lm.timed("prefill"):
                found = slots.prefill(batch, free[: len(batch)])
            self.lm.counts["prefill_tokens"] += sum(g.columns for g in batch)
            fresh, free = free[: len(batch)], free[len(batch) :]
            for slot, group, new in zip(fresh, batch, found, strict=True):
                active[slot] = list(zip(new, group.requests, strict=True))
            self.lm.counts["peak_rows"] = max(self.lm.counts["peak_rows"], rows)
            self._retire(fresh, [[row.token] for new in found for row in new])

    def _decode(self) -> None:
        slots, active, counts = self.slots, self.active, self.lm.counts
        pairs = [pair for slot in sorted(active) for pair in active[slot]]
        rows = [row for row, _ in pairs]
        with self.lm.timed("decode"):
            drafts = self._drafts([request for _, request in pairs])
            try:
                found = slots.step(rows, drafts)
            except OutOfColumns:
                # Slots that nothing will use again are given up.
                keep = range(slots.first, slots.count) if self.queue else sorted(active)
                places = slots.repack(list(keep), slots.columns + max(MAX_TURNS, slots.columns // 2), rows)
                self.active = active = {places[slot]: mine for slot, mine in active.items()}
                found = slots.step(rows, drafts)
        counts["decode_steps"] += 1
        counts["decode_tokens"] += sum(map(len, found))
        self._retire(sorted(active), found)

    def _drafts(self, requests: list[Request]) -> list[list[int]]:
        """Guesses for every row, as many as the step takes; after a wrong one, a row starts again with a single
        guess."""
        step = CUDA_GUESSED_TOKENS if self.lm.device.type == "cuda" else CPU_GUESSED_TOKENS
        share = min(GUESSES, step // len(requests) - 1)
        cheap = CHEAP_TOKENS // len(requests) - 1
        shortest = 1 if cheap > 1 else 2
        counts = [min(share, max(cheap, 1 + 2 * r.right), r.max_gen_toks - len(r.made) - 1) for r in requests]
        drafts = [guess(request, count, shortest) for request, count in zip(requests, counts, strict=True)]
        self.lm.counts["guessed"] += sum(map(len, drafts))
        return drafts

    def _retire(self, slots: list[int], found: list[list[int]]) -> None:
        """Give the rows of these slots their newest tokens; rows that are done leave, and slots without rows are
        free."""
        tokens = iter(found)
        with self.lm.timed("stopping", wait=False):
            for slot in slots:
                kept = []
                for row, request in self.active[slot]:
                    new = next(tokens)
                    request.right = len(new) - 1
                    self.lm.counts["guessed_right"] += request.right
                    if not any(self.lm.endings.reached(request, token, self.eos) for token in new):
                        kept.append((row, request))
                        continue
                    request.done = True
                    self.done(request)
                if kept:
                    self.active[slot] = kept
                else:
                    del self.active[slot]
