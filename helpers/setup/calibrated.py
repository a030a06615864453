"""GPTQ and AWQ through llm-compressor: quantized once with calibration text, kept under .cache/quantized.

    folder, record = calibrated.quantized(study, configuration, source, tokenizer, device, dtype)

The folder's name ends in a key over everything that the weights depend on (`ingredients`). It appears in one move,
complete or not at all. Quantizing is a process of its own: its workspaces are not in the memory measured afterwards.

Calibration text is never a dialogue that is evaluated. Every sample is one dialogue as lm-eval's CoQA prompt writes it,
cut to `sequence_length` tokens; for random weights, which have no tokenizer, `source: random-tokens` draws token ids.

GPTQ: Frantar et al., 2022, https://arxiv.org/abs/2210.17323. AWQ: Lin et al., 2023, https://arxiv.org/abs/2306.00978.
"""

import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stderr
from importlib import metadata
from pathlib import Path

import torch
from pydantic import TypeAdapter
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import CACHE, ROOT, StudyError
from helpers.params import Calibration, Configuration, Quantization, Study
from helpers.setup import coqa
from helpers.setup.layers import linear_layers

PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")
HUB_COMMIT = re.compile(r"[0-9a-f]{40}")
RANDOM = "random-tokens"
AT_MOST, OF_RANDOM = 128, 16  # samples where the parameters name no number

# ---- calibration text ----


def text(dialogue: dict) -> str:
    """lm-eval's `coqa` prompt (lm_eval/tasks/coqa/utils.py, doc_to_text), with the last answer as well."""
    turns = zip(dialogue["questions"]["input_text"], dialogue["answers"]["input_text"], strict=True)
    return dialogue["story"] + "\n\n" + "".join(f"Q: {question}\n\nA: {answer}\n\n" for question, answer in turns)


def check_unseen(dialogues: list[dict], study: Study) -> None:
    """Raises StudyError if the story of one of `dialogues`, whatever its case and white space, is evaluated in this
    study. Ids say nothing: two files may both count from 0."""
    plain = lambda dialogue: " ".join(dialogue["story"].lower().split())  # noqa: E731
    stories = set(map(plain, coqa.read_all(study)))
    for dialogue in dialogues:
        if plain(dialogue) in stories:
            raise StudyError(
                f"calibration.source: dialogue {dialogue['id']} is also evaluated in this study; calibrate on other "
                "dialogues, such as embedded-held-out or a hub data set's train split"
            )


def _dialogues(study: Study, calibration: Calibration) -> list[dict]:
    """The dialogues that `calibration.seed` draws, in the order drawn."""
    # The hub's evaluated split is validation. A file or an embedded set has no splits.
    found = coqa.read(calibration.source, revision=calibration.revision, split="train")
    count = calibration.samples or max(1, min(len(found) * 4 // 5, AT_MOST))
    if count > len(found):
        said = f"{count} asked for, but {calibration.source} has {len(found)} dialogues; ask for at most that many"
        raise StudyError(f"calibration.samples: {said}")
    chosen = random.Random(calibration.seed).sample(found, count)
    check_unseen(chosen, study)
    return chosen


def samples(study: Study, calibration: Calibration, tokenizer, vocabulary: int) -> tuple[list[list[int]], dict]:
    """Token ids of every sample, and the record of them: source, seed, samples, tokens, sha256 (of the ids).

    Raises StudyError if a dialogue is evaluated too, if there are too few, or if there is no tokenizer for text."""
    calibration = calibration.resolved(study)
    source = calibration.source
    if source == RANDOM:
        generator = torch.Generator().manual_seed(study.seed + calibration.seed)
        shape = (calibration.samples or OF_RANDOM, calibration.sequence_length)
        ids = torch.randint(vocabulary, shape, generator=generator).tolist()
    elif tokenizer is None:
        said = f"{study.model.name} has random weights and no tokenizer to read {source} with; write {RANDOM}"
        raise StudyError(f"calibration.source: {said}")
    else:
        ids = [tokenizer(text(d))["input_ids"][: calibration.sequence_length] for d in _dialogues(study, calibration)]
    digest = hashlib.sha256(repr(ids).encode()).hexdigest()
    record = {"source": source, "seed": calibration.seed, "samples": len(ids), "tokens": sum(map(len, ids))}
    return ids, record | {"sha256": digest}


# ---- weights ----


def weights_key(folder: Path) -> str:
    """What identifies full-precision weights: the hub's commit if the folder is a snapshot, else the files' sha256."""
    if HUB_COMMIT.fullmatch(folder.name):
        return folder.name
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_group_size(architecture, group_size: int) -> None:
    """Raises StudyError if a group would not divide every linear layer's inputs, or if there is no such layer (GPT-2:
    Conv1D)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=False)
    inputs = {m.in_features: name for name, m in linear_layers(model).items()}
    if not inputs:
        raise StudyError(f"quantization: {type(model).__name__} has no linear layers to quantize; leave the format out")
    for size, name in inputs.items():
        if size % group_size:
            fits = " or ".join(str(g) for g in (256, 128, 64, 32) if not any(s % g for s in inputs))
            remedy = f"write {fits}" if fits else "no usual group size does"
            said = f"{group_size} does not divide the {size} inputs of {name}; {remedy}"
            raise StudyError(f"quantization.group_size: {said}")


def ingredients(
    configuration: Configuration, weights: str, calibrated: dict, device: torch.device, dtype: torch.dtype
) -> dict:
    """Everything that the quantized weights depend on; the cache's key is its hash."""
    return {
        "weights": weights,
        "recipe": configuration.quantization.model_dump(),
        "calibration": calibrated["sha256"],
        "computed_in": f"{arithmetic(configuration.quantization.method, dtype)} on {device.type}",
        "stored_in": str(stored(dtype)),
        "versions": {p: metadata.version(p) for p in PACKAGES},
    }


def key(parts: dict) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _recipe(options) -> list:
    """llm-compressor's modifiers for GPTQ, or for AWQ's scaling and the rounding that follows it."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group"}
    weights |= {"symmetric": options.symmetric, "group_size": options.group_size}
    common = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if options.method == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        # Columns in the order of their activations, groups as they stand: the unpacked weight needs no reordering.
        weights |= {"actorder": "static", "observer": f"memoryless_{options.scales}"}
        return [GPTQModifier(dampening_frac=options.dampening, **common)]
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    return [AWQModifier(n_grid=options.grid_points, duo_scaling=True), QuantizationModifier(**common)]


@contextmanager
def _without_pinning():
    """AWQ pins its cached activations (llm-compressor 0.14, modifiers/transform/awq/base.py), which torch refuses
    without a GPU."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    original = IntermediatesCache.pin_memory
    if not torch.cuda.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = original


@contextmanager
def _quiet():
    """Without llm-compressor's line per layer (loguru) and its progress bars; its errors are exceptions."""
    import llmcompressor  # noqa: F401  sets up its own logging
    from loguru import logger

    logger.disable("llmcompressor")
    logger.disable("compressed_tensors")
    with redirect_stderr(io.StringIO()):
        yield


def arithmetic(method: str, dtype: torch.dtype) -> torch.dtype:
    """What a method computes in. AWQ's trial scales overflowed float16 (SmolLM2-135M), so it gets float32."""
    return torch.float32 if method == "awq" else dtype


def _oneshot(source: str, target: Path, options, ids: list[list[int]], dtype: torch.dtype) -> float:
    """Quantize `source` into `target`, for a model that computes in `dtype`; returns seconds, without loading and
    saving."""
    with _quiet():
        from llmcompressor import oneshot

        # Not on a device: llm-compressor moves one layer at a time to the GPU, if there is one.
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=arithmetic(options.method, dtype), trust_remote_code=False, use_safetensors=True
        )
        tensors = [torch.tensor([i]) for i in ids]
        batches = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in tensors]
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        # It wants a tokenizer even where the samples are token ids already, and does nothing with it.
        given = {"model": model, "processor": object(), "dataset": loader, "num_calibration_samples": len(ids)}
        start = time.perf_counter()
        with _without_pinning():
            oneshot(recipe=_recipe(options), **given)
        seconds = time.perf_counter() - start
        model.to(stored(dtype))
        model.save_pretrained(target, save_compressed=True)
    return seconds


def _quantize(source: str, target: Path, options, ids: list[list[int]], dtype: torch.dtype) -> float:
    """`_oneshot` in a process of its own. Raises OSError if its files can't be written, else StudyError if it fails."""
    job, answer = target.with_name("job.json"), target.with_name("seconds.json")
    values = {"source": source, "target": str(target), "ids": ids, "dtype": str(dtype).removeprefix("torch.")}
    job.write_text(json.dumps(values | {"options": options.model_dump(), "answer": str(answer)}))
    command = [sys.executable, "-m", "helpers.setup.calibrated", str(job)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 0:
        return json.loads(answer.read_text())
    if done.returncode < 0:
        said = f"{options.method}: quantizing was killed by signal {-done.returncode}, as for lack of memory; use fewer"
        raise StudyError(f"{said} calibration.samples or a shorter calibration.sequence_length")
    last = (done.stdout.strip().splitlines() or ["no text"])[-1]
    if "No space left" in last or "Disk quota" in last:
        raise OSError(28, "No space left on device")
    print(done.stdout)
    raise StudyError(f"{options.method}: llm-compressor failed ({last}); its output stands above")


def _main(job: Path) -> None:
    values = json.loads(job.read_text())
    options, dtype = TypeAdapter(Quantization).validate_python(values["options"]), getattr(torch, values["dtype"])
    seconds = _oneshot(values["source"], Path(values["target"]), options, values["ids"], dtype)
    Path(values["answer"]).write_text(json.dumps(seconds))


def stored(dtype: torch.dtype) -> torch.dtype:
    """Of what a checkpoint does not quantize: 16 bits, as such checkpoints are published."""
    return torch.float16 if dtype == torch.float32 else dtype


def quantized(
    study: Study, configuration: Configuration, source: str, tokenizer, device: torch.device, dtype: torch.dtype
) -> tuple[Path, dict]:
    """The folder of the quantized checkpoint, and its record: quantize_seconds (s, in the run that made it),
    from_cache, checkpoint_bytes, checkpoint_dtype (of what is not quantized in it), calibration, ingredients.

    Raises StudyError if the group size does not fit the model, or the calibration is not allowed (`check_unseen`)."""
    options = configuration.quantization
    architecture = AutoConfig.from_pretrained(source, trust_remote_code=False)
    check_group_size(architecture, options.group_size)
    ids, calibrated = samples(study, options.calibration, tokenizer, architecture.vocab_size)
    parts = ingredients(configuration, weights_key(Path(source)), calibrated, device, dtype)
    folder = CACHE / "quantized" / f"{Path(study.model.name).name}-{options.method}-{key(parts)}"
    if (folder / "record.json").is_file():
        return folder, {**json.loads((folder / "record.json").read_text()), "from_cache": True}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        target = Path(scratch) / "model"
        try:
            seconds = _quantize(source, target, options, ids, dtype)
            record = {
                "quantize_seconds": seconds,
                "checkpoint_bytes": sum(p.stat().st_size for p in target.glob("*.safetensors")),
                "checkpoint_dtype": str(stored(dtype)).removeprefix("torch."),
                "calibration": calibrated,
                "ingredients": parts,
            }
            (target / "record.json").write_text(json.dumps(record, indent=2))
        except OSError as error:
            said = f"the quantized weights could not be written ({error.strerror or error}); free some disk space"
            raise StudyError(f"{folder}: {said}") from error
        if not folder.is_dir():  # another process may have been faster
            os.replace(target, folder)
    return folder, {**record, "from_cache": False}


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
