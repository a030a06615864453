"""What a configuration costs on this machine: memory, latency, throughput, energy, each in a pass of its own.

    bench = passes.load(study, configuration)
    memory = passes.memory(bench)
    parts = [passes.prefill(bench), *(passes.decode(bench, mode) for mode in bench.sizes.modes)]
    data = passes.result(bench, memory, parts)      # what helpers.schema_benchmark describes

*Prefill* is one forward pass over the prompt, keys and values kept, logits of the last position. *Time to first
token* is `generate` from its call to its first token, *time per output token* the interval between tokens after it:
decode alone. *Mode* is how a step is started (`decoder`): "eager" is `model.generate`, greedy, as the paper ran it;
"cuda_graph" the same step captured over a static cache; "compile" that step compiled, then captured. MB is 2**20
bytes.

What a model or machine can't do is a row of `left_out` with its reason, and the rest is measured.
"""

import atexit
import contextlib
import os
import shutil
import tempfile
import time
from typing import NamedTuple

import torch

from helpers import results
from helpers.benchmark import conditions, decoder, roofline, timing
from helpers.benchmark.generation import agreement, decoder_samples, eager_samples, generate, prompt
from helpers.setup import integrity, models
from helpers.setup.device import MB, device_and_dtype, free, kv_cache_bytes_per_token, peak_mb, reset_peak
from helpers.setup.layers import checkpoint_bytes, linear_layers, stored_bytes

# Of the whole measurement: nothing optional is begun after it.
DEADLINE_SECONDS = {"cpu": 60.0, "cuda": 220.0}
CAPACITY_SECONDS = 50.0  # of these, kept for the largest batches
ENERGY_SECONDS = 10.0  # the counter moves every 0.1 s
AGREEMENT_TOKENS = 32
PROFILED_STEPS = 8
PARTS = ("prefill", "decode", "time_to_first_token", "energy", "agreement", "profile", "left_out")
UNPACKED = "same kernels as full precision: not measured again"


class Bench(NamedTuple):
    """A loaded model and what all passes need."""

    loaded: models.Loaded
    sizes: object  # params.Sizes of this device
    seed: int
    held: dict  # memory while loading
    hardware: dict  # roofline.bandwidth_and_rate
    kv_bytes: float | None  # per token; None: the model keeps no keys and values
    before: dict  # conditions
    began: float  # time.perf_counter()
    unmeasured: str | None  # why no times are measured
    times_only: bool = False  # a further process: energy, profile and largest batch do not need three

    @property
    def model(self):
        return self.loaded.model

    @property
    def device(self) -> torch.device:
        return self.loaded.model.device

    @property
    def deadline(self) -> float:
        return self.began + DEADLINE_SECONDS[self.device.type]


def own_compile_cache() -> None:
    """Let this process compile into a folder of its own: tuned kernels are cached on disk, and processes that share
    the cache are not independent."""
    folder = tempfile.mkdtemp(prefix="inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    os.environ.pop("TRITON_CACHE_DIR", None)  # Inductor then puts Triton's into its own
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


@contextlib.contextmanager
def attempt(found: dict, what: str):
    """What fails, for lack of memory or because a model's architecture is another, becomes a row of `left_out`."""
    try:
        yield
    except Exception as error:  # models' own code raises any class
        reason = str(error) if isinstance(error, NotImplementedError) else results.first_line(error)
        found["left_out"].append({"what": what, "reason": reason})
        free()


def blank() -> dict:
    return {part: [] for part in PARTS}


def _left_out(what: str, reason: str | None) -> dict:
    return blank() | {"left_out": [{"what": what, "reason": reason}]}


@torch.no_grad()
def _kv_bytes(model, seed: int) -> float:
    out = model(input_ids=prompt(model, 1, 8, seed), use_cache=True, logits_to_keep=1)
    return kv_cache_bytes_per_token(getattr(out, "past_key_values", None))


def load(study, configuration, process: int = 1) -> Bench:
    """Load the model; `process` after the first measure times alone. Raises StudyError or NotHere without weights."""
    began = time.perf_counter()
    own_compile_cache()
    device = device_and_dtype(configuration.dtype)[0]
    no_peak = reset_peak(device)
    gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if gpu else 0
    loaded = models.load(study, configuration)
    free()  # what packing left behind is not the model's
    allocated = torch.cuda.memory_allocated() - before if gpu else None
    peak = None if no_peak else peak_mb(device)
    model, stored = loaded.model, stored_bytes(loaded.model)
    layers = torch.nn.ModuleList(linear_layers(model).values())
    held = {
        "reported_footprint_mb": model.get_memory_footprint() / MB,
        "allocated_mb": (sum(stored.values()) if allocated is None else allocated) / MB,
        "tensors_mb": sum(stored.values()) / MB,
        "quantization_state_mb": stored["quantization_state"] / MB,
        "linear_layers_mb": stored_bytes(layers)["parameters_and_buffers"] / MB,
        "checkpoint_mb": (loaded.info.get("checkpoint_bytes") or checkpoint_bytes(model)) / MB,
        "peak_load_mb": peak,
        "peak_reason": no_peak,
        **dict.fromkeys(("peak_prefill_mb", "peak_decode_mb", "kv_cache_bytes_per_token")),
    }
    unmeasured = None
    if configuration.quantization.method != "none" and not loaded.info["packed"]:
        unmeasured = f"{loaded.info['kernel']}; {UNPACKED}"
        held = {key: value if key == "checkpoint_mb" else None for key, value in held.items()}
        held["peak_reason"] = UNPACKED
    sizes = integrity.check_positions(study, loaded.model.config)
    return ready(loaded, sizes, study.seed, held, began, unmeasured)._replace(times_only=process > 1)


def ready(loaded: models.Loaded, sizes, seed: int, held: dict, began: float, unmeasured: str | None = None) -> Bench:
    """A loaded model with what the hardware can do now."""
    kv = None
    with contextlib.suppress(Exception):  # `memory` says why
        kv = _kv_bytes(loaded.model, seed)
    device = loaded.model.device
    hardware = roofline.bandwidth_and_rate(device, loaded.model.dtype)
    return Bench(loaded, sizes, seed, held, hardware, kv, conditions.conditions(device), began, unmeasured)


@torch.no_grad()
def memory(bench: Bench) -> dict:
    """`bench.held`, and peaks of the longest prefill and of an eager decode at batch 1: memory, and left_out."""
    model, sizes, held, found = bench.model, bench.sizes, dict(bench.held), blank()
    if bench.unmeasured:
        return {"memory": held, "left_out": [{"what": "memory", "reason": bench.unmeasured}]}
    with attempt(found, "keys and values per token"):
        held["kv_cache_bytes_per_token"] = _kv_bytes(model, bench.seed)
    with attempt(found, "peak memory of prefill"):
        no_peak = reset_peak(bench.device)
        model(input_ids=prompt(model, 1, max(sizes.prefill_tokens), bench.seed), use_cache=True, logits_to_keep=1)
        held["peak_prefill_mb"] = None if no_peak else peak_mb(bench.device)
    with attempt(found, "peak memory of decode"):
        no_peak = reset_peak(bench.device)
        generate(model, prompt(model, 1, sizes.prompt_tokens, bench.seed), min(sizes.decode_tokens, 4))
        held["peak_decode_mb"] = None if no_peak else peak_mb(bench.device)
    return {"memory": held, "left_out": found["left_out"]}


# ---- prefill ----


def prefill_row(mode: str, batch: int, tokens: int, samples_ms: list[float], limit_ms: float) -> dict:
    row = {"mode": mode, "tokens": tokens, "batch": batch, **timing.summary(samples_ms, "ms")}
    row["tokens_per_second"] = batch * tokens / row["median_ms"] * 1e3
    return row | {"limit_ms": limit_ms, "percent_of_limit": 100 * limit_ms / row["median_ms"]}


@torch.no_grad()
def prefill(bench: Bench, progress=print) -> dict:
    """Rows of prefill times at batch 1. "cuda_graph" runs the eager kernels without their launches."""
    model, sizes, found = bench.model, bench.sizes, blank()
    if bench.unmeasured:
        return _left_out("prefill", bench.unmeasured)
    for tokens in sizes.prefill_tokens:
        for mode in (m for m in sizes.modes if m != "compile"):
            with attempt(found, f"prefill of {tokens} tokens, {mode}"):
                ids, graph = prompt(model, 1, tokens, bench.seed), None
                moved = roofline.step_bytes(model, 1, 0, bench.kv_bytes, tokens)
                limit = roofline.limit_ms(moved, roofline.operations(model, 1, tokens), bench.hardware)
                if mode == "cuda_graph":
                    decoder.refuse(model, mode)
                    graph = decoder.captured_prefill(model, ids)
                run = graph.replay if graph else lambda ids=ids: model(input_ids=ids, use_cache=True, logits_to_keep=1)
                seconds = timing.CELL_SECONDS[bench.device.type]
                samples = timing.repeat(run, bench.device, sizes.repeats, sizes.warmup - 1, seconds)
                del run, graph
                found["prefill"].append(prefill_row(mode, 1, tokens, samples, limit))
                progress(f"prefill {tokens} tokens, {mode}: {found['prefill'][-1]['median_ms']:.2f} ms")
    return found


# ---- decode ----


def decode_row(mode, batch, prompt_tokens, samples_ms_per_token, byte_count, hardware) -> dict:
    """One cell of the decode table. byte_count: that a step must move."""
    row = {"mode": mode, "batch": batch, "prompt_tokens": prompt_tokens}
    row |= timing.summary(samples_ms_per_token, "ms_per_token")
    median = row["median_ms_per_token"]
    limit = byte_count / hardware["copy_bandwidth_gb_per_second"] / 1e6
    return row | {
        "tokens_per_second": batch / median * 1e3,
        "limit_ms": limit,
        "achieved_gb_per_second": roofline.rate_gb(byte_count, median),
        "percent_of_limit": 100 * limit / median,
        "build_seconds": None,
    }


def energy_row(mode: str, batch: int, run, tokens_per_run: int, device, includes_prefill: bool) -> dict:
    """Joules per token of `run`, repeated for ENERGY_SECONDS: the mean power between moves of the GPU's counter,
    times the time of a token."""
    runs, began = 0, time.perf_counter()

    def work() -> None:
        nonlocal runs
        while time.perf_counter() - began < ENERGY_SECONDS:
            run()
            timing.synchronize(device)
            runs += 1

    timing.synchronize(device)
    watts = conditions.mean_watts(work)
    seconds = time.perf_counter() - began
    tokens = runs * tokens_per_run * batch
    row = {"mode": mode, "batch": batch, "tokens": tokens, "seconds": seconds, "mean_watts": watts}
    return row | {"joules_per_token": watts * seconds / tokens, "includes_prefill": includes_prefill}


def cells(bench: Bench) -> list[tuple[int, int]]:
    """(batch, tokens of context) of all decode rows: the prompt at every batch size, longer contexts at batch 1."""
    sizes = bench.sizes
    most = getattr(bench.model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    longer = [c for c in sizes.contexts if c != sizes.prompt_tokens and c + sizes.decode_tokens <= most]
    first, *others = [(batch, sizes.prompt_tokens) for batch in sizes.batch_sizes]
    return [first, *((1, context) for context in longer), *others]


def decode(bench: Bench, mode: str, progress=print) -> dict:
    """Time per output token in one mode, a row per batch size and context; with energy, agreement with eager and the
    profile of a step, where this mode and cell are chosen for them."""
    if bench.unmeasured:
        return _left_out(f"decode, {mode}", bench.unmeasured)
    found, expected = blank(), 0.0
    for batch, context in cells(bench):
        what = f"decode at batch {batch}, {context} tokens of context, {mode}"
        if mode == "compile" and context != bench.sizes.prompt_tokens:
            found["left_out"].append({"what": what, "reason": "a long context is measured without compiling for it"})
            continue
        if mode != "eager" and time.perf_counter() + expected > bench.deadline - CAPACITY_SECONDS:
            why = f"building it takes some {expected:.0f} s, and the time for this notebook was over"
            found["left_out"].append({"what": what, "reason": why})
            continue
        with attempt(found, what):
            decoder.refuse(bench.model, mode)
            (_eager_cell if mode == "eager" else _decoder_cell)(bench, mode, batch, context, found)
            row = found["decode"][-1]
            # A single row is tuned (decoder.compile_options), which takes far longer than several.
            expected = max(expected, row["build_seconds"] or 0.0) if batch > 1 else expected
            progress(f"{what}: {row['median_ms_per_token']:.3f} ms per token")
        if not found["decode"]:
            break  # what the first cell can't do, none can
    return found


def _add_row(bench: Bench, mode: str, batch: int, context: int, samples: list[float], tokens: int, found: dict) -> None:
    count = roofline.step_bytes(bench.model, batch, context + tokens / 2, bench.kv_bytes)
    found["decode"].append(decode_row(mode, batch, context, samples, count, bench.hardware))


def _eager_cell(bench: Bench, mode: str, batch: int, context: int, found: dict) -> None:
    model = bench.model
    ids = prompt(model, batch, context, bench.seed)
    first_ms, samples, tokens = eager_samples(model, ids, bench.sizes)
    _add_row(bench, mode, batch, context, samples, tokens, found)
    first = {"mode": mode, "batch": batch, "prompt_tokens": context, **timing.summary(first_ms, "ms")}
    found["time_to_first_token"].append(first)
    if (batch, context) == cells(bench)[0]:
        _measure_energy(bench, mode, batch, lambda: generate(model, ids, tokens), tokens, found)
        with attempt(found, "profile, eager"), torch.no_grad():
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

            def one() -> None:
                model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)

            one()
            _profile(bench, mode, batch, one, 1, found)


def _decoder_cell(bench: Bench, mode: str, batch: int, context: int, found: dict) -> None:
    model, sizes = bench.model, bench.sizes
    ids = prompt(model, batch, context, bench.seed)
    running = decoder.Decoder(model, ids, sizes.decode_tokens, captured=True, compiled=mode == "compile")
    try:
        samples, tokens = decoder_samples(running, sizes)
        _add_row(bench, mode, batch, context, samples, tokens, found)
        found["decode"][-1]["build_seconds"] = running.build_seconds
        first = (batch, context) == cells(bench)[0]
        # Energy in the last mode that the model can do, at one row and at most rows.
        able = [m for m in sizes.modes if decoder.obstacle(model, m) is None]
        most = batch == max(sizes.batch_sizes) and context == sizes.prompt_tokens
        if mode == able[-1] and (first or most):

            def run() -> None:
                running.reset()
                running.steps(tokens - 1)

            _measure_energy(bench, mode, batch, run, tokens - 1, found)
        if first:
            with attempt(found, f"agreement, {mode}"):
                tokens = min(sizes.decode_tokens, AGREEMENT_TOKENS)
                found["agreement"].append(agreement(model, ids, running, tokens, mode))
            running.reset()
            steps = min(PROFILED_STEPS, sizes.decode_tokens - 1)
            with attempt(found, f"profile, {mode}"):
                _profile(bench, mode, batch, lambda: running.steps(steps), steps, found)
    finally:
        running.close()


def _measure_energy(bench: Bench, mode: str, batch: int, run, tokens: int, found: dict) -> None:
    if conditions.energy_reason(bench.device) is None and not bench.times_only:
        with attempt(found, f"energy at batch {batch}, {mode}"):
            found["energy"].append(energy_row(mode, batch, run, tokens, bench.device, mode == "eager"))


def _profile(bench: Bench, mode: str, batch: int, function, steps: int, found: dict) -> None:
    if bench.times_only:
        return
    wall = found["decode"][-1]["median_ms_per_token"]
    rows = roofline.profile(function, bench.device, wall, steps, roofline.matmul_bytes(bench.model))
    found["profile"].extend({"mode": mode, "batch": batch, **row} for row in rows)


# ---- all of it ----


def result(bench: Bench, memory: dict, parts: list[dict], largest=([], None), int8: dict | None = None) -> dict:
    """What goes into the result file: the passes' rows, by the keys of helpers.schema_benchmark.Benchmark.

    largest: what `capacity.largest_batches` returned; int8: `int8_limit.reproduce`'s.
    """
    joined = {name: [row for part in parts for row in part[name]] for name in PARTS}
    reason = [{"what": "largest batch", "reason": largest[1]}] if largest[1] else []
    return {
        "dtype": bench.loaded.info["dtype"],
        "loading": bench.loaded.info,
        **memory,
        **joined,
        "left_out": memory["left_out"] + joined["left_out"] + reason,
        "energy": {"rows": joined["energy"], "reason": bench.unmeasured or conditions.energy_reason(bench.device)},
        "hardware": bench.hardware,
        "largest_batch": largest[0],
        "int8_limit": int8,
        "conditions": {"warnings": conditions.warnings(bench.before, conditions.conditions(bench.device))},
        "measure_seconds": time.perf_counter() - bench.began,
    }
