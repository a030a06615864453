"""A copy of the project with two studies that run in a minute: `tiny`, a folder with a model of two layers and the
embedded model's tokenizer, four dialogues and two formats; `hardware`, the same layers and no data.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from helpers import CACHE, ROOT, params
from helpers.setup import models

BENCHMARK = {
    "prefill_tokens": [16, 32],
    "batch_sizes": [1, 2],
    "prompt_tokens": 16,
    "contexts": [24],
    "decode_tokens": 4,
    "repeats": 3,
    "warmup": 1,
}
# Two layers of the embedded model's family with random weights: its study `hardware` has no data.
MODEL = {
    "source": "random",
    "name": "two-layers",
    "architecture": {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}
STUDY = {
    "study": "tiny",
    "title": "Tiny",
    "formats": ["fp16", "nf4"],
    "benchmark": {"cpu": BENCHMARK},
    "fidelity": {"dialogues": 2, "noise_seeds": [0], "block_sizes": [64]},
    "evaluation": {"max_gen_toks": 8},
    "statistics": {"resamples": 200, "redraws": 200},
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def copy(root: Path) -> Path:
    """The project as it stands, without results, in `root`; the weights' cache is shared."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("executed/", "figures/")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    (root / ".cache").mkdir()
    for part in CACHE.iterdir():
        if part.name != "cards":  # its benchmarks wait for none but its own
            (root / ".cache" / part.name).symlink_to(part)
    study = yaml.safe_load((ROOT / "params/smollm2-135m/study.yaml").read_text()) | STUDY
    study["data"] |= {"dialogues": 5, "dialogues_on_cpu": 4}
    study["model"] = {"source": "path", "name": model(root / "two-layers").name}
    hardware = {key: value for key, value in study.items() if key != "data"} | {"study": "hardware", "model": MODEL}
    for one in (study, hardware):
        (root / "params" / one["study"]).mkdir()
        (root / "params" / one["study"] / "study.yaml").write_text(yaml.safe_dump(one, sort_keys=False))
    return root


def model(folder: Path) -> Path:
    """Two layers with random weights and the embedded model's tokenizer, written by save_pretrained."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    embedded = Path(models.prepare(params.read_study("smollm2-135m")))
    settings = MODEL["architecture"] | {"vocab_size": AutoConfig.from_pretrained(embedded).vocab_size}
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in TOKENIZER:
        if (embedded / name).is_file():
            shutil.copy(embedded / name, folder)
    return folder


def environment(**more: str) -> dict:
    """This process's environment without what a surrounding make left in it; two layers need no threads."""
    kept = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "STUDY")}
    return kept | {"OMP_NUM_THREADS": "1"} | more


def command(study: str = "tiny") -> list[str]:
    return ["make", f"PYTHON={sys.executable}", f"STUDY={study}"]
