"""One test per reported number on synthetic timings; memory and the decode step on the embedded model."""

import json
import mmap

import pytest
import torch

from helpers import ROOT, params
from helpers.benchmark import capacity, conditions, decoder, throughput, timing
from helpers.benchmark import passes as benchmark
from helpers.setup.device import MB, kv_cache_bytes_per_token, process_peak_mb, reset_peak
from helpers.setup.layers import int8_threshold, quantization_state, stored_bytes

CPU = torch.device("cpu")
HARDWARE = {"copy_bandwidth_gb_per_second": 1000.0, "matmul_tflops": 100.0}


@pytest.fixture(scope="module")
def sizes():
    return params.Sizes(
        prefill_tokens=[8, 16], batch_sizes=[1, 2], prompt_tokens=8, decode_tokens=4, repeats=3, warmup=1
    )


def test_summary_keeps_samples_and_gives_median_and_quartiles():
    found = timing.summary([4.0, 1.0, 2.0, 3.0, 5.0], "ms")
    assert (found["median_ms"], found["q25_ms"], found["q75_ms"], found["n"]) == (3.0, 2.0, 4.0, 5)
    assert found["samples_ms"] == [4.0, 1.0, 2.0, 3.0, 5.0] and found["drift_percent"] is None


def test_drift_compares_the_halves():
    assert timing.summary([10, 10, 10, 11, 11, 11], "ms")["drift_percent"] == pytest.approx(100 / 10.5)


def test_repeat_warms_up_on_the_same_path_and_stops_early_but_not_too_early():
    calls = []
    assert len(timing.repeat(lambda: calls.append(1), CPU, repeats=7, warmup=2)) == 7 and len(calls) == 9
    calls.clear()
    assert len(timing.repeat(lambda: calls.append(1), CPU, repeats=7, warmup=2, seconds=0)) == timing.LEAST_REPEATS
    assert len(calls) == 1 + timing.LEAST_REPEATS


def test_time_per_output_token_leaves_the_first_out():
    assert throughput.per_token_ms(1.0, 1.3, tokens=4) == pytest.approx(100.0)


def test_prefill_row():
    row = benchmark.prefill_row("eager", 2, 100, [9.0, 10.0, 11.0], (4.0, "compute"))
    assert row["tokens_per_second"] == pytest.approx(20_000)
    assert row["percent_of_limit"] == pytest.approx(40.0)
    assert (row["limit_ms"], row["limit_kind"], row["batch"], row["tokens"], row["n"]) == (4.0, "compute", 2, 100, 3)


def test_decode_row():
    row = throughput.decode_row("cuda_graph", 8, 128, 64, [2.0, 2.0, 2.0], int(1e9), HARDWARE)
    assert row["tokens_per_second"] == pytest.approx(4000)
    assert row["achieved_gb_per_second"] == pytest.approx(500)
    assert row["limit_ms"] == pytest.approx(1.0) and row["percent_of_bandwidth"] == pytest.approx(50)
    assert row["median_ms_per_token"] == 2.0 and row["samples_ms_per_token"] == [2.0, 2.0, 2.0]


def test_energy_row_divides_by_the_tokens_of_all_rows(monkeypatch):
    counter = iter([100.0, 130.0])
    monkeypatch.setattr(conditions, "energy_joules", lambda device: next(counter))
    monkeypatch.setattr(throughput, "ENERGY_SECONDS", 0.05)
    runs = []
    row = throughput.energy_row("compile", 4, lambda: runs.append(1), 10, CPU, includes_prefill=False)
    assert row["tokens"] == len(runs) * 40 and row["joules"] == 30.0
    assert row["joules_per_token"] == pytest.approx(30 / row["tokens"])
    assert row["mean_watts"] == pytest.approx(30 / row["seconds"])


def test_leading_equal():
    assert throughput.leading_equal(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 9, 4])) == 2
    assert throughput.leading_equal(torch.tensor([1, 2]), torch.tensor([1, 2])) == 2


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
    loaded, held = benchmark.load(study, params.read_configuration("smollm2-135m", "nf4"))
    assert held["allocated_mb"] > held["reported_footprint_mb"]
    if loaded.model.device.type == "cpu":
        assert held["allocated_mb"] == pytest.approx(
            held["reported_footprint_mb"] + held["quantization_state_mb"], abs=0.01
        )
        assert held["reserved_mb"] is None
    # One byte of absmax for 64 weights, and little beside it.
    weights = sum(m.in_features * m.out_features for m in loaded.model.modules() if type(m).__name__ == "Linear4bit")
    assert weights / 64 / MB < held["quantization_state_mb"] < 1.2 * weights / 64 / MB
    assert held["checkpoint_mb"] == pytest.approx(held["allocated_mb"], rel=0.01)


def test_int8_scales_are_found_before_and_after_the_first_run(study):
    loaded, _ = benchmark.load(study, params.read_configuration("smollm2-135m", "int8"))
    before = stored_bytes(loaded.model)
    rows = sum(m.out_features for m in loaded.model.modules() if type(m).__name__ == "Linear8bitLt")
    assert before["quantization_state"] == 4 * rows
    throughput.generate(loaded.model, throughput.prompt(loaded.model, 1, 8, 0), 2)
    assert stored_bytes(loaded.model) == before


def test_kv_cache_bytes(load):
    model = load("fp16").model
    config = model.config
    with torch.no_grad():
        cache = model(throughput.prompt(model, 2, 12, 0), use_cache=True, logits_to_keep=1).past_key_values
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
    first = throughput.prompt(model, 2, 16, 5)
    assert torch.equal(first, throughput.prompt(model, 2, 16, 5)) and not torch.equal(
        first, throughput.prompt(model, 2, 16, 6)
    )
    assert first.shape == (2, 16) and int(first.max()) < model.config.vocab_size


def test_the_static_step_decodes_what_generate_decodes(load):
    model = load("fp16").model
    ids = throughput.prompt(model, 3, 21, 0)
    expected = throughput.generate(model, ids, 12)[:, 21:].cpu()
    running = decoder.Decoder(model, ids, 12)
    assert torch.equal(running.tokens(12), expected)
    assert torch.equal(running.tokens(12), expected)  # reset is complete
    assert model.config._attn_implementation != decoder.ATTENTION and running.length == 48


def test_the_static_step_of_a_4bit_model_departs_by_rounding_at_most(load):
    """bitsandbytes computes 4-bit layers in bfloat16 on some CPUs, so that near ties may fall either way."""
    model = load("nf4").model
    for seed in range(3):
        ids = throughput.prompt(model, 1, 21, seed)
        found = throughput.agreement(model, ids, decoder.Decoder(model, ids, 8), 8, "static")
        assert found["identical"] == 8 or found["first_divergence"]["explained"]


def test_repeated_rows_decode_the_same_tokens(load):
    model = load("fp16").model
    ids = throughput.prompt(model, 2, 9, 0)
    found = decoder.Decoder(model, ids, 6, repeat_rows=5).tokens(6)
    assert found.shape == (5, 6) and torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_end_of_text_is_suppressed_as_in_generate(load, monkeypatch):
    model = load("fp16").model
    ids = throughput.prompt(model, 1, 16, 0)
    likely = [int(t) for t in throughput.generate(model, ids, 3)[0, 16:]]
    monkeypatch.setattr(model.generation_config, "eos_token_id", likely)
    found = decoder.Decoder(model, ids, 6).tokens(6)
    assert not set(likely) & set(found[0].tolist())
    assert torch.equal(found, throughput.generate(model, ids, 6)[:, 16:].cpu())


@pytest.mark.parametrize("name", ["fp16", "nf4"])
def test_one_compiled_function_stands_for_all_layers(load, name, monkeypatch):
    """Traced in full, without a graph break; only the code generation is left to the test's backend."""
    from torch._dynamo.testing import CompileCounter

    model, counter, real = load(name).model, CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options, **given: real(f, backend=counter, **given))
    ids = throughput.prompt(model, 1, 16, 0)
    running = decoder.Decoder(model, ids, 6, compiled=True)
    found = throughput.agreement(model, ids, running, 6, "compile")
    assert found["identical"] == 6 or (name == "nf4" and found["first_divergence"]["explained"])
    assert counter.frame_count == 4  # layer, last norm, rotary embedding, output head
    running.close()
    assert "forward" not in vars(model.base_model.layers[0])


def test_attention_over_a_sliding_window_is_refused():
    query, key = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 32, 8)
    with pytest.raises(NotImplementedError, match="sliding window of 16"):
        decoder.static_attention(None, query, key, key, torch.zeros(1, 1, 1, 32), sliding_window=16)


def test_modes_that_cannot_be_captured_say_why(load):
    assert decoder.obstacle(load("fp16").model, "eager") is None
    assert int8_threshold(load("int8").model) == 6.0 and int8_threshold(load("nf4").model) is None
    if not torch.cuda.is_available():
        assert "needs a GPU" in decoder.obstacle(load("fp16").model, "cuda_graph")


def test_int8_with_outliers_names_the_threshold(load, monkeypatch):
    model = load("int8").model
    monkeypatch.setattr(decoder, "_device_type", lambda model: "cuda")
    assert "threshold 6.0" in decoder.obstacle(model, "cuda_graph")


def test_agreement_counts_and_judges_the_first_divergence(load):
    model = load("fp16").model
    ids = throughput.prompt(model, 1, 16, 0)
    running = decoder.Decoder(model, ids, 6)
    found = throughput.agreement(model, ids, running, 6, "static")
    assert found == {"mode": "static", "tokens": 6, "identical": 6, "first_divergence": None}

    class Wrong:
        def tokens(self, count):
            tokens = running.tokens(count)
            tokens[0, 2] = 11
            return tokens

    found = throughput.agreement(model, ids, Wrong(), 6, "wrong")
    assert found["identical"] == 2 and found["first_divergence"]["mode_token"] == 11
    assert found["first_divergence"]["logit_gap"] > 0 and not found["first_divergence"]["explained"]


def test_eager_samples_come_from_whole_runs(load, sizes):
    model = load("fp16").model
    first, per_token, tokens = throughput.eager_samples(model, throughput.prompt(model, 1, 8, 0), sizes)
    assert len(first) == len(per_token) == 3 and tokens == 4
    assert min(first) > 0 and min(per_token) > 0


def test_measure_gives_a_result_of_the_schema(study, sizes):
    """The whole of it in small sizes: every section is there, numbers or a reason, and JSON can hold it."""
    small = study.model_copy(update={"benchmark": params.Benchmark(cpu=sizes, cuda=sizes)})
    lines = []
    found = benchmark.measure(small, params.read_configuration("smollm2-135m", "nf4"), progress=lines.append)
    json.dumps(found, allow_nan=False)
    assert [r["tokens"] for r in found["prefill"]] == [8, 16] and [r["batch"] for r in found["decode"]] == [1, 2]
    assert len(found["time_to_first_token"]) == 2 and len(lines) >= 5
    assert sum(r["share"] for r in found["profile"]) == pytest.approx(1.0)
    assert set(found["modes"]) == set(decoder.MODES) and found["modes"]["eager"]["ok"]
    for mode in ("cuda_graph", "compile"):
        assert not found["modes"][mode]["ok"] and found["modes"][mode]["reason"]
    for row in found["decode"]:
        assert row["percent_of_bandwidth"] == pytest.approx(100 * row["limit_ms"] / row["median_ms_per_token"])
    held = found["memory"]
    assert held["process_peak_mb"] > held["allocated_mb"] > held["reported_footprint_mb"]
    if found["device"] == "cpu":
        assert found["largest_batch"] == [] and "no GPU" in found["largest_batch_reason"]
        assert found["energy"]["rows"] == [] and "no GPU" in found["energy"]["reason"]


def test_a_decoder_pass_fills_every_table(load, sizes, monkeypatch):
    """The pass that a GPU runs, with its steps left uncaptured here."""
    loaded, real = load("fp16"), decoder.Decoder
    monkeypatch.setattr(decoder, "obstacle", lambda model, mode: None)
    monkeypatch.setattr(decoder, "Decoder", lambda model, ids, new, captured, compiled: real(model, ids, new))
    found = throughput.decoder_pass(
        loaded, "cuda_graph", sizes, 0, HARDWARE, 1000.0, float("inf"), progress=lambda line: None
    )
    assert found.modes == {"cuda_graph": {"ok": True, "reason": None}}
    assert [r["batch"] for r in found.decode] == [1, 2] and all(r["build_seconds"] > 0 for r in found.decode)
    assert found.agreement[0]["identical"] == found.agreement[0]["tokens"] == 4
    assert sum(r["share"] for r in found.profile) == pytest.approx(1.0)


def test_no_time_left_is_a_reason(load, sizes, monkeypatch):
    monkeypatch.setattr(decoder, "obstacle", lambda model, mode: None)
    found = throughput.decoder_pass(
        load("fp16"), "compile", sizes, 0, HARDWARE, 1000.0, deadline=0.0, progress=lambda line: None
    )
    assert found.decode == [] and not found.modes["compile"]["ok"] and "time" in found.modes["compile"]["reason"]
    assert [row["what"] for row in found.left_out] == ["decode at batch 1, compile", "decode at batch 2, compile"]


def test_a_capture_that_fails_is_a_reason(load, sizes, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(decoder, "obstacle", lambda model, mode: None)
    monkeypatch.setattr(decoder, "Decoder", fail)
    found = throughput.decoder_pass(
        load("fp16"), "cuda_graph", sizes, 0, HARDWARE, 1000.0, float("inf"), progress=lambda line: None
    )
    assert found.modes["cuda_graph"] == {
        "ok": False,
        "reason": "RuntimeError: operation not permitted when stream is capturing",
    }


def test_all_captures_share_one_stream():
    """Each further one would hold a workspace of cuBLAS for good, which the largest batches would then lack."""
    assert [p.name for p in sorted((ROOT / "helpers").glob("*.py")) if "cuda.Stream(" in p.read_text()] == ["memory.py"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_decoder_that_is_closed_leaves_no_memory_behind(load):
    model = load("fp16").model
    held = []
    for _ in range(3):
        running = decoder.Decoder(model, throughput.prompt(model, 2, 8, 0), 8, captured=True)
        running.step()
        running.close()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2]


def test_the_largest_batch_is_the_first_that_decodes(load, sizes, monkeypatch):
    tried = []

    def attempt(model, sizes, batch, seed, captured):
        tried.append(batch)
        return [2.0, 2.0, 2.0] if batch <= 90 else None

    class Properties:
        total_memory = 80 * 2**30

    fractions = []
    monkeypatch.setattr(capacity, "_attempt", attempt)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**29)
    row = capacity._largest(load("fp16").model, sizes, 8, 100, 0, captured=True)
    assert tried == [97, 92, 87] and fractions == [0.1, 1.0]
    assert (row["batch"], row["attempts"], row["allocated_before_mb"], row["peak_reserved_mb"]) == (
        87,
        3,
        512.0,
        1024.0,
    )
    assert row["tokens_per_second"] == pytest.approx(87 / 2e-3)
    assert "no batch" in capacity._largest(load("fp16").model, sizes, 8, 0, 0, captured=True)["reason"]
