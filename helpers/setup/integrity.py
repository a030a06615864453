"""What is checked before a model's weights are believed: files, positions, tensors. Each failure is one sentence with
a remedy.

    integrity.verify(study, folder)                     # the files are those that 00_setup recorded
    integrity.check_loaded(study, model, report)        # every tensor was there, of its shape, and finite
"""

import json
from pathlib import Path

import torch
from bitsandbytes.functional import has_avx512bf16
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from helpers import NotHere, StudyError, results
from helpers.params import Configuration, Sizes, Study
from helpers.setup import packages
from helpers.setup.layers import quantized_layers, tensors

_verified: set[tuple[str, str]] = set()


def damaged(folder: Path) -> str | None:
    """Name of the first file of a model's folder that is missing or truncated; None if there is none. Reads headers
    only."""
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "config.json"
    index = folder / "model.safetensors.index.json"
    try:
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    except (ValueError, KeyError, TypeError):
        return index.name
    for name in sorted(named):
        try:
            with safe_open(folder / name, "pt"):  # compares the file's length with what its header promises
                pass
        except (OSError, SafetensorError):
            return name
    return None


def own_folder(name: str) -> str:
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise StudyError(f"model.name: {name} has no config.json; give a folder written by save_pretrained")
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    if not any(folder.glob("*.safetensors")):
        what = f"only {pickles[0]}, a pickle, which can run code when it is read" if pickles else "no weights"
        raise StudyError(f"model.name: {name} holds {what}; write it as safetensors with save_pretrained")
    if broken := damaged(folder):
        raise StudyError(f"model.name: {broken} in {name} is missing or truncated; copy or download it again")
    return name


def verify(study: Study, folder: Path) -> None:
    """Compare the weights' files with what 00_setup recorded, once a process; hash only those whose time of change is
    another.

    Raises StudyError that names the file. Without a record (a notebook run by hand) there is nothing to compare."""
    record = results.path(study, None, "setup")
    if (str(folder), str(record)) in _verified or not record.is_file():
        return
    for row in results.read(record).data["weights"]["files"]:
        path = folder / row["file"]
        if path.suffix != ".safetensors":
            continue
        status = path.stat() if path.is_file() else None
        unchanged = status and (status.st_size, status.st_mtime_ns) == (row["bytes"], row.get("modified_ns"))
        if unchanged or (status and packages.sha256(path) == row["sha256"]):
            continue
        where = f".cache/models/{folder.name}" if study.model.source in ("package", "random") else study.model.name
        raise StudyError(
            f"{where}: {path.name} is not the file that 00_setup recorded (sha256 {row['sha256'][:12]}...); "
            f"{_repair(study, folder)}"
        )
    _verified.add((str(folder), str(record)))


def _repair(study: Study, folder: Path) -> str:
    if study.model.source in ("package", "random"):
        return f"delete .cache/models/{folder.name}, and the next run makes it anew"
    if study.model.source == "hub":
        return f"run `.venv/bin/hf cache rm model/{study.model.name}`, and the next run fetches it again"
    return "copy it again, or, if the change is meant, delete 00_setup.ipynb and setup.json of the study's results"


def check_positions(study: Study, config) -> Sizes:
    """The benchmark's sizes for this machine and model. Raises StudyError if the study asks for longer texts than the
    model has positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    asked = study.evaluation.max_gen_toks
    if study.data is not None and positions is not None and positions <= asked:
        raise StudyError(
            f"evaluation.max_gen_toks: {asked} new tokens leave no room for a prompt in the model's {positions} "
            f"positions; write at most {positions // 2}"
        )
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return getattr(study.benchmark, kind).fitted(positions, f"benchmark.{kind}")


def check_loaded(study: Study, model: PreTrainedModel, report) -> None:
    """Raises StudyError if a tensor was missing, unexpected or of another shape, or if a weight is not finite.

    report: transformers' loading info (missing_keys, unexpected_keys, mismatched_keys)."""
    for kind, what in (
        ("missing", "lack"),
        ("unexpected", "hold the unknown tensor"),
        ("mismatched", "have another shape for"),
    ):
        if keys := sorted(k if isinstance(k, str) else k[0] for k in report.get(f"{kind}_keys", ())):
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise StudyError(
                f"model.name: the weights of {study.model.name} {what} {keys[0]}{more}, so they do not belong to its "
                "config.json; fetch or copy the whole folder again"
            )
    for held in tensors(model):
        for name, tensor in held.items():
            # float8 has no isfinite of its own; its scales are tested.
            if tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.isfinite().all():
                raise StudyError(
                    f"model.name: {name} of {study.model.name} holds NaN or infinite weights in "
                    f"{str(tensor.dtype).removeprefix('torch.')}; fetch the weights again, or set `dtype` to bfloat16 "
                    "or float32 if the model does not fit float16"
                )


def check_rows(configuration: Configuration, model: PreTrainedModel) -> None:
    """bitsandbytes 0.50 rearranges 4-bit layers for CPUs with AVX512-BF16 in blocks of 32 rows (functional.py,
    `block_n`)."""
    if configuration.quantization.method != "bitsandbytes-4bit" or model.device.type != "cpu" or not has_avx512bf16():
        return
    for name, layer in quantized_layers(model).items():
        if layer.out_features % 32:
            raise NotHere(
                f"{configuration.configuration}: {name} has {layer.out_features} rows, and on this CPU (AVX512-BF16) "
                "bitsandbytes multiplies 4-bit weights in blocks of 32 rows; run it on a GPU"
            )
