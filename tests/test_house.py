"""The house of helpers and notebooks: size, direction of imports, nothing written twice, cells that run twice."""

import ast
import re
from itertools import pairwise

import nbformat
import pytest

from helpers import ROOT, params

SOURCES = sorted((ROOT / "helpers").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARTS = ("analysis", "fidelity", "benchmark", "evaluate")
PARAMETERS = set(params.Study.model_fields) | set(params.Configuration.model_fields)


def code(path) -> list[str]:
    """Sources of a notebook's code cells, without the parameters cell."""
    cells = nbformat.read(path, 4).cells
    return [c.source for c in cells if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", [])]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_lines_are_short(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 120]


def test_lines_of_make_and_shell_are_short():
    others = [ROOT / "Makefile", *ROOT.glob("params/*.mk"), *ROOT.glob("tests/**/*.sh"), *ROOT.glob(".ci/*")]
    rows = [(p.name, n, line) for p in others for n, line in enumerate(p.read_text().splitlines(), 1)]
    assert len(others) > 4 and not [row for row in rows if len(row[2]) > 120]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    imported = set(re.findall(r"(?:from|import) helpers\.(\w+)", path.read_text()))
    imported |= {name for names in re.findall(r"from helpers import ([\w, ]+)", path.read_text()) for name in
                 re.split(r", *", names)}  # fmt: skip
    part = path.relative_to(ROOT / "helpers").parts[0]
    forbidden = set(PARTS) - {part} if part in (*PARTS, "setup") else set()
    if part in ("params.py", "results.py", "statistics.py", "provenance.py") or part.startswith("schema"):
        forbidden = {*PARTS, "setup"}
    assert not imported & forbidden
    if part == "analysis":
        assert not re.search(r"^\s*(import|from) torch", path.read_text(), re.M)


def test_no_six_lines_stand_in_two_places():
    seen, twice = {}, []
    for path in SOURCES:
        lines = [(n, line.strip()) for n, line in enumerate(path.read_text().splitlines(), 1)]
        lines = [(n, s) for n, s in lines if len(s) > 3 and not s.startswith(("import ", "from ", "#"))]
        for start in range(len(lines) - 5):
            block = tuple(text for _, text in lines[start : start + 6])
            here = f"{path.relative_to(ROOT)}:{lines[start][0]}"
            if seen.setdefault(block, here) != here:
                twice.append((seen[block], here))
    assert not twice


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_are_short_and_assign_no_parameter(path):
    for source in code(path):
        lines = [
            line for line in source.splitlines() if line.strip() and not line.startswith(("import", "from", "sys."))
        ]
        assert len(lines) <= 20, source
        tree = ast.parse("\n".join(line for line in source.splitlines() if not line.startswith(("%", "!"))))
        assigned = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        assert not assigned & PARAMETERS, source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_variable_takes_the_name_of_an_import(path):
    trees = [ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M)) for source in code(path)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imports = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    imported = [alias.asname or alias.name for n in imports for alias in n.names]
    assigned = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert not assigned & set(imported)
    ordered = sorted(imported)
    assert not [a for a, b in pairwise(ordered) if a == b]
