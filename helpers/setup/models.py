"""Weights, loaded in any configuration.

`prepare(study)` makes a folder of full-precision safetensors once; `load(study, configuration)` reads it through
`from_pretrained` with the configuration's quantization (helpers.setup.methods).

    model, tokenizer, info = models.load(study, configuration)

Nothing is believed: files are compared with the sha256 that 00_setup recorded, a missing or unexpected tensor and a
weight that is not finite are errors, and neither pickles nor a model's own code are ever read."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from helpers import CACHE, StudyError
from helpers.params import Configuration, Study
from helpers.setup import calibrated, hub, integrity, methods, packages, packed
from helpers.setup.device import device_and_dtype
from helpers.setup.layers import (
    checkpoint_bytes,
    linear_layers,
    make_plain,
    parameter_count,
    quantized_layers,
    stored_bytes,
)
from helpers.setup.methods import METHODS

# One line per layer and forward pass otherwise.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# Its report on missing tensors names absolute paths; `integrity.check_loaded` says what it says.
logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
transformers_logging.disable_progress_bar()

OWN_CODE_NEVER = {"trust_remote_code": False}
CALIBRATED_TENSORS = ("packed", "scale", "zero_point", "shape", "g_idx")  # of a compressed-tensors checkpoint's layer
PARTLY = 0.9  # a method that quantizes a smaller share of the linear weights gets a warning


class Loaded(NamedTuple):
    model: torch.nn.Module
    tokenizer: object
    info: dict


def sized(study: Study) -> Study:
    """The study with as many dialogues as this machine is asked for (`data.dialogues_on_cpu`)."""
    return study if torch.cuda.is_available() else study.on_cpu()


# ---- files ----


def _from_random(study: Study, folder: Path) -> None:
    architecture = dict(study.model.architecture)
    config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    torch.manual_seed(study.seed)
    with torch.device(device_and_dtype()[0]):
        weights = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float16)
    weights.save_pretrained(folder)


def prepare(study: Study) -> str:
    """Folder of the study's full-precision weights; makes it once, under .cache/models, atomically, and anew if it is
    damaged.

    Raises StudyError if the weights can't be had, if there are only pickles, or if the disk is full."""
    model = study.model
    if model.source == "hub":
        return str(hub.snapshot(model.name, model.revision))
    if model.source == "path":
        return integrity.own_folder(model.name)
    key = hashlib.sha256(f"{model.model_dump_json(exclude={'dtype'})}{study.seed}".encode()).hexdigest()[:8]
    folder = CACHE / "models" / f"{model.name}-{key}"
    if folder.is_dir():
        if (name := integrity.damaged(folder)) is None:
            return str(folder)
        print(f".cache/models/{folder.name}: {name} is missing or truncated; the folder is made anew")
        shutil.rmtree(folder)
    with _writing(folder) as target:
        packages.unpack(model.name, target) if model.source == "package" else _from_random(study, target)
    return str(folder)


@contextlib.contextmanager
def _writing(folder: Path):
    """A scratch folder that becomes `folder` in one move if all goes well."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            yield (target := Path(scratch) / "model")
            if not folder.is_dir():  # another process may have been faster
                os.replace(target, folder)
    except (OSError, SafetensorError) as error:
        why, remedy = getattr(error, "strerror", None) or error, "free some disk space, or make .cache writable"
        raise StudyError(f".cache/models/{folder.name}: the weights could not be written ({why}); {remedy}") from error


def describe(study: Study) -> dict:
    """The full-precision weights: source, commit, licence, parameters, dtype (config.json's), and of each file its size
    (bytes), time of change (ns) and sha256. Prepares them first. Raises StudyError if the study asks for more than the
    model's positions."""
    folder = Path(prepare(study))
    config = _config(study, folder)
    integrity.check_positions(study, config)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, **OWN_CODE_NEVER)
    files = [
        {"file": p.name, "bytes": p.stat().st_size, "modified_ns": p.stat().st_mtime_ns, "sha256": packages.sha256(p)}
        for p in sorted(folder.iterdir())
        if p.is_file()
    ]
    package = packages.PACKAGES.get(study.model.name) if study.model.source == "package" else None
    return {
        "source": f"{study.model.source}: {study.model.name}",
        "commit": hub.resolved_revision(str(folder)) if study.model.source == "hub" else None,
        "licence": package.licence if package else None,
        "already_quantized": study.model.already_quantized,
        "parameters": sum(p.numel() for p in skeleton.parameters()),
        "dtype": _name(config.dtype) if config.dtype else None,
        "files": files,
    }


# ---- loading ----


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def _explained(study: Study):
    """What transformers raises over files of other people, in a sentence."""
    name = f"model.name: {study.model.name}"
    try:
        yield
    except SafetensorError as error:
        raise StudyError(f"{name}: its weights are damaged ({error}); fetch them again") from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        said = "needs code of its own (auto_map in config.json), which is never run; name a model that transformers"
        raise StudyError(f"{name} {said} knows") from error


def _config(study: Study, folder: str | Path):
    with _explained(study):
        return AutoConfig.from_pretrained(folder, **OWN_CODE_NEVER)


def _tokenizer(study: Study, folder: str):
    """The tokenizer; None for random weights. An EOS that it does not name may stand in generation_config.json."""
    if study.model.source == "random":
        return None
    name = f"model.name: {study.model.name}"
    with _explained(study):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **OWN_CODE_NEVER)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if "trust_remote_code" in str(error):
                raise
            said = f"{name} has no tokenizer files that can be read ({type(error).__name__}); put tokenizer.json and"
            raise StudyError(
                f"{said} tokenizer_config.json of the model it was made from beside config.json"
            ) from error
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        generation = Path(folder, "generation_config.json")
        values = json.loads(generation.read_text()) if generation.is_file() else {}
        end = values.get("eos_token_id", values.get("bos_token_id"))
        end = end[0] if isinstance(end, list) and end else end
        if not isinstance(end, int) or (token := tokenizer.convert_ids_to_tokens(end)) is None:
            said = "its tokenizer names neither a BOS nor an EOS token, and scoring a text needs one"
            raise StudyError(f"{name}: {said}; add eos_token to its tokenizer_config.json")
        tokenizer.eos_token = token
    return tokenizer


def shares(model: PreTrainedModel, folder: Path | None) -> dict:
    """How much of a model a method has quantized, and in how many bits.

    quantized_share         of the weights in matrices; embeddings and output layer are left out, experts in 3-D tensors
                            are in (no method here quantizes them)
    bits_per_weight         as stored, scales and zero points included, over all quantized layers (full precision: all
                            linear ones); from the checkpoint in `folder` where a method unpacks its weights on loading
    """
    quantized, output, matrices = quantized_layers(model), model.get_output_embeddings(), {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not output:
            matrices[id(module)] = module.in_features * module.out_features
        elif module is not output and not isinstance(module, torch.nn.Embedding):
            matrices |= {id(p): p.numel() for p in module.parameters(recurse=False) if p.dim() >= 2}
    linear = quantized or linear_layers(model)
    inside, weights = (sum(m.in_features * m.out_features for m in some.values()) for some in (quantized, linear))
    if folder is not None:
        stored = _checkpoint_bytes_of(folder, quantized)
    else:
        biases = sum(m.bias.nbytes for m in linear.values() if m.bias is not None)
        stored = sum(stored_bytes(torch.nn.ModuleList(linear.values())).values()) - biases
    return {
        "quantized_share": inside / max(sum(matrices.values()), 1),
        "bits_per_weight": 8 * stored / weights if weights else None,
    }


def _checkpoint_bytes_of(folder: Path, layers: dict) -> int:
    """Bytes of the tensors of `layers` in a compressed-tensors checkpoint."""
    wanted, total = {f"{name}.weight_{part}" for name in layers for part in CALIBRATED_TENSORS}, 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in wanted.intersection(file.keys()))
    return total


def load(study: Study, configuration: Configuration) -> Loaded:
    """The model on its device, quantized, in eval mode; its tokenizer (None for random weights); and `info`:

    device, dtype (what is computed in), dtype_reason, load_seconds (s, from file to device, quantization included
    unless it is calibrated), parameters, quantized_layers, quantization (its options), kernel (what multiplies, in
    words), packed (the device holds the method's own bits), checkpoint_bytes (of a calibrated method's file, else of
    what `save_pretrained` would write), checkpoint_dtype (of what is not quantized in it), `shares`, and warning (a
    sentence, or None). Calibrated methods: also quantize_seconds (s), from_cache, calibration (`calibrated.samples`).

    Raises NotHere if this machine can't do the method, StudyError if the weights are not what they should be."""
    methods.require(configuration)
    options, method = configuration.quantization, METHODS[configuration.quantization.method]
    source = prepare(study)
    integrity.verify(study, Path(source))
    wanted = methods.wanted_dtype(configuration) or study.dtype
    device, dtype, reason = device_and_dtype(wanted, _config(study, source).dtype)
    tokenizer, record = _tokenizer(study, source), {}
    if method.calibrated:
        source, record = calibrated.quantized(study, configuration, source, tokenizer, device, dtype)
    given = {"dtype": dtype, "device_map": {"": device}, "use_safetensors": True, "output_loading_info": True}
    given["ignore_mismatched_sizes"] = True  # reported, and refused by `check_loaded`
    if quantization := method.config(options, dtype):
        given["quantization_config"] = quantization
    start = time.perf_counter()
    with _explained(study):
        model, report = AutoModelForCausalLM.from_pretrained(source, **given, **OWN_CODE_NEVER)
    model.eval()
    if device.type == "cuda":
        packed.replace_layers(model)
    if method.calibrated:
        make_plain(model)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    integrity.check_loaded(study, model, report)
    integrity.check_rows(configuration, model)
    share, warning = shares(model, Path(source) if method.calibrated else None), None
    if options.method != "none" and (part := share["quantized_share"]) < PARTLY:
        warning = f"{configuration.label} quantizes {part:.0%} of the linear weights; the rest stays in {_name(dtype)}"
    info = {
        "device": device.type,
        "dtype": _name(dtype),
        "dtype_reason": reason,
        "load_seconds": seconds,
        "parameters": parameter_count(model),
        "quantized_layers": len(quantized_layers(model)),
        "quantization": options.model_dump(),
        "kernel": methods.kernel(options, device.type, _name(dtype)),
        "packed": methods.is_packed(options, device.type, _name(dtype)),
        "checkpoint_bytes": record.get("checkpoint_bytes") or checkpoint_bytes(model),
        "checkpoint_dtype": record.get("checkpoint_dtype", _name(dtype)),
        **share,
        "warning": warning,
    }
    more = {k: record[k] for k in ("quantize_seconds", "from_cache", "calibration") if k in record}
    return Loaded(model, tokenizer, info | more)
