"""hf-dialogue in two real processes: the same answers as one process and stock lm-eval give, and no dialogue torn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine import MIXED, SHOTS, byte_tokenizer, choices, conversation, requests, small
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from helpers import ROOT
from helpers.evaluate.hf_dialogue import HFDialogue
from helpers.evaluate.processes import cuts

DIALOGUES = 3


def evaluate(lm: HFLM) -> dict | None:
    """Dialogues and log-likelihoods by lm-eval's own evaluator, which deals documents out to the processes; None in
    all processes but the first."""
    manager = TaskManager(
        include_path=[str(ROOT / "helpers/tasks"), str(ROOT / "tests/tasks")],
        include_defaults=False,
        metadata={"source": "embedded", "dialogues": DIALOGUES},
    )
    tasks = ["coqa_turns", "few_shot_choices"]
    return simple_evaluate(
        lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, gen_kwargs={"max_gen_toks": 4}, verbosity="ERROR"
    )


def said(found: dict) -> dict:
    """Every task's answers in the order of its documents, and scores."""
    samples = {
        task: [s["filtered_resps"] for s in sorted(rows, key=lambda s: s["doc_id"])]
        for task, rows in found["samples"].items()
    }
    scores = {
        task: {k: v for k, v in r.items() if k in ("f1,none", "em,none", "acc,none")}
        for task, r in found["results"].items()
    }
    return {"samples": samples, "scores": scores}


def mixed() -> list:
    """Requests of which the first is not for hf-dialogue to answer."""
    asked = requests(MIXED)
    asked[0].arguments[1]["num_beams"] = 2
    return asked


def main(model: str, out: str) -> None:
    """What every process does."""
    lm = get_model("hf-dialogue")(pretrained=model, device="cpu", dtype="float32")
    found = evaluate(lm)
    report = {"counts": dict(lm.counts), "fallbacks": dict(lm.fallbacks), "size": lm.world_size}
    report["mixed"] = lm.generate_until(mixed()[lm.rank :: lm.world_size], True)
    report["left"] = dict(lm.fallbacks)
    texts = MIXED[lm.rank :: lm.world_size]
    report["rolling"] = lm.loglikelihood_rolling(choices([(t,) for t in texts], "loglikelihood_rolling"), True)
    report |= said(found) if lm.rank == 0 else {}
    Path(out, f"{lm.rank}.json").write_text(json.dumps(report))


def test_two_processes_answer_as_one_and_as_stock_does(tmp_path):
    tokenizer = byte_tokenizer()
    model = small("llama", tokenizer, max_position_embeddings=8192)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [*launch, __file__, str(tmp_path / "model"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2)]
    assert [r["size"] for r in ranks] == [2, 2] and not any(r["fallbacks"] for r in ranks)

    one = HFDialogue(pretrained=model, tokenizer=tokenizer)
    alone, stock = said(evaluate(one)), said(evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)))
    for expected in (alone, stock):
        found = ranks[0]
        assert found["samples"]["coqa_turns"] == expected["samples"]["coqa_turns"]
        assert found["scores"] == expected["scores"]
        pairs = zip(found["samples"]["few_shot_choices"], expected["samples"]["few_shot_choices"], strict=True)
        for mine, theirs in pairs:
            assert [m[1] for m in mine] == [bool(t[1]) for t in theirs]
            assert [m[0] for m in mine] == pytest.approx([t[0] for t in theirs], abs=1e-3, rel=1e-5)
    # Of three stories one at most is run by both; with lm-eval's own dealing all would be.
    assert sum(r["counts"]["prefill_tokens"] for r in ranks) < 4 / 3 * one.counts["prefill_tokens"]
    assert all(r["counts"]["prefill_tokens"] > 0.2 * one.counts["prefill_tokens"] for r in ranks)
    answers = one.generate_until(mixed(), True)
    assert [r["mixed"] for r in ranks] == [answers[0::2], answers[1::2]]
    assert sorted(sum(r["left"].values()) for r in ranks) == [0, 1]
    rolling = one.loglikelihood_rolling(choices([(t,) for t in MIXED], "loglikelihood_rolling"), True)
    for n, r in enumerate(ranks):
        assert r["rolling"] == pytest.approx(rolling[n::2], rel=1e-5)


def test_where_requests_are_cut():
    topics = ["The cat sat on the mat. ", "Snow fell all night. ", "A dog barked at noon. ", "Rain is due at ten. "]
    dialogues = [conversation(6, topic) for topic in topics]
    texts = sorted(text for d in dialogues for text in d)
    assert cuts(texts, 4) == [0, 6, 12, 18, 24] and cuts(texts, 2) == [0, 12, 24]  # between dialogues
    uneven = sorted(conversation(20) + conversation(12, "Snow fell all night. "))
    assert cuts(uneven, 2) in ([0, 20, 32], [0, 12, 32])
    shots = sorted(f"{SHOTS[0]}{n:03d}" for n in range(100))  # one header: torn, there is no other way
    assert cuts(shots, 4) == [0, 25, 50, 75, 100]
    assert cuts(["only"], 3)[-1] == 1 and cuts([], 2) == [0, 0, 0]


if __name__ == "__main__":
    main(*sys.argv[1:])
