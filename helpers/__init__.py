"""The code behind the notebooks: one folder per notebook, one noun per file.

| where | what |
|---|---|
| `params`, `checked_yaml`, `new_study` | the schema of params/, strict reading with messages; a new study |
| `results`, `provenance`, `schema*` | result files: envelope, origin, atomic writes, every key of every kind |
| `statistics`, `ranks` | paired, clustered comparisons; quantiles and rank correlation |
| `notebook`, `cards`, `cloud` | papermill, the HTML report, `make status`; a GPU for each running notebook; Modal |
| `setup/` | 00: models, data, quantization methods; what knows a quantized layer or a device |
| `evaluate/`, `tasks/` | 01: hf-dialogue, an lm-eval model; lm-eval's tasks, and the dialogues that ship |
| `benchmark/` | 02: memory, prefill, decode, throughput, energy, and their limits |
| `fidelity/` | 03: predictions vs full precision; what formats and noise do to weights |
| `analysis/` | 04 to 06: tables, contrasts, claims, sentences, figures; samples, gate, comparison of studies |

Imports run one way: analysis, fidelity, benchmark, evaluate -> setup, results -> params, statistics.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXECUTED = ROOT / "executed"
FIGURES = ROOT / "figures"
CACHE = ROOT / ".cache"


class StudyError(RuntimeError):
    """Something the user can put right. Its text is one sentence that names the file or value and the remedy."""

    def __str__(self) -> str:
        """Names and values come from files: control characters are shown as escapes, which no terminal obeys."""
        return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in super().__str__())


class NotHere(StudyError):
    """Cannot be done on this machine; the sentence says why and what it takes. The run is skipped, not failed."""
