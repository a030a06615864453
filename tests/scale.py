"""Seventy configurations of forty models on paper: `python tests/scale.py` writes executed/reference/scale.md.

Every number comes from a committed run: seconds of each notebook's own work on a GPU, bytes of weights and of result
files. Starting a kernel (some seconds a notebook) and downloads are not in it.
"""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "executed/reference"
ACCURACY, HARDWARE = REFERENCE / "hopper/smollm2-135m", REFERENCE / "hopper/llama-3.2-1b-random"
CONFIGURATIONS, MODELS, PROCESSES, GPUS = 70, 40, 3, 8


def data(pattern: str, folder: Path) -> list[dict]:
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]
    return [one["data"] for one in found if one["status"] == "ok"]


def median(values) -> float:
    return statistics.median(values)


def seconds(fidelity: dict) -> float:
    """Earlier versions gave seconds by what took them."""
    given = fidelity["seconds"]
    return sum(given.values()) if isinstance(given, dict) else given


def folder_bytes(folder: Path) -> float:
    """Of a configuration's results, the median."""
    return median(sum(p.stat().st_size for p in one.iterdir()) for one in folder.iterdir() if one.is_dir())


def measured() -> dict:
    """Seconds and bytes of one piece each."""
    weights = data("weights.json", ACCURACY)[0]
    sizes = {one: data("setup.json", one)[0]["weights"] for one in (ACCURACY, HARDWARE)}
    return {
        "01": median(one["seconds"] + one["loading"]["load_seconds"] for one in data("*/evaluation.json", ACCURACY)),
        "02": median(one["measure_seconds"] for one in data("*/benchmark*.json", HARDWARE)),
        "03": median(seconds(one) for one in data("*/fidelity.json", ACCURACY)),
        "03_weights": sum(weights[part]["seconds"] for part in ("weights", "noise")),
        "questions": data("fp16/evaluation.json", ACCURACY)[0]["engine"]["counts"]["requests"],
        "accuracy_parameters": sizes[ACCURACY]["parameters"],
        "hardware_parameters": sizes[HARDWARE]["parameters"],
        "weights": sum(row["bytes"] for row in sizes[HARDWARE]["files"]),
        "results": folder_bytes(ACCURACY) + folder_bytes(HARDWARE),
    }


def table(m: dict) -> str:
    """Markdown: each piece, how often, the whole, and what it grows with."""
    small, large = (f"{m[k] / 1e6:,.0f}M" for k in ("accuracy_parameters", "hardware_parameters"))
    rows = [
        (f"01, {m['questions']} questions ({small})", m["01"], CONFIGURATIONS, "questions x answer length; parameters"),
        (f"02, {PROCESSES} processes ({large})", m["02"] * PROCESSES, CONFIGURATIONS, "sizes x repeats x modes"),
        (f"03, fidelity ({small})", m["03"], CONFIGURATIONS, "tokens x vocabulary; parameters"),
        (f"03, weights, once a model ({small})", m["03_weights"], MODELS, "parameters x formats x block sizes"),
    ]  # fmt: skip
    total = sum(seconds * times for _, seconds, times, _ in rows)
    lines = ["| piece | each | times | together | grows with |", "|---|---|---|---|---|"]
    lines += [f"| {what} | {s:,.0f} s | {n} | {s * n / 3600:.1f} h | {why} |" for what, s, n, why in rows]
    lines.append(f"| **one GPU** | | | **{total / 3600:.1f} h** | |")
    lines.append(
        f"| **{GPUS} GPUs**, `make -j{GPUS}` | | | **{total / 3600 / GPUS:.1f} h** | the longest job, in the end |"
    )
    rows = [(f"weights in 16 bits ({large})", m["weights"], MODELS, "2 bytes x parameters"),
            ("results of a configuration", m["results"], CONFIGURATIONS, "questions: answers are kept")]  # fmt: skip
    lines += [f"| {what} | {b / 1e6:,.1f} MB | {n} | {b * n / 1e9:,.1f} GB | {why} |" for what, b, n, why in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    text = f"# {CONFIGURATIONS} configurations of {MODELS} models, on paper\n\n"
    card = json.loads((ACCURACY / "fp16/evaluation.json").read_text())["provenance"]["gpu"]["name"]
    text += f"Rendered by `python tests/scale.py` from the committed runs on an {card}, not run at this size.\n"
    text += "Without kernel starts (some seconds a notebook) and downloads. Larger models take longer.\n\n"
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else REFERENCE / "scale.md"
    target.write_text(text + table(measured()))
    print(target.read_text())


if __name__ == "__main__":
    main()
