"""Decode variants at one row, timed side by side on a GPU: what Inductor's options and batches cost and save.

    python tests/bench_decode.py [--layers 16] [--minutes 6] [--json executed/reference/h200/bench_decode.json]

On Llama-3.2-1B's shape with random weights, in bfloat16 and packed to 4 bits. Every variant is built from an empty
compile cache of its own, so that its build time is that of a first run. A variant that fails, or for which no time is
left, is a row with its reason.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.benchmark import decoder, generation, passes, roofline, timing
from tests.check_gpu import SIZES, llama, quantize

# name: (batch, options of decoder.compile_options; None: not compiled), most telling first
VARIANTS = {
    "graph": (1, None),
    "compiled, descent": (1, {"combo": False}),
    "compiled, descent, combo (default)": (1, {}),
    "compiled, plain": (1, {"descent": False, "combo": False}),
    "compiled, combo, all directions": (1, {"all_directions": True}),
    "compiled, combo, pointwise": (1, {"pointwise": True}),
    "batch 8: graph": (8, None),
    "batch 8: compiled (default)": (8, {}),
    "batch 8: compiled, combo": (8, {"combo": True}),
    "batch 8: compiled, descent": (8, {"descent": True}),
    "batch 8: compiled, descent, combo": (8, {"descent": True, "combo": True}),
}


def variant(model, bench, name: str, batch: int, options: dict | None) -> dict:
    """One row: ms per token, its limit, seconds to build, leading greedy tokens equal to eager's, or the reason."""
    row = {"variant": name, "batch": batch, "ms": None, "limit_ms": None, "build_seconds": None, "reason": None}
    running = None
    with tempfile.TemporaryDirectory(prefix="inductor-", ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        os.environ.pop("TRITON_CACHE_DIR", None)
        try:
            ids = generation.prompt(model, batch, 128, 0)
            built = decoder.compile_options(batch, **options) if options is not None else None
            running = decoder.Decoder(model, ids, 64, captured=True, compiled=options is not None, options=built)
            samples, tokens = generation.decoder_samples(running, SIZES)
            found = timing.summary(samples, "ms")
            count = roofline.step_bytes(model, batch, 128 + tokens / 2, bench.kv_bytes)
            row |= {"ms": found["median_ms"], "n": found["n"], "build_seconds": running.build_seconds}
            bandwidth = bench.hardware["copy_bandwidth_gb_per_second"]
            row["limit_ms"] = roofline.memory_limit_ms(count, bandwidth)
            row["identical"] = generation.agreement(model, ids, running, 32, "compile")["identical"]
            row["options"] = sorted(built or {})
        except Exception as error:
            row["reason"] = generation.first_line(error)
        finally:
            if running is not None:
                running.close()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU")
    end, longest = time.perf_counter() + 60 * given.minutes, 0.0
    model = llama(given.layers)
    result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "layers": given.layers, "rows": []}
    for weights in ("bfloat16", "packed int4"):
        if weights != "bfloat16":
            quantize(model)
            torch.cuda.empty_cache()
        bench = passes.ready(passes.models.Loaded(model, None, {}), SIZES, 0, {}, time.perf_counter())
        # Half of the time for each kind of weights.
        until = end if weights != "bfloat16" else end - 30 * given.minutes
        for name, (batch, options) in VARIANTS.items():
            began = time.perf_counter()
            if began + longest > until:
                row = {
                    "variant": name,
                    "batch": batch,
                    "ms": None,
                    "reason": f"not measured: {given.minutes} minutes over",
                }
            else:
                row = variant(model, bench, name, batch, options)
                longest = max(longest, time.perf_counter() - began)
            result["rows"].append({"weights": weights} | row)
            ms = f"{row['ms']:.3f} ms, {row['ms'] / row['limit_ms']:.2f}x its limit" if row["ms"] else row["reason"]
            built = f", built in {row['build_seconds']:.0f} s" if row.get("build_seconds") else ""
            print(f"{weights:12s} {name:36s} {ms}{built}", flush=True)
            if given.json:
                given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
