"""make lock: .requirements-lock.txt, every package that the requirements bring along, pinned, for Linux and Python 3.11
to 3.13 (each that is on PATH as python3.NN; the others keep their lines). pip resolves, and nothing is installed.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES, LOCK = ("requirements.txt", "requirements-methods.txt"), ROOT / ".requirements-lock.txt"
PYTHONS = ("3.11", "3.12", "3.13")
HEAD = """# Written by make lock; make setup takes these versions of everything that the requirements bring along.
# No hashes: torch's file is another one on PyPI and at TORCH_INDEX, and pip checks hashes for all packages or none.
"""


def resolved(python: str) -> dict[str, str]:
    """Package -> version, as pip would install them; a build's local label (+cpu) is left out."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [python, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--report", report.name]
        subprocess.run([*command, *(word for name in FILES for word in ("-r", str(ROOT / name)))], check=True)
        found = json.loads(Path(report.name).read_text())["install"]
    pins = [(re.sub(r"[-_.]+", "-", one["metadata"]["name"]).lower(), one["metadata"]["version"]) for one in found]
    return {name: version.split("+")[0] for name, version in sorted(pins)}


def before() -> dict[str, dict[str, str]]:
    """Python -> package -> version, of the lock that is there."""
    found = {python: {} for python in PYTHONS}
    for line in LOCK.read_text().splitlines() if LOCK.exists() else []:
        if pin := re.fullmatch(r'([\w.-]+)==([^; ]+)(?:; python_version == "([\d.]+)")?', line):
            for python in [pin[3]] if pin[3] else PYTHONS:
                found[python][pin[1]] = pin[2]
    return found


def main() -> None:
    pins, pythons = before(), [python for python in PYTHONS if shutil.which(f"python{python}")]
    if not pythons:
        sys.exit("no python3.11, python3.12 or python3.13 on PATH")
    pins |= {python: resolved(f"python{python}") for python in pythons}
    lines = []
    for name in sorted({name for versions in pins.values() for name in versions}):
        versions = {python: found[name] for python, found in pins.items() if name in found}
        if len(set(versions.values())) == 1:
            lines.append(f"{name}=={next(iter(versions.values()))}")
        else:
            lines += [f'{name}=={version}; python_version == "{python}"' for python, version in versions.items()]
    LOCK.write_text(HEAD + "\n".join(lines) + "\n")
    print(f"{LOCK.name}: {len(lines)} pins, resolved for Python {', '.join(pythons)}")


if __name__ == "__main__":
    main()
