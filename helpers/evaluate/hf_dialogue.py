"""`hf-dialogue`: lm-eval's Hugging Face model, but tokens that several requests begin with are run once.

In a conversation turn t's prompt is the beginning of turn t+1's; few-shot questions share their header, chats their
system prompt, choices their question. Stock lm-eval runs each from its start, in batches that go on until the last row
stops. Here requests that begin alike are a tree (helpers.evaluate.prefixes) that is run once. Log-likelihoods are read
off it (helpers.evaluate.scores). For answers, every request becomes a row that sees its own path
(helpers.evaluate.slots); rows that are done leave, and other groups' rows take their place (helpers.evaluate.answers).
Requests that share nothing run too, each as a group of one.

    from helpers.evaluate.hf_dialogue import HFDialogue
    model = HFDialogue(pretrained=model, tokenizer=tokenizer, answer_line=True)
    lm_eval.simple_evaluate(model=model, tasks=["coqa_turns"], task_manager=TaskManager(include_path="helpers/tasks"))
    model.report()          # questions, groups, seconds by phase, peak rows, fallbacks with their reasons

or, with lm-eval's own command line (its `--use_cache` keys answers by the model's arguments alone: another model under
the same arguments gets the first one's answers),

    python -m helpers.evaluate.hf_dialogue run --model hf-dialogue --model_args pretrained=MODEL \\
        --tasks coqa_turns --include_path helpers/tasks

Greedy generation only. Truncation, stop sequences and what is cut off the text are lm-eval's
(lm_eval/models/huggingface.py); anything else (sampling, beams, an unfamiliar attention) is handed to it, and the
reason is counted and said once.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from tqdm import tqdm

from helpers import StudyError
from helpers.evaluate.answers import answer
from helpers.evaluate.architectures import longest, unsupported
from helpers.evaluate.limits import CPU_CONTEXTS, Limits, halving, tokens_at_a_time
from helpers.evaluate.prefixes import Group
from helpers.evaluate.processes import dealt
from helpers.evaluate.requests import Endings, Request
from helpers.evaluate.scores import Scored, score
from helpers.setup.methods import quantization_arguments

GREEDY = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
# Keys of a model's generation_config that don't change what greedy generation yields.
HARMLESS = {"bos_token_id", "pad_token_id", "eos_token_id", "do_sample", "temperature", "top_p", "top_k", "max_length"}
HARMLESS |= {"use_cache", "output_attentions", "output_hidden_states", "transformers_version", "cache_implementation"}
HARMLESS |= {"_from_model_config"}
FALLBACK_BATCH = 8  # HFLM's, unless it was given more; its default of 1 leaves a machine idle
ENCODED = 1024  # texts that the tokenizer is given at a time: what it returns takes ten times the tokens' memory
logger = logging.getLogger(__name__)


@register_model("hf-dialogue")
class HFDialogue(HFLM):
    """HFLM whose greedy `generate_until`, `loglikelihood` and `loglikelihood_rolling` share prefixes.

    answer_line: a row stops when its first line with text ends; CoQA's metric reads no further, other tasks may, so it
    is off unless asked for. static: decode over fixed buffers (default: on CUDA). cuda_graph: as CUDA graphs.
    max_slots, max_rows, prefill_tokens: upper limits; found from free memory where not given. contexts: how many of
    the longest context fit into packed slots at a time (default: batch_size, for about stock's memory; CPU_CONTEXTS if
    that is "auto"). Everything else is HFLM's.

    After a run: `seconds` by phase, `counts`, `fallbacks` (reason -> requests), `limits` (of the last round),
    `generated` (token ids of the last call's answers, in its order; None where HFLM answered). Under `accelerate
    launch` all of it is of what this process ran (helpers.evaluate.processes).
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
        if accelerator := getattr(self, "accelerator", None):
            # HFLM looks at one machine's GPUs and processes: on CPUs every process would answer everything.
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
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
        self.encoded: dict[str, list[int]] = {}
        self._last_settings: tuple[dict, dict] | None = None
        self.given_batch = self.batch_size
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
        counts: requests, groups, alone, truncated (HFLM's included), prefill_tokens, context_tokens (what stock
        prefills), decode_steps, decode_tokens, guessed, guessed_right, peak_rows, graphs, out_of_memory; fallbacks:
        reason -> requests, or -> 1 for a step that could not be captured; limits: slots, rows, prefill_tokens, columns
        of the last round."""
        limits = vars(self.limits) if self.limits else None
        return {
            "seconds": dict(self.seconds),
            "counts": dict(self.counts),
            "fallbacks": dict(self.fallbacks),
            "limits": limits,
        }

    @contextmanager
    def timed(self, phase: str, wait: bool = True):
        """Seconds of a phase; a GPU's work is waited for, unless there is none."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if wait and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[phase] += time.perf_counter() - start

    def count(self, groups: list[Group]) -> None:
        self.counts["groups"] += len(groups)
        self.counts["alone"] += sum(len(g.requests) == 1 for g in groups)
        self.counts["requests"] += sum(len(g.requests) for g in groups)
        self.counts["context_tokens"] += sum(len(r.tokens) for g in groups for r in g.requests)

    def packed(self) -> bool:
        return not (self.device.type == "cuda" if self.static is None else self.static)

    # ---- lm-eval's interface

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The answers to lm-eval's requests (context, generation arguments), in their order. An error leaves
        finished answers in lm-eval's cache (`use_cache`) and nothing behind in the model."""
        return self._dealt(requests, lambda mine: self._generate(mine, disable_tqdm))

    def _generate(self, requests, disable_tqdm: bool) -> list[str]:
        self.generated = [None] * len(requests)
        answers: list[str | None] = [None] * len(requests)
        with self.timed("total"):
            prepared = self._prepare(requests)
            reasons = self._reasons(prepared)
            mine = [request for request, reason in zip(prepared, reasons, strict=True) if reason is None]
            with self._bar("generate_until", len(mine), disable_tqdm) as bar:

                def done(request: Request) -> None:
                    answers[request.index] = text = self.endings.text(request)
                    self.generated[request.index] = request.made
                    self.cache_hook.add_partial("generate_until", (request.context, request.kwargs), text)
                    bar.update(1)

                answer(self, mine, done)
            if stock := self._tell(reasons):
                left = [requests[n] for n in stock]
                found = self._by_stock(lambda: HFLM.generate_until(self, left, disable_tqdm=disable_tqdm))
                for n, text in zip(stock, found, strict=True):
                    answers[n] = text
        return answers

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As HFLM's: (log-likelihood, whether greedy decoding would say it) of each (context, continuation)."""
        return self._dealt(requests, lambda mine: self._loglikelihood(mine, disable_tqdm))

    def _loglikelihood(self, requests, disable_tqdm: bool) -> list[tuple[float, bool]]:
        texts = [(context.rstrip(), context + continuation) for context, continuation in (r.args for r in requests)]
        with self.timed("total"), self._encoded_ahead([text for pair in texts if pair[0] for text in pair]):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """As HFLM's, with all windows of all texts at once. Texts share nothing: each process keeps its own."""
        with self.timed("total"), self._encoded_ahead([r.args[0] for r in requests]), self._batches_of(2**31):
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _dealt(self, requests, answer: Callable[[list], list]) -> list:
        """Answers by all processes, so that none runs what another does. lm-eval's cache is each process's own, and
        who finds all in it isn't here to be asked: with it each answers for itself."""
        if self.world_size == 1:
            return answer(requests)
        if getattr(self.cache_hook, "dbdict", None) is not None:
            logger.warning("--use_cache: each process answers its own requests, and runs what others run as well")
            return answer(requests)
        return dealt(self, requests, answer)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs=None):
        self.encoded = {}
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        prepared = []
        for n, (_, context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-(self.max_length + 1) :]
            prepared.append(Scored(n, tokens[:-1], continuation))
        self._tell_cut(sum(len(c) + len(t) > self.max_length + 1 for _, c, t in requests), len(requests))
        reasons = self._scored_reasons(prepared)
        mine = [request for request, reason in zip(prepared, reasons, strict=True) if reason is None]
        with self._bar("loglikelihood", len(mine), disable_tqdm) as bar:

            def done(request: Scored) -> None:
                answers[request.index] = request.answer
                if (texts := requests[request.index][0]) is not None:  # None: a window of a rolling request
                    self.cache_hook.add_partial("loglikelihood", texts, request.answer)
                bar.update(1)

            score(self, mine, done)
        if stock := self._tell(reasons):
            left = [requests[n] for n in stock]
            # HFLM holds all logits and their logarithms at a time.
            length = max(1, *(len(prepared[n].tokens) for n in stock))
            most = tokens_at_a_time(self, FALLBACK_BATCH * length, 8 * len(self.tokenizer)) // length
            found = self._by_stock(lambda: HFLM._loglikelihood_tokens(self, left, disable_tqdm=disable_tqdm), most)
            for n, pair in zip(stock, found, strict=True):
                answers[n] = pair
        return answers

    def _by_stock(self, call: Callable[[], list], most: int = FALLBACK_BATCH) -> list:
        """What HFLM answers at the batch size it was given or, if that is more, `most`; with half of it as often as
        memory runs out."""
        found = []

        def attempt(size: int | str) -> None:
            with self._batches_of(size):
                found.extend(call())

        with self.timed("stock"):
            # To find a size, HFLM's processes wait for one another; others may have nothing to answer here.
            size = self.given_batch if self.world_size == 1 or isinstance(self.given_batch, int) else 1
            halving(self, max(size, most), attempt) if isinstance(size, int) else attempt(size)
        return found

    def _bar(self, kind: str, total: int, disabled: bool) -> tqdm:
        return tqdm(total=total, disable=disabled or self.rank != 0, desc=f"Running {kind} requests")

    @contextmanager
    def _batches_of(self, size):
        """HFLM's batch size."""
        before, self.batch_size_per_gpu = self.batch_size_per_gpu, size
        try:
            yield
        finally:
            self.batch_size_per_gpu = before

    # ---- what is handed to HFLM

    def _tell_cut(self, cut: int, count: int) -> None:
        self.counts["truncated"] += cut
        if cut:
            text = "%d of %d prompts are longer than the %d tokens that the model reads: their beginning is cut off"
            logger.warning(text, cut, count, self.max_length)

    def _tell(self, reasons: list[str | None]) -> list[int]:
        """The requests that HFLM must answer; says how many, and why."""
        found = Counter(reason for reason in reasons if reason is not None)
        self.fallbacks.update(found)
        for reason, count in found.items():
            logger.warning("%d of %d requests go to lm-eval's own model: %s", count, len(reasons), reason)
        return [n for n, reason in enumerate(reasons) if reason is not None]

    def _reason(self) -> str | None:
        """Why HFLM must run this model, or None."""
        if self.backend != "causal":
            return f"backend {self.backend}"
        return "mixed_precision_dtype" if self.mixed_precision_dtype is not None else unsupported(self.model)

    def _scored_reasons(self, requests: list[Scored]) -> list[str | None]:
        reason, limit = self._reason(), longest(self.model)

        def why(request: Scored) -> str | None:
            # Nothing to score, or more than the model reads: HFLM refuses it in its own words.
            if not request.tokens or not 0 < len(request.targets) <= min(self.max_length, len(request.tokens)):
                return "an empty context or continuation, or one longer than the model reads"
            return limit[1] if limit and len(request.tokens) > limit[0] else None

        return [reason or why(request) for request in requests]

    def _reasons(self, requests: list[Request]) -> list[str | None]:
        """For each request, why HFLM must answer it, or None."""
        settings = getattr(self.model, "generation_config", None)
        odd = sorted(set(settings.to_diff_dict()) - HARMLESS) if settings else []
        reason = self._reason() or (f"the model's generation_config sets {', '.join(odd)}" if odd else None)
        limit = longest(self.model) if reason is None else None

        def why(request: Request) -> str | None:
            kwargs = self._settings(request.kwargs)
            odd = sorted(key for key in set(kwargs) - GREEDY if (key, kwargs[key]) != ("num_beams", 1))
            if kwargs["do_sample"] or kwargs.get("temperature", 0.0):
                return "sampling"
            if odd:
                return f"generation argument {', '.join(odd)}"
            if request.max_gen_toks < 1:
                return "max_gen_toks of 0"
            if not request.tokens:
                return "empty context"
            return limit[1] if limit and len(request.tokens) + request.max_gen_toks > limit[0] else None

        return [reason or why(request) for request in requests]

    # ---- requests

    def _settings(self, gen_kwargs: dict) -> dict:
        """As lm-eval reads them; a task's requests have equal ones, and reading takes longer than comparing."""
        if self._last_settings is None or self._last_settings[0] != gen_kwargs:
            self._last_settings = deepcopy(gen_kwargs), normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        return self._last_settings[1]

    def _tokens(self, texts: list[str], bos: str | None, truncation: bool = False) -> list[list[int]]:
        """As HFLM tokenizes: a text that begins with `bos` gets no further special tokens."""
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        starts = [has_bos_prefix(text, bos) for text in texts]
        tokens: list[list[int]] = [[]] * len(texts)
        for flag, options in ((False, special), (True, {"add_special_tokens": False})):
            mine = [n for n, start in enumerate(starts) if start == flag]
            for first in range(0, len(mine), ENCODED):
                some = mine[first : first + ENCODED]
                encoded = self.tokenizer(
                    [texts[n] for n in some], truncation=truncation, return_attention_mask=False, **options
                )
                for n, ids in zip(some, encoded["input_ids"], strict=True):
                    tokens[n] = ids
        return tokens

    @contextmanager
    def _encoded_ahead(self, texts: list[str]):
        """Lets `tok_encode` look texts up that were tokenized together, each once."""
        with self.timed("tokenization", wait=False):
            texts = list(dict.fromkeys(texts))
            bos = self.tokenizer.decode(self.prefix_token_id)
            self.encoded = dict(zip(texts, self._tokens(texts, bos), strict=True))
        try:
            yield
        finally:
            self.encoded = {}

    def tok_encode(self, string, add_special_tokens=None, left_truncate_len=None, **kwargs) -> list[int]:
        if add_special_tokens is None and left_truncate_len is None and string in self.encoded:
            return self.encoded[string]
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)

    def _prepare(self, requests) -> list[Request]:
        with self.timed("tokenization", wait=False):
            eos = self.eot_token_id
            eos = None if eos is None else self.tok_decode(eos, skip_special_tokens=False)
            prepared, cut, bos = [], 0, getattr(self.tokenizer, "bos_token", None)
            texts = [request.args[0] for request in requests]
            for n, tokens in enumerate(self._tokens(texts, bos, truncation=bool(self.truncation))):
                context, gen_kwargs = requests[n].args
                kwargs = self._settings(gen_kwargs)
                until = handle_stop_sequences(kwargs["until"], eos=eos)
                room = self.max_length - kwargs["max_gen_toks"]
                if room <= 0 and self.backend == "causal":
                    wanted = f"max_gen_toks is {kwargs['max_gen_toks']}"
                    raise StudyError(f"{wanted}, and the model reads no more than {self.max_length} tokens: lower it")
                cut += len(tokens) > room
                line = self.answer_line and self.endings.line_is_safe(until)
                prepared.append(Request(n, context, gen_kwargs, tokens[-room:], kwargs["max_gen_toks"], until, line))
            self._tell_cut(cut, len(requests))
            return prepared


def main() -> None:
    """lm-eval's command line, with hf-dialogue among its models."""
    from lm_eval.__main__ import cli_evaluate

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    cli_evaluate()


if __name__ == "__main__":
    main()
