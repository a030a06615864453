"""`hf-dialogue`: lm-eval's Hugging Face model, but contexts that continue one another are prefilled once.

In a conversation turn t's prompt is the beginning of turn t+1's. Stock lm-eval runs each from its start, in batches
that go on until the last row stops. Here the longest prompt is run once; every turn becomes a row that sees it up to
its own length (helpers.evaluate.slots); rows that are done leave, and other dialogues' rows take their place. Requests
that share nothing run too, each as a group of one.

    from helpers.evaluate.hf_dialogue import HFDialogue
    model = HFDialogue(pretrained=model, tokenizer=tokenizer, answer_line=True)
    lm_eval.simple_evaluate(model=model, tasks=["coqa_turns"], task_manager=TaskManager(include_path="helpers/tasks"))
    model.report()          # questions, groups, seconds by phase, peak rows, fallbacks with their reasons

or, with lm-eval's own command line (its `--use_cache` keys answers by the model's arguments alone: another model under
the same arguments gets the first one's answers),

    python -m helpers.evaluate.hf_dialogue run --model hf-dialogue --model_args pretrained=MODEL \\
        --tasks coqa_turns --include_path helpers/tasks

Greedy generation only. Truncation, stop sequences and what is cut off the text are lm-eval's
(lm_eval/models/huggingface.py, `generate_until`); anything else (sampling, beams, an unfamiliar attention) is handed
to it, and the reason is counted and said once.
"""

import logging
import os
import time
from collections import Counter
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from tqdm import tqdm

from helpers import StudyError
from helpers.evaluate import limits as limits_of
from helpers.evaluate.limits import (
    CHEAP_TOKENS,
    CPU_CONTEXTS,
    CPU_GUESSED_TOKENS,
    CUDA_GUESSED_TOKENS,
    GUESSES,
    MAX_TURNS,
    Limits,
)
from helpers.evaluate.requests import Endings, Group, Request, group_by_prefix, guess
from helpers.evaluate.slots import PackedSlots, Row, Slots, unsupported
from helpers.evaluate.static_slots import OutOfColumns, StaticSlots
from helpers.setup.methods import quantization_arguments

GREEDY = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
# Keys of a model's generation_config that don't change what greedy generation yields.
HARMLESS = {"bos_token_id", "pad_token_id", "eos_token_id", "do_sample", "temperature", "top_p", "top_k", "max_length"}
HARMLESS |= {"use_cache", "output_attentions", "output_hidden_states", "transformers_version", "cache_implementation"}
HARMLESS |= {"_from_model_config"}
logger = logging.getLogger(__name__)


@register_model("hf-dialogue")
class HFDialogue(HFLM):
    """HFLM whose greedy `generate_until` shares prefixes.

    answer_line: a row stops when its first line with text ends; CoQA's metric reads no further, other tasks may, so it
    is off unless asked for. static: decode over fixed buffers (default: on CUDA). cuda_graph: as CUDA graphs.
    max_slots, max_rows, prefill_tokens: upper limits; found from free memory where not given. contexts: how many of
    the longest context fit into packed slots at a time (default: batch_size, for about stock's memory; CPU_CONTEXTS if
    that is "auto"). Everything else is HFLM's.

    After a run: `seconds` by phase, `counts`, `fallbacks` (reason -> requests), `limits` (of the last round),
    `generated` (token ids of the last call's answers, in its order; None where HFLM answered).
    """

    def __init__(
        self,
        *args,
        answer_line=False,
        static=None,
        cuda_graph=True,
        max_slots=None,
        max_rows=None,
        prefill_tokens=None,
        contexts=None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        settings = getattr(self.model, "generation_config", None)
        if getattr(settings, "max_new_tokens", None):
            logger.warning(
                "the model's own max_new_tokens (%s) is cleared: a task says its length", settings.max_new_tokens
            )
            settings.max_new_tokens = None
        self.answer_line = answer_line
        self.static = static
        self.cuda_graph = cuda_graph
        self.contexts = int(contexts or (self.batch_size if isinstance(self.batch_size, int) else CPU_CONTEXTS))
        self.wanted = {"slots": max_slots, "rows": max_rows, "prefill_tokens": prefill_tokens}
        self.endings = Endings(self.tokenizer, self.think_end_token)
        self.reset_report()

    def _create_model(self, *args, **kwargs) -> None:
        super()._create_model(*args, **quantization_arguments(kwargs))

    # ---- report

    def reset_report(self) -> None:
        self.seconds = dict.fromkeys(("tokenization", "prefill", "decode", "stopping", "stock", "total"), 0.0)
        self.counts = Counter()
        self.fallbacks = Counter()
        self.limits: Limits | None = None
        self.generated: list[list[int] | None] = []

    def report(self) -> dict:
        """seconds: by phase (s; what the host does for the next step while a GPU is at a prefill counts as prefill);
        counts: requests, groups, alone, misaligned, truncated, prefill_tokens, context_tokens (what stock prefills),
        decode_steps, decode_tokens, guessed, guessed_right, peak_rows, graphs, out_of_memory; fallbacks: reason ->
        requests, or -> 1 for a step that could not be captured; limits: slots, rows, prefill_tokens, columns of the
        last round."""
        limits = vars(self.limits) if self.limits else None
        return {
            "seconds": dict(self.seconds),
            "counts": dict(self.counts),
            "fallbacks": dict(self.fallbacks),
            "limits": limits,
        }

    @contextmanager
    def _timed(self, phase: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[phase] += time.perf_counter() - start

    # ---- lm-eval's interface

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The answers to lm-eval's requests (context, generation arguments), in their order. An error leaves
        finished answers in lm-eval's cache (`use_cache`) and nothing behind in the model."""
        self.generated = [None] * len(requests)
        answers: list[str | None] = [None] * len(requests)
        with self._timed("total"):
            reasons = self._reasons(requests)
            mine = [n for n, reason in enumerate(reasons) if reason is None]
            stock = [n for n, reason in enumerate(reasons) if reason is not None]
            with tqdm(
                total=len(mine), disable=disable_tqdm or self.rank != 0, desc="Running generate_until requests"
            ) as bar:
                self._answer(self._prepare(requests, mine), answers, bar)
            if stock:
                self.fallbacks.update(reasons[n] for n in stock)
                for reason, count in Counter(reasons[n] for n in stock).items():
                    logger.warning("%d of %d requests go to lm-eval's own model: %s", count, len(requests), reason)
                with self._timed("stock"):
                    found = super().generate_until([requests[n] for n in stock], disable_tqdm=disable_tqdm)
                for n, answer in zip(stock, found, strict=True):
                    answers[n] = answer
        return answers

    def _reasons(self, requests) -> list[str | None]:
        """For each request, why HFLM must answer it, or None."""
        reason = unsupported(self.model) if self.backend == "causal" else f"backend {self.backend}"
        if reason is None and self.mixed_precision_dtype is not None:
            reason = "mixed_precision_dtype"
        if reason is None:
            given = (
                self.model.generation_config.to_diff_dict() if getattr(self.model, "generation_config", None) else {}
            )
            odd = sorted(set(given) - HARMLESS)
            reason = f"the model's generation_config sets {', '.join(odd)}" if odd else None
        if reason is not None:
            return [reason] * len(requests)
        reasons = []
        for request in requests:
            kwargs = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            odd = sorted(key for key in set(kwargs) - GREEDY if (key, kwargs[key]) != ("num_beams", 1))
            if kwargs["do_sample"] or kwargs.get("temperature", 0.0):
                reasons.append("sampling")
            elif odd:
                reasons.append(f"generation argument {', '.join(odd)}")
            elif not request.args[0]:
                reasons.append("empty context")
            else:
                reasons.append(None)
        return reasons

    # ---- requests

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        """As HFLM.tok_batch_encode, without padding."""
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        bos = getattr(self.tokenizer, "bos_token", None)
        starts = [has_bos_prefix(text, bos) for text in texts]
        tokens: list[list[int]] = [[]] * len(texts)
        for flag, options in ((False, special), (True, {"add_special_tokens": False})):
            mine = [n for n, start in enumerate(starts) if start == flag]
            if mine:
                encoded = self.tokenizer(
                    [texts[n] for n in mine], truncation=bool(self.truncation), return_attention_mask=False, **options
                )
                for n, ids in zip(mine, encoded["input_ids"], strict=True):
                    tokens[n] = ids
        return tokens

    def _prepare(self, requests, mine: list[int]) -> list[Request]:
        with self._timed("tokenization"):
            eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
            prepared = []
            for n, tokens in zip(mine, self._tokens([requests[n].args[0] for n in mine]), strict=True):
                context, gen_kwargs = requests[n].args
                kwargs = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
                until = handle_stop_sequences(kwargs["until"], eos=eos)
                room = self.max_length - kwargs["max_gen_toks"]
                if room <= 0:
                    wanted = f"max_gen_toks is {kwargs['max_gen_toks']}"
                    raise StudyError(f"{wanted}, and the model reads no more than {self.max_length} tokens: lower it")
                self.counts["truncated"] += len(tokens) > room
                line = self.answer_line and self.endings.line_is_safe(until)
                prepared.append(Request(n, context, gen_kwargs, tokens[-room:], kwargs["max_gen_toks"], until, line))
            self.counts["requests"] += len(prepared)
            self.counts["context_tokens"] += sum(len(r.tokens) for r in prepared)
            return prepared

    # ---- rounds

    def _answer(self, requests: list[Request], answers: list, bar) -> None:
        """Answer all requests; out of memory, begin a round anew with half the limits and what is not yet answered."""
        limits = None
        while left := [r for r in requests if not r.done]:
            with self._timed("tokenization"):
                groups, misaligned = group_by_prefix(left)
            if limits is None:
                self.counts["groups"] += len(groups)
                self.counts["alone"] += sum(len(g.requests) == 1 for g in groups)
                self.counts["misaligned"] += misaligned
                limits = limits_of.find(self, groups)
            self.limits = limits
            try:
                self._round(groups, limits, answers, bar)
            except (RuntimeError, MemoryError) as error:
                smaller = limits.halved()
                if smaller is None or not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                    raise
                self.counts["out_of_memory"] += 1
                limits = smaller
            # Outside the handler: the exception's traceback would keep the round's buffers alive.
            if limits is not self.limits and self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _round(self, groups: list[Group], limits: Limits, answers: list, bar) -> None:
        turns = min(limits.rows, max(len(g.requests) for g in groups), MAX_TURNS)
        queue = [Group(g.requests[n : n + turns]) for g in groups for n in range(0, len(g.requests), turns)]
        queue.sort(key=lambda g: g.length)  # the longest at the end: memory runs out at once or not at all
        slots = self._slots(groups, min(limits.slots, len(queue)), turns)
        eos = self._eos()
        active: dict[int, list[tuple[Row, Request]]] = {}
        for group in queue:
            for request in group.requests:
                request.made.clear()
        try:
            while queue or active:
                self._refill(slots, queue, active, limits, eos, answers, bar)
                if active:
                    self._decode(slots, active, queue, eos, answers, bar)
        finally:
            self.counts["graphs"] += slots.captures
            for reason in slots.fallbacks:
                self.fallbacks[reason] = 1

    def _slots(self, groups: list[Group], count: int, turns: int) -> Slots:
        if self._packed():
            return PackedSlots(self.model, count)
        captured = self.cuda_graph and self.device.type == "cuda"
        return StaticSlots(self.model, count, turns, limits_of.columns(groups, turns), captured=captured)

    def _packed(self) -> bool:
        return not (self.device.type == "cuda" if self.static is None else self.static)

    def _eos(self) -> set[int]:
        """What `generate` itself stops at."""
        found = self.model.generation_config.eos_token_id if getattr(self.model, "generation_config", None) else None
        return set(found) if isinstance(found, (list, tuple)) else {found} - {None}

    def _refill(self, slots: Slots, queue, active, limits: Limits, eos, answers, bar) -> None:
        """Prefill groups into free slots, a quarter of the slots at a time."""
        free = [n for n in range(slots.first, slots.count) if n not in active]
        rows, held = sum(len(pairs) for pairs in active.values()), sum(slots.used[n] for n in active)
        if not queue or (active and (len(free) < -(-(slots.count - slots.first) // 4) or rows >= limits.rows)):
            return
        slots.forget(free)
        while queue and free:
            batch = []
            while queue and free[len(batch) :]:
                group = queue[-1]
                # One context is run whatever its length: there is no other way.
                tokens = sum(g.length for g in batch) + group.length
                too_long = batch and tokens > limits.prefill_tokens
                too_many = rows + len(group.requests) > limits.rows
                if self._packed():
                    too_many = too_many or held + group.length + limits_of.running(self.model, tokens) > limits.columns
                if too_long or ((batch or active) and too_many):
                    break
                batch.append(queue.pop())
                rows += len(group.requests)
                held += group.length
            if not batch:
                return
            contexts = [(g.requests[0].tokens, [len(r.tokens) for r in g.requests]) for g in batch]
            with self._timed("prefill"):
                found = slots.prefill(contexts, free[: len(batch)])
            self.counts["prefill_tokens"] += sum(g.length for g in batch)
            fresh, free = free[: len(batch)], free[len(batch) :]
            for slot, group, new in zip(fresh, batch, found, strict=True):
                active[slot] = list(zip(new, group.requests, strict=True))
            self.counts["peak_rows"] = max(self.counts["peak_rows"], rows)
            self._retire(active, fresh, [[row.token] for new in found for row in new], eos, answers, bar)

    def _decode(self, slots: Slots, active, queue, eos, answers, bar) -> None:
        pairs = [pair for slot in sorted(active) for pair in active[slot]]
        rows = [row for row, _ in pairs]
        with self._timed("decode"):
            drafts = self._drafts([request for _, request in pairs])
            try:
                found = slots.step(rows, drafts)
            except OutOfColumns:
                # Slots that nothing will use again are given up.
                keep = range(slots.first, slots.count) if queue else sorted(active)
                places = slots.repack(list(keep), slots.columns + max(MAX_TURNS, slots.columns // 2), rows)
                moved = {places[slot]: mine for slot, mine in active.items()}
                active.clear()
                active.update(moved)
                found = slots.step(rows, drafts)
        self.counts["decode_steps"] += 1
        self.counts["decode_tokens"] += sum(map(len, found))
        self._retire(active, sorted(active), found, eos, answers, bar)

    def _drafts(self, requests: list[Request]) -> list[list[int]]:
        """Guesses for every row, as many as the step takes; after a wrong one, a row starts again with a single
        guess."""
        share = min(
            GUESSES, (CUDA_GUESSED_TOKENS if self.device.type == "cuda" else CPU_GUESSED_TOKENS) // len(requests) - 1
        )
        cheap = CHEAP_TOKENS // len(requests) - 1
        shortest = 1 if cheap > 1 else 2
        counts = [min(share, max(cheap, 1 + 2 * r.right), r.max_gen_toks - len(r.made) - 1) for r in requests]
        drafts = [guess(request, count, shortest) for request, count in zip(requests, counts, strict=True)]
        self.counts["guessed"] += sum(map(len, drafts))
        return drafts

    def _retire(self, active, slots: list[int], found: list[list[int]], eos, answers, bar) -> None:
        """Give the rows of these slots their newest tokens; rows that are done leave, and slots without rows are
        free."""
        start = time.perf_counter()
        tokens = iter(found)
        for slot in slots:
            kept = []
            for row, request in active[slot]:
                new = next(tokens)
                request.right = len(new) - 1
                self.counts["guessed_right"] += request.right
                if not any(self.endings.reached(request, token, eos) for token in new):
                    kept.append((row, request))
                    continue
                request.done = True
                answers[request.index] = self.endings.text(request)
                self.generated[request.index] = request.made
                self.cache_hook.add_partial("generate_until", (request.context, request.kwargs), answers[request.index])
                bar.update(1)
            if kept:
                active[slot] = kept
            else:
                del active[slot]
        self.seconds["stopping"] += time.perf_counter() - start


def main() -> None:
    """lm-eval's command line, with hf-dialogue among its models."""
    from lm_eval.__main__ import cli_evaluate

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    cli_evaluate()


if __name__ == "__main__":
    main()
