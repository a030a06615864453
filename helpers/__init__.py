"""The code behind the notebooks: one noun per file.

| file | what it holds |
|---|---|
| `params` | the schema of params/STUDY/*.yaml, and its error messages |
| `models` | weights and quantization methods: `prepare`, `load` |
| `coqa` | dialogues in CoQA's format: read, validate |
| `dialogue` | `hf-dialogue`, an lm-eval model that answers every turn from one prefill |
| `evaluation` | lm-eval runs |
| `benchmark` | memory, latency, throughput |
| `results` | result files: schema, provenance, atomic writes |
| `statistics` | paired, clustered comparisons |
| `figures` | every figure |
| `notebook` | headless runs through papermill, and `make status` |
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXECUTED = ROOT / "executed"
FIGURES = ROOT / "figures"
CACHE = ROOT / ".cache"


class StudyError(RuntimeError):
    """Something the user can put right. Its text is one sentence that names the file or value and the remedy."""
