"""hf-dialogue against stock lm-eval: the same answers, whatever is shared, truncated, blank, endless or interrupted."""

import json
import math
import os
import shutil
import subprocess
import sys

import lm_eval
import pytest
import torch
from bench_eval import parting
from bitsandbytes.functional import has_avx512bf16
from engine import MIXED, SHOTS, both, byte_tokenizer, conversation, requests, small
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.coqa import utils as upstream

from helpers import ROOT, StudyError, params
from helpers.evaluate import limits, slots, static_slots
from helpers.evaluate.answers import end_tokens
from helpers.evaluate.hf_dialogue import FALLBACK_BATCH, HFDialogue
from helpers.evaluate.limits import CPU_ROWS
from helpers.evaluate.prefixes import ends, group_by_prefix
from helpers.evaluate.requests import Request, guess
from helpers.evaluate.run import evaluate, floor, save, slim
from helpers.setup import coqa
from helpers.setup.layers import widest_layer
from helpers.setup.models import Loaded

TASKS = str(ROOT / "helpers" / "tasks")
BFLOAT16_TIE = 0.1  # logits; their spread over the vocabulary is some 20
FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": None}}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def words(load):
    """A tokenizer whose tokens are pieces of words."""
    return load("fp16").tokenizer


@pytest.fixture(scope="module")
def tiny(tokenizer):
    """A model that never ends a text of itself."""
    model = small("llama", tokenizer)
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0
    return model


def first_line(text: str) -> str:
    return text.strip().split("\n")[0].strip()


# ---- the same answers as stock


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_same_text_in_every_architecture(kind, static, tokenizer):
    model = small(kind, tokenizer, **FAMILIES[kind])
    options = {"static": static, "max_slots": 2}  # fewer slots than groups: they are used again
    expected, found, mine = both(model, tokenizer, MIXED, options=options)
    assert found == expected
    assert len(set(expected)) > 5, "the model says the same to everything; the test would prove little"
    assert mine.counts["groups"] == 4 and mine.counts["alone"] == 2 and not mine.fallbacks
    assert mine.counts["prefill_tokens"] < mine.counts["context_tokens"]


@pytest.mark.parametrize("static", [False, True])
def test_a_context_longer_than_a_prefill_does_not_wait_for_the_rows_before_it(static, tiny, tokenizer):
    expected, found, mine = both(tiny, tokenizer, MIXED, options={"prefill_tokens": 1, "static": static, "contexts": 2})
    assert found == expected and mine.counts["peak_rows"] == len(MIXED)


def test_on_a_cpu_the_slots_together_hold_no_more_than_a_few_contexts(tiny, tokenizer, monkeypatch):
    held, prefill = [], slots.PackedSlots.prefill

    def watched(self, groups, free):
        rows = prefill(self, groups, free)
        held.append(sum(used for used, kept in zip(self.used, self.kept[0], strict=True) if kept is not None))
        return rows

    monkeypatch.setattr(slots.PackedSlots, "prefill", watched)
    alone = [f"{n}: {MIXED[0]}" for n in range(12)]
    asked = {"until": ["never this"], "max_gen_toks": 40}
    for contexts in ({}, {"batch_size": 2}, {"contexts": 3}, {"batch_size": "auto"}):
        expected, found, mine = both(tiny, tokenizer, alone, options=contexts, **asked)
        assert found == expected and mine.counts["groups"] == mine.limits.slots == 12
        together = contexts.get("contexts") or {2: 2, "auto": 4}.get(contexts.get("batch_size"), 1)
        assert together <= mine.counts["peak_rows"] < 12 and max(held) <= mine.limits.columns
        held.clear()


def test_batched_stock_agrees_too(tiny, tokenizer):
    expected, found, _ = both(tiny, tokenizer, MIXED, stock_batch=4)
    assert found == expected


@pytest.mark.parametrize("configuration", ["fp16", "nf4"])
def test_same_predictions_and_scores_on_dialogues(configuration, load, tmp_path):
    """Stock `coqa` over the same dialogues, against the last turns of coqa_turns."""
    model, tokenizer, _ = load(configuration)
    dialogues = [shorten(d, turns=2, words=25) for d in coqa.read("embedded", 5)]
    path = tmp_path / "dialogues.jsonl"
    path.write_text("\n".join(json.dumps(d) for d in dialogues))
    manager = TaskManager(include_path=TASKS, metadata={"source": str(path)})
    arguments = {"task_manager": manager, "bootstrap_iters": 0, "gen_kwargs": {"max_gen_toks": 6}}
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    mine = HFDialogue(pretrained=model, tokenizer=tokenizer, answer_line=True)
    expected = lm_eval.simple_evaluate(model=stock, tasks=["coqa_turns"], **arguments)
    found = lm_eval.simple_evaluate(model=mine, tasks=["coqa_turns"], **arguments)
    for n, (theirs, ours) in enumerate(
        zip(expected["samples"]["coqa_turns"], found["samples"]["coqa_turns"], strict=True)
    ):
        assert (ours["doc"]["id"], ours["doc"]["turn"]) == (theirs["doc"]["id"], theirs["doc"]["turn"])
        said, wanted = ours["resps"][0][0], theirs["resps"][0][0]
        if rounds_to_bfloat16(configuration) and first_line(said) != first_line(wanted):
            gap = parting(mine, ours["arguments"][0][0], mine.generated[n], wanted)["gap"]
            assert gap < BFLOAT16_TIE, f"{first_line(said)!r}, stock {first_line(wanted)!r}: {gap} logits apart"
        else:
            assert first_line(said) == first_line(wanted)
            assert (ours["f1"], ours["em"]) == (theirs["f1"], theirs["em"])
    last = [s for s in found["samples"]["coqa_turns"] if s["doc"]["last_turn"]]
    assert [s["doc"]["id"] for s in last] == [d["id"] for d in dialogues]
    for sample, dialogue in zip(last, dialogues, strict=True):
        assert sample["arguments"][0][0] == upstream.doc_to_text(dialogue)
        assert {k: sample[k] for k in ("em", "f1")} == upstream.process_results(dialogue, sample["resps"][0])


def rounds_to_bfloat16(configuration: str) -> bool:
    """bitsandbytes' 4-bit kernel for AVX512-BF16 does, and a tie may then fall either way: stock at two batch sizes
    differs as much."""
    return configuration != "fp16" and has_avx512bf16()


def shorten(dialogue: dict, turns: int = 3, words: int = 60) -> dict:
    """A dialogue small enough for a test, in the hub's shape."""
    story = " ".join(dialogue["story"].split()[:words])

    def columns(c):
        kept = {k: v[:turns] for k, v in c.items()}
        for field, value in (("span_start", -1), ("span_end", -1), ("span_text", "unknown")):
            if field in kept:
                kept[field] = [value] * turns
        return kept

    return dialogue | {
        "story": story,
        "questions": columns(dialogue["questions"]),
        "answers": columns(dialogue["answers"]),
        "additional_answers": {k: columns(v) for k, v in dialogue["additional_answers"].items()},
    }


def test_int8_answers_as_stock_does(load):
    """LLM.int8() looks for outliers in everything that runs together, so only a context alone is certain to come out
    alike."""
    model, tokenizer, _ = load("int8")
    expected, found, mine = both(
        model, tokenizer, ["The sky is blue.\n\nQ: What colour is the sky?\n\nA:"], max_gen_toks=4
    )
    assert found == expected
    assert mine.counts["requests"] == 1 and not mine.fallbacks


# ---- grouping


def test_a_boundary_of_text_that_is_none_of_tokens(words):
    short, long = "The answer is un", "The answer is understandable, or so they say. Q:"
    tokens = [words.encode(text) for text in (short, long)]
    assert tokens[1][: len(tokens[0])] != tokens[0], "these texts' tokens line up; choose others"
    expected, found, mine = both(small("llama", words), words, [short, long])
    assert found == expected and mine.counts["alone"] == 2


def test_unicode_cut_at_a_boundary(tiny, tokenizer):
    contexts = ["Ünï", "Ünïcödé 🐈", "Ünïcödé 🐈‍⬛ and 日本", "Ünïcödé 🐈‍⬛ and 日本語のテキスト\n\nQ: 何?\n\nA:"]
    expected, found, _ = both(tiny, tokenizer, contexts)
    assert found == expected


def request(n: int, text: str, tokens: list[int]) -> Request:
    return Request(n, text, {}, tokens, 4, [], False)


def test_groups_hold_every_request_and_a_path_spells_it():
    prompts = ["a", "ab", "abc", "abd", "b", "a", "header one", "header two", "header one", "heat", "c" * 9, "c" * 7]
    given = [request(n, p, [ord(c) for c in p]) for n, p in enumerate(prompts)]
    for least, most, rows in ((1, None, 64), (1, 12, 64), (4, 100, 64), (64, None, 64), (1, None, 2)):
        groups = group_by_prefix(given, rows, least, most)
        assert sorted(r.index for g in groups for r in g.requests) == list(range(len(prompts)))
        assert [g.columns for g in groups] == sorted((g.columns for g in groups), reverse=True)
        for group in groups:
            assert len(group.requests) <= rows and group.keys >= group.columns
            for one, path in zip(group.requests, group.paths, strict=True):
                columns = [column for start, stop in path for column in range(start, stop)]
                assert [group.tokens[c] for c in columns] == one.tokens
                assert [group.positions[c] for c in columns] == list(range(len(columns)))
                assert ends(path, 2) == columns[-2:]
            for path, start, stop in group.branches:
                assert all(b <= start for _, b in path) and start < stop
    assert [g.columns for g in group_by_prefix(given, 64, 4)] == [13, 9, 4, 3, 3, 1]


CHAT = [f"{prompt}<assistant>" for prompt in conversation(5)]  # no prompt is the beginning of another


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("contexts", [SHOTS, CHAT], ids=["few-shot", "chat"])
def test_what_prompts_begin_with_is_run_once(contexts, static, tiny, tokenizer):
    expected, found, mine = both(tiny, tokenizer, contexts, options={"static": static, "max_slots": 2})
    assert found == expected and len(set(expected)) > 3
    assert mine.counts["groups"] < 3 and 2 * mine.counts["prefill_tokens"] < mine.counts["context_tokens"]


def test_same_context_twice_and_more_turns_than_rows(tiny, tokenizer):
    contexts = conversation(5) + conversation(5)[2:4]
    expected, found, mine = both(tiny, tokenizer, contexts, options={"max_rows": 2, "max_slots": 2})
    assert found == expected and mine.counts["peak_rows"] <= 2


# ---- where an answer ends


def test_a_context_beyond_the_window_is_cut_as_stock_cuts_it_and_told(tiny, tokenizer, caplog):
    expected, found, mine = both(tiny, tokenizer, conversation(6), options={"max_length": 212}, max_gen_toks=12)
    assert found == expected and f"{mine.counts['truncated']} of 6 prompts are longer than the 212" in caplog.text
    mine.generate_until(requests(conversation(6), max_gen_toks=12, num_beams=2), disable_tqdm=True)
    mine.counts["truncated"] /= 2  # HFLM's are counted too
    lengths = [len(tokenizer.encode(text)) for text in conversation(6)]
    assert mine.counts["truncated"] == sum(n > 200 for n in lengths) > 0
    assert any(n <= 200 for n in lengths)


def test_an_answer_that_never_ends_stops_at_max_gen_toks(tiny, tokenizer):
    expected, found, mine = both(
        tiny, tokenizer, MIXED, until=["never this"], max_gen_toks=40, options={"static": True}
    )
    assert found == expected
    assert max(len(tokens) for tokens in mine.generated) == 40


@pytest.mark.parametrize("static", [False, True])
def test_buffers_that_are_too_short_grow_and_the_answers_stay(static, tiny, tokenizer, monkeypatch):
    for module in ("slots", "limits"):
        monkeypatch.setattr(f"helpers.evaluate.{module}.room", lambda turns: 1)
    owner, name = (static_slots.StaticSlots, "repack") if static else (slots.PackedSlots, "_reserve")
    widths, original = set(), getattr(owner, name)

    def watched(self, *arguments):
        found = original(self, *arguments)
        widths.add(self.columns if static else self.masks[arguments[0]].shape[1])
        return found

    monkeypatch.setattr(owner, name, watched)
    expected, found, _ = both(tiny, tokenizer, MIXED, max_gen_toks=60, options={"static": static})
    assert found == expected and len(widths) > 1


def test_slots_that_nothing_will_use_again_are_given_up(tiny, tokenizer, monkeypatch):
    monkeypatch.setattr("helpers.evaluate.limits.room", lambda turns: 1)
    counts = []

    def watched(self, *arguments, repack=static_slots.StaticSlots.repack):
        counts.append(self.count)
        return repack(self, *arguments)

    monkeypatch.setattr(static_slots.StaticSlots, "repack", watched)

    def asked() -> list[Instance]:
        found = requests([f"{n}: {MIXED[n % 8]}" for n in range(12)], until=["never this"])
        for n, one in enumerate(found):
            one.arguments[1]["max_gen_toks"] = 300 if n < 2 else 4
        return found

    stock = HFLM(pretrained=tiny, tokenizer=tokenizer, batch_size=1).generate_until(asked(), disable_tqdm=True)
    mine = HFDialogue(pretrained=tiny, tokenizer=tokenizer, static=True)
    assert mine.generate_until(asked(), disable_tqdm=True) == stock
    assert len(counts) > 1 and counts[-1] < counts[0] == 13


# ---- guesses


def test_a_guess_is_what_followed_before():
    made = Request(0, "", {}, [5, 1, 2, 3, 9, 8, 7], 50, [], False, made=[1, 2, 3])
    assert guess(made, 4) == [9, 8, 7, 1] and guess(made, 0) == []
    circle = Request(0, "", {}, [9], 50, [], False, made=[4, 6, 4, 6, 4])
    assert guess(circle, 5) == [6, 4, 6, 4, 6]
    assert guess(Request(0, "", {}, [1, 2, 3, 4], 50, [], False), 3) == []


@pytest.mark.parametrize("static", [False, True])
def test_guesses_right_and_wrong_change_no_answer(static, tiny, tokenizer, monkeypatch):
    endless = {"until": ["never this"], "max_gen_toks": 40}
    options = {"max_slots": 2, "static": static}
    expected, found, mine = both(tiny, tokenizer, MIXED, options=options, **endless)
    assert found == expected and all(len(tokens) == 40 for tokens in mine.generated)
    # A fortune teller: what the model is going to say, now and then with a mistake.
    truth = {context: tokens for context, tokens in zip(MIXED, mine.generated, strict=True)}

    def foretold(request, count, shortest):
        rest = truth[request.context][len(request.made) :][: max(0, count)]
        return [token + (n == 3) for n, token in enumerate(rest)]

    monkeypatch.setattr("helpers.evaluate.answers.guess", foretold)
    _, again, told = both(tiny, tokenizer, MIXED, options=options, **endless)
    assert again == expected and told.counts["guessed"] > told.counts["guessed_right"] > 20
    assert told.counts["decode_steps"] < mine.counts["decode_steps"]


class Script(HFDialogue):
    """hf-dialogue whose model says what it is told to, token by token: stopping and cutting run as they are."""

    def say(self, text: str, **kwargs) -> str:
        made = iter(self.tokenizer.encode(text, add_special_tokens=False) + [self.eot_token_id] * 4)
        (request,) = self._prepare(requests(["Q: x\n\nA:"], **kwargs))
        while not self.endings.reached(request, next(made), end_tokens(self.model)):
            pass
        return self.endings.text(request)


@pytest.fixture(scope="module")
def script(words):
    return Script(pretrained=small("llama", words), tokenizer=words, answer_line=True)


@pytest.fixture(scope="module")
def exact(script, words):
    return Script(pretrained=script.model, tokenizer=words)


SAYINGS = [
    "",  # an empty answer: end of text at once
    " blue\n\nQ: Why?\n\nA: because",
    "\n\n  \n blue\nand more",
    "\n\nQ: Why?",
    "\n\n\n",
    " blue  \nred",
    " 日本語\nもっと",
    " Q: is not a stop",
    " a\n b\n c",
]


@pytest.mark.parametrize("text", SAYINGS)
def test_what_coqa_reads_is_what_stock_would_have_given_it(text, script, exact):
    full = text.split("\nQ:")[0]
    assert exact.say(text, max_gen_toks=100) == full
    assert first_line(script.say(text, max_gen_toks=100)) == first_line(full)


def test_a_row_stops_at_the_end_of_its_line_only_if_asked(script, exact):
    assert script.say("\n\n blue\n and so on") == "\n\n blue"
    assert exact.say("\n\n blue\n and so on") == "\n\n blue\n and so on"


def test_a_stop_that_spans_lines_is_not_forestalled(script):
    assert script.say(" blue.\n\n red", until=[".\n\n"]) == " blue"


@pytest.mark.parametrize("until", [["."], [" "], [" the"], ["e", "\n\n"], [], "\nQ:", ["\n"], [""]])
def test_other_stop_sequences(until, tiny, tokenizer, load, words):
    expected, found, _ = both(tiny, tokenizer, conversation(3), until=until)
    assert found == expected
    expected, found, _ = both(load("fp16").model, words, conversation(2)[1:], until=until, max_gen_toks=8)
    assert found == expected


# ---- what is handed to stock


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"do_sample": True, "temperature": 0.7}, "sampling"),
        ({"num_beams": 2}, "generation argument num_beams"),
        ({"repetition_penalty": 1.3}, "generation argument repetition_penalty"),
    ],
)
def test_other_ways_to_generate_are_handed_to_stock_with_the_reason(kwargs, reason, tiny, tokenizer):
    torch.manual_seed(1)
    stock = HFLM(pretrained=tiny, tokenizer=tokenizer, batch_size=FALLBACK_BATCH)
    stock = stock.generate_until(requests(MIXED[:2], **kwargs), disable_tqdm=True)
    mine = HFDialogue(pretrained=tiny, tokenizer=tokenizer)
    torch.manual_seed(1)
    assert mine.generate_until(requests(MIXED[:2], **kwargs), disable_tqdm=True) == stock
    assert mine.fallbacks == {reason: 2} and mine.generated == [None, None]


def test_an_answer_of_no_tokens_is_refused_as_stock_refuses_it(tiny, tokenizer):
    mine = HFDialogue(pretrained=tiny, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="max_length"):
        mine.generate_until(requests(["x"], max_gen_toks=0), disable_tqdm=True)
    assert mine.fallbacks == {"max_gen_toks of 0": 1}


def test_a_generation_config_that_changes_greedy_text_is_respected(tokenizer):
    model = small("llama", tokenizer)
    model.generation_config.repetition_penalty = 1.5
    expected, found, mine = both(model, tokenizer, MIXED[:2])
    assert found == expected and "repetition_penalty" in next(iter(mine.fallbacks))


def test_a_length_in_the_generation_config_is_cleared_and_told(tokenizer, caplog):
    model = small("llama", tokenizer)
    model.generation_config.max_new_tokens = 3
    mine = HFDialogue(pretrained=model, tokenizer=tokenizer)
    assert "max_new_tokens (3) is cleared" in caplog.text
    expected, found, _ = both(model, tokenizer, MIXED[:2])
    assert found == expected and mine.generate_until(requests(MIXED[:2]), disable_tqdm=True) == found
    assert max(map(len, mine.generated)) > 3


def test_a_tokenizer_without_an_end_of_text(tiny, tokenizer):
    endless = byte_tokenizer(eos=False)
    expected = HFLM(pretrained=tiny, tokenizer=tokenizer).generate_until(requests(MIXED), disable_tqdm=True)
    assert HFDialogue(pretrained=tiny, tokenizer=endless).generate_until(requests(MIXED), disable_tqdm=True) == expected


def test_what_falls_back_runs_in_batches_and_halves_them_where_memory_is_short(tiny, tokenizer, monkeypatch):
    sizes = []

    def generate(self, requests, disable_tqdm=False, generate=HFLM.generate_until):
        sizes.append(self.batch_size)
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return generate(self, requests, disable_tqdm)

    monkeypatch.setattr(HFLM, "generate_until", generate)
    mine = HFDialogue(pretrained=tiny, tokenizer=tokenizer)
    assert None not in mine.generate_until(requests(MIXED, num_beams=2), disable_tqdm=True)
    assert sizes == [FALLBACK_BATCH, FALLBACK_BATCH // 2] and mine.batch_size == 1


def test_requests_of_both_kinds_come_back_in_order(tiny, tokenizer):
    mixed = requests(MIXED[:4])
    mixed[1].arguments[1]["num_beams"] = 2
    stock = HFLM(pretrained=tiny, tokenizer=tokenizer, batch_size=1)
    found = HFDialogue(pretrained=tiny, tokenizer=tokenizer).generate_until(mixed, disable_tqdm=True)
    assert found == stock.generate_until(mixed, disable_tqdm=True)
    assert HFDialogue(pretrained=tiny, tokenizer=tokenizer).generate_until([], disable_tqdm=True) == []


# ---- errors


def fail_at(monkeypatch, call: int, error: Exception) -> list:
    """Make the n-th decode step raise, once."""
    calls = []

    def step(self, rows, drafts, step=slots.PackedSlots.step):
        calls.append(len(rows))
        if len(calls) == call:
            raise error
        return step(self, rows, drafts)

    monkeypatch.setattr(slots.PackedSlots, "step", step)
    return calls


class Kept:
    """lm-eval's cache hook, which keeps what is finished."""

    def __init__(self):
        self.answers = []

    def add_partial(self, kind, arguments, answer):
        self.answers.append((arguments[0], answer))


def test_out_of_memory_halves_the_batch_and_keeps_finished_answers(tiny, tokenizer, monkeypatch):
    stock = HFLM(pretrained=tiny, tokenizer=tokenizer).generate_until(requests(MIXED), disable_tqdm=True)
    mine = HFDialogue(pretrained=tiny, tokenizer=tokenizer, max_slots=2, max_rows=8, contexts=2)
    mine.cache_hook = Kept()
    fail_at(monkeypatch, 20, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"))
    assert mine.generate_until(requests(MIXED), disable_tqdm=True) == stock
    groups = group_by_prefix(mine._prepare(requests(MIXED)), rows=8)
    columns = (2 * limits.columns(groups, CPU_ROWS) + limits.running(mine.model, groups[0].columns)) // 2
    assert mine.counts["out_of_memory"] == 1 and vars(mine.limits) == {
        "slots": 1,
        "rows": 4,
        "prefill_tokens": 256,
        "columns": columns,
    }
    assert sorted(mine.cache_hook.answers) == sorted(zip(MIXED, stock, strict=True)), (
        "an answer was lost or given twice"
    )


def test_out_of_memory_with_nothing_left_to_halve_is_the_users_to_see(tiny, tokenizer, monkeypatch):
    def prefill(self, *arguments):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(slots.Slots, "prefill", prefill)
    mine = HFDialogue(pretrained=tiny, tokenizer=tokenizer, max_slots=4, max_rows=4)
    with pytest.raises(RuntimeError, match="can't allocate"):
        mine.generate_until(requests(MIXED), disable_tqdm=True)
    assert mine.counts["out_of_memory"] == 2


def test_an_error_leaves_the_model_as_it_was_and_a_second_run_finishes(tiny, tokenizer, monkeypatch):
    before = tiny.config._attn_implementation
    mine = HFDialogue(pretrained=tiny, tokenizer=tokenizer)
    mine.cache_hook = Kept()
    fail_at(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        mine.generate_until(requests(MIXED), disable_tqdm=True)
    assert tiny.config._attn_implementation == before
    stock = HFLM(pretrained=tiny, tokenizer=tokenizer).generate_until(requests(MIXED), disable_tqdm=True)
    assert mine.generate_until(requests(MIXED), disable_tqdm=True) == stock


def test_rows_times_columns_stay_under_two_to_the_31(tokenizer):
    model = small("llama", tokenizer)
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 2**28, bias=False, device="meta")
    assert widest_layer(model) == 2**28
    mine = HFDialogue(pretrained=model, tokenizer=tokenizer)
    groups = group_by_prefix([request(0, "a", [1] * 100)], rows=1)
    found = limits.find(mine, groups)
    assert max(found.rows, found.prefill_tokens) * 2**28 < 2**31


# ---- other requests of HFLM, lm-eval's command line


def test_further_tasks_have_a_report_of_their_own(study, tiny, tokenizer, monkeypatch):
    tasks = {"max_gen_toks": 4, "tasks": ["few_shot_choices"], "include_path": "tests/tasks", "limit": 3}
    study = study.model_copy(
        update={
            "evaluation": study.evaluation.model_copy(update=tasks),
            "data": [study.sources[0].model_copy(update={"dialogues": 2, "dialogues_on_cpu": 1})],
        }
    )
    loaded = Loaded(tiny, tokenizer, {})
    monkeypatch.chdir("notebooks")  # where papermill runs them: a path is of the project all the same
    found = evaluate(study, loaded)
    assert found["engine"]["counts"]["requests"] == len(found["samples"]["coqa_turns"])
    assert found["engine"]["tasks"]["counts"]["requests"] == 3 * 4 and not found["engine"]["tasks"]["fallbacks"]
    assert 0 <= found["results"]["few_shot_choices"]["acc,none"] <= 1
    kept = [slim(row) for row in found["samples"]["coqa_turns"]]  # a prompt holds all before it: the story is kept once
    assert [row["doc"]["turn"] for row in kept if "text" in row["doc"]] == [1, 1] and "arguments" not in kept[0]
    # In float32 a batch changes nothing; what did change is counted.
    none = {"right_to_wrong": 0, "wrong_to_right": 0, "f1_difference": 0}
    assert floor(study, loaded, found) == {"same_text": 1, **none}
    found["samples"]["coqa_turns"][0] |= {"filtered_resps": ["another"], "em": 0.5, "f1": 1.0}
    share = 1 / len(found["samples"]["coqa_turns"])
    changed = {"same_text": 1 - share, **none, "right_to_wrong": share, "f1_difference": -share}
    assert floor(study, loaded, found) == pytest.approx(changed)


def test_a_further_task_that_fails_or_is_unknown_costs_no_answers(study, tiny, tokenizer, monkeypatch, tmp_path):
    data = [study.sources[0].model_copy(update={"dialogues": 1, "dialogues_on_cpu": 1})]

    def asked(**tasks):
        evaluation = study.evaluation.model_copy(update={"max_gen_toks": 4, "include_path": str(tmp_path)} | tasks)
        return study.model_copy(update={"data": data, "evaluation": evaluation, "folder": str(tmp_path)})

    broken = "task: broken\ncustom_dataset: !function nowhere.rows\noutput_type: multiple_choice\n"
    (tmp_path / "broken.yaml").write_text(broken)
    loaded = Loaded(tiny, tokenizer, {"device": "cpu"})
    shutil.copytree(ROOT / "tests/tasks", tmp_path, dirs_exist_ok=True)
    found = evaluate(asked(tasks=["broken", "few_shot_choices"], limit=1), loaded)
    assert "nowhere" in found["engine"]["tasks"]["failed"]["broken"] and "few_shot_choices" in found["results"]
    assert len(found["samples"]["coqa_turns"]) > 5
    found["results"]["coqa_turns"]["odd,none"] = math.nan
    configuration = params.read_configuration("smollm2-135m", "fp16")
    written = save(asked(tasks=["broken"]), configuration, loaded, found)
    assert "odd" not in written.data["tasks"]["coqa_turns"]
    assert json.loads((tmp_path / "fp16/lm_eval.json").read_text())["results"]["coqa_turns"]["odd,none"] == "nan"
    monkeypatch.setattr(HFDialogue, "generate_until", lambda *_, **__: pytest.fail("asked before the name was known"))
    with pytest.raises(StudyError, match="lm-eval has no task 'hellaswagg'"):
        evaluate(asked(tasks=["hellaswagg"]), loaded)


def test_lm_evals_command_line(tiny, tokenizer, tmp_path):
    """A task of our own and its data by --metadata, a saved model by --model_args, samples by --log_samples."""
    tiny.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "dialogues.json"
    path.write_text(json.dumps([shorten(d) for d in coqa.read("embedded", 2)]))
    command = [
        sys.executable,
        "-m",
        "helpers.evaluate.hf_dialogue",
        "run",
        "--model",
        "hf-dialogue",
        "--tasks",
        "coqa_turns",
        "--device",
        "cpu",
    ]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},answer_line=True", "--include_path", TASKS]
    command += ["--metadata", json.dumps({"source": str(path)}), "--gen_kwargs", "max_gen_toks=4", "--log_samples"]
    anywhere = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out")], capture_output=True, text=True, **anywhere
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|coqa_turns|" in done.stdout.replace(" ", "")
    (samples,) = (tmp_path / "out").rglob("samples_coqa_turns_*.jsonl")
    docs = [json.loads(line)["doc"] for line in samples.read_text().splitlines()]
    assert [d["turn"] for d in docs] == [1, 2, 3, 1, 2, 3] and [d["last_turn"] for d in docs] == [
        False,
        False,
        True,
    ] * 2


# ---- the captured step


class Replay:
    """Stands in for a CUDA graph: the recorded step reads what the fixed buffers hold when it is replayed, and
    nothing else."""

    def __init__(self, step):
        self.replay = step


@pytest.fixture
def capturing(monkeypatch):
    """Static slots that believe they can capture."""

    def begin(self, *arguments, begin=static_slots.StaticSlots.__init__, **options):
        begin(self, *arguments, **options)
        self.captured = True

    monkeypatch.setattr(static_slots.StaticSlots, "__init__", begin)


def test_a_replayed_step_needs_nothing_but_its_buffers(tiny, tokenizer, capturing, monkeypatch):
    captured = []

    def capture(self, key):
        captured.append(key)
        self.graphs[key] = Replay(lambda: self._static_forward(*key))

    monkeypatch.setattr(static_slots.StaticSlots, "_capture", capture)
    monkeypatch.setattr(static_slots, "ROW_BUCKETS", (2, 4, 8))
    expected, found, _ = both(tiny, tokenizer, MIXED, options={"static": True, "max_slots": 3})
    assert found == expected
    assert len(captured) == len(set(captured)) > 1, "each shape is captured once"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU can capture")
def test_a_capture_that_fails_is_reported_and_the_step_runs_eagerly(tiny, tokenizer, capturing):
    expected, found, mine = both(tiny, tokenizer, MIXED, options={"static": True})
    assert found == expected
    (reason,) = mine.fallbacks
    assert reason.startswith("CUDA graph: ") and mine.counts["graphs"] == 0


def test_int8_with_a_threshold_is_never_captured(load, tiny):
    assert "threshold 6.0" in static_slots.uncapturable(load("int8").model)
    assert static_slots.uncapturable(tiny) is None and static_slots.uncapturable(load("nf4").model) is None


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_captured_step_answers_as_the_eager_one(tokenizer):
    model = small("llama", tokenizer).cuda()
    eager = HFDialogue(pretrained=model, tokenizer=tokenizer, cuda_graph=False).generate_until(
        requests(MIXED), disable_tqdm=True
    )
    captured = HFDialogue(pretrained=model, tokenizer=tokenizer)
    assert captured.generate_until(requests(MIXED), disable_tqdm=True) == eager
    assert captured.counts["graphs"] > 0 and not captured.fallbacks
