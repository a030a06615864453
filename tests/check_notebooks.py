"""Committed notebooks have no outputs and no execution counts. Exits with 1 and names those that do."""

import sys
from pathlib import Path

import nbformat

dirty = [
    path.name
    for path in sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
    if any(c.cell_type == "code" and (c.outputs or c.execution_count) for c in nbformat.read(path, 4).cells)
]
if dirty:
    sys.exit(f"notebooks with outputs: {', '.join(dirty)}; clear them before committing")
