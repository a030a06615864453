"""What 02_benchmark writes: every key, with its unit. See helpers.schema.

MB is 2**20 bytes, GB 10**9 bytes, TFLOPS 10**12 operations per second. Times are medians of one process, without a
drifting start (helpers.benchmark.timing); the quartiles are those of the same samples.
"""

from typing import Literal

from helpers.schema_base import Exact

Mode = Literal["eager", "cuda_graph", "compile", "static"]


class Memory(Exact):
    """None: not measured, for `peak_reason` or a row of `left_out`."""

    reported_footprint_mb: float | None  # get_memory_footprint()
    allocated_mb: float | None  # by torch's allocator on a GPU; of all tensors on a CPU
    tensors_mb: float | None  # all tensors that hold the model
    quantization_state_mb: float | None  # of these, scales, zero points and codebooks
    linear_layers_mb: float | None  # of the quantizable layers, without that state
    checkpoint_mb: float  # on disk
    peak_load_mb: float | None  # while loading; a GPU: allocated, a CPU: resident memory of the process
    peak_prefill_mb: float | None  # of the longest prefill
    peak_decode_mb: float | None  # of eager decode at batch 1
    peak_reason: str | None  # why there are no peaks
    kv_cache_bytes_per_token: float | None  # of one sequence; None: no keys and values


class Time(Exact):
    """Keys with a default are not in schema 1."""

    mode: Mode
    batch: int
    n: int  # samples behind the median
    dropped: int | None = None  # samples before them: a drifting start


class Milliseconds(Time):
    median_ms: float
    q25_ms: float
    q75_ms: float
    samples_ms: list[float]  # all, in order


class Prefill(Milliseconds):
    tokens: int  # of each row's prompt
    tokens_per_second: float
    limit_ms: float  # least time by bandwidth or matmul rate
    percent_of_limit: float


class FirstToken(Milliseconds):
    prompt_tokens: int


class Decode(Time):
    prompt_tokens: int  # context at the start
    median_ms_per_token: float  # of one step, for all rows
    q25_ms_per_token: float
    q75_ms_per_token: float
    samples_ms_per_token: list[float]
    tokens_per_second: float  # of all rows
    limit_ms: float  # to move the bytes of a step at the copy bandwidth
    achieved_gb_per_second: float
    percent_of_limit: float | None = None
    build_seconds: float | None = None  # compiling and capturing; None: eager


class Joules(Exact):
    mode: Mode
    batch: int
    tokens: int  # generated while measured
    seconds: float
    mean_watts: float  # between the first and the last move of the energy counter
    joules_per_token: float
    includes_prefill: bool


class Energy(Exact):
    rows: list[Joules]
    reason: str | None  # why there are none


class Agreement(Exact):
    """Greedy tokens of a mode beside eager's, at batch 1."""

    mode: Mode
    tokens: int  # compared
    identical: int  # of them, before the first that differs
    explained: bool | None = None  # rounding explains the difference; None: there is none


class Profile(Exact):
    """Where a decode step's time goes, kernels grouped by what they do."""

    mode: Mode
    batch: int
    what: str
    ms_per_step: float
    share: float  # 0 to 1
    kernels: float | None = None  # launched per step
    gb_per_second: float | None = None  # weights that a matmul reads, per second of its kernels; None: unknown


class LeftOut(Exact):
    what: str
    reason: str


class Hardware(Exact):
    """What the device reached in this process."""

    name: str
    copy_bandwidth_gb_per_second: float  # read and written
    matmul_tflops: float  # in the model's dtype


class Largest(Exact):
    """The largest batch within a memory budget; fails - batch is at most 1 % of it, unless time was over."""

    budget_gib: float
    mode: Mode | None  # of the times: the fastest that fits
    batch: int  # that decodes; 0: none
    fails: int | None = None  # the smallest that was seen to fail
    tokens_per_second: float | None  # of all rows
    samples_ms_per_token: list[float] | None = None
    reason: str | None  # why there is no batch


class Conditions(Exact):
    warnings: list[str]  # what may have disturbed the measurement


class Benchmark(Exact):
    dtype: str  # computed in
    loading: dict  # models.load's info
    memory: Memory
    prefill: list[Prefill]
    decode: list[Decode]
    time_to_first_token: list[FirstToken]
    energy: Energy
    agreement: list[Agreement]
    profile: list[Profile]
    left_out: list[LeftOut]  # not measured, and why
    hardware: Hardware
    largest_batch: list[Largest]
    int8_limit: dict | None  # helpers.benchmark.int8_limit.reproduce; None: no LLM.int8() layer
    conditions: Conditions
    measure_seconds: float  # s, from before loading
