"""Stock lm-eval and hf-dialogue side by side: the same requests, the same weights in memory, one process.

Run by `make bench-eval STUDY=... LIMIT=...`; writes executed/STUDY/bench_eval.json (without coqa_turns among --task:
bench_eval_TASKS.json) and exits with 1 if a target is missed:

- seconds per question, stock over hf-dialogue (`TARGETS`): of coqa_turns, where a turn's prompt is the beginning of the
  next; of coqa_last_turns, which is what stock `coqa` asks and shares nothing: there it may not be slower; of
  few_shot_choices, log-likelihoods under a header of five shots, as MMLU has them; of few_shot_answers, longer answers
  under one header, as GSM8K has them (tests/tasks);
- in float32 the same predictions and scores; else every differing prediction is listed with the logit gap where the two
  part (a CPU with AVX512-BF16 counts as "else" for 4-bit weights: bitsandbytes' kernel for it rounds to bfloat16);
- peak memory no more than stock's at the same batch size (on a GPU hf-dialogue takes no batch size and finds its own;
  --contexts lets it hold more of the longest contexts than the batch size on a CPU).

`prefill_bound` is the ratio that would be reached if generation cost nothing: stock's seconds over hf-dialogue's
prefill alone. `cold` is the process's first run: kernels are loaded, graphs captured; on a GPU its ratio must reach
coqa_turns' target too. At the end transformers' own `generate_batch` (prefix sharing, CUDA graphs) answers a CoQA task
on a GPU (on a CPU with --peer): told to stop at any token with a newline, which cuts answers that begin with one, so
only its time is compared.

Stock gets the batch size at which it is fastest (`--stock-batch-sizes`; of coqa_turns on a CPU the one of the last
turns). A machine that slows down or speeds up meanwhile should favour neither side: the two take turns (`--rounds`),
and on coqa_turns hf-dialogue runs before and after stock. Compared are the medians (of two runs: their mean); every
run's seconds are kept. Seconds are those of `generate_until` and `loglikelihood`, tokenization included; scoring is
lm-eval's own on both sides and comes on top (`scoring_seconds`)."""

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
from transformers import GenerationConfig  # noqa: E402

from helpers import StudyError, params, results  # noqa: E402
from helpers.evaluate.hf_dialogue import HFDialogue  # noqa: E402
from helpers.setup import models  # noqa: E402
from helpers.setup.device import trim  # noqa: E402

TURNS, LAST, CHOICES, ANSWERS = "coqa_turns", "coqa_last_turns", "few_shot_choices", "few_shot_answers"
TARGETS = {
    "cpu": {TURNS: 12, LAST: 0.95, CHOICES: 2, ANSWERS: 2},
    "cuda": {TURNS: 60, LAST: 0.95, CHOICES: 3, ANSWERS: 3},
}
COQA = (TURNS, LAST)
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


class Continuous(HFLM):
    """transformers' continuous batching as an lm-eval model, at its own defaults; an answer ends with its line."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.newline = [n for n in range(len(self.tokenizer)) if "\n" in self.tokenizer.decode([n])]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        length = max(request.args[1]["max_gen_toks"] for request in requests)
        settings = GenerationConfig(
            max_new_tokens=length, do_sample=False, eos_token_id=[self.eot_token_id, *self.newline], pad_token_id=0
        )
        found = self.model.generate_batch([self.tok_encode(r.args[0]) for r in requests], generation_config=settings)
        # Requests are numbered in their order.
        found = sorted(found.values(), key=lambda output: int(output.request_id.rpartition("_")[2]))
        return [self.tok_decode(output.generated_tokens) for output in found]


def run(lm: HFLM, task: str, manager: TaskManager, max_gen_toks: int, device: str) -> dict:
    """One evaluation: seconds, predictions, scores, peak memory."""
    spent, worked = [], []

    def timed(name: str):
        method = getattr(lm, name)

        def call(*arguments, **options):
            start, work = time.perf_counter(), time.process_time()
            found = method(*arguments, **options)
            spent.append(time.perf_counter() - start)
            worked.append(time.process_time() - work)
            return found

        return call

    for name in ("generate_until", "loglikelihood"):
        setattr(lm, name, timed(name))
    start = time.perf_counter()
    with Peak(device) as peak:
        found = simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=manager,
            bootstrap_iters=0,
            gen_kwargs={"max_gen_toks": max_gen_toks} if task in COQA else None,
            verbosity="ERROR",
        )
    samples = sorted(found["samples"][task], key=lambda s: s["doc_id"])
    scores = {k.removesuffix(",none"): v for k, v in found["results"][task].items() if k.endswith(",none")}
    return {
        "questions": len(samples),
        "requests": sum(len(s["resps"]) for s in samples),
        "seconds": sum(spent),
        "cpu_seconds": sum(worked),  # of all threads: on a machine that others use too, less than it took
        "seconds_per_question": sum(spent) / len(samples),
        "scoring_seconds": time.perf_counter() - start - sum(spent),
        "scores": scores,
        "memory_before_mib": peak.before,
        "peak_mib": peak.highest,
        "samples": samples,
    }


def prediction(sample: dict) -> str | int:
    """An answer's first line, or the likeliest choice."""
    said = [response[0] for response in sample["resps"]]
    return first_line(said[0]) if isinstance(said[0], str) else max(range(len(said)), key=lambda n: said[n][0])


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
        wanted, said = prediction(theirs), prediction(ours)
        if wanted == said:
            continue
        if isinstance(said, str):
            gap = parting(lm, ours["arguments"][0][0], lm.generated[n], theirs["resps"][0][0])
        else:
            gap = {"gap": abs(theirs["resps"][wanted][0][0] - theirs["resps"][said][0][0])}
        doc = {k: ours["doc"][k] for k in ("id", "turn") if k in ours["doc"]} or {"doc": ours["doc_id"]}
        different.append(doc | {"stock": wanted, "dialogue": said} | gap)
    return {"identical_share": 1 - len(different) / len(pairs), "different": different}


def bench(study, name: str, given: argparse.Namespace, save) -> None:
    """One configuration. save: called with what there is after every task, so that an interrupted run keeps it."""
    configuration = params.read_configuration(study.study, name)
    model, tokenizer, info = models.load(study, configuration)
    device, longest = info["device"], study.evaluation.max_gen_toks
    sizes = given.stock_batch_sizes or ([1, 8, 64, 256] if device == "cuda" else [1, 8])
    manager = TaskManager(
        include_path=[str(ROOT / "helpers" / "tasks"), str(ROOT / "tests" / "tasks")],
        include_defaults=False,
        metadata={"source": study.data.source, "dialogues": given.limit, "data_revision": study.data.revision},
    )

    def stock(size: int, task: str, kind: type[HFLM] = HFLM) -> dict:
        lm = kind(pretrained=model, tokenizer=tokenizer, batch_size=size)
        return run(lm, task, manager, longest, device) | {"batch_size": size}

    def mine(task: str, size: int) -> tuple[dict, HFDialogue]:
        lm = HFDialogue(
            pretrained=model,
            tokenizer=tokenizer,
            answer_line=task in COQA,  # whose metric reads no further
            batch_size=size,
            contexts=given.contexts,
        )
        return run(lm, task, manager, longest, device) | {"engine": lm.report()}, lm

    # A CPU takes too long to try stock's batch sizes on all turns; a GPU's first run is theirs.
    tasks = sorted(given.task, key=lambda task: task != (LAST if device == "cpu" else TURNS))
    if device == "cpu" and TURNS in tasks and LAST not in tasks:
        tasks = [LAST, *tasks]
    found = {"loading": info, "arithmetic": arithmetic(configuration, info), "tasks": {}}
    cold = tasks[0]
    cold_seconds = mine(cold, sizes[0])[0]["seconds"]  # a warm-up of both sides' kernels: they are the same
    for task in tasks:
        last_best = task == TURNS and device == "cpu"
        wanted = [found["tasks"][LAST]["stock"]["batch_size"]] if last_best else sizes
        ours = [mine(task, wanted[0])[0]] if task == TURNS else []
        tried = []
        for size in wanted:
            if not tried or tried[-1]["batch_size"] < tried[-1]["requests"]:
                tried.append(stock(size, task))
        theirs = [min(tried, key=lambda r: r["seconds"])]
        size = theirs[0]["batch_size"]
        last, lm = mine(task, size)
        ours.append(last)
        for _ in range(0 if task == TURNS else given.rounds - 1):
            theirs.append(stock(size, task))
            last, lm = mine(task, size)
            ours.append(last)
        r = found["tasks"][task] = pair(theirs, ours, lm)
        r["stock_by_batch_size"] = {t["batch_size"]: {k: t[k] for k in ("seconds", "peak_mib")} for t in tried}
        if task == cold:
            r["cold"] = {"seconds": cold_seconds, "ratio": r["stock"]["seconds"] / cold_seconds}
        if task == TURNS:
            # The same questions within a run of all turns: what the report calls the stock task's score.
            asked = [s for s in last["samples"] if s["doc"]["last_turn"]]
            found["last_turns_of_all"] = {metric: sum(s[metric] for s in asked) / len(asked) for metric in ("f1", "em")}
        found["missed"] = missed(found)
        save(found)
        print(f"{name} {task}: {in_words(r)}", flush=True)
    for line in found["missed"]:
        print(f"{name} missed: {line}", flush=True)
    if peers := [task for task in (TURNS, LAST) if task in tasks and (device == "cuda" or given.peer)]:
        r = found["tasks"][peers[0]]
        try:
            peer = stock(1, peers[0], Continuous)
            r["generate_batch"] = {k: peer[k] for k in ("seconds", "peak_mib", "scores")}
        except Exception as error:  # another's engine: what it can't run is told, and the rest stays
            r["generate_batch"] = {"error": f"{type(error).__name__}: {error}"}
        print(f"{name} {peers[0]}, generate_batch: {r['generate_batch']}", flush=True)
        save(found)


def in_words(r: dict) -> str:
    cold = f" ({r['cold']['ratio']:.1f} cold)" if "cold" in r else ""
    return (
        f"{r['dialogue']['questions']} questions, stock {r['stock']['seconds_per_question']:.3f} s each (batch "
        f"{r['stock']['batch_size']}), hf-dialogue {r['dialogue']['seconds_per_question']:.4f} s, {r['ratio']:.1f} "
        f"times{cold}; same prediction {r['identical_share']:.1%}; "
        f"peak {r['peak_mib']['stock']:.0f} and {r['peak_mib']['dialogue']:.0f} MiB"
    )


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
    for task, target in TARGETS[found["loading"]["device"]].items():
        r = found["tasks"].get(task)
        if r is None:
            continue
        if r["ratio"] < target:
            bound = f"; {r['prefill_bound']:.1f} if all but the prefill cost nothing"
            out.append(f"{task}: {r['ratio']:.1f} times stock's speed, at least {target} wanted{bound}")
        if "cold" in r and task == TURNS and r["cold"]["ratio"] < target:
            out.append(
                f"{task}: {r['cold']['ratio']:.1f} times stock's speed in a process's first run, {target} wanted"
            )
        if found["arithmetic"] == "float32" and (r["different"] or r["stock"]["scores"] != r["dialogue"]["scores"]):
            out.append(f"{task}: {len(r['different'])} predictions differ from stock's, none should in float32")
        if r["peak_mib"]["dialogue"] > r["peak_mib"]["stock"]:
            out.append(f"{task}: peak of {r['peak_mib']['dialogue']:.0f} MiB, stock {r['peak_mib']['stock']:.0f}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", default="smollm2-135m")
    parser.add_argument("--limit", type=int, default=20, help="dialogues")
    parser.add_argument("--configurations", nargs="*", help="default: all of the study's")
    kinds = [LAST, TURNS, CHOICES, ANSWERS]
    parser.add_argument("--task", nargs="+", choices=kinds, default=kinds, help="last turns alone take seconds")
    parser.add_argument("--stock-batch-sizes", nargs="+", type=int, help="default: 1 8 on a CPU, 1 8 64 256 on a GPU")
    parser.add_argument("--contexts", type=int, help="hf-dialogue's, on a CPU; default: the batch size that stock gets")
    parser.add_argument("--rounds", type=int, default=1, help="of every task but coqa_turns, by both in turn")
    parser.add_argument("--peer", action="store_true", help="generate_batch on a CPU as well")
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    study = params.read_study(given.study)
    if study.data is None:
        raise StudyError(f"study {given.study} has no dialogues; choose one that has")
    kept = "bench_eval" if TURNS in given.task else "_".join(["bench_eval", *given.task])
    target = results.folder(study) / f"{kept}.json"
    whole = {"provenance": results.provenance(study, None), "limit": given.limit, "contexts": given.contexts}
    found = whole["configurations"] = {}

    for name in given.configurations or params.configurations(given.study):

        def save(one: dict, name=name) -> None:
            found[name] = one
            load = {"torch_threads": torch.get_num_threads(), "load_average": psutil.getloadavg()[0]}
            results.write_json(target, whole | load)

        bench(study, name, given, save)
    print(f"wrote {target.relative_to(ROOT)}")
    sys.exit(any(r["missed"] for r in found.values()))


if __name__ == "__main__":
    try:
        main()
    except StudyError as error:
        raise SystemExit(str(error)) from None
