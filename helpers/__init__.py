"""The code behind the notebooks: one noun per file.

| file | what it holds |
|---|---|
| `params` | the schema of params/STUDY/*.yaml, and its error messages |
| `models` | weights: `prepare`, `load` |
| `methods` | quantization methods: what each needs, which kernel it runs |
| `compress` | GPTQ and AWQ, quantized once and cached |
| `calibration` | the text that GPTQ and AWQ see |
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


class NotHere(StudyError):
    """Cannot be done on this machine; the sentence says why and what it takes. The run is skipped, not failed."""
