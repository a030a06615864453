"""Prefill and decode by optimum-benchmark and by helpers.benchmark, in turn, in one process, on the same weights.

Run by `make bench-peer STUDY=...` where optimum-benchmark is installed (`pip install optimum-benchmark==0.6.0`; it is
not among the requirements); writes executed/STUDY/bench_peer.json. Both time transformers' eager `generate` at batch
1: prefill is the time to the first token, decode the time per output token after it. They take turns, so that a
machine that changes its pace favours none; the first round warms up and does not count.

optimum-benchmark runs under torch.inference_mode, which starts kernels faster than the no_grad of a plain `generate`.
So ours is timed under both: under inference_mode the two should agree within 5%; what no_grad takes beyond that is
what users of `generate` pay.
"""

import argparse
import logging
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from helpers import StudyError, params, results  # noqa: E402
from helpers.benchmark import generation  # noqa: E402
from helpers.setup import models  # noqa: E402

NAME = "fp16"
WITHIN = 0.05
OURS, ALIKE, PEER = "ours", "ours, inference_mode", "peer"


def theirs(folder: str, loaded, sizes, tokens: int) -> tuple[list[float], list[float]]:
    """The same by optimum-benchmark, which loads the weights itself."""
    import transformers

    # optimum-benchmark 0.6.0 asks for a name that transformers 5 no longer exports; it tells tokenizers by it.
    transformers.SpecialTokensMixin = transformers.PreTrainedTokenizerBase
    from optimum_benchmark import Benchmark, BenchmarkConfig, InferenceConfig, InlineConfig, PyTorchConfig

    config = BenchmarkConfig(
        name="peer",
        launcher=InlineConfig(),
        scenario=InferenceConfig(
            iterations=sizes.repeats,
            duration=0,
            warmup_runs=sizes.warmup,
            input_shapes={"batch_size": 1, "sequence_length": sizes.prompt_tokens},
            generate_kwargs={"max_new_tokens": tokens, "min_new_tokens": tokens},
        ),
        backend=PyTorchConfig(
            model=folder,
            device=loaded.info["device"],
            torch_dtype=loaded.info["dtype"],
            task="text-generation",
            no_weights=False,
        ),
    )
    report = Benchmark.launch(config)
    return [1e3 * s for s in report.prefill.latency.values], [
        1e3 * s / (tokens - 1) for s in report.decode.latency.values
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    try:
        import optimum_benchmark  # noqa: F401
    except ImportError:
        raise StudyError(
            "optimum-benchmark is not installed; `pip install optimum-benchmark==0.6.0` into this environment"
        ) from None
    logging.disable(logging.WARNING)
    study, configuration = params.read_study(given.study), params.read_configuration(given.study, NAME)
    loaded, folder = models.load(study, configuration), models.prepare(study)
    sizes = getattr(study.benchmark, loaded.info["device"])
    ids, rounds = generation.prompt(loaded.model, 1, sizes.prompt_tokens, study.seed), []
    for number in range(given.rounds + 1):
        *plain, tokens = generation.eager_samples(loaded.model, ids, sizes)
        with torch.inference_mode():
            *inference, _ = generation.eager_samples(loaded.model, ids, sizes)
        for who, (prefill, decode) in (
            (OURS, plain),
            (ALIKE, inference),
            (PEER, theirs(folder, loaded, sizes, tokens)),
        ):
            row = {"by": who, "tokens": tokens, "prefill_ms": prefill, "decode_ms_per_token": decode}
            print(
                number,
                who,
                {k: round(statistics.median(v), 3) for k, v in row.items() if isinstance(v, list)},
                flush=True,
            )
            rounds.append(row | {"warmup": number == 0})
    found = {"rounds": rounds, "prompt_tokens": sizes.prompt_tokens, "ratio": {OURS: {}, ALIKE: {}}}
    for key in ("prefill_ms", "decode_ms_per_token"):
        medians = {
            w: statistics.median(x for r in rounds if r["by"] == w and not r["warmup"] for x in r[key])
            for w in (OURS, ALIKE, PEER)
        }
        for who in (OURS, ALIKE):
            found["ratio"][who][key] = medians[who] / medians[PEER]
            ratio = found["ratio"][who][key]
            print(f"{key}: {who} {medians[who]:.2f}, optimum-benchmark {medians[PEER]:.2f}, ratio {ratio:.3f}")
    target = results.folder(study) / "bench_peer.json"
    results.write_json(target, {"provenance": results.provenance(study, configuration)} | found)
    print(f"wrote {target.relative_to(ROOT)}")
    sys.exit(any(abs(r - 1) > WITHIN for r in found["ratio"][ALIKE].values()))


if __name__ == "__main__":
    try:
        main()
    except StudyError as error:
        raise SystemExit(str(error)) from None
