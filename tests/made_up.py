"""Results of a study that nobody ran, for tests of what reads them: plausible numbers in the shapes of the real files."""

import numpy as np

from helpers import results
from helpers.analysis.redraw import redraw
from helpers.statistics import compare_all, intervals_all

LABELS = {"fp16": "FP16", "int8": "LLM.int8()", "fp8": "FP8", "gptq": "GPTQ", "awq": "AWQ", "nf4": "NF4", "fp4": "FP4"}
FOUR = ("fp16", "int8", "nf4", "fp4")
MODES = {"eager": 50.0, "cuda_graph": 3.0, "compile": 1.7}  # ms per token at batch 1
BITS4 = {"method": "bitsandbytes-4bit", "double_quant": True, "block_size": 64}
METHODS = {
    "fp16": {"method": "none"},
    "int8": {"method": "bitsandbytes-int8", "threshold": 6.0},
    "nf4": BITS4 | {"quant_type": "nf4"},
    "fp4": BITS4 | {"quant_type": "fp4"},
}
LOSS = {"fp16": 0.0, "int8": 0.01, "fp8": 0.01, "gptq": 0.09, "awq": 0.10, "nf4": 0.14, "fp4": 0.15}
SIZE_MB = {"fp16": 513.1, "int8": 230.5, "fp8": 231.0, "gptq": 166.0, "awq": 166.1, "nf4": 170.2, "fp4": 170.2}
PERPLEXITY = {"fp16": 15.87, "int8": 16.15, "fp8": 16.28, "gptq": 18.0, "awq": 18.25, "nf4": 19.26, "fp4": 20.87}
WEIGHT_ERROR = {"int8": 5e-5, "fp8": 7e-4, "gptq": 0.012, "awq": 0.011, "nf4": 0.009, "fp4": 0.015}
PAPER = {
    "fp16": {
        "coqa_f1": 0.6248, "coqa_em": 0.4866, "model_size_mb": 2357.13, "prefill_ms": {"128": 12.3, "512": 45.2},
        "decode_ms_per_token": {"1": 15.8}, "throughput_tokens_per_second": {"1": 63.2, "4": 198.4, "8": 312.1},
    },
    "nf4": {"coqa_f1": 0.6758, "coqa_em": 0.5285, "model_size_mb": 965.13},
    "fp4": {"coqa_f1": 0.5865, "coqa_em": 0.4483, "model_size_mb": 965.13},
}  # fmt: skip


def result(study, name: str | None, kind: str, data: dict | None, reason: str | None = None) -> results.Result:
    """One result file; without data, a failed one."""
    quantization = METHODS.get(name, {"method": name, "group_size": 64})
    return results.Result(
        schema_version=1,
        kind=kind,
        study=study.study,
        configuration=name,
        status="failed" if data is None else "ok",
        reason=reason,
        data=data,
        provenance={
            "configuration": {"configuration": name, "label": LABELS.get(name, name), "quantization": quantization}
            if name
            else None,
            "packages": {"torch": "2.13.0", "transformers": "5.17.0", "bitsandbytes": "0.50.2", "lm_eval": "0.4.13"},
            "processor": "Some CPU @ 2.20GHz",
            "cores": 2,
            "memory_gib": 15.6,
            "system": "Linux",
            "python": "3.11.9",
            "gpu": {"name": "Some GPU 80GB", "cuda": "13.0", "driver": "580.1"},
        },
    )


def spread(median: float, unit: str) -> dict:
    return {f"median_{unit}": median, f"q25_{unit}": 0.97 * median, f"q75_{unit}": 1.08 * median, "n": 10}


def benchmark(name: str, modes=tuple(MODES)) -> dict:
    slow, size = {"fp16": 1.0, "int8": 2.4}.get(name, 1.3), SIZE_MB[name]
    state = 0.0 if name == "fp16" else 5.1
    decode = []
    for mode in modes:
        for batch in (1, 4, 8, 16, 32, 64):
            read = (size + batch * 8) * 2**20
            row = {"mode": mode, "batch": batch, "bytes_per_step": read, "limit_ms": read / 3e9}
            decode.append(row | spread(MODES[mode] * (slow + batch / 60), "ms_per_token"))
    return {
        "device": "cuda",
        "loading": {"dtype": "float16", "parameters": 134_515_008},
        "hardware": {"copy_bandwidth_gb_per_second": 3000.0, "matmul_tflops": 700.0},
        "memory": {
            "allocated_mb": size,
            "reported_footprint_mb": size - state,
            "quantization_state_mb": state,
            "linear_layers_mb": size - state - 108,
        },
        "prefill": [
            {"mode": "eager", "tokens": t, "limit_ms": 0.4 + t / 90} | spread(slow * (30 + t / 20), "ms")
            for t in (128, 256, 512, 1024, 2048, 4096)
        ],
        "decode": decode,
    }


def weights() -> dict:
    """What helpers.weights.analyse says of the full-precision weights."""
    levels, edges = np.linspace(-1, 1, 16), np.linspace(-1, 1, 81)
    books = {
        "nf4": np.sign(levels) * np.abs(levels) ** 1.4,
        "fp4": np.array(
            [-1, -0.67, -0.5, -0.33, -0.25, -0.17, -0.005, -0.0, 0.0, 0.005, 0.17, 0.25, 0.33, 0.5, 0.67, 1]
        ),
        "lloyd_max": np.sign(levels) * np.abs(levels) ** 1.2,
        "gaussian_lloyd_max": np.sign(levels) * np.abs(levels) ** 1.3,
        "uniform": levels,
    }
    bell = np.exp(-((edges[1:] - 0.01) ** 2) * 6)
    return {
        "codebooks": {name: {"levels": book.tolist()} for name, book in books.items()},
        "histogram": {"edges": edges.tolist(), "density": bell.tolist(), "gaussian_density": (bell * 0.97).tolist()},
    }


def sensitivity() -> dict:
    rng = np.random.default_rng(1)
    rows = [
        {
            "depth": depth,
            "format": name,
            "relative_squared_error": error,
            "ln_ratio": 0.01,
            "kl": float(error * rng.uniform(0.1, 2)),
        }
        for depth in range(30)
        for name, error in (("nf4", 0.0085 + 0.0001 * depth), ("fp4", 0.013 + 0.0001 * depth))
    ]
    return {"texts": 4, "tokens": 640, "layers": rows, "formats": [], "spearman": {"layers": {"n": 60, "kl": -0.31}}}


def fidelity(name: str) -> dict:
    ln = float(np.log(PERPLEXITY[name] / PERPLEXITY["fp16"]))
    shape = {"mean": 1.0, "median": 0.4, "p95": 4.0, "p99": 8.0, "p999": 20.0, "max": 60.0}
    kl = {key: max(ln, 1e-7) * factor for key, factor in shape.items()}
    intervals = {key: {"ci_low": 0.8 * value, "ci_high": 1.3 * value} for key, value in kl.items() if key != "max"}
    perplexity = {
        "full": PERPLEXITY["fp16"],
        "quantized": PERPLEXITY[name],
        "ln_ratio": ln,
        "ci_low": ln - 0.03,
        "ci_high": ln + 0.03,
    }
    own = {"formats": {name: {"relative_squared_error": WEIGHT_ERROR.get(name)}}}
    return {
        "tokens": 10_000,
        "dialogues": 50,
        "perplexity": {"all": perplexity | {"reason": None}},
        "kl": kl | {"intervals": intervals},
        "weights": weights() if name == "fp16" else own,
    } | ({"sensitivity": sensitivity()} if name == "fp16" else {})


def study_results(study, names=FOUR, modes=tuple(MODES), dialogues=50) -> tuple[dict, dict]:
    """`found` and `analysis`: dialogues of 10 turns, scores from a seeded generator, judged by the project's own statistics."""
    rng = np.random.default_rng(0)
    questions = 10 * dialogues
    clusters, last = np.repeat(np.arange(dialogues), 10), np.arange(questions) % 10 == 9
    base = np.clip(rng.normal(0.45, 0.2, dialogues)[clusters] + rng.normal(0, 0.3, questions), 0, 1)
    f1 = {n: np.clip(base - LOSS[n] + (n != "fp16") * rng.normal(0, 0.15, questions), 0, 1) for n in names}
    scores = {n: {"f1": values, "em": (values > 0.5).astype(float)} for n, values in f1.items()}
    last_scores = {n: {metric: values[last] for metric, values in columns.items()} for n, columns in scores.items()}
    pairs = {("fp16", "nf4"): [0.051], ("fp4", "nf4"): [], ("nf4", "fp4"): [], ("fp16", "fp4"): []}
    analysis = {
        "means": intervals_all(scores, clusters, ["f1", "em"], resamples=2000),
        "comparisons": compare_all(scores, clusters, ["f1", "em"], resamples=2000),
        "last_turn": {"means": intervals_all(last_scores, clusters[last], ["f1", "em"], resamples=2000)},
        "redraw": [
            redraw({n: values[last] for n, values in f1.items()}, pairs, draws=2000),
            redraw(f1, pairs, clusters=clusters, draws=2000),
        ],
        "paper_model": "Llama-3.2-1B",
        "paper": PAPER,
    }
    loading = {"dtype": "float16", "parameters": 134_515_008}
    answered = {
        "tasks": {},
        "files": {},
        "questions": questions,
        "dialogues": dialogues,
        "seconds": 60.0,
        "engine": {},
        "process_peak_mb": 2000.0,
    }
    found = {
        n: {
            "evaluation": result(study, n, "evaluation", answered | {"loading": loading}),
            "benchmark": result(study, n, "benchmark", benchmark(n, modes)),
            "fidelity": result(study, n, "fidelity", fidelity(n)),
        }
        for n in names
    }
    return found, analysis
