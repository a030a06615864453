"""Rehearse a gated study of the hub without an account: `make run-all` against a stand-in on 127.0.0.1, start to end.

The stand-in serves, at the commits that the study pins and for a granted token only, a model of Llama-3.2-1B's exact
architecture with random weights, a tokenizer of the same size (byte-level BPE trained on the project's dialogues,
filled up), and made-up dialogues in the layout of EleutherAI/coqa. What the model answers is noise: times, memory,
sizes and error paths are what is rehearsed.

    python tests/bench_rehearsal.py                         # on a GPU; writes executed/reference/rehearsal.json
    python tests/bench_rehearsal.py --tiny --configs fp16 nf4 --out /tmp/rehearsal.json        # minutes on a CPU
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from helpers import params  # noqa: E402
from helpers.setup import coqa  # noqa: E402
from tests.hub_server import GRANTED, NOT_GRANTED, Hub, Repository  # noqa: E402

STUDY, ARCHITECTURE = "llama-3.2-1b", "llama-3.2-1b-random"
DIALOGUES = {"validation": 500, "train": 200}
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY_STUDY = {
    "benchmark": {
        "cpu": {"prefill_tokens": [32], "batch_sizes": [1], "prompt_tokens": 16, "decode_tokens": 4, "repeats": 3}
    },
    "fidelity": {"dialogues": 2, "noise_seeds": [0], "block_sizes": [64]},
    "evaluation": {"max_gen_toks": 8},
    "statistics": {"resamples": 200, "redraws": 200},
}


def model(folder: Path, tiny: bool) -> dict[str, Path]:
    """Files of the random model, by name: bfloat16, as the original's."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(params.read_study(ARCHITECTURE).model.architecture) | {"dtype": "bfloat16"}
    values |= TINY if tiny else {}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer(config.vocab_size, config.bos_token_id, config.eos_token_id).save_pretrained(folder)
    return {p.name: p for p in folder.iterdir()}


def tokenizer(size: int, bos: int, eos: int):
    """A byte-level BPE tokenizer of `size` tokens, BOS and EOS at the original's places."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([d["story"] for d in coqa.read("embedded")], vocab_size=8000)
    state = json.loads(trained.to_str())
    vocabulary = state["model"]["vocab"]
    # No merge makes the rest, so no text is ever split into them.
    vocabulary |= {f"<|unused_{n}|>": n for n in range(len(vocabulary), size) if n not in (bos, eos)}
    vocabulary |= {"<|begin_of_text|>": bos, "<|end_of_text|>": eos}
    built = tokenizers.Tokenizer.from_str(json.dumps(state))
    built.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", padding_side="left"
    )


def dialogues(folder: Path, counts: dict[str, int]) -> dict[str, Path]:
    """Parquet files as EleutherAI/coqa lays them out; no story of one split is in another."""
    import datasets

    files = {}
    for split, source in (("validation", "embedded"), ("train", "embedded-held-out")):
        found = coqa.read(source)
        rows = [_numbered(found[n % len(found)], n) for n in range(counts[split])]
        name = f"data/{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows).to_parquet(folder / Path(name).name)
        files[name] = folder / Path(name).name
    return files


def _numbered(dialogue: dict, number: int) -> dict:
    """The dialogue with an id and a first sentence of its own, and spans as CoQA has them (of none)."""

    def spans(answers: dict) -> dict:
        nowhere, count = [-1], len(answers["input_text"])
        return answers | {"span_start": nowhere * count, "span_end": nowhere * count, "span_text": [""] * count}

    changed = {"id": f"made-up-{number}", "story": f"This is story {number}. {dialogue['story']}"}
    more = {key: spans(answers) for key, answers in dialogue["additional_answers"].items()}
    return dialogue | changed | {"answers": spans(dialogue["answers"]), "additional_answers": more}


def project(folder: Path, tiny: bool) -> Path:
    """A copy of the project without results, so that nothing here is taken for the study's own."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.splitlines() or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    for name in names:
        if (ROOT / name).is_file() and not name.startswith(("executed/", "figures/", ".cache/", ".git/", ".venv/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    if tiny:
        path = folder / "params" / STUDY / "study.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | TINY_STUDY, sort_keys=False))
    return folder


class Watch(threading.Thread):
    """Highest resident memory of this process's children together (MiB), and highest use of the first GPU (MiB),
    every half second.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.rss, self.gpu, self.done = 0.0, None, threading.Event()

    def run(self):
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            before = pynvml.nvmlDeviceGetMemoryInfo(handle).used
        except Exception:  # no driver, no GPU, or no package
            handle = None
        while not self.done.wait(0.5):
            total = 0
            for child in psutil.Process().children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.Error:
                    continue
            self.rss = max(self.rss, total / 2**20)
            if handle is not None:
                used = (pynvml.nvmlDeviceGetMemoryInfo(handle).used - before) / 2**20
                self.gpu = max(self.gpu or 0.0, used)


def notebooks(results: Path) -> dict[str, float]:
    """Seconds of every notebook that ran, by its place under the study's results."""
    durations = {}
    for path in sorted(results.rglob("*.ipynb")):
        seconds = json.loads(path.read_text())["metadata"].get("papermill", {}).get("duration")
        durations[str(path.relative_to(results).with_suffix(""))] = seconds and round(seconds, 1)
    return durations


def run(where: Path, *arguments: str, url: str, token: str | None) -> tuple[int, str]:
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    ours = {"HF_ENDPOINT": url, "HF_HOME": str(where.parent / "hub"), "NO_PROXY": "127.0.0.1,localhost"}
    ours |= {"HF_TOKEN": token} if token else {}
    command = ["make", f"PYTHON={sys.executable}", f"STUDY={STUDY}", *arguments]
    with subprocess.Popen(
        command, cwd=where, env=kept | ours, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        for line in process.stdout:
            print(line, end="")
            lines.append(line.rstrip())
    return process.returncode, "\n".join(lines)


def rehearse(
    scratch: Path, tiny: bool, counts: dict[str, int], configs: list[str], targets: list[str], jobs: int
) -> dict:
    """Seconds per notebook, memory, and what a user without access reads first."""
    study = params.read_study(STUDY)
    data = study.sources[0]
    made, tables = scratch / "made", scratch / "tables"
    tables.mkdir()
    files = model(made, tiny)
    repositories = [
        Repository(study.model.name, files, gated=True, commit=study.model.revision),
        Repository(data.source, dialogues(tables, counts), kind="dataset", commit=data.revision),
    ]
    where = project(scratch / "project", tiny)
    setup = f"executed/{STUDY}/00_setup.ipynb"
    chosen = [f"CONFIGS={' '.join(configs)}"] if configs else []
    with Hub(repositories) as hub:
        refused = {}
        for who, token in (
            ("without a token", None),
            ("without a grant", NOT_GRANTED),
            ("with a mistyped token", "hf_x"),
        ):
            code, output = run(where, setup, url=hub.url, token=token)
            refused[who] = next(
                (line for line in output.splitlines() if "FAILED" in line or "gated" in line), output[-300:]
            )
            assert code, f"{who}: the model was given out"
        watch = Watch()
        watch.start()
        start = time.perf_counter()
        code, output = run(where, "-k", f"-j{jobs}", *targets, *chosen, url=hub.url, token=GRANTED)
        seconds = time.perf_counter() - start
        watch.done.set()
    machine = json.loads((where / "executed" / STUDY / "setup.json").read_text())["provenance"]
    return {
        "study": STUDY,
        "tiny": tiny,
        "targets": targets,
        "jobs": jobs,
        "dialogues": counts,
        "weights_gb": round(sum(p.stat().st_size for n, p in files.items() if n.endswith(".safetensors")) / 1e9, 2),
        "gpu": machine.get("gpu"),
        "returncode": code,
        "seconds": round(seconds, 1),
        "seconds_per_notebook": notebooks(where / "executed" / STUDY),
        "peak_resident_mib": round(watch.rss),
        "peak_gpu_mib": watch.gpu and round(watch.gpu),
        "not_run": [line.strip() for line in output.splitlines() if "not run" in line],
        "refused": refused,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two narrow layers and few measurements, for a CPU")
    parser.add_argument("--dialogues", type=int, help="to evaluate (500; tiny: 4)")
    parser.add_argument("--train", type=int, help="to calibrate on (200; tiny: 130)")
    parser.add_argument("--configs", nargs="*", default=[], help="only these (the study's)")
    parser.add_argument("--targets", nargs="+", default=["run-all"], help="of make, such as: accuracy report")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "executed/reference/rehearsal.json")
    options = parser.parse_args()
    wanted = {
        "validation": options.dialogues or (4 if options.tiny else DIALOGUES["validation"]),
        "train": options.train or (130 if options.tiny else DIALOGUES["train"]),
    }
    with tempfile.TemporaryDirectory() as folder:
        measured = rehearse(Path(folder), options.tiny, wanted, options.configs, options.targets, options.jobs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured, indent=2))
    sys.exit(measured["returncode"])
