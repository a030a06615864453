"""A hub that misbehaves, for 00_setup: what is said, that no token is kept, and that a well hub mends it."""

import re
import tempfile
import time

import yaml

from tests.hub_server import GRANTED, NOT_GRANTED, Hub, Repository

CASES = {
    "401": {"status": 401},
    "403, a gated model": {"gated": True},
    "404": {"name": "tiny/elsewhere"},
    "429": {"status": 429},
    "500": {"status": 500},
    "a login page with status 200": {"fault": "page"},
    "an answer that repeats the token": {"fault": "echo"},
    "other content than its checksum": {"fault": "flip"},
    "cut off in the middle of the weights": {"fault": "cut"},
    "a byte now and then": {"fault": "drip"},
    "stalled": {"fault": "stall"},
}


def wanted(only: str) -> dict:
    return {name: case for name, case in CASES.items() if re.search(only, f"hub: {name}")}


def survive(project, make, case: dict) -> dict:
    """One row's values: 00_setup of a hub's model with the fault, then with a well hub and the same cache."""
    study = yaml.safe_load((project / "params/hardware/study.yaml").read_text())
    study |= {"study": "hub", "model": {"source": "hub", "name": "tiny/llama"}}
    (project / "params/hub").mkdir(exist_ok=True)
    (project / "params/hub/study.yaml").write_text(yaml.safe_dump(study))
    target = "executed/hub/00_setup.ipynb"
    (project / target).unlink(missing_ok=True)
    files = {path.name: path.read_bytes() for path in (project / "two-layers").iterdir()}
    start, well = time.monotonic(), {"name": "tiny/llama", "files": files}
    token = NOT_GRANTED if "gated" in case else GRANTED
    with tempfile.TemporaryDirectory(dir=project) as cache:
        home = {"HF_HOME": cache, "NO_PROXY": "127.0.0.1,localhost"}
        with Hub([Repository(**well | case)]) as hub:
            code, output = make(project, target, study="hub", HF_ENDPOINT=hub.url, HF_TOKEN=token, **home)
        said = re.search(r"FAILED: (.+?)(; see \S+)?$", output, re.M)
        with Hub([Repository(**well)]) as hub:
            last, end = make(project, target, study="hub", HF_ENDPOINT=hub.url, HF_TOKEN=GRANTED, **home)
    broken = "Traceback" in output + end
    return {
        "exit": code,
        "said": said[1][:300] if said else "",
        "traceback": broken,
        "next_exit": last,
        "survived": bool(code and said) and last == 0 and not broken,
        "seconds": round(time.monotonic() - start, 1),
    }
