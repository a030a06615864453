"""Limits, bytes and operations against hand-computed ones; the LLM.int8() rule."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers import ROOT
from helpers.benchmark import int8_limit, roofline
from helpers.setup import layers
from helpers.setup.layers import widest_int8_layer

CPU = torch.device("cpu")
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY = 32, 48, 2, 4, 2, 100
KV_WIDTH = KV_HEADS * HIDDEN // HEADS
LAYER_WEIGHTS = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_WIDTH + 3 * HIDDEN * INNER


def llama(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def hand_counted_bytes() -> int:
    """float32: decoder layers with two norms each, the last norm, one vocabulary matrix, the rotary frequencies
    twice."""
    frequencies = 2 * (HIDDEN // HEADS // 2)
    return 4 * (LAYERS * (LAYER_WEIGHTS + 2 * HIDDEN) + HIDDEN + VOCABULARY * HIDDEN + frequencies)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_read_once_and_an_embedding_of_its_own_is_not(tied):
    assert roofline.weight_bytes(llama(tied)) == hand_counted_bytes()


def test_bytes_of_a_decode_step():
    kv = 2 * LAYERS * KV_WIDTH * 4
    expected = hand_counted_bytes() + 3 * HIDDEN * 4 + 3 * (10 + 1) * kv
    assert roofline.step_bytes(llama(True), batch=3, context=10, kv_bytes_per_token=kv) == expected


def test_operations_of_a_prefill():
    tokens, batch = 5, 2
    attention = 4 * LAYERS * HIDDEN * (1 + 2 + 3 + 4 + 5)
    expected = batch * (2 * tokens * LAYERS * LAYER_WEIGHTS + 2 * VOCABULARY * HIDDEN + attention)
    assert roofline.operations(llama(True), batch, tokens) == expected


def test_rates_in_their_units():
    assert roofline.rate_gb(3e9, 1000) == pytest.approx(3.0)


def test_the_later_limit_counts():
    hardware = {"copy_bandwidth_gb_per_second": 1000, "matmul_tflops": 100}
    assert roofline.limit_ms(2e9, 1e11, hardware) == pytest.approx(2.0)
    assert roofline.limit_ms(1e9, 3e11, hardware) == pytest.approx(3.0)


def test_shares_add_up_to_the_step_and_the_rest_is_launches():
    found = [("nvjet_hsh_64x8", 2.0, 3), ("void kDequantizeBlockwise<half>", 1.0, 2), ("void cutlass::gemm", 0.5, 1)]
    rows = {r["what"]: r for r in roofline.shares(found, roofline.GPU_KERNELS, 10.0, {"matmul": 5_000_000})}
    assert rows["matmul"]["kernels"] == 4 and rows["matmul"]["gb_per_second"] == pytest.approx(2.0)
    assert rows["dequantization"]["gb_per_second"] is None and rows[roofline.LAUNCHES]["kernels"] is None
    assert rows["matmul"]["ms_per_step"] == 2.5
    assert rows["dequantization"]["ms_per_step"] == 1.0
    assert (rows[roofline.LAUNCHES]["ms_per_step"], rows[roofline.LAUNCHES]["share"]) == (6.5, 0.65)
    assert sum(r["share"] for r in rows.values()) == pytest.approx(1.0)


def test_no_launches_where_kernels_fill_the_step():
    assert [r["what"] for r in roofline.shares([("gemv", 2.0, 1)], roofline.GPU_KERNELS, 1.9)] == ["matmul"]


def test_compiled_matmuls_have_a_speed_only_where_no_other_reads_weights():
    kernels = [("triton_red_fused_mm_3", 1.0, 1), ("triton_poi_fused_add", 1.0, 1)]
    rows = roofline.shares(kernels, roofline.GPU_KERNELS, None, {roofline.MATMUL: 7_000_000})
    assert {r["what"]: r["gb_per_second"] for r in rows}[roofline.COMPILED_MATMUL] == pytest.approx(7.0)
    both = roofline.shares([*kernels, ("nvjet", 1.0, 1)], roofline.GPU_KERNELS, None, {roofline.MATMUL: 7_000_000})
    assert all(r["gb_per_second"] is None for r in both)


def test_bytes_that_matmuls_read(load):
    full, nf4 = roofline.matmul_bytes(load("fp16").model), roofline.matmul_bytes(load("nf4").model)
    head = load("nf4").model.get_output_embeddings().weight.nbytes
    assert full[roofline.PACKED_MATMUL] == 0 and nf4[roofline.MATMUL] == head
    # A byte for 64 weights, or, after a forward pass on a CPU with AVX512-BF16, two.
    scales = 1.0625 if any(map(layers.repacked, load("nf4").model.modules())) else 1.032
    assert nf4[roofline.PACKED_MATMUL] == pytest.approx((full[roofline.MATMUL] - head) / 8 * scales, rel=0.01)


def tiny(kind: str, **options):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()


def test_gpt2s_conv1d_is_counted_as_a_linear_layer():
    model = tiny("gpt2", vocab_size=100, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    attention = 4 * 32 * 3  # two tokens see one and two
    assert roofline.operations(model, 1, 2) == 2 * 2 * 12 * 32 * 32 + 2 * 100 * 32 + attention


def test_of_experts_those_count_that_a_token_meets():
    sizes = dict(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = tiny("mixtral", **sizes)
    met = 4 * 32 * 32 + 2 * 3 * 32 * 48
    router = 8 * 32
    counted = roofline.operations(model, 1, 1) - 2 * 100 * 32 - 4 * 32
    assert counted in (2 * met, 2 * (met + router))
    one, all_of_them = (roofline.step_bytes(model, batch, 0, 0) for batch in (1, 4))
    assert all_of_them - one == 6 * 3 * 32 * 48 * 4 + 3 * 32 * 4  # six idle experts, and three embedding rows


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        ("fmha_cutlassF_f16_aligned_64x64_rf_sm80", "attention"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel", "attention"),
        ("void gemm_4bit_simt_kernel<half, 64>", "matmul and dequantization in one"),
        ("void kgemm_4bit_inference_naive<half, 128, 16>", "matmul and dequantization in one"),
        ("kdequant_mm_int32_fp16", "dequantization"),
        ("void kInt8VectorQuant<half, 1024, 0>", "quantization of activations"),
        ("void gemv2T_kernel_val", "matmul"),
        ("sm90_xmma_gemm_f16f16_f16f32", "matmul"),
        ("triton_red_fused_mm_mul_3", "matmul, written by torch.compile"),
        ("triton_per_fused__softmax_add_mul_7", "attention"),
        ("triton_poi_fused_add_mul_rsqrt_1", "other kernels of torch.compile"),
        ("void at::native::tinygemm_m16n8k16_chunk_kernel<...>", "matmul and dequantization in one"),
        ("void at::native::vectorized_elementwise_kernel", "other"),
    ],
)
def test_kernel_names(kernel, what):
    assert roofline.classify(kernel, roofline.GPU_KERNELS) == what


def test_profile_of_a_matmul_finds_the_matmul():
    left = torch.randn(512, 512)
    rows = roofline.profile(lambda: left @ left, CPU)
    assert rows[0]["what"] == "matmul"
    assert sum(r["share"] for r in rows) == pytest.approx(1.0)


def test_measured_hardware_agrees_with_its_own_samples(monkeypatch):
    monkeypatch.setattr(roofline, "_copy_samples", lambda count, device: [4.0, 2.0, 2.0])
    monkeypatch.setattr(roofline, "_matmul_samples", lambda side, device, dtype: [1.0, 1.0, 8.0])
    found = roofline.bandwidth_and_rate(CPU, torch.float32)
    assert found["copy_bandwidth_gb_per_second"] == pytest.approx(2 * 2**27 / 2.0 / 1e6)
    assert found["matmul_tflops"] == pytest.approx(2 * 1024**3 / 1e9)


def test_widest_int8_layer(load):
    assert widest_int8_layer(load("int8").model) == 1536
    assert widest_int8_layer(load("fp16").model) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is reproduced instead")
def test_without_a_gpu_the_crash_has_a_reason():
    found = int8_limit.reproduce()
    assert found["runs"] == [] and "no GPU" in found["reason"]
    child = subprocess.run(
        [sys.executable, "-m", "helpers.benchmark.int8_limit", "4", "8"], cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 1 and "no GPU" in child.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the overflow is in a CUDA kernel")
def test_the_crash_itself():
    found = int8_limit.reproduce()
    if found["runs"]:
        assert found["runs"][0]["exit_code"] == 0 and found["runs"][1]["exit_code"] not in (0, None)
    else:
        assert "GiB of free GPU memory" in found["reason"]


def test_a_child_that_fails_is_reported_with_its_line(monkeypatch):
    def died(command, **kwargs):
        error = "Error invalid configuration argument at line 421 in file /src/csrc/ops.cu"
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=f"{error}\nother noise\n")

    monkeypatch.setattr(int8_limit.subprocess, "run", died)
    found = int8_limit.run(64 * 4096, 8192)
    assert found["exit_code"] == 1 and "line 421" in found["last_line"] and found["elements"] == 2**31
