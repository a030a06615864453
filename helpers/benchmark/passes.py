"""What a configuration costs on this machine: memory, latency, throughput, energy, each in a pass of its own.

    result = benchmark.measure(study, configuration)        # everything, JSON-able, in one process

or step by step, as `measure` does it: `load`, `memory_pass`, `roofline.bandwidth_and_rate`, `prefill_pass`, `throughput.eager_pass`,
`throughput.decoder_pass`, `capacity.largest_batches`, `int8_limit.reproduce`.

*Prefill* is one forward pass over the prompt, keys and values kept, logits of the last position. MB is 2**20 bytes. What was left out,
for time or because the machine or method has no such thing, is listed with its reason and never filled in.
"""

import time

import torch

from helpers.benchmark import capacity, conditions, decoder, int8_limit, roofline, throughput, timing
from helpers.benchmark.throughput import first_line, generate, prompt
from helpers.setup import models
from helpers.setup.device import MB, device_and_dtype, kv_cache_bytes_per_token, peak_mb, process_peak_mb, reset_peak
from helpers.setup.layers import checkpoint_bytes, linear_layers, stored_bytes, widest_int8_layer

DEADLINE_SECONDS = {"cpu": 60.0, "cuda": 160.0}  # of the whole measurement: nothing optional is begun after it
CAPACITY_SECONDS = 30.0  # of these, kept for the largest batches


def load(study, configuration):
    """(loaded, memory so far): reported_footprint_mb, allocated_mb, quantization_state_mb, linear_layers_mb (without it),
    reserved_mb, checkpoint_mb, peak_load_mb.

    allocated_mb is what torch's allocator holds on a GPU, and the bytes of all tensors found on a CPU.
    """
    device = device_and_dtype(configuration.dtype)[0]
    no_peak = reset_peak(device)
    gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if gpu else 0
    loaded = models.load(study, configuration)
    allocated = torch.cuda.memory_allocated() - before if gpu else None
    peak = None if no_peak else peak_mb(device)
    stored = stored_bytes(loaded.model)
    layers = torch.nn.ModuleList(linear_layers(loaded.model).values())
    found = {
        "reported_footprint_mb": loaded.model.get_memory_footprint() / MB,
        "allocated_mb": (sum(stored.values()) if allocated is None else allocated) / MB,
        "tensors_mb": sum(stored.values()) / MB,
        "quantization_state_mb": stored["quantization_state"] / MB,
        "linear_layers_mb": stored_bytes(layers)["parameters_and_buffers"] / MB,
        "reserved_mb": torch.cuda.memory_reserved() / MB if gpu else None,
        "checkpoint_mb": checkpoint_bytes(loaded.model) / MB,
        "peak_load_mb": peak,
        "peak_kind": "allocated on the GPU" if gpu else "resident memory of the whole process",
        "peak_reason": no_peak,
    }
    return loaded, found


@torch.no_grad()
def memory_pass(loaded, sizes, seed: int) -> dict:
    """Peaks of a prefill and of an eager decode at batch 1, the KV cache, and what the first run changed.

    peak_prefill_mb (longest prefill), peak_decode_mb, kv_cache_bytes_per_token, tensors_after_run_mb (bitsandbytes repacks 4-bit
    weights at the first run on CPUs with AVX512-BF16), process_peak_mb.
    """
    model = loaded.model
    device = model.device
    no_peak = reset_peak(device)
    longest = max(sizes.prefill_tokens)
    out = model(input_ids=prompt(model, 1, longest, seed), use_cache=True, logits_to_keep=1)
    kv = kv_cache_bytes_per_token(out.past_key_values)
    del out
    prefill = None if no_peak else peak_mb(device)
    reset_peak(device)
    generate(model, prompt(model, 1, sizes.prompt_tokens, seed), min(sizes.decode_tokens, 8))
    return {
        "peak_prefill_mb": prefill,
        "peak_prefill_tokens": longest,
        "peak_decode_mb": None if no_peak else peak_mb(device),
        "kv_cache_bytes_per_token": kv,
        "tensors_after_run_mb": sum(stored_bytes(model).values()) / MB,
        "process_peak_mb": process_peak_mb(),
    }


def prefill_row(mode: str, batch: int, tokens: int, samples_ms: list[float], limit: tuple[float, str]) -> dict:
    row = {"mode": mode, "tokens": tokens, "batch": batch, **timing.summary(samples_ms, "ms")}
    row["tokens_per_second"] = timing.per_second(batch * tokens, row["median_ms"])
    row["limit_ms"], row["limit_kind"] = limit
    row["percent_of_limit"] = timing.percent_of_limit(limit[0], row["median_ms"])
    return row


@torch.no_grad()
def prefill_pass(
    loaded, sizes, seed: int, hardware: dict, kv_bytes: float, progress=print
) -> tuple[list[dict], list[dict]]:
    """Rows of prefill times at batch 1, and what was left out. "cuda_graph" runs the eager kernels without their launches."""
    model, rows, left_out = loaded.model, [], []
    device = model.device
    for tokens in sizes.prefill_tokens:
        ids = prompt(model, 1, tokens, seed)
        limit = roofline.limit(
            roofline.step_bytes(model, 1, 0, kv_bytes, tokens), roofline.operations(model, 1, tokens), hardware
        )
        for mode in (m for m in sizes.modes if m in ("eager", "cuda_graph")):
            graph, why = None, decoder.obstacle(model, mode)
            if mode == "cuda_graph" and why is None:
                try:
                    graph = decoder.captured_prefill(model, ids)
                except (RuntimeError, NotImplementedError) as error:
                    why = first_line(error)
            if why:
                left_out.append({"what": f"prefill of {tokens} tokens, {mode}", "reason": why})
                continue
            run = graph.replay if graph else lambda ids=ids: model(input_ids=ids, use_cache=True, logits_to_keep=1)
            samples = timing.repeat(run, device, sizes.repeats, sizes.warmup, timing.CELL_SECONDS[device.type])
            rows.append(prefill_row(mode, 1, tokens, samples, limit))
            progress(f"prefill {tokens} tokens, {mode}: {rows[-1]['median_ms']:.2f} ms")
            del graph, run
    return rows, left_out


def why_not(model, mode: str) -> str:
    """Why a mode was not measured that the study's sizes do not name."""
    return decoder.obstacle(model, mode) or f"{mode}: the study's sizes for this device do not name it"


def measure(study, configuration, progress=print) -> dict:
    """Measure one configuration; see the module for the steps and the result files' schema for the keys.

    progress: called with one line of text after each cell. Raises StudyError if the weights can't be had; what fails later for lack of
    a GPU, of time or of memory is a reason in the result.
    """
    began = time.perf_counter()
    loaded, held = load(study, configuration)
    model, device = loaded.model, loaded.model.device
    sizes = getattr(study.benchmark, device.type)
    deadline = began + DEADLINE_SECONDS[device.type]
    seconds = loaded.info["load_seconds"]
    progress(
        f"loaded in {seconds:.1f} s: {held['reported_footprint_mb']:.2f} MB reported, {held['allocated_mb']:.2f} MB allocated"
    )
    before = conditions.conditions(device)
    held |= memory_pass(loaded, sizes, study.seed)
    if device.type == "cpu":
        held["process_peak_mb"] = max(
            held[k] or 0.0 for k in ("peak_load_mb", "peak_prefill_mb", "peak_decode_mb", "process_peak_mb")
        )
    kv_bytes = held["kv_cache_bytes_per_token"]
    hardware = roofline.bandwidth_and_rate(device, model.dtype)
    prefill, left_out = prefill_pass(loaded, sizes, study.seed, hardware, kv_bytes, progress)
    arguments = (sizes, study.seed, hardware, kv_bytes)
    found = [throughput.eager_pass(loaded, *arguments, progress)]
    for mode in (m for m in sizes.modes if m != "eager"):
        found.append(throughput.decoder_pass(loaded, mode, *arguments, deadline - CAPACITY_SECONDS, progress))
    joined = throughput.join(found)
    largest, reason = capacity.largest_batches(
        loaded, sizes, study.benchmark.memory_budgets_gib, study.seed, deadline, progress
    )
    int8 = int8_limit.reproduce() if widest_int8_layer(model) else None
    after = conditions.conditions(device)
    return {
        **{key: loaded.info[key] for key in ("device", "dtype", "dtype_reason", "load_seconds")},
        "loading": loaded.info,
        "memory": held,
        "prefill": prefill,
        **joined,
        "energy": {"rows": joined["energy"], "reason": conditions.energy_reason(device)},
        "modes": {m: joined["modes"].get(m) or {"ok": False, "reason": why_not(model, m)} for m in decoder.MODES},
        "left_out": left_out + joined["left_out"],
        "hardware": hardware,
        "largest_batch": largest,
        "largest_batch_reason": reason,
        "int8_limit": int8,
        "conditions": {"before": before, "after": after, "warnings": conditions.warnings(before, after)},
        "sizes": sizes.model_dump(),
        "measure_seconds": time.perf_counter() - began,
    }
