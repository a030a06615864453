"""Write a new study's folder: `make new-study MODEL=Qwen/Qwen2.5-0.5B STUDY=qwen2.5-0.5b`.

MODEL is a name on the model hub (OWNER/NAME, or OWNER/NAME@REVISION) or a folder with config.json and safetensors. The folder params/STUDY
gets study.yaml and the configurations fp16, nf4, fp4 and int8. Sizes and configurations are those of params/smollm2-135m, as far as the
model's context allows; a hub model is asked CoQA (the revision of params/llama-3.2-1b), a local one the project's own dialogues.

The model's configuration is looked up first, if it can be. What can't work is refused (no such model, not a decoder, quantized already);
what could not be looked up (no access yet, no network) is said, and the folder is written all the same.
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import httpx
import huggingface_hub
import yaml

from helpers import StudyError, params
from helpers.setup import hub

TEMPLATE, PAPER = "smollm2-135m", "llama-3.2-1b"
CONFIGURATIONS = ("fp16", "nf4", "fp4", "int8")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
# Above this a CPU gets the sizes of the paper's 1.2B model, so that a configuration's benchmark stays a matter of minutes there.
SMALL = 600_000_000  # parameters
# CoQA's longest dialogues, with the story and all turns before the last.
DIALOGUE_TOKENS = 2048
UNREACHABLE = ("gated", "token", "network", "offline")


class Written(NamedTuple):
    folder: Path
    files: list[str]
    facts: list[str]  # what was found out about the model, a line each


def write(model: str, study: str) -> Written:
    """Make params/STUDY for a model. Raises StudyError if the folder is there already, or the model can't be studied."""
    folder = params.PARAMS / study
    if not NAME.fullmatch(study) or study == "reference":
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
        text = yaml.dump(values, sort_keys=False, default_flow_style=None, width=140, allow_unicode=True)
        (new / "study.yaml").write_text(
            f"# Written by make new-study MODEL={model}; change what you like.\n{text}", encoding="utf-8"
        )
        for name in CONFIGURATIONS:
            shutil.copy(params.PARAMS / TEMPLATE / f"{name}.yaml", new)
        os.replace(new, folder)
    return Written(folder, ["study.yaml", *(f"{name}.yaml" for name in CONFIGURATIONS)], facts)


def describe(config, model: str) -> list[str]:
    """Facts about a transformers configuration, a line each. Raises StudyError if it is not one of a full-precision decoder."""
    if getattr(config, "quantization_config", None):
        raise StudyError(f"MODEL={model} is quantized already; name the model that it was made from")
    try:
        parameters = _parameters(config)
    except (ValueError, KeyError, ImportError) as error:
        raise StudyError(
            f"MODEL={model} is of type {config.model_type}, not a decoder that transformers loads by itself"
        ) from error
    context = getattr(config, "max_position_embeddings", None)
    facts = [
        f"{config.model_type}, {parameters:,} parameters ({parameters * 2 / 1e9:.1f} GB in float16), vocabulary {config.vocab_size:,}, "
        f"context {f'{context:,} tokens' if context else 'not stated'}"
    ]
    if context and context < DIALOGUE_TOKENS:
        facts.append(f"its context is short: dialogues of up to {DIALOGUE_TOKENS:,} tokens may not fit")
    return facts


def _is_path(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~")) or (Path(model) / "config.json").is_file()


def _local(model: str) -> tuple[dict, object, list[str]]:
    folder = Path(model).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise StudyError(
            f"MODEL={model}: there is no config.json; give a folder written by save_pretrained, or OWNER/NAME"
        )
    if not any(folder.glob("*.safetensors")):
        raise StudyError(f"MODEL={model}: there are no safetensors weights; save the model with save_pretrained")
    return {"source": "path", "name": str(folder)}, _config(folder, model), []


def _from_hub(model: str) -> tuple[dict, object | None, list[str]]:
    name, _, revision = model.partition("@")
    source = {"source": "hub", "name": name}
    try:
        plan = hub.plan(name, revision or None)
        path = huggingface_hub.hf_hub_download(name, "config.json", revision=plan["commit"])
    except hub.HubError as error:
        if error.reason not in UNREACHABLE:
            raise
        commit = revision or (_public_commit(name) if error.reason == "gated" else None)
        return source | ({"revision": commit} if commit else {}), None, [f"not looked up: {error}"]
    facts = [
        f"{name} at commit {plan['commit'][:8]}, {plan['bytes_to_download'] / 1e9:.1f} of {plan['bytes'] / 1e9:.1f} GB to download"
    ]
    return source | {"revision": plan["commit"]}, _config(Path(path).parent, model), facts


def _public_commit(name: str) -> str | None:
    """The commit of a gated model: its files are closed, but not its name and history. None if the hub does not say."""
    try:
        return huggingface_hub.model_info(name).sha
    except (httpx.HTTPError, OSError):  # only a convenience: without it the study has no fixed revision
        return None


def _config(folder: Path, model: str):
    from transformers import AutoConfig  # takes seconds

    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise StudyError(
            f"MODEL={model}: transformers does not know this architecture, and the model's own code is not run; name another"
        ) from error


def _parameters(config) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def _study(study: str, source: dict, config) -> dict:
    """study.yaml's values."""
    template, paper = (params.read_yaml(params.PARAMS / name / "study.yaml") for name in (TEMPLATE, PAPER))
    small = config is not None and _parameters(config) < SMALL
    sizes = {"cpu": (template if small else paper)["benchmark"]["cpu"], "cuda": template["benchmark"]["cuda"]}
    context = getattr(config, "max_position_embeddings", None) or max(sizes["cuda"]["prefill_tokens"])
    for kind in sizes.values():
        kind["prefill_tokens"] = [n for n in kind["prefill_tokens"] if n <= context] or [context]
        kind["prompt_tokens"] = min(kind["prompt_tokens"], context - kind["decode_tokens"])
    hub_data = source["source"] == "hub"
    asked = "CoQA" if hub_data else "the project's own dialogues"
    return {
        "study": study,
        "title": f"{Path(source['name']).name} on {asked}",
        "model": source,
        "data": paper["data"] if hub_data else template["data"],
        "benchmark": sizes,
    }


def main(argv: list[str]) -> None:
    if len(argv) != 2 or not all(argv):
        raise SystemExit(
            "usage: make new-study MODEL=OWNER/NAME STUDY=NAME   (or MODEL=a folder with config.json and safetensors)"
        )
    try:
        written = write(*argv)
    except StudyError as error:
        raise SystemExit(str(error)) from None
    print(f"wrote params/{argv[1]}: {', '.join(written.files)}")
    for fact in written.facts:
        print(f"  {fact}")
    print(f"next: make run-all STUDY={argv[1]}")


if __name__ == "__main__":
    main(sys.argv[1:])
