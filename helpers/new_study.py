"""Write a new study's folder: `make new-study MODEL=Qwen/Qwen2.5-0.5B STUDY=qwen2.5-0.5b`.

MODEL is a name on the model hub (OWNER/NAME, or OWNER/NAME@REVISION) or a folder with config.json, safetensors and a
tokenizer. params/STUDY/study.yaml names formats and says what differs from the defaults. A hub model is asked CoQA (the
revision of params/llama-3.2-1b), a local one the project's own dialogues.

The model's small files are looked up first: what can't work is refused; what could not be looked up (no access yet, no
network) is said, and the study is written all the same. No code of a model is run.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import httpx
import huggingface_hub
import yaml

from helpers import StudyError, params
from helpers.checked_yaml import NAME
from helpers.setup import hub

PAPER = "llama-3.2-1b"
FORMATS = ["fp16", "int8", "nf4", "fp4"]
RESERVED = ("reference", "formats")
# Above this a CPU gets the sizes of the paper's 1.2B model, so that a benchmark stays a matter of minutes there.
SMALL = 600_000_000  # parameters
# CoQA's longest dialogues, with the story and all turns before the last.
DIALOGUE_TOKENS = 2048
UNREACHABLE = ("gated", "token", "network", "offline")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
SMALL_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


class Written(NamedTuple):
    folder: Path
    facts: list[str]  # what was found out about the model, a line each


def write(model: str, study: str) -> Written:
    """Make params/STUDY. Raises StudyError if it is there already, or the model can't be studied."""
    folder = params.PARAMS / study
    if not re.fullmatch(NAME, study) or study != study.lower() or study in RESERVED:
        raise StudyError(f"STUDY={study}: write lower-case letters, digits, dots and hyphens, such as qwen2.5-0.5b")
    if folder.exists():
        raise StudyError(f"params/{study} is there already: give another STUDY=, or remove the folder first")
    source, config, facts = _local(model) if _is_path(model) else _from_hub(model)
    if config is not None:
        facts += describe(config, model)
    values = _study(study, source, config)
    params.check(values, f"params/{study}/study.yaml")
    with tempfile.TemporaryDirectory(dir=params.PARAMS, prefix=".new-") as scratch:
        new = Path(scratch) / study
        new.mkdir()
        text = yaml.dump(values, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)
        head = f"# Written by make new-study MODEL={' '.join(model.split())}; change what you like."
        (new / "study.yaml").write_text(f"{head}\n{text}", encoding="utf-8")
        os.replace(new, folder)
    return Written(folder, facts)


def describe(config, model: str) -> list[str]:
    """Facts about a transformers configuration, a line each. Raises StudyError if it can't be studied."""
    model, heads = f"MODEL={model}", config.architectures or []
    if getattr(config, "quantization_config", None):
        raise StudyError(f"{model} is quantized already; name the model that it was made from")
    if heads and not any(h.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for h in heads):
        raise StudyError(f"{model} is {heads[0]}, not a decoder that writes text; name a causal language model")
    try:
        parameters = _parameters(config)
    except Exception as error:  # a configuration can be wrong in as many ways as there are models
        said = f"is of type {config.model_type}, not a decoder that transformers loads by itself"
        raise StudyError(f"{model} {said}") from error
    text, answer = config.get_text_config(), params.Evaluation().max_gen_toks
    context = getattr(text, "max_position_embeddings", None)
    if context and context <= answer + 64:  # the least question, with the end of its story
        said = f"its context of {context} tokens has no room for a question and an answer of {answer} tokens"
        raise StudyError(f"{model}: {said} (evaluation.max_gen_toks); name a model with a longer one")
    stated = f"{context:,} tokens" if context else "not stated"
    facts = [f"{config.model_type}, {parameters:,} parameters ({parameters * 2 / 1e9:.1f} GB in 16 bits), "]
    facts[0] += f"vocabulary {text.vocab_size:,}, context {stated}"
    if context and context < DIALOGUE_TOKENS:
        facts.append(f"its context is short: dialogues of up to {DIALOGUE_TOKENS:,} tokens may not fit")
    return facts


def _is_path(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~")) or Path(model).is_dir() or "/" not in model


def _local(model: str) -> tuple[dict, object, list[str]]:
    folder = Path(os.path.abspath(Path(model).expanduser()))
    needed = {
        ("config.json",): "config.json; give a folder written by save_pretrained, or OWNER/NAME",
        ("*.safetensors",): "safetensors weights; save the model with save_pretrained",
        TOKENIZERS: "tokenizer; save it with the tokenizer's save_pretrained",
    }
    for patterns, said in needed.items():
        if not any(path for pattern in patterns for path in folder.glob(pattern)):
            raise StudyError(f"MODEL={model}: there is no {said}")
    return {"source": "path", "name": str(folder)}, _config(folder, model), []


def _from_hub(model: str) -> tuple[dict, object | None, list[str]]:
    name, _, revision = model.partition("@")
    source = {"source": "hub", "name": name}
    try:
        plan = hub.plan(name, revision or None)
        for file in sorted({*SMALL_FILES} & {*plan["files"]}, reverse=True):
            path = huggingface_hub.hf_hub_download(name, file, revision=plan["commit"])
    except hub.HubError as error:
        if error.reason not in UNREACHABLE:
            raise
        commit = revision or (_public_commit(name) if error.reason == "gated" else None)
        return source | ({"revision": commit} if commit else {}), None, [f"not looked up: {error}"]
    sizes = f"{plan['bytes_to_download'] / 1e9:.1f} of {plan['bytes'] / 1e9:.1f} GB to download"
    facts = [f"{name} at commit {plan['commit'][:8]}, {sizes}"]
    return source | {"revision": plan["commit"]}, _config(Path(path).parent, model), facts


def _public_commit(name: str) -> str | None:
    """The commit of a gated model, whose name and history are open. None if the hub does not say."""
    try:
        return huggingface_hub.model_info(name).sha
    except (httpx.HTTPError, OSError):  # only a convenience: without it the study has no fixed revision
        return None


def _config(folder: Path, model: str):
    """The model's configuration, read without its own code. Raises StudyError if transformers does not know it, or no
    text could end."""
    from transformers import AutoConfig  # takes seconds

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        stated = [json.loads((folder / f).read_text("utf-8")) for f in SMALL_FILES if (folder / f).is_file()]
    except Exception as error:  # not JSON, an unknown type, a value that the type's own check refuses
        said = "transformers does not know this architecture, and the model's own code is not run; name another"
        raise StudyError(f"MODEL={model}: {said}") from error
    stated.append(config.get_text_config().to_dict())  # the type's own defaults
    if not any(given.get(key) not in (None, []) for given in stated for key in ("eos_token_id", "eos_token")):
        said = "no eos_token_id, the token that ends a text; state it in its generation_config.json"
        raise StudyError(f"MODEL={model}: {said}")
    return config


def _parameters(config) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config, trust_remote_code=False).parameters())


def _study(study: str, source: dict, config) -> dict:
    """study.yaml's values: what differs from the defaults, which shrink to a context (params.Sizes.fitted)."""
    paper, on_hub = params.read_yaml(params.PARAMS / PAPER / "study.yaml"), source["source"] == "hub"
    asked = "CoQA" if on_hub else "the project's own dialogues"
    values = {
        "study": study,
        "title": f"{Path(source['name']).name} on {asked}",
        "formats": FORMATS,
        "model": source,
        "data": paper["data"] if on_hub else {"source": "embedded", "dialogues_on_cpu": 20},
    }
    large = config is None or _parameters(config) >= SMALL
    return values | ({"benchmark": {"cpu": paper["benchmark"]["cpu"]}} if large else {})


def main(argv: list[str]) -> None:
    if len(argv) != 2 or not all(argv):
        raise SystemExit(
            "usage: make new-study MODEL=OWNER/NAME STUDY=NAME   (or MODEL=a folder with config.json and safetensors)"
        )
    try:
        written = write(*argv)
    except StudyError as error:
        raise SystemExit(str(error)) from None
    print(f"wrote params/{argv[1]}: study.yaml")
    for fact in written.facts:
        print(f"  {fact}")
    print(f"next: make run-all STUDY={argv[1]}")


if __name__ == "__main__":
    main(sys.argv[1:])
