"""Stock lm-eval and hf-dialogue side by side: the same dialogues, the same weights in memory, one process.

Run by `make bench-eval STUDY=... LIMIT=...`; writes executed/STUDY/bench_eval.json (--tasks coqa_last_turns:
bench_eval_last_turns.json) and exits with 1 if a target is missed:

- seconds per question of coqa_turns, stock over hf-dialogue: at least 12 on a CPU, 50 on a GPU; - of coqa_last_turns,
which is what stock `coqa` asks and shares nothing: at least 4; - in float32 the same predictions, F1 and EM; else
every differing prediction is listed with the logit gap where the two part (a CPU with
  AVX512-BF16 counts as "else" for 4-bit weights: bitsandbytes' kernel for it rounds to bfloat16);
- peak memory no more than stock's at the same batch size (on a GPU hf-dialogue takes no batch size and finds its own;
--contexts lets it
  hold more of the longest contexts than the batch size on a CPU).

`prefill_bound` is the ratio that would be reached if generation cost nothing: stock's seconds over hf-dialogue's
prefill alone.

Stock gets the batch size at which it answers the last turns fastest (`--stock-batch-sizes`). A machine that slows
down or speeds up meanwhile should favour neither side: on the last turns, which a GPU answers in a second, the two
take turns (`--rounds`), and on coqa_turns hf-dialogue runs before and after stock. Compared are the medians (of two
runs: their mean); every run's seconds are kept. Seconds are those of `generate_until`, tokenization included; scoring
is lm-eval's own on both sides and comes on top (`scoring_seconds`)."""

import argparse
import gc
import os
import statistics
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402
from bitsandbytes.functional import has_avx512bf16  # noqa: E402
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from helpers import StudyError, params, results  # noqa: E402
from helpers.evaluate.hf_dialogue import HFDialogue  # noqa: E402
from helpers.setup import models  # noqa: E402
from helpers.setup.device import trim  # noqa: E402

TURNS, LAST = "coqa_turns", "coqa_last_turns"
TARGET_TURNS = {"cpu": 12, "cuda": 50}
TARGET_LAST = 4
MIB = 2**20


def give_back() -> None:
    """Memory that is free but still held, back to the system, so that the next side's peak is its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:
        trim()


class Peak:
    """Highest memory while it runs, MiB: allocated on the GPU, or resident (sampled every 5 ms) on a CPU; and what
    was there before."""

    def __init__(self, device: str):
        self.device, self.process = device, psutil.Process()

    def __enter__(self):
        give_back()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / MIB
            return self
        self.before = self.highest = self.process.memory_info().rss / MIB
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while not self.stop.wait(0.005):
            self.highest = max(self.highest, self.process.memory_info().rss / MIB)

    def __exit__(self, *error):
        if self.device == "cuda":
            self.highest = torch.cuda.max_memory_allocated() / MIB
        else:
            self.stop.set()
            self.thread.join()


def first_line(text: str) -> str:
    """What CoQA's metric reads (lm_eval/tasks/coqa/utils.py), without the space around it, which its normalization
    drops."""
    return text.strip().split("\n")[0].strip()


def run(lm: HFLM, task: str, manager: TaskManager, max_gen_toks: int, device: str) -> dict:
    """One evaluation: seconds, predictions, scores, peak memory."""
    answer, spent = type(lm).generate_until, []

    def timed(requests, **options):
        start = time.perf_counter()
        found = answer(lm, requests, **options)
        spent.append(time.perf_counter() - start)
        return found

    lm.generate_until = timed
    start = time.perf_counter()
    with Peak(device) as peak:
        found = simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=manager,
            bootstrap_iters=0,
            gen_kwargs={"max_gen_toks": max_gen_toks},
            verbosity="ERROR",
        )
    samples = sorted(found["samples"][task], key=lambda s: s["doc_id"])
    return {
        "questions": len(samples),
        "seconds": sum(spent),
        "seconds_per_question": sum(spent) / len(samples),
        "scoring_seconds": time.perf_counter() - start - sum(spent),
        "f1": found["results"][task]["f1,none"],
        "em": found["results"][task]["em,none"],
        "memory_before_mib": peak.before,
        "peak_mib": peak.highest,
        "samples": samples,
    }


def text_of(sample: dict) -> str:
    return sample["resps"][0][0]


@torch.inference_mode()
def parting(lm: HFDialogue, context: str, tokens: list[int], theirs: str) -> dict:
    """Where hf-dialogue's tokens leave stock's text, and how far apart the two likeliest tokens are there, in
    logits."""
    same = 0
    while same < len(tokens) and theirs.startswith(lm.tok_decode(tokens[: same + 1])):
        same += 1
    # Stock's text may go on with other tokens that spell the same: the last shared token is where they could have
    # parted first.
    gaps = []
    ids = lm._tokens([context], None)[0]
    for at in {max(0, same - 1), min(same, len(tokens) - 1)}:
        logits = lm.model(torch.tensor([ids + tokens[:at]], device=lm.device), logits_to_keep=1).logits[0, -1].float()
        top = logits.topk(2)
        likeliest = [lm.tok_decode([i]) for i in top.indices.tolist()]
        gaps.append({"token": at, "gap": (top.values[0] - top.values[1]).item(), "likeliest": likeliest})
    return min(gaps, key=lambda g: g["gap"])


def compare(stock: dict, mine: dict, lm: HFDialogue) -> dict:
    """The share of questions with the same prediction, and every other one with the gap that explains it."""
    pairs = list(zip(stock["samples"], mine["samples"], strict=True))
    different = []
    for n, (theirs, ours) in enumerate(pairs):
        if first_line(text_of(theirs)) != first_line(text_of(ours)):
            gap = parting(lm, ours["arguments"][0][0], lm.generated[n], text_of(theirs))
            doc = {k: ours["doc"][k] for k in ("id", "turn")}
            different.append(doc | {"stock": first_line(text_of(theirs)), "dialogue": first_line(text_of(ours))} | gap)
    return {"identical_share": 1 - len(different) / len(pairs), "different": different}


def bench(study, name: str, limit: int, sizes: list[int], tasks: list[str], rounds: int, contexts: int | None) -> dict:
    configuration = params.read_configuration(study.study, name)
    model, tokenizer, info = models.load(study, configuration)
    device, longest = info["device"], study.evaluation.max_gen_toks
    manager = TaskManager(
        include_path=str(ROOT / "helpers" / "tasks"),
        metadata={"source": study.data.source, "dialogues": limit, "data_revision": study.data.revision},
    )

    def stock(size: int, task: str) -> dict:
        return run(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size), task, manager, longest, device) | {
            "batch_size": size
        }

    def mine(task: str, size: int) -> tuple[dict, HFDialogue]:
        lm = HFDialogue(pretrained=model, tokenizer=tokenizer, answer_line=True, batch_size=size, contexts=contexts)
        return run(lm, task, manager, longest, device) | {"engine": lm.report()}, lm

    mine(LAST, sizes[0])  # warm-up of both sides' kernels: they are the same
    tried = [stock(size, LAST) for size in sizes]
    best = min(tried, key=lambda r: r["seconds"])
    size = best["batch_size"]
    last, lm = mine(LAST, size)
    ours, theirs = [last], [best]
    for _ in range(rounds - 1):
        theirs.append(stock(size, LAST))
        last, lm = mine(LAST, size)
        ours.append(last)
    found = {LAST: pair(theirs, ours, lm)}
    found[LAST]["stock_by_batch_size"] = {r["batch_size"]: {k: r[k] for k in ("seconds", "peak_mib")} for r in tried}
    if TURNS in tasks:
        before, _ = mine(TURNS, size)
        theirs = stock(size, TURNS)
        after, lm = mine(TURNS, size)
        found[TURNS] = pair([theirs], [before, after], lm)
        asked = [s for s in after["samples"] if s["doc"]["last_turn"]]
        # The same questions within a run of all turns: what the report calls the stock task's score.
        found["last_turns_of_all"] = {metric: sum(s[metric] for s in asked) / len(asked) for metric in ("f1", "em")}
    found_all = {"loading": info, "arithmetic": arithmetic(configuration, info), "tasks": found}
    return found_all | {"missed": missed(found_all)}


def arithmetic(configuration, info: dict) -> str:
    """What the linear layers compute in, which decides whether both sides must agree to the last digit."""
    method = configuration.quantization.method
    if method == "bitsandbytes-int8":
        return "int8"
    if method == "bitsandbytes-4bit" and info["device"] == "cpu" and has_avx512bf16():
        return "bfloat16"
    return info["dtype"]


def pair(stock: list[dict], mine: list[dict], lm: HFDialogue) -> dict:
    """Both sides' runs compared: medians of seconds; predictions and scores of the last run."""
    theirs, ours = (
        {k: v for k, v in runs[-1].items() if k != "samples"}
        | {"seconds": (seconds := statistics.median(r["seconds"] for r in runs))}
        | {"seconds_per_question": seconds / runs[-1]["questions"], "seconds_of_runs": [r["seconds"] for r in runs]}
        for runs in (stock, mine)
    )
    return {
        "ratio": theirs["seconds"] / ours["seconds"],
        "prefill_bound": theirs["seconds"] / ours["engine"]["seconds"]["prefill"],
        "peak_mib": {side: max(r["peak_mib"] for r in runs) for side, runs in (("stock", stock), ("dialogue", mine))},
        **compare(stock[-1], mine[-1], lm),
        "stock": theirs,
        "dialogue": ours,
    }


def missed(found: dict) -> list[str]:
    """The targets that this run did not reach, in words."""
    out = []
    for task, target in ((TURNS, TARGET_TURNS[found["loading"]["device"]]), (LAST, TARGET_LAST)):
        r = found["tasks"].get(task)
        if r is None:
            continue
        if r["ratio"] < target:
            bound = f"; {r['prefill_bound']:.1f} if all but the prefill cost nothing"
            out.append(f"{task}: {r['ratio']:.1f} times stock's speed, at least {target} wanted{bound}")
        if found["arithmetic"] == "float32" and (
            r["different"] or any(r["stock"][m] != r["dialogue"][m] for m in ("f1", "em"))
        ):
            out.append(f"{task}: {len(r['different'])} predictions differ from stock's, none should in float32")
        if r["peak_mib"]["dialogue"] > r["peak_mib"]["stock"]:
            out.append(f"{task}: peak of {r['peak_mib']['dialogue']:.0f} MiB, stock {r['peak_mib']['stock']:.0f}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", default="smollm2-135m")
    parser.add_argument("--limit", type=int, default=20, help="dialogues")
    parser.add_argument("--configurations", nargs="*", help="default: all of the study's")
    parser.add_argument(
        "--tasks", nargs="+", choices=[LAST, TURNS], default=[LAST, TURNS], help="last turns alone take seconds"
    )
    parser.add_argument("--stock-batch-sizes", nargs="+", type=int, help="default: 1 8 on a CPU, 1 8 32 64 on a GPU")
    parser.add_argument("--contexts", type=int, help="hf-dialogue's, on a CPU; default: the batch size that stock gets")
    parser.add_argument(
        "--rounds", type=int, help="of the last turns, by both in turn; default: 1 on a CPU, 5 on a GPU"
    )
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    study = params.read_study(given.study)
    if study.data is None:
        raise StudyError(f"study {given.study} has no dialogues; choose one that has")
    sizes = given.stock_batch_sizes or ([1, 8, 32, 64] if torch.cuda.is_available() else [1, 8])
    rounds = given.rounds or (5 if torch.cuda.is_available() else 1)
    target = results.folder(study) / ("bench_eval.json" if TURNS in given.tasks else "bench_eval_last_turns.json")
    found = {}
    for name in given.configurations or params.configurations(given.study):
        found[name] = bench(study, name, given.limit, sizes, given.tasks, rounds, given.contexts)
        for task in given.tasks:
            r = found[name]["tasks"][task]
            print(
                f"{name} {task}: {r['dialogue']['questions']} questions, stock "
                f"{r['stock']['seconds_per_question']:.3f} s each (batch "
                f"{r['stock']['batch_size']}), hf-dialogue {r['dialogue']['seconds_per_question']:.4f} s, "
                f"{r['ratio']:.1f} times; same "
                f"prediction {r['identical_share']:.1%}; F1 {r['stock']['f1']:.4f} and {r['dialogue']['f1']:.4f}",
                flush=True,
            )
        for line in found[name]["missed"]:
            print(f"{name} missed: {line}", flush=True)
        # written after every configuration: an interrupted run keeps what it has
        threads = {"torch_threads": torch.get_num_threads(), "load_average": psutil.getloadavg()[0]}
        asked = {"limit": given.limit, "contexts": given.contexts}
        whole = {"provenance": results.provenance(study, None), **asked, **threads, "configurations": found}
        results.write_json(target, whole)
    print(f"wrote {target.relative_to(ROOT)}")
    sys.exit(any(r["missed"] for r in found.values()))


if __name__ == "__main__":
    try:
        main()
    except StudyError as error:
        raise SystemExit(str(error)) from None
