"""A few minutes on a GPU: packed kernels, decode modes, profile, energy and largest batch on Llama-3.2-1B's shape.

    python tests/check_gpu.py [--layers 16] [--json FILE]

Every check prints one line, ok or FAILED with its reason, and the rest goes on; exit status 1 if one failed. What is
measured on the way (rows from which unpacking is faster, `packed.UNPACK_ROWS`) is printed as a table.
"""

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import AutoConfig, AutoModelForCausalLM

from helpers import params
from helpers.benchmark import capacity, conditions, decoder, generation, passes, timing
from helpers.setup import layers, models, packed

DEVICE = torch.device("cuda")
SHAPES = [(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192), (1536, 576), (576, 1536)]  # out, in
SIZES = params.GPUSizes(
    prefill_tokens=[128, 512], batch_sizes=[1, 8], contexts=[1024], decode_tokens=32, repeats=5, warmup=2
)
FAILED, FOUND = [], {}


def check(name: str):
    """Run the function now; a failure is printed and the rest goes on."""

    def run(function):
        began = time.perf_counter()
        try:
            said = function()
            FOUND[name] = said
            print(f"ok      {name} ({time.perf_counter() - began:.1f} s): {said}", flush=True)
        except Exception as error:
            FAILED.append(name)
            FOUND[name] = f"failed: {error}"
            print(f"FAILED  {name}: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc(limit=-4)
        return function

    return run


def llama(count: int, dtype=torch.bfloat16):
    architecture = dict(params.read_study("llama-3.2-1b-random").model.architecture) | {"num_hidden_layers": count}
    config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    torch.manual_seed(0)
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def integers(out_features: int, in_features: int, group: int = 64):
    values = torch.randint(0, 16, (out_features, in_features), device=DEVICE)
    scale = (torch.rand(out_features, in_features // group, device=DEVICE) * 0.01 + 0.01).bfloat16()
    zero = (torch.randn_like(scale.float()) * 0.01).bfloat16()
    return values, scale, zero


def quantize(model, group: int = 128) -> None:
    """Every linear layer rounded to 4-bit integers, as GPTQ's symmetric layers are kept."""
    for name, module in list(layers.linear_layers(model).items()):
        grouped = module.weight.detach().float().view(module.out_features, -1, group)
        scale = (grouped.abs().amax(-1) / 7.5).bfloat16()
        values = (grouped / scale.float()[..., None]).round().clamp(-8, 7).int().view(module.weight.shape) + 8
        parent, _, own = name.rpartition(".")
        new = packed.Int4Linear(values, scale, torch.zeros_like(scale), module.bias).eval()
        setattr(model.get_submodule(parent), own, new)


def microseconds(function) -> float:
    """Of one call, from a CUDA graph of twenty: no launches."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            function()
    return min(timing.repeat(graph.replay, DEVICE, 10, 3)) * 1e3 / 20


def bench(model, seconds: float = 300.0, dtype: str = "bfloat16") -> passes.Bench:
    """As passes.load gives it, of a model that is there."""
    info = {"dtype": dtype, "packed": True, "kernel": "check"}
    began = time.perf_counter() + seconds - passes.DEADLINE_SECONDS["cuda"]
    return passes.ready(models.Loaded(model, None, info), SIZES, 0, {}, began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    passes.own_compile_cache()

    @check("the tile's layout is read off the operator")
    def _():
        values, scale, zero = integers(64, 640)
        layer = packed.Int4Linear(values, scale, zero)
        tiles = packed._nibbles(layer.packed)[..., layer.order].view(8, 5, 8, 128).transpose(1, 2).reshape(64, 640)
        assert torch.equal(tiles.int(), values.int()), "unpacked integers differ"
        return "64 x 640 integers equal"

    for out_features, in_features in SHAPES:

        @check(f"product and unpacked weight, {out_features} x {in_features}")
        def _(out_features=out_features, in_features=in_features):
            said = []
            for group in (g for g in (32, 64, 128) if in_features % g == 0):
                values, scale, zero = integers(out_features, in_features, group)
                layer = packed.Int4Linear(values, scale, zero)
                weight = (values.view(*scale.shape, group) - 8) * scale.float()[..., None] + zero.float()[..., None]
                weight = weight.view(out_features, in_features)
                for rows in (1, 8, 64, packed.UNPACK_ROWS):
                    x = torch.randn(rows, in_features, device=DEVICE).bfloat16()
                    expected = x.float() @ weight.T
                    error = float((layer(x).float() - expected).norm() / expected.norm())
                    said.append(error)
                    assert error < 0.006, f"group {group}, {rows} rows: off by {error:.4f}"
            return f"relative error at most {max(said):.4f}"

    @check("torchao's int4 without its padding")
    def _():
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        said = []
        for out_features, in_features in ((1536, 576), (576, 1536), (8192, 2048)):
            linear = torch.nn.Linear(in_features, out_features, bias=False, device=DEVICE, dtype=torch.bfloat16)
            holder = torch.nn.Sequential(linear)
            config = Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d")
            quantize_(holder, config)
            linear = holder[0]
            mine = packed.Int4Linear.of_torchao(linear)
            x = torch.randn(4, in_features, device=DEVICE).bfloat16()
            expected = linear(x).float()
            error = float((mine(x).float() - expected).norm() / expected.norm())
            assert error < 0.004, f"{out_features} x {in_features}: off by {error:.4f}"
            theirs = linear.weight.qdata.nbytes + linear.weight.scale_and_zero.nbytes
            said.append(f"{sum(layers.stored_bytes(mine).values()) / theirs:.2f}")
        return f"bytes over torchao's: {', '.join(said)}"

    @check("microseconds by rows: packed, unpacked, plain bfloat16")
    def _():
        table = {}
        for out_features, in_features in ((8192, 2048), (2048, 8192), (2048, 2048), (1536, 576)):
            layer = packed.Int4Linear(*integers(out_features, in_features))
            plain = torch.randn(out_features, in_features, device=DEVICE).bfloat16()
            for rows in (1, 4, 8, 16, 32, 64, 96, 128, 256, 512):
                x = torch.randn(rows, in_features, device=DEVICE).bfloat16()
                layer.unpack_rows = 10**9
                one = microseconds(lambda layer=layer, x=x: layer(x))
                layer.unpack_rows = 1
                two = microseconds(lambda layer=layer, x=x: layer(x))
                three = microseconds(lambda plain=plain, x=x: x @ plain.T)
                table[f"{out_features}x{in_features} {rows}"] = [round(v, 1) for v in (one, two, three)]
        for key, row in table.items():
            print(f"        {key:16s} {row}")
        return table

    model = llama(given.layers)

    @check("bfloat16: decode modes")
    def _():
        return modes(model)

    @check("largest batch, bfloat16")
    def _():
        return largest(model)

    quantize(model)
    torch.cuda.empty_cache()

    @check("packed: memory")
    def _():
        return f"{sum(layers.stored_bytes(model).values()) / 2**20:.1f} MB of tensors"

    @check("packed: decode modes")
    def _():
        return modes(model)

    @check("largest batch, packed")
    def _():
        return largest(model)

    @check("energy")
    def _():
        running = decoder.Decoder(model, generation.prompt(model, 1, 128, 0), 32, captured=True)

        def run() -> None:
            running.reset()
            for _ in range(31):
                running.step()

        assert conditions.energy_reason(DEVICE) is None, conditions.energy_reason(DEVICE)
        row = passes.energy_row("cuda_graph", 1, run, 31, DEVICE, includes_prefill=False)
        running.close()
        return row

    @check("conditions by pynvml")
    def _():
        found = conditions.conditions(DEVICE)
        assert conditions.nvml()[1] is None and found["gpu_processes"] >= 1, conditions.nvml()[1]
        return found

    if given.json:
        given.json.write_text(json.dumps(FOUND, indent=1, default=str))
    print(f"{len(FAILED)} failed: {FAILED}" if FAILED else "all ok")
    sys.exit(bool(FAILED))


def modes(model) -> dict:
    """ms per token by mode, batch and context; raises if a mode could not be measured or disagrees with eager."""
    one, said = bench(model), {}
    energy, passes.ENERGY_SECONDS = passes.ENERGY_SECONDS, 1.0
    try:
        for mode in SIZES.modes:
            found = passes.decode(one, mode, progress=lambda line: None)
            for row in found["decode"]:
                key = f"{mode} batch {row['batch']} context {row['prompt_tokens']}"
                said[key] = f"{row['median_ms_per_token']:.3f} ms, {row['percent_of_limit']:.0f}% of limit"
            for row in found["profile"]:
                speed = f", {row['gb_per_second']:.0f} GB/s" if row["gb_per_second"] else ""
                print(f"        {mode}: {row['what']}: {row['ms_per_step']:.3f} ms, {row['kernels']} kernels{speed}")
            for row in found["agreement"]:
                said[f"{mode} agrees"] = f"{row['identical']} of {row['tokens']}, explained {row['explained']}"
            left_out = [
                r for r in found["left_out"] if not r["what"].startswith("energy") and "compiling" not in r["reason"]
            ]
            assert not left_out, left_out
            print(f"        {mode}: {said}", flush=True)
    finally:
        passes.ENERGY_SECONDS = energy
    return said


def largest(model) -> list:
    loaded = models.Loaded(model, None, {})
    rows, reason = capacity.largest_batches(loaded, SIZES, [4], 0, time.perf_counter() + 40, progress=lambda line: None)
    assert not reason and rows[0]["batch"], reason or rows
    (row,) = rows
    assert row["fails"] is None or row["fails"] - row["batch"] <= max(1, 0.01 * row["batch"]), row
    return {k: v for k, v in row.items() if not k.startswith(("samples", "q"))}


if __name__ == "__main__":
    main()
