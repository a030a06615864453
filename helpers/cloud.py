"""The study on Modal, where the paper ran: a container with a GPU for every configuration, results in executed/STUDY.

    pip install modal && modal setup
    GPU=H100 modal run helpers/cloud.py --study llama-3.2-1b      # HF_TOKEN goes along if it is set

Weights stay in a volume `quantization-study` between runs. Nothing of this was run: there was no account.
"""

import os
import subprocess
import sys
from pathlib import Path

import modal

HERE, THERE = Path(__file__).resolve().parents[1], "/study"
LEFT_HERE = [".git", ".venv", ".cache", "executed", "figures", "**/__pycache__"]
TOKEN = {"HF_TOKEN": os.environ["HF_TOKEN"]} if "HF_TOKEN" in os.environ else {}

app = modal.App("quantization-study")
image = (
    modal.Image.debian_slim(python_version="3.12")
    .apt_install("make", "gcc")
    .pip_install_from_requirements(str(HERE / "requirements.txt"))
    .env({"HF_HOME": "/weights"})
    .add_local_dir(HERE, THERE, ignore=LEFT_HERE)
)
weights = modal.Volume.from_name("quantization-study", create_if_missing=True)


def jobs(study: str) -> list[tuple[str, str, list[str]]]:
    """(study, configuration, Make's targets) of each container; full precision's makes what the study has once."""
    from helpers import notebook, params

    case, out = params.read_study(study), f"executed/{study}"
    further = [name for name in notebook.PER_CONFIGURATION if name != "02_benchmark"] if case.data else []
    found = []
    for name in params.configurations(study):
        targets = ["hardware", *(f"{out}/{name}/{one}.ipynb" for one in further)]
        found.append((study, name, [*targets, *([f"{out}/03_weights.ipynb"] if further and not found else [])]))
    return found


@app.function(
    image=image,
    gpu=os.environ.get("GPU", "H100"),
    volumes={"/weights": weights},
    secrets=[modal.Secret.from_dict(TOKEN)],
    timeout=4 * 3600,
)
def measure(study: str, configuration: str, targets: list[str]) -> dict[str, bytes]:
    """File -> content, of all that Make wrote; a failed target has a result that says why."""
    command = ["make", "-k", f"STUDY={study}", f"CONFIGS={configuration}", "PYTHON=python3", "PROCESSES=3", *targets]
    subprocess.run(command, cwd=THERE, check=False)
    written = (path for path in Path(THERE, "executed", study).rglob("*") if path.is_file())
    return {str(path.relative_to(THERE)): path.read_bytes() for path in written}


@app.local_entrypoint()
def main(study: str = "llama-3.2-1b"):
    sys.path.insert(0, str(HERE))
    for files in measure.starmap(jobs(study)):
        for name, content in files.items():
            target = HERE / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    print(f"now: make report STUDY={study}")
