"""Result files as tidy pandas tables: the one way to a number of a study.

    f = frames.load("smollm2-135m")                             # a study under executed/
    f = frames.load("executed/reference/hopper/smollm2-135m")     # or a folder of results
    f.samples.groupby("configuration").f1.mean()

Notebooks 04 to 06, claims, sentences and plots read these tables and nothing else. Nothing here imports torch. What was
not measured is NaN or None, or has no row; so is what a format unpacked to full precision would only repeat: times,
energy, sizes in memory. Names are the configuration's (`nf4`); `Frames.label` gives what a reader
sees (`NF4`).

configurations  index: configuration, in the order of every table and figure, full precision first. label, method,
                dtype (of compute), full (is full precision), packed (the device holds the format's own bits),
                same_kernels (unpacked when loaded: it runs full precision's kernels, so its times are full
                precision's), kernel, quantized_share and bits_per_weight (of the linear layers), group_size (weights
                that share a scale, where a parameter says so), evaluation, benchmark, fidelity (ok, failed, skipped or
                None), reason
samples         a row per configuration and question that all configurations answered: data_set, dialogue, turn,
                last_turn, domain, question, references, prediction (what the metric reads; its hash in results
                without texts), f1, em (both 0 to 1), right (em of at least one half), answer_tokens, hit_limit,
                kl (mean over the reference answer's tokens, nats)
scores          lm-eval's own aggregates: configuration, task, metric, value, stderr, questions
times           configuration, process, phase (prefill, decode, first token), mode (eager, cuda_graph, compile),
                batch, tokens (prompt or context), ms (median of one prefill, or per output token), q25, q75, n,
                tokens_per_second, limit_ms, percent_of_limit, gb_per_second, build_seconds
sizes           index: configuration. MiB: reported (get_memory_footprint), allocated, tensors, state (quantization
                state), linear, checkpoint (the file; known without a benchmark), peak_load, peak_prefill, peak_decode;
                kv_bytes (per token)
largest         configuration, process, budget_gib, mode, batch (0: none fits; NaN: none found, though some may fit),
                fails_at, tokens_per_second, reason
energy          configuration, process, mode, batch, seconds, joules_per_token, watts
profile         configuration, process, mode, batch, what, ms (per step), share, kernels, gb_per_second
agreement       configuration, process, mode, tokens, identical (greedy tokens equal to eager's)
int8_limit      configuration, process, rows, columns, exit_code, last_line: an LLM.int8() layer on either side of 2^31
                elements, a child process each (benchmark.int8_limit)
tokens          configuration, group (all, story, answers), tokens, ppl_full, ppl, ln_ratio, ln_low, ln_high, p, kl,
                kl_low, kl_high, kl_median, kl_p99, kl_max, agreement (most likely token equal to full precision's),
                baseline (dtype of full precision there: this configuration's)
texts           configuration, file (fidelity.text names it), windows, tokens, ppl_full, ppl, ln_ratio, ln_low, ln_high,
                kl, reason
confidence      configuration, low, high (full precision's largest probability), tokens, kl, agreement
floor           kind (batch shape, or weight rounding), detail, kl, kl_median, kl_p99, kl_max, agreement, ln_ratio: full
                precision vs itself, what no format can be told from
dialogues       configuration, data_set, dialogue, tokens, nll_full, nll, kl (sums in nats)
formats         index: format. relative_squared_error, sqnr_db, dtype: each format on full precision's weights, and
                each quantized configuration's own (comparable: False where there is no error, or where its method moves
                scales into neighbouring layers); reason
layers          layer, weights, ks_distance (from Gaussian)
block_sizes     format, block_size, bits_per_weight, relative_squared_error, ppl, ln_ratio (NF4 and FP4)
noise           kind (nf4; block: noise matched to it), seed, relative_squared_error, ln_ratio, ln_low, ln_high,
                f1, f1_low, f1_high (difference from full precision)
hardware        configuration, process, device, gb_per_second (copy), tflops (matmul), dtype, warnings
engine          index: configuration. questions, seconds, fallbacks, truncated; stock_ratio (seconds of stock lm-eval
                over these), stock_identical (share of answers like its); same_text, right_to_wrong, wrong_to_right,
                f1_difference (of the same dialogues one at a time: evaluate.run.floor), floor_failed (why not);
                tasks_failed (further tasks without scores, and why)
runs            configuration, kind, process, status, reason, created, commit, dirty, gpu, driver, cuda, processor,
                cores, memory_gib, torch, transformers, bitsandbytes, seed, seconds
"""

import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import pandas as pd

from helpers import ROOT, StudyError, params, results, statistics
from helpers.analysis import tables
from helpers.params import Study

TASK = "coqa_turns"
KINDS = ("evaluation", "benchmark", "fidelity")
ORDER = "fp16 bf16 fp32 int8 int8-weights fp8 gptq awq hqq nf4 nf4-plain fp4 int4"
FULL_LABELS = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}
MODES = {"eager": "eager", "cuda_graph": "CUDA graph", "compile": "compiled"}
LARGEST_MODES = MODES | {"static": "static cache"}  # of the largest batch: the step of a CUDA graph, uncaptured
KEYS = ["data_set", "dialogue", "turn"]


FIELDS = """study folder full configurations samples scores times sizes largest energy profile agreement int8_limit
tokens texts confidence floor dialogues formats layers block_sizes noise hardware runs weights engine"""


class Frames(namedtuple("Frames", FIELDS)):
    """study (its parameters), folder (of the results), full (the configuration that others are compared with, or
    None), weights (what 03_weights wrote: codebooks and histogram have no natural table); all else as above."""

    def label(self, configuration: str) -> str:
        """What a reader sees. A format that no configuration has (lloyd_max) is its own name in words."""
        labels = self.configurations.label
        return labels[configuration] if configuration in labels else WORDS.get(configuration, configuration.upper())

    def wide(self, metric: str, last_turns: bool = False) -> pd.DataFrame:
        """Questions (index: data_set, dialogue, turn) by configuration, of one column of `samples`."""
        rows = self.samples
        if last_turns:
            rows = rows[rows.last_turn]
        if rows.empty:
            return pd.DataFrame()
        table = rows.pivot(index=KEYS, columns="configuration", values=metric)
        table = table.loc[rows[KEYS].drop_duplicates().itertuples(index=False, name=None)]  # in the data's order
        return table[[name for name in self.configurations.index if name in table]]

    def medians(self) -> pd.DataFrame:
        """`times` over processes: ms is the median of the processes' medians, low to high their range."""
        keys = ["configuration", "phase", "mode", "batch", "tokens"]
        if self.times.empty:
            return self.times.assign(low=[], high=[], processes=[]).drop(columns="process")
        grouped = self.times.groupby(keys, sort=False)
        table = grouped[["ms", "tokens_per_second", "limit_ms", "percent_of_limit", "gb_per_second"]].median()
        spread = grouped.ms.agg(low="min", high="max", processes="count")
        return table.join(spread).reset_index()

    def ratios(self) -> pd.DataFrame:
        """`medians` over full precision at the same setting: ratio, and the range of any two processes."""
        keys = ["phase", "mode", "batch", "tokens"]
        table = self.medians()
        full = table[table.configuration == self.full][[*keys, "ms", "low", "high", "processes"]]
        both = table[table.configuration != self.full].merge(full, on=keys, suffixes=("", "_full"))
        return both.assign(
            ratio=both.ms / both.ms_full,
            ratio_low=both.low / both.high_full,
            ratio_high=both.high / both.low_full,
            processes=both[["processes", "processes_full"]].min(axis=1),
        )


WORDS = {
    "lloyd_max": "Lloyd-Max for these weights",
    "gaussian_lloyd_max": "Lloyd-Max for Gaussian weights",
    "uniform": "16 uniform levels",
    "asymmetric": "16 uniform levels with a zero point",
}


def load(where: Study | str | Path) -> Frames:
    """All tables of a study, by its parameters, name or folder of results. Raises StudyError if it has no results."""
    study = where if isinstance(where, Study) else _study(str(where))
    finished, processes = results.read_all(study), results.read_processes(study)
    order = {name: place for place, name in enumerate(ORDER.split())}
    names = sorted({*finished, *processes}, key=lambda name: (order.get(name, len(order)), name))
    finished = {name: finished.get(name, {}) for name in names}
    data = {k: {n: p[k].data for n, p in finished.items() if k in p and p[k].status == "ok"} for k in KINDS}
    runs = [(n, i, r) for n in names for i, r in enumerate(processes.get(n, []), 1)]
    measured = [(n, i, r.data) for n, i, r in runs if r.status == "ok"]
    evaluations, fidelity = data["evaluation"], data["fidelity"]
    path = results.folder(study) / "weights.json"
    weights = (results.read(path).data if path.is_file() else None) or {}
    configurations, checkpoints = _configurations(finished, data)
    full = next((n for n in names if configurations.full[n]), None)
    built = {name: tables.listed(measured, name) for name in tables.LISTS} | {"times": tables.times(measured)}
    unpacked = configurations.index[configurations.same_kernels]
    built = {k: rows[~rows.configuration.isin(unpacked)].reset_index(drop=True) for k, rows in built.items()}
    # Only a search that saw a single row fail has shown that none fits.
    searched = built["largest"]
    known = searched.fails_at.notna() | searched.reason.notna()  # schema 1 has neither where none fits
    lost = (searched.batch == 0) & known & (searched.fails_at.astype(float) != 1)
    built["largest"].loc[lost, ["batch", "tokens_per_second"]] = np.nan
    sizes = tables.sizes(data["benchmark"], checkpoints)  # of what is unpacked only the file is the format's own
    sizes.loc[sizes.index.isin(unpacked), sizes.columns != "checkpoint"] = np.nan
    parts = {name: getattr(tables, name)(fidelity) for name in ("tokens", "texts", "confidence", "floor", "dialogues")}
    return Frames(
        study=study,
        folder=results.folder(study),
        full=full,
        configurations=configurations,
        samples=_samples(study, evaluations, fidelity),
        scores=tables.scores(evaluations),
        sizes=sizes.reindex([name for name in names if name in sizes.index]),
        formats=tables.formats(weights, fidelity),
        layers=tables.layers(weights),
        block_sizes=tables.block_sizes(weights),
        noise=tables.noise(weights.get("noise") or {}),
        hardware=tables.hardware(measured),
        runs=_runs(study, finished, runs),
        weights=weights,
        engine=_engine(study, evaluations),
        **built,
        **parts,
    )


def _study(where: str) -> Study:
    """A study by its name, or by a folder of results, which hold their parameters."""
    folder = Path(where) if Path(where).is_absolute() else ROOT / where
    if "/" not in where:
        return params.read_study(where)
    for source in sorted(folder.glob("*/*.json")) + sorted(folder.glob("*.json")):
        if source.stem.partition("_")[0] in (*KINDS, "setup", "weights"):
            given = results.read(source).provenance["study"]
            known = {key: value for key, value in given.items() if key in Study.model_fields}
            inside = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
            study = params.check(known | {"folder": None}, results.clean(str(source))).study
            return study.model_copy(update={"folder": str(inside)})  # read, never written: it may lie anywhere
    raise StudyError(f"{where}: holds no results; give a folder that make run-all wrote, or the name of a study")


def _configurations(finished: dict, data: dict) -> tuple[pd.DataFrame, dict]:
    """The table, and MiB of the files that were loaded."""
    rows, checkpoints = {}, {}
    for name, parts in finished.items():
        origin = next((r.provenance["configuration"] for r in parts.values() if r.provenance["configuration"]), {})
        method = origin.get("quantization", {}).get("method")
        info = next((data[k][name].get("loading") or {} for k in ("evaluation", "benchmark") if name in data[k]), {})
        full = method == "none"
        label = FULL_LABELS.get(info.get("dtype"), origin.get("label")) if full else origin.get("label", name)
        rows[name] = {"label": label, "method": method, "full": full}
        rows[name] |= tables.pick(info, "dtype packed kernel quantized_share bits_per_weight")
        rows[name] |= {"group_size": origin.get("quantization", {}).get("group_size")}
        rows[name] |= {"same_kernels": not full and info.get("packed") is False}
        rows[name] |= {kind: parts[kind].status if kind in parts else None for kind in KINDS}
        rows[name] |= {"reason": next((_reason(name, r) for r in parts.values() if r.status != "ok"), None)}
        if info.get("checkpoint_bytes"):
            checkpoints[name] = info["checkpoint_bytes"] / 2**20
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("configuration"), checkpoints


def _reason(name: str | None, result) -> str | None:
    """Without the configuration's name before it, so that the same reason is told once."""
    return (result.reason or "").removeprefix(f"{name}: ") or None


def prediction(row: dict) -> str | None:
    """What CoQA's metric reads of an answer: its first line that is not blank; its hash in results without texts."""
    answer = row.get("filtered_resps")
    return answer[0].strip().split("\n")[0] if answer else row.get("answer_sha256")


def _samples(study: Study, evaluations: dict, fidelity: dict) -> pd.DataFrame:
    rows = []
    for name, data in evaluations.items():
        file = data["tasks"][TASK]["samples"]
        kl = {(str(row["id"]), row["turn"]): row["kl"] for row in (fidelity.get(name) or {}).get("per_question", [])}
        for row in results.read_lines(results.folder(study) / name / file, data["files"][file]):
            doc = row["doc"]
            dialogue, turn = str(doc["id"]), int(doc["turn"])
            where = {"configuration": name, "data_set": doc.get("data_set", "dialogues"), "dialogue": dialogue}
            where |= {"turn": turn, "last_turn": bool(doc["last_turn"])}
            where |= tables.pick(doc, "domain question references", {"domain": "source"})
            said = {
                "prediction": prediction(row),
                "right": row["em"] >= statistics.RIGHT,
                "kl": kl.get((dialogue, turn), np.nan),
            }
            rows.append(where | tables.pick(row, "f1 em answer_tokens hit_limit") | said)
    if not rows:
        return pd.DataFrame(columns=["configuration", *KEYS, *SAMPLE.split()])
    found = pd.DataFrame(rows)
    answered = found.groupby(KEYS).configuration.transform("nunique")
    common = found[answered == len(evaluations)].reset_index(drop=True)
    if common.empty:
        asked = ", ".join(evaluations)
        raise StudyError(f"{asked}: no question was answered by all; run make clean and make run-all again")
    return common


SAMPLE = "last_turn domain question references prediction f1 em right answer_tokens hit_limit kl"


def _runs(study: Study, finished: dict, processes: list) -> pd.DataFrame:
    found = [(n, k, 1, parts[k]) for n, parts in finished.items() for k in KINDS if k in parts and k != "benchmark"]
    found += [(name, "benchmark", i, result) for name, i, result in processes]
    paths = {kind: results.folder(study) / f"{kind}.json" for kind in ("setup", "weights")}
    found += [(None, kind, 1, results.read(path)) for kind, path in paths.items() if path.is_file()]
    rows = []
    for name, kind, process, result in found:
        origin, data = result.provenance, result.data or {}
        seconds = data.get("measure_seconds") or data.get("seconds")
        row = {"configuration": name, "kind": kind, "process": process}
        row |= {"status": result.status, "reason": _reason(name, result)}
        row |= tables.pick(origin, "created commit dirty processor cores memory_gib seed")
        row |= tables.pick(origin["gpu"] or {}, "gpu driver cuda", {"gpu": "name"})
        row |= tables.pick(origin["packages"], "torch transformers bitsandbytes")
        rows.append(row | {"seconds": sum(seconds.values()) if isinstance(seconds, dict) else seconds})
    return pd.DataFrame(rows)


def _engine(study: Study, evaluations: dict) -> pd.DataFrame:
    path = results.folder(study) / "bench_eval.json"
    stock, rows = {}, {}
    if path.is_file():
        try:
            stock = {n: c["tasks"][TASK] for n, c in json.loads(path.read_text())["configurations"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(f"{path.name}: not what bench-eval writes ({type(error).__name__}); delete it") from None
    for name, data in evaluations.items():
        reports = [data["engine"], data["engine"].get("tasks") or {}]  # the dialogues', and further tasks'
        fallbacks = [v for report in reports for v in (report.get("fallbacks") or {}).values()]
        cut = [n for n in (tables.dig(report, "counts.truncated") for report in reports) if n is not None]
        rows[name] = tables.pick(data, "questions seconds")
        rows[name] |= {"fallbacks": sum(v if isinstance(v, int) else 1 for v in fallbacks)}
        rows[name] |= {"truncated": sum(cut) if cut else None}
        rows[name] |= tables.pick(data.get("floor") or {}, FLOOR)
        lost = tables.dig(data, "engine.tasks.failed") or {}
        rows[name] |= {"tasks_failed": "; ".join(f"{task}: {why}" for task, why in lost.items()) or None}
        rows[name] |= {"floor_failed": tables.dig(data, "floor.reason")}
        names = {"stock_ratio": "ratio", "stock_identical": "identical_share"}
        rows[name] |= tables.pick(stock.get(name) or {}, " ".join(names), names)
    return pd.DataFrame.from_dict(rows, orient="index", columns=ENGINE.split())


FLOOR = "same_text right_to_wrong wrong_to_right f1_difference"
ENGINE = f"questions seconds fallbacks truncated stock_ratio stock_identical {FLOOR} floor_failed tasks_failed"
