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

from helpers import ROOT, NotHere, StudyError, results
from helpers.params import Configuration, Sizes, Study
from helpers.setup import packages
from helpers.setup.layers import quantized_layers, tensors

_verified: set[tuple[str, str]] = set()


def damaged(folder: Path) -> str | None:
    """Name of the first file of a model's folder that is missing or truncated (by its header); None: all are whole."""
    name = "config.json"
    try:
        json.loads((folder / name).read_text(encoding="utf-8"))
        name = "model.safetensors.index.json"
        index = json.loads((folder / name).read_text())["weight_map"] if (folder / name).is_file() else {}
        for name in sorted({*index.values()} or {"model.safetensors"}):
            with safe_open(folder / name, "pt"):  # compares the file's length with what its header promises
                pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return name
    return None


def own_folder(name: str) -> str:
    folder = ROOT / Path(name).expanduser()  # a notebook's own folder is another
    if not (folder / "config.json").is_file():
        raise StudyError(f"model.name: {name} has no config.json; give a folder written by save_pretrained")
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    if not any(folder.glob("*.safetensors")):
        what = f"only {pickles[0]}, a pickle, which can run code when it is read" if pickles else "no weights"
        raise StudyError(f"model.name: {name} holds {what}; write it as safetensors with save_pretrained")
    if broken := damaged(folder):
        raise StudyError(f"model.name: {broken} in {name} is missing or truncated; copy or download it again")
    return str(folder)


def verify(study: Study, folder: Path) -> None:
    """Compare the weights' files with what 00_setup recorded, once a process; hash only those whose time of change is
    another.

    Raises StudyError that names the file. Without a record (a notebook run by hand) there is nothing to compare."""
    record = results.path(study, None, "setup")
    if (str(folder), str(record)) in _verified or not record.is_file():
        return
    own = study.model.source in ("package", "random")
    recorded = results.read(record).data
    for row in recorded["weights"]["files"] if recorded else []:  # a setup that failed has none
        path = folder / row["file"]
        if path.suffix != ".safetensors":
            continue
        status = path.stat() if path.is_file() else None
        unchanged = status and (status.st_size, status.st_mtime_ns) == (row["bytes"], row.get("modified_ns"))
        if unchanged or (status and packages.sha256(path) == row["sha256"]):
            continue
        where = f".cache/models/{folder.name}" if own else study.model.name
        remedy = (
            "copy it again, or, if the change is meant, delete 00_setup.ipynb and setup.json of the study's results"
        )
        if own:
            remedy = f"delete {where}, and the next run makes it anew"
        elif study.model.source == "hub":
            remedy = f"run `.venv/bin/hf cache rm model/{where}`, and the next run fetches it again"
        said = f"{path.name} is not the file that 00_setup recorded (sha256 {row['sha256'][:12]}...)"
        raise StudyError(f"{where}: {said}; {remedy}")
    _verified.add((str(folder), str(record)))


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
    kinds = {"missing": "lack", "unexpected": "hold the unknown tensor", "mismatched": "have another shape for"}
    for kind, what in kinds.items():
        if keys := sorted(k if isinstance(k, str) else k[0] for k in report.get(f"{kind}_keys", ())):
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            said = f"the weights of {study.model.name} {what} {keys[0]}{more}, so they do not belong to its config.json"
            raise StudyError(f"model.name: {said}; fetch or copy the whole folder again")
    for name, tensor in (pair for held in tensors(model) for pair in held.items()):
        # float8 has no isfinite of its own; its scales are tested.
        if tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.isfinite().all():
            dtype = str(tensor.dtype).removeprefix("torch.")
            said = f"{name} of {study.model.name} holds NaN or infinite weights in {dtype}; fetch the weights again, or"
            raise StudyError(f"model.name: {said} set `dtype` to bfloat16 or float32 if the model does not fit float16")


def check_rows(configuration: Configuration, model: PreTrainedModel) -> None:
    """bitsandbytes 0.50 packs 4-bit layers for CPUs with AVX512-BF16 in blocks of 32 rows (functional.py, `block_n`).
    Raises NotHere for a layer of others."""
    if configuration.quantization.method != "bitsandbytes-4bit" or model.device.type != "cpu" or not has_avx512bf16():
        return
    for name, layer in quantized_layers(model).items():
        if layer.out_features % 32:
            said = f"{name} has {layer.out_features} rows, and on this CPU (AVX512-BF16) bitsandbytes multiplies 4-bit"
            raise NotHere(f"{configuration.configuration}: {said} weights in blocks of 32 rows; run it on a GPU")
