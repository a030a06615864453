"""Choose GPTQ's recipe on held-out dialogues alone: calibrate on some of them, score the others.

Every recipe is quantized with each calibration seed; its score is the perplexity of the held-out dialogues that the
seed did not draw, divided by full precision's on the same ones. No dialogue that a study evaluates is read.

    python tests/bench_recipe.py --seeds 0 1 2          # writes executed/reference/recipe.json
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig  # noqa: E402

from helpers import params, results  # noqa: E402
from helpers.setup import calibrated, coqa, models  # noqa: E402
from helpers.setup.device import device_and_dtype  # noqa: E402

SAMPLES = 12
LOADING = Lock()  # transformers makes empty models on a device that all threads then have
GRID = {"scales": ("mse", "minmax"), "dampening": (0.01, 0.1)}


def perplexity(model, texts: list[list[int]]) -> float:
    loss = tokens = 0
    for ids in texts:
        given = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            logits = model(given).logits[0, :-1].float()
        loss += torch.nn.functional.cross_entropy(logits, given[0, 1:], reduction="sum").item()
        tokens += len(ids) - 1
    return math.exp(loss / tokens)


def row(source: str, seed: int, ids: list, texts: list, base: float, options, device, dtype) -> dict:
    """One recipe with one seed's calibration: quantized, and scored on the texts that the seed left."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "model"
        seconds = calibrated._quantize(source, target, options, ids, dtype)
        with LOADING:
            model = AutoModelForCausalLM.from_pretrained(
                target, dtype=dtype, use_safetensors=True, quantization_config=CompressedTensorsConfig(dequantize=True)
            )
            ratio = perplexity(model.to(device).eval(), texts) / base
    recipe = {name: getattr(options, name) for name in GRID}
    found = {"seed": seed, **recipe, "perplexity_ratio": ratio, "quantize_seconds": round(seconds, 1)}
    print(found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="smollm2-135m")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="recipes at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "executed/reference/recipe.json")
    options = parser.parse_args()
    study = params.read_study(options.study)
    shipped = params.read_configuration(options.study, "gptq").quantization
    source = models.prepare(study)
    device, dtype, _ = device_and_dtype()
    tokenizer = AutoTokenizer.from_pretrained(source)
    full = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True).to(device).eval()
    waiting = []
    with ThreadPoolExecutor(options.jobs) as pool:  # quantizing is a process of its own
        for seed in options.seeds:
            calibration = params.Calibration(source="embedded-held-out", samples=SAMPLES, seed=seed)
            drawn = {d["id"] for d in calibrated._dialogues(study, calibration)}
            ids, _ = calibrated.samples(study, calibration, tokenizer, 0)
            others = [d for d in coqa.read(calibration.source) if d["id"] not in drawn]
            texts = [tokenizer(calibrated.text(d))["input_ids"] for d in others]
            base = perplexity(full, texts)
            for values in itertools.product(*GRID.values()):
                recipe = shipped.model_copy(update=dict(zip(GRID, values, strict=True)))
                waiting.append(pool.submit(row, source, seed, ids, texts, base, recipe, device, dtype))
        rows = [future.result() for future in waiting]
    means = {}
    for values in itertools.product(*GRID.values()):
        recipe = dict(zip(GRID, values, strict=True))
        ratios = [r["perplexity_ratio"] for r in rows if all(r[k] == v for k, v in recipe.items())]
        means[", ".join(f"{k} {v}" for k, v in recipe.items())] = sum(ratios) / len(ratios)
    found = {"study": options.study, "calibrated_on": SAMPLES, "rows": rows, "mean_perplexity_ratio": means}
    found |= {"best": min(means, key=means.get), "provenance": results.provenance(study, None)}
    results.write_json(options.out, found)
    print(json.dumps(means, indent=2))


if __name__ == "__main__":
    main()
