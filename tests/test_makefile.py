"""Make's prerequisites: a helper that a notebook reaches through its imports makes the notebook stale when it changes."""

import ast
import os
import subprocess
import sys

import nbformat
import pytest

from helpers import ROOT

TARGETS = {
    "00_setup": "executed/smollm2-135m/00_setup.ipynb",
    "01_evaluate": "executed/smollm2-135m/nf4/01_evaluate.ipynb",
    "02_benchmark": "executed/smollm2-135m/nf4/02_benchmark.ipynb",
    "03_fidelity": "executed/smollm2-135m/nf4/03_fidelity.ipynb",
    "04_analysis": "executed/smollm2-135m/04_analysis.ipynb",
    "05_figures": "executed/smollm2-135m/05_figures.ipynb",
}


def imported(source: str) -> set[str]:
    """Names of the helpers that a piece of code imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "helpers":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helpers."):
            names.add(node.module.split(".")[1])
    return {name for name in names if (ROOT / f"helpers/{name}.py").exists()}


def reached(notebook: str) -> set[str]:
    cells = nbformat.read(ROOT / f"notebooks/{notebook}.ipynb", 4).cells
    found, waiting = set(), imported("\n".join(c.source for c in cells if c.cell_type == "code"))
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= imported((ROOT / f"helpers/{name}.py").read_text(encoding="utf-8")) - found
    return found


@pytest.fixture(scope="module")
def prerequisites() -> dict[str, set[str]]:
    """Target -> what Make says it depends on."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    command = ["make", "-npq", f"PYTHON={sys.executable}", "STUDY=smollm2-135m"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment).stdout
    rules = (line.split(":", 1) for line in printed.splitlines() if line.startswith("executed/") and ":" in line)
    return {target: set(rest.split("|")[0].split()) for target, rest in rules}


@pytest.mark.parametrize("notebook", TARGETS)
def test_every_helper_that_a_notebook_reaches_is_a_prerequisite(notebook, prerequisites):
    missing = {f"helpers/{name}.py" for name in reached(notebook)} - prerequisites[TARGETS[notebook]]
    assert not missing, f"{notebook}: add {sorted(missing)} to the Makefile"
