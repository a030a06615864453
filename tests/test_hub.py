"""Models and data sets from the hub, over real HTTP from a stand-in (tests/hub_server.py).

huggingface_hub reads its environment variables once, when it is imported, so what depends on them runs in a process
of its own."""

import errno
import io
import json
import os
import subprocess
import sys

import httpx
import pytest
from huggingface_hub import errors

from helpers import ROOT
from helpers.setup import coqa, hub
from tests.hub_server import GRANTED, NOT_GRANTED, Hub, Repository

# Two layers of the architectures that the shipped studies use. Their vocabulary is the embedded model's, whose
# tokenizer they borrow.
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ARCHITECTURES = ("llama", "qwen2", "mistral")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
PROMPT = [1, 504, 2, 33, 7, 905]

ASK = """
import json, sys
from helpers.setup import hub, http
http.TIMEOUT, hub.LOOKUP = 0.7, 3
hub.SLOWEST = 10**9
for name, revision, call in json.loads(sys.argv[1]):
    try:
        found = getattr(hub, call)(name, revision)
        print(json.dumps(found if isinstance(found, dict) else str(found)))
    except hub.HubError as error:
        told = {"reason": error.reason, "sentence": str(error)}
        told["quiet"] = error.__suppress_context__ or error.__context__ is None
        print(json.dumps(told))
"""

LOAD = """
import json, sys, torch
from helpers import params
from helpers.setup import coqa, models
found = {}
for name in sys.argv[2:]:
    found[name] = {}
    for method in ("fp16", "nf4", "int8")[: 3 if "llama" in name else 2]:
        values = {"study": "t", "title": "t", "model": {"source": "hub", "name": name}}
        study = params.check(values, "test").study
        model, tokenizer, info = models.load(study, params.read_configuration("smollm2-135m", method))
        tokens = torch.tensor([json.loads(sys.argv[1])], device=model.device)
        with torch.no_grad():
            logits = model(tokens).logits[0, -1].float().cpu()
        found[name][method] = {
            "layers": info["quantized_layers"], "logits": logits[:50].tolist(),
            "finite": bool(logits.isfinite().all()), "architecture": type(model).__name__,
            "source": models.prepare(study) if method == "fp16" else None, "text": tokenizer("A cat sat.")["input_ids"],
        }
found["validation"] = coqa.read("EleutherAI/coqa")
found["train"] = coqa.read("EleutherAI/coqa", 1, split="train")
print("RESULT" + json.dumps(found))
"""


def python(code: str, *arguments: str, url: str, home, **environment: str) -> str:
    """What a fresh process prints with a hub at `url` and a cache at `home`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_OFFLINE"))}
    ours = {"HF_ENDPOINT": url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=kept | ours | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def ask(names: list, **where) -> list:
    """hub.plan of each [name, revision], or another of hub's functions for each [name, revision, function]."""
    calls = json.dumps([[*name, "plan"][:3] for name in names])
    return [json.loads(line) for line in python(ASK, calls, **where).splitlines()]


def read(found: str) -> dict:
    return json.loads(found.split("RESULT")[1])


@pytest.fixture(scope="module")
def repositories(embedded, tmp_path_factory) -> list[Repository]:
    import datasets
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from_embedded = {name: (embedded / name).read_bytes() for name in TOKENIZER}
    made = []
    for architecture in ARCHITECTURES:
        folder = tmp_path_factory.mktemp(architecture)
        torch.manual_seed(0)
        config = AutoConfig.for_model(architecture, vocab_size=49152, max_position_embeddings=512, **TINY)
        AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder, max_shard_size="9MB")
        files = {p.name: p.read_bytes() for p in folder.iterdir()} | from_embedded
        # What hub repositories hold beside it and nobody needs.
        files |= {"pytorch_model.bin": b"pickle", "original/consolidated.00.pth": b"pickle", "onnx/config.json": b"{}"}
        made.append(Repository(f"tiny/{architecture}", files))
    small = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"0" * 8, "tokenizer.json": b"{}"}
    tables = {}
    for split, rows in {"train": coqa.read("embedded", 3), "validation": coqa.read("embedded", 5)[3:]}.items():
        buffer = io.BytesIO()
        datasets.Dataset.from_list(rows).to_parquet(buffer)
        tables[f"coqa_{split}.parquet"] = buffer.getvalue()
    return [
        *made,
        Repository(
            "EleutherAI/coqa",
            tables | {"README.md": b"---\nlicense: other\n---\n", "coqa.py": b"raise SystemExit"},
            kind="dataset",
        ),
        Repository("tiny/gated", small, gated=True),
        Repository("tiny/pickle", {"config.json": b"{}", "pytorch_model.bin": b"pickle"}),
        Repository("tiny/huge", small | {"model.safetensors": 10**15}),
        *(Repository(f"tiny/{fault}", small, fault=fault) for fault in ("stall", "page", "echo")),
        *(
            Repository(f"tiny/{fault}", small | {"model.safetensors": fault.encode() * 40_000}, fault=fault)
            for fault in ("drip", "flip", "cut")
        ),
        Repository("tiny/down", small, status=503),
        Repository("tiny/busy", small, status=429),
    ]


@pytest.fixture(scope="module")
def server(repositories):
    with Hub(repositories) as running:
        yield running


SENTENCES = {  # token: [(name, revision, function), reason, words]
    None: [
        (["tiny/gated", None], "gated", ["access on https://huggingface.co/tiny/gated", "auth login", "HF_TOKEN"]),
        (["tiny/nothere", None], "missing", ["model.name", "no model tiny/nothere", "private"]),
        (["tiny/llama", "v9"], "revision", ["tiny/llama has no revision 'v9'", "commits/main"]),
        (["tiny/llama", "0" * 40], "revision", ["has no revision '0000"]),
        (["not a name", None], "missing", ["'not a name' is not a hub name", "OWNER/NAME"]),
        (["tiny/pickle", None], "format", ["no safetensors weights"]),
        (["tiny/huge", None], "disk", ["1000000.0 GB", "HF_HOME"]),
        (["tiny/down", None], "network", ["error 503", "try again later"]),
        (["tiny/busy", None], "network", ["429", "wait"]),
        (["tiny/page", None], "network", ["does not answer like a model hub", "login page"]),
        (["tiny/stall", None], "network", ["did not answer in 0.7 s", "try again later"]),
        (["tiny/drip", None, "snapshot"], "network", ["too slow"]),
        (["tiny/cut", None, "snapshot"], "network", ["too slow"]),  # it is tried again and again
        (["tiny/flip", None, "snapshot"], "damaged", ["model.safetensors of tiny/flip", "another mirror"]),
    ],
    NOT_GRANTED: [
        (["tiny/gated", None], "gated", ["your token has no access", "ask for access"]),
        (["tiny/echo", None], "network", ["error 400"]),
    ],
    "hf_mistyped": [(["tiny/gated", None], "token", ["not valid", "HF_TOKEN"])],
    GRANTED: [(["tiny/nothere", None], "missing", ["no model tiny/nothere", "token may not see it"])],
}


@pytest.mark.parametrize("token", SENTENCES)
def test_each_failure_is_one_sentence_without_secrets(server, tmp_path, token):
    before = len(server.log)
    # User and password of a mirror's address are sent, and never repeated.
    url = server.url.replace("://", "://me:secret@") if token is None else server.url
    calls = [call for call, _, _ in SENTENCES[token]]
    found = ask(calls, url=url, home=tmp_path, **({"HF_TOKEN": token} if token else {}))
    for (call, reason, words), told in zip(SENTENCES[token], found, strict=True):
        sentence = told["sentence"]
        assert told["reason"] == reason and all(word in sentence for word in words), (call, told)
        assert "\n" not in sentence and not sentence.endswith(".") and told["quiet"]
        assert "secret" not in sentence and (token or "hf_") not in sentence.replace("HF_TOKEN", "")
    fetched = [path for method, path, _ in server.log[before:] if method == "GET" and "/resolve/" in path]
    assert {path.split("/")[2] for path in fetched} <= {"drip", "flip", "cut"}
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_granted_token_opens_a_gated_model_and_does_not_leave_the_hub(server, tmp_path):
    calls = [["tiny/gated", None], ["tiny/llama", None, "snapshot"]]
    found, _ = ask(calls, url=server.url, home=tmp_path, HF_TOKEN=GRANTED)
    assert found["files"] == ["config.json", "model.safetensors", "tokenizer.json"]
    large = [token for method, path, token in server.log if path.startswith("/cdn/") and method == "GET"]
    assert GRANTED not in large


def test_architectures_load_from_the_hub_and_again_without_it(repositories, tmp_path):
    """Llama, Qwen2 and Mistral through models.load in full precision, NF4 and LLM.int8(); then one from the cache,
    the server gone.
    """
    names = [f"tiny/{a}" for a in ARCHITECTURES]
    with Hub(repositories) as server:
        online = read(python(LOAD, json.dumps(PROMPT), *names, url=server.url, home=tmp_path))
        fetched = [path for method, path, _ in server.log if method == "GET" and "/resolve/" in path]
        before = len(server.log)
        (pinned,) = ask([[names[0], repositories[0].commit]], url=server.url, home=tmp_path)
        assert not [path for _, path, _ in server.log[before:] if names[0] in path], "pinned and cached: no request"
    assert pinned["pinned"] and pinned["bytes_to_download"] == 0
    assert not [path for path in fetched if path.endswith((".bin", ".pth", ".py")) or "onnx" in path]
    for repository, name in zip(repositories, names):
        rows = online[name]
        kinds = {r["architecture"].removesuffix("ForCausalLM").lower() for r in rows.values()}
        assert kinds == {name.removeprefix("tiny/")} and all(r["finite"] for r in rows.values())
        assert [r["layers"] for r in rows.values()] == [0, 14, 14][: len(rows)]  # seven linear layers in each block
        assert hub.resolved_revision(rows["fp16"]["source"]) == repository.commit
        # Quantized, but of the same weights: near the full precision's logits, and not equal to them.
        full = rows["fp16"]["logits"]
        for method in rows.keys() - {"fp16"}:
            off = max(abs(a - b) for a, b in zip(full, rows[method]["logits"]))
            assert 0 < off < max(full) - min(full), (name, method, off)
    assert online["validation"] == coqa.read("embedded", 5)[3:]
    assert online["train"] == coqa.read("embedded", 1)
    # The server is gone now.
    commit = repositories[0].commit
    calls = [[names[0], None], [names[0], commit], ["tiny/huge", None]]
    main, pinned, absent = ask(calls, url=server.url, home=tmp_path)
    assert (main["from_cache"], main["commit"], pinned["commit"]) == (True, commit, commit)
    assert absent["reason"] == "network" and server.url in absent["sentence"] and "HF_ENDPOINT" in absent["sentence"]
    offline = read(python(LOAD, json.dumps(PROMPT), names[0], url=server.url, home=tmp_path, HF_HUB_OFFLINE="1"))
    assert offline == {key: online[key] for key in (names[0], "validation", "train")}
    # A cache that lost a shard is not taken for a whole one.
    shards = sorted(tmp_path.rglob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    shards[0].unlink()
    cut, absent = ask([[names[0], None], ["tiny/huge", None]], url=server.url, home=tmp_path, HF_HUB_OFFLINE="1")
    assert cut["reason"] == absent["reason"] == "offline" and "tiny/huge (main) is not complete" in absent["sentence"]


def test_check_asks_for_model_and_data(server, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "plan", lambda *call: asked.append(call) or {"bytes": len(asked)})
    study = hub_study("tiny/llama", "EleutherAI/coqa", "me/mine", "embedded")
    assert hub.check(study) == {"tiny/llama": {"bytes": 1}, "EleutherAI/coqa": {"bytes": 2}, "me/mine": {"bytes": 3}}
    assert asked == [("tiny/llama", None), ("EleutherAI/coqa", None, "dataset"), ("me/mine", None, "dataset")]


def test_a_mistyped_path_to_data_is_no_name_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(hub, "ROOT", tmp_path)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub.HubError, match=r"data\.source: there is a folder data/ here, but no mine in it"):
        hub.plan("data/mine", None, "dataset")
    with pytest.raises(hub.HubError, match="HF_HUB_OFFLINE is set"):
        hub.plan("date/mine", None, "dataset")


def hub_study(model: str, *data: str):
    from helpers import params

    sources = [{"source": source} for source in data]
    values = {"study": "t", "title": "t", "model": {"source": "hub", "name": model}, "data": sources}
    return params.check(values, "t").study


def test_nothing_of_an_embedded_study_is_asked_of_the_hub(study):
    assert hub.check(study) == {}
    assert not any(map(hub.is_hub_data, ("embedded", "embedded-held-out", "mine.jsonl", "/a/b.json")))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, reason, words",
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "disk", "is full"),
        (caused(RuntimeError("data processing"), OSError(errno.ENOSPC, "No space left on device")), "disk", "is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), "disk", "can't be written"),
        (
            caused(httpx.ConnectError("refused"), PermissionError(errno.EACCES, "Permission denied")),
            "network",
            "can't be reached",
        ),
        (httpx.ReadTimeout("slow"), "network", "did not answer in 30 s"),
        (errors.FileMetadataError("no commit"), "network", "does not answer like a model hub"),
        (RuntimeError("something new\nwith hf_token"), "network", "could not be fetched (RuntimeError)"),
        (json.JSONDecodeError("x", "<html>", 0), "network", "does not answer like a model hub"),
    ],
)
def test_system_errors_are_explained(error, reason, words):
    found = hub.explain(error, "tiny/llama")
    assert found.reason == reason and words in str(found) and "\n" not in str(found)


def test_resolved_revision_of_what_is_no_snapshot():
    assert hub.resolved_revision("/models/mine") is None
    assert hub.resolved_revision("tiny/never", "a" * 40) == "a" * 40
    assert hub.resolved_revision(f"/cache/snapshots/{'b' * 40}") == "b" * 40
