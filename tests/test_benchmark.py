"""One test per reported number on synthetic timings; memory and the decode step on the embedded model."""

import json
import mmap
import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import ROOT, params
from helpers.benchmark import capacity, conditions, decoder, generation, passes, timing
from helpers.schema_benchmark import Benchmark, Largest, Memory
from helpers.setup import models
from helpers.setup.device import MB, kv_cache_bytes_per_token, process_peak_mb, reset_peak
from helpers.setup.layers import quantization_state, stored_bytes

CPU = torch.device("cpu")
QUIET = lambda line: None  # noqa: E731
HARDWARE = {"copy_bandwidth_gb_per_second": 1000.0, "matmul_tflops": 100.0}


@pytest.fixture(scope="module")
def sizes():
    return params.Sizes(
        prefill_tokens=[8, 16], batch_sizes=[1, 2], prompt_tokens=8, contexts=[24], decode_tokens=4, repeats=3, warmup=1
    )


def test_summary_keeps_samples_and_gives_median_and_quartiles():
    found = timing.summary([4.0, 1.0, 2.0, 3.0, 5.0], "ms")
    assert (found["median_ms"], found["q25_ms"], found["q75_ms"], found["n"]) == (2.5, 1.75, 3.5, 4)
    assert found["samples_ms"] == [4.0, 1.0, 2.0, 3.0, 5.0] and found["dropped"] == 1


@pytest.mark.parametrize(
    ("samples", "dropped"),
    [
        ([63.8, 67.3, 27.3, 21.7, 22.3, 22.0], 3),  # a start that settles
        ([22.1, 22.0, 21.9, 22.3, 22.0, 22.2], 0),  # steady
        ([24.0, 22.0, 22.0, 22.0, 22.0, 22.0], 0),  # within the rule's 20%
        ([22.0, 60.0, 22.0, 22.0, 22.0, 22.0], 0),  # a late outlier is no start
        ([60.0, 22.0, 22.0, 22.0, 60.0, 22.0], 1),
        ([90.0, 80.0, 70.0, 60.0, 50.0, 40.0], 3),  # never settles: at most half
        ([20.0, 20.0, 20.0, 30.0, 30.0, 30.0], 0),  # slower later: nothing to drop
        ([63.8, 67.3, 27.3], 0),  # fewer than LEAST_REPEATS would remain
        ([63.8, 22.0, 22.0, 22.0], 1),
        ([22.0], 0),
    ],
)
def test_a_drifting_start_is_dropped(samples, dropped):
    assert timing.settled(samples) == samples[dropped:]
    assert timing.summary(samples, "ms")["dropped"] == dropped


def test_repeat_warms_up_on_the_same_path_and_stops_early_but_not_too_early():
    calls = []
    assert len(timing.repeat(lambda: calls.append(1), CPU, repeats=7, warmup=2)) == 7 and len(calls) == 9
    calls.clear()
    assert len(timing.repeat(lambda: calls.append(1), CPU, repeats=7, warmup=2, seconds=0)) == timing.LEAST_REPEATS
    assert len(calls) == 1 + timing.LEAST_REPEATS


def test_time_per_output_token_leaves_the_first_out():
    assert generation.per_token_ms(1.0, 1.3, tokens=4) == pytest.approx(100.0)


def test_prefill_row():
    row = passes.prefill_row("eager", 2, 100, [9.0, 10.0, 11.0], 4.0)
    assert row["tokens_per_second"] == pytest.approx(20_000)
    assert row["percent_of_limit"] == pytest.approx(40.0)
    assert (row["limit_ms"], row["batch"], row["tokens"], row["n"]) == (4.0, 2, 100, 3)


def test_decode_row():
    row = passes.decode_row("cuda_graph", 8, 128, [2.0, 2.0, 2.0], int(1e9), HARDWARE)
    assert row["tokens_per_second"] == pytest.approx(4000)
    assert row["achieved_gb_per_second"] == pytest.approx(500)
    assert row["limit_ms"] == pytest.approx(1.0) and row["percent_of_limit"] == pytest.approx(50)
    assert row["median_ms_per_token"] == 2.0 and row["samples_ms_per_token"] == [2.0, 2.0, 2.0]


class Meter:
    """An energy counter that moves every 20 ms, at 200 W."""

    def __call__(self):
        return 200 * (time.perf_counter() // 0.02) * 0.02


def test_energy_is_the_counters_power_times_a_tokens_time(monkeypatch):
    monkeypatch.setattr(conditions, "energy_joules", Meter())
    monkeypatch.setattr(passes, "ENERGY_SECONDS", 0.3)
    runs = []
    row = passes.energy_row("compile", 4, lambda: runs.append(time.sleep(0.01)), 10, CPU, includes_prefill=False)
    assert row["tokens"] == len(runs) * 40
    assert row["mean_watts"] == pytest.approx(200, rel=0.15)
    assert row["joules_per_token"] == pytest.approx(row["mean_watts"] * row["seconds"] / row["tokens"])


def test_a_counter_that_stands_still_is_no_energy(monkeypatch):
    monkeypatch.setattr(conditions, "energy_joules", lambda: 5.0)
    with pytest.raises(RuntimeError, match="hardly moved"):
        conditions.mean_watts(lambda: time.sleep(0.02))


def test_leading_equal():
    assert generation.leading_equal(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 9, 4])) == 2
    assert generation.leading_equal(torch.tensor([1, 2]), torch.tensor([1, 2])) == 2


def test_batch_that_fits_is_linear_in_the_peaks():
    assert capacity.batch_that_fits(1000, (10, 20), (300, 400)) == 80
    assert capacity.batch_that_fits(150, (10, 20), (300, 400)) == 0


def test_warnings_name_what_others_used():
    before = {"unix_seconds": 0.0, "cpu_count": 2, "cpu_seconds_all": 0.0, "cpu_seconds_own": 0.0}
    quiet = before | {"unix_seconds": 10.0, "cpu_seconds_all": 10.5, "cpu_seconds_own": 10.0}
    assert conditions.warnings(before, quiet) == []
    (busy,) = conditions.warnings(before, quiet | {"cpu_seconds_all": 16.0})
    assert "30%" in busy and "2 cores" in busy
    gpu = {"gpu_processes": 3, "throttle_reasons": ["power cap"]}
    found = conditions.warnings(before | gpu, quiet | gpu)
    assert len(found) == 2 and "3 processes" in found[0] and "power cap" in found[1]


def test_conditions_count_own_work():
    before = conditions.conditions(CPU)
    torch.randn(1500, 1500) @ torch.randn(1500, 1500)
    after = conditions.conditions(CPU)
    assert after["cpu_seconds_own"] > before["cpu_seconds_own"] and after["unix_seconds"] > before["unix_seconds"]


def test_full_precision_has_no_hidden_state(load):
    model = load("fp16").model
    stored = stored_bytes(model)
    assert stored["quantization_state"] == 0
    assert stored["parameters_and_buffers"] >= model.num_parameters() * model.dtype.itemsize
    # The footprint counts the rotary frequencies once more than they are stored, or once less; never a weight.
    assert abs(stored["parameters_and_buffers"] - model.get_memory_footprint()) < 4096


def test_a_4bit_layers_state_by_hand():
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        128, 256, bias=False, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32
    )
    layer = layer.to("cpu")
    sizes = {name: t.nbytes for name, t in quantization_state(layer).items()}
    blocks = 128 * 256 // 64
    assert sizes["absmax"] == blocks and sizes["state2.absmax"] == 4 * blocks // 256
    assert sizes["code"] == 16 * 4 and sizes["state2.code"] == 256 * 4 and sizes["offset"] == 4
    stored = stored_bytes(layer)
    assert stored == {"parameters_and_buffers": 128 * 256 // 2, "quantization_state": sum(sizes.values())}


def test_really_allocated_is_more_than_the_reported_footprint(study):
    bench = passes.load(study, params.read_configuration("smollm2-135m", "nf4"))
    held, model = bench.held, bench.model
    assert held["allocated_mb"] > held["reported_footprint_mb"]
    if bench.device.type == "cpu":
        reported = held["reported_footprint_mb"] + held["quantization_state_mb"]
        assert held["allocated_mb"] == pytest.approx(reported, abs=0.01)
    # One byte of absmax for 64 weights, and little beside it.
    weights = sum(m.in_features * m.out_features for m in model.modules() if type(m).__name__ == "Linear4bit")
    assert weights / 64 / MB < held["quantization_state_mb"] < 1.2 * weights / 64 / MB
    assert held["checkpoint_mb"] == pytest.approx(held["allocated_mb"], rel=0.01)


def test_int8_scales_are_found_before_and_after_the_first_run(study):
    loaded = models.load(study, params.read_configuration("smollm2-135m", "int8"))
    before = stored_bytes(loaded.model)
    rows = sum(m.out_features for m in loaded.model.modules() if type(m).__name__ == "Linear8bitLt")
    assert before["quantization_state"] == 4 * rows
    generation.generate(loaded.model, generation.prompt(loaded.model, 1, 8, 0), 2)
    assert stored_bytes(loaded.model) == before


def test_kv_cache_bytes(load):
    model = load("fp16").model
    config = model.config
    with torch.no_grad():
        cache = model(generation.prompt(model, 2, 12, 0), use_cache=True, logits_to_keep=1).past_key_values
    expected = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    assert kv_cache_bytes_per_token(cache) == expected


def test_a_new_phase_forgets_the_last_ones_peak():
    if reset_peak(CPU):
        pytest.skip("this system does not let a process reset its peak")
    before = process_peak_mb()
    held = mmap.mmap(-1, 64 * MB)  # fresh pages, not what malloc has left over
    for page in range(0, len(held), mmap.PAGESIZE):
        held[page] = 1
    peak = process_peak_mb()
    assert peak > before + 32
    held.close()
    reset_peak(CPU)
    assert process_peak_mb() < peak


def test_prompts_are_the_seeds(load):
    model = load("fp16").model
    first = generation.prompt(model, 2, 16, 5)
    assert torch.equal(first, generation.prompt(model, 2, 16, 5)) and not torch.equal(
        first, generation.prompt(model, 2, 16, 6)
    )
    assert first.shape == (2, 16) and int(first.max()) < model.config.vocab_size


def test_the_static_step_decodes_what_generate_decodes(load):
    model = load("fp16").model
    ids = generation.prompt(model, 3, 21, 0)
    expected = generation.generate(model, ids, 12)[:, 21:].cpu()
    running = decoder.Decoder(model, ids, 12)
    assert torch.equal(running.tokens(12), expected)
    assert torch.equal(running.tokens(12), expected)  # reset is complete
    assert model.config._attn_implementation != decoder.ATTENTION and running.length == 48


def test_the_static_step_of_a_4bit_model_departs_by_rounding_at_most(load):
    """bitsandbytes computes 4-bit layers in bfloat16 on some CPUs, so that near ties may fall either way."""
    model = load("nf4").model
    for seed in range(1):
        ids = generation.prompt(model, 1, 21, seed)
        found = generation.agreement(model, ids, decoder.Decoder(model, ids, 8), 8, "static")
        assert found["identical"] == 8 or found["explained"]


def test_repeated_rows_decode_the_same_tokens(load):
    model = load("fp16").model
    ids = generation.prompt(model, 2, 9, 0)
    found = decoder.Decoder(model, ids, 6, repeat_rows=5).tokens(6)
    assert found.shape == (5, 6) and torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_end_of_text_is_suppressed_as_in_generate(load, monkeypatch):
    model = load("fp16").model
    ids = generation.prompt(model, 1, 16, 0)
    likely = [int(t) for t in generation.generate(model, ids, 3)[0, 16:]]
    monkeypatch.setattr(model.generation_config, "eos_token_id", likely)
    found = decoder.Decoder(model, ids, 6).tokens(6)
    assert not set(likely) & set(found[0].tolist())
    assert torch.equal(found, generation.generate(model, ids, 6)[:, 16:].cpu())


@pytest.mark.parametrize("name", ["fp16", "nf4"])
def test_one_compiled_function_stands_for_all_layers(load, name, monkeypatch):
    """Traced in full, without a graph break; only the code generation is left to the test's backend."""
    from torch._dynamo.testing import CompileCounter

    model, counter, real = load(name).model, CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options, **given: real(f, backend=counter, **given))
    ids = generation.prompt(model, 1, 16, 0)
    running = decoder.Decoder(model, ids, 6, compiled=True)
    found = generation.agreement(model, ids, running, 6, "compile")
    assert found["identical"] == 6 or (name == "nf4" and found["explained"])
    assert counter.frame_count == 4  # layer, last norm, rotary embedding, output head
    running.close()
    assert "forward" not in vars(model.base_model.layers[0])


def test_attention_over_a_sliding_window_is_refused():
    query, key = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 32, 8)
    with pytest.raises(NotImplementedError, match="sliding window of 16"):
        decoder.static_attention(None, query, key, key, torch.zeros(1, 1, 1, 32), sliding_window=16)


def test_modes_that_cannot_be_captured_say_why(load):
    assert decoder.obstacle(load("fp16").model, "eager") is None
    if not torch.cuda.is_available():
        assert "needs a GPU" in decoder.obstacle(load("fp16").model, "cuda_graph")


def test_int8_with_outliers_names_the_threshold(load, monkeypatch):
    model = load("int8").model
    monkeypatch.setattr(decoder, "_device_type", lambda model: "cuda")
    assert "threshold 6.0" in decoder.obstacle(model, "cuda_graph")


def test_agreement_counts_and_judges_the_first_divergence(load):
    model = load("fp16").model
    ids = generation.prompt(model, 1, 16, 0)
    running = decoder.Decoder(model, ids, 6)
    found = generation.agreement(model, ids, running, 6, "static")
    assert found == {"mode": "static", "tokens": 6, "identical": 6, "explained": None}

    class Wrong:
        def tokens(self, count):
            tokens = running.tokens(count)
            tokens[0, 2] = 11
            return tokens

    found = generation.agreement(model, ids, Wrong(), 6, "wrong")
    assert found["identical"] == 2 and found["explained"] is False


def test_eager_samples_come_from_whole_runs(load, sizes):
    model = load("fp16").model
    first, per_token, tokens = generation.eager_samples(model, generation.prompt(model, 1, 8, 0), sizes)
    assert len(first) == len(per_token) == 3 and tokens == 4
    assert min(first) > 0 and min(per_token) > 0


def everything(bench: passes.Bench) -> dict:
    memory, parts = passes.memory(bench), [passes.prefill(bench, progress=QUIET)]
    parts += [passes.decode(bench, mode, progress=QUIET) for mode in bench.sizes.modes]
    largest = capacity.largest_batches(bench.loaded, bench.sizes, [1], 0, bench.deadline, progress=QUIET)
    found = passes.result(bench, memory, parts, largest)
    Benchmark.model_validate(found, context="writing")
    json.dumps(found, allow_nan=False)
    return found


def test_all_passes_give_a_result_of_the_schema(study, sizes):
    """The whole of it in small sizes: every section is there, numbers or a reason, and JSON can hold it."""
    cuda = params.GPUSizes(**sizes.model_dump())
    small = study.model_copy(update={"benchmark": params.Benchmark(cpu=sizes, cuda=cuda)})
    found = everything(passes.load(small, params.read_configuration("smollm2-135m", "nf4")))
    assert [r["tokens"] for r in found["prefill"]] == [8, 16]
    assert [(r["batch"], r["prompt_tokens"]) for r in found["decode"]] == [(1, 8), (1, 24), (2, 8)]
    assert len(found["time_to_first_token"]) == 3
    assert sum(r["share"] for r in found["profile"]) == pytest.approx(1.0)
    assert any(r["gb_per_second"] and r["kernels"] >= 210 for r in found["profile"])
    for row in found["decode"]:
        assert row["percent_of_limit"] == pytest.approx(100 * row["limit_ms"] / row["median_ms_per_token"])
    held = found["memory"]
    assert held["allocated_mb"] > held["reported_footprint_mb"]
    if not torch.cuda.is_available():
        assert found["largest_batch"] == [] and "no GPU" in found["left_out"][-1]["reason"]
        assert found["energy"]["rows"] == [] and "no GPU" in found["energy"]["reason"]


def test_what_runs_full_precisions_kernels_is_not_timed(load, sizes):
    """GPTQ on a CPU: checkpoint size and a reason, no time and no memory."""
    loaded = load("fp16")
    reason = f"no 4-bit kernel here; {passes.UNPACKED}"
    held = dict.fromkeys(Memory.model_fields) | {"checkpoint_mb": 90.0, "peak_reason": passes.UNPACKED}
    bench = passes.ready(loaded, sizes, 0, held, time.perf_counter(), reason)
    memory, parts = passes.memory(bench), [passes.prefill(bench), passes.decode(bench, "eager")]
    found = passes.result(bench, memory, parts, ([], reason))
    Benchmark.model_validate(found, context="writing")
    assert not found["prefill"] and not found["decode"] and not found["profile"]
    assert {r["reason"] for r in found["left_out"]} == {reason}
    assert {k for k, v in found["memory"].items() if v is not None} == {"checkpoint_mb", "peak_reason"}


@pytest.fixture
def uncaptured(monkeypatch):
    """The passes that a GPU runs, with their steps left uncaptured."""
    real = decoder.Decoder
    monkeypatch.setattr(decoder, "obstacle", lambda model, mode: None)
    monkeypatch.setattr(decoder, "Decoder", lambda model, ids, new, captured, compiled: real(model, ids, new))


IN_TIME = time.perf_counter() + 3600  # a busy machine does not make the deadline pass


def test_a_decoder_pass_fills_every_table(load, sizes, uncaptured):
    found = passes.decode(passes.ready(load("fp16"), sizes, 0, {}, IN_TIME), "cuda_graph", QUIET)
    assert not found["left_out"]
    assert [r["batch"] for r in found["decode"]] == [1, 1, 2] and all(r["build_seconds"] > 0 for r in found["decode"])
    assert found["agreement"] == [{"mode": "cuda_graph", "tokens": 4, "identical": 4, "explained": None}]
    assert sum(r["share"] for r in found["profile"]) == pytest.approx(1.0)


def test_no_time_left_is_a_reason(load, sizes, uncaptured):
    found = passes.decode(passes.ready(load("fp16"), sizes, 0, {}, began=-1e6), "compile", QUIET)
    assert found["decode"] == [] and len(found["left_out"]) == 3
    assert any("time for this notebook" in row["reason"] for row in found["left_out"])


def test_a_capture_that_fails_is_a_reason(load, sizes, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(decoder, "obstacle", lambda model, mode: None)
    monkeypatch.setattr(decoder, "Decoder", fail)
    found = passes.decode(passes.ready(load("fp16"), sizes, 0, {}, IN_TIME), "cuda_graph", QUIET)
    (row,) = found["left_out"]
    # what the first cell can't do is not tried again
    assert row["reason"] == "RuntimeError: operation not permitted when stream is capturing"


SMALL = {"vocab_size": 128, "max_position_embeddings": 128, "tie_word_embeddings": True}
LLAMA = SMALL | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES = {
    "gpt2": {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": LLAMA | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "falcon": LLAMA,
    "bloom": {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 128, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "expansion_ratio": 2},
    "mamba": {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "lfm2": LLAMA | {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "gemma3_text": LLAMA | {
        "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": LLAMA | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_any_architecture_gives_rows_or_reasons(kind, sizes, uncaptured):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ARCHITECTURES[kind])).eval()
    loaded = models.Loaded(model, None, {"dtype": "float32"})
    both = sizes.model_copy(update={"modes": ["eager", "cuda_graph"], "batch_sizes": [1]})
    bench = passes.ready(
        loaded, both, 0, dict.fromkeys(Memory.model_fields) | {"checkpoint_mb": 1.0}, time.perf_counter()
    )
    found = everything(bench)
    assert len(found["prefill"]) >= 2 and [r["mode"] for r in found["decode"]][:2] == ["eager", "eager"]
    assert all(row["limit_ms"] > 0 for row in found["prefill"] + found["decode"])
    static = [r for r in found["decode"] if r["mode"] == "cuda_graph"]
    assert static or any("cuda_graph" in row["what"] for row in found["left_out"])
    assert all(row["reason"] for row in found["left_out"])
    if kind in ("mamba", "lfm2"):
        assert found["memory"]["kv_cache_bytes_per_token"] is None
    else:
        assert found["memory"]["kv_cache_bytes_per_token"] > 0
    if kind == "gemma3_text":
        assert bench.kv_bytes == 2 * 2 * 2 * 16 * 4  # both layers, below the window


def test_all_captures_share_one_stream():
    """Each further one would hold a workspace of cuBLAS for good, which the largest batches would then lack."""
    paths = (ROOT / "helpers").rglob("*.py")
    assert [p.name for p in paths if "cuda.Stream(" in p.read_text()] == ["device.py"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_decoder_that_is_closed_leaves_no_memory_behind(load):
    model = load("fp16").model
    held = []
    for _ in range(3):
        running = decoder.Decoder(model, generation.prompt(model, 2, 8, 0), 8, captured=True)
        running.step()
        running.close()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2]


@pytest.mark.parametrize("edge", [0, 1, 7, 87, 100, 101, 260, 1234])
@pytest.mark.parametrize("start", [0, 1, 100, 1300])
def test_the_largest_batch_is_bisected_to_one_per_cent(edge, start):
    low, high, tries = capacity.interval(lambda batch: batch <= edge, start)
    assert low <= edge < high and high - low <= max(1, 0.01 * low)
    assert tries < 25


def test_near_the_prediction_few_tries_do():
    assert max(capacity.interval(edge.__ge__, 400)[2] for edge in range(370, 440)) <= 8


def test_time_over_leaves_the_interval_as_it_is():
    budget = iter([True, True, False])
    assert capacity.interval(lambda batch: batch <= 150, 100, lambda: next(budget)) == (106, None, 2)


def test_a_budgets_row(load, sizes, monkeypatch):
    tried = []

    def samples(model, sizes, batch, seed, mode, timed):
        tried.append((batch, mode, timed))
        return None if batch > 90 or (mode == "compile" and batch > 89) else [3.0 if mode == "compile" else 2.0] * 3

    class Properties:
        total_memory = 80 * 2**30

    fractions = []
    monkeypatch.setattr(capacity, "_attempt", samples)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    model, modes = load("fp16").model, ["cuda_graph", "compile"]
    row = capacity._largest(model, sizes, 8, 100, 0, modes, float("inf"))
    assert (row["batch"], row["fails"], row["mode"]) == (90, 91, "cuda_graph") and fractions == [0.1, 1.0]
    assert row["tokens_per_second"] == pytest.approx(90 / 2e-3)
    assert tried[-2:] == [(90, "cuda_graph", True), (90, "compile", True)]
    # The edge's batch fits for one step, and not for the timing: the next smaller that does is the largest.
    monkeypatch.setattr(capacity, "_attempt", lambda m, s, batch, *_, timed: [2.0] if batch <= 90 - 2 * timed else None)
    row = capacity._largest(model, sizes, 8, 100, 0, modes, float("inf"))
    assert (row["batch"], row["fails"], row["reason"]) == (88, 89, None)
    monkeypatch.setattr(capacity, "_attempt", lambda *arguments, **options: None)
    nothing = capacity._largest(model, sizes, 8, 0, 0, modes, float("inf"))
    assert nothing["batch"] == 0 and "no batch decoded within 8 GiB" in nothing["reason"]
    for found in (row, nothing):
        Largest.model_validate(found, context="writing")
