"""What 03_fidelity and 03_weights write: every key, with its unit. See helpers.schema."""

from helpers.schema_base import Exact, Interval, NotDone


class Perplexity(Interval):
    """The interval is ln_ratio's."""

    tokens: int  # scored
    full: float | None  # full precision's perplexity
    quantized: float | None  # this configuration's
    ratio: float | None  # quantized / full
    ln_ratio: float | None  # ln of it, nats per token
    p: float | None  # sign-flip test over dialogues


class FilePerplexity(Perplexity):
    """A text file in llama.cpp's windows, of which the second half is scored; the interval resamples windows."""

    file: str  # its name
    window: int  # tokens of a window
    windows: int  # read; a CPU reads the first ten
    windows_in_file: int
    kl: float  # mean, nats


class Divergence(Exact):
    """KL(full || quantized) over positions, nats; None where there is none."""

    mean: float | None
    median: float | None
    p99: float | None
    max: float | None
    intervals: dict[str, Interval] | None = None  # of mean, median, p99


class Bucket(Exact):
    """Positions by full precision's largest probability."""

    low: float
    high: float
    count: int
    kl: float | None  # mean, nats
    agreement: float | None  # share


class KL(Divergence):
    by_group: dict[str, Divergence] | None = None  # story, answers
    by_confidence: list[Bucket] | None = None


class Sums(Exact):
    count: int  # tokens
    nll_full: float  # summed negative log-probability, nats
    nll: float
    kl: float  # summed, nats
    agreement: float  # positions with the same most likely token


class DialogueSums(Exact):
    id: str
    data_set: str | None = None
    story: Sums
    answers: Sums


class QuestionDivergence(Exact):
    id: str
    data_set: str | None = None
    turn: int  # from 1
    tokens: int  # of the gold answer
    kl: float  # mean over them, nats


class LeftOut(Exact):
    data_set: str
    dialogue: str
    tokens: int
    reason: str


class Baseline(Exact):
    """Full precision that this configuration is compared with."""

    dtype: str  # this configuration's


class Floor(Exact):
    """What no difference amounts to: full precision compared with itself."""

    kind: str  # batch shape; weight rounding
    detail: str  # in words
    dialogues: int
    tokens: int
    kl: float  # mean, nats
    kl_median: float
    kl_p99: float
    kl_max: float
    agreement: float  # share
    ln_ratio: float  # of perplexities


class FormatError(Exact):
    relative_squared_error: float | None  # ||w - q(w)||^2 / ||w||^2 over all linear layers
    sqnr_db: float | None  # -10 log10 of it
    dtype: str | None  # of the stored weights


class OwnError(Exact):
    formats: dict[str, FormatError | NotDone]  # of this configuration


class Fidelity(Exact):
    tokens: int  # compared
    dialogues: int
    perplexity: dict[str, Perplexity]  # story, answers, all
    kl: KL  # over all positions
    agreement: float  # share of positions with the same most likely token
    per_dialogue: list[DialogueSums]
    per_question: list[QuestionDivergence]
    left_out: list[LeftOut] | None = None  # dialogues longer than the model takes
    baseline: Baseline | None = None
    weights: OwnError | None = None  # None: full precision
    floor: list[Floor] | NotDone | None = None  # full precision's result alone has it, for its own dtype
    text: FilePerplexity | NotDone | None = None  # of fidelity.text; None: no file named
    seconds: float | dict[str, float]  # earlier versions: by what took them


class Codebook(Exact):
    levels: list[float]  # sorted, in [-1, 1]


class Layer(Exact):
    layer: str
    weights: int  # their number
    ks_distance: float  # of w / absmax in blocks of 64, from a Gaussian in the same blocks


class BlockSize(Exact):
    format: str
    block_size: int
    bits_per_weight: float
    relative_squared_error: float
    ppl: float | None = None  # all linear layers in this format; None: not read
    ln_ratio: float | None = None  # ln(ppl / full precision's)


class BlockSizeTexts(Exact):
    texts: int  # dialogues, or their beginnings on a CPU
    tokens: int
    ppl_full: float
    reason: str | None  # why sizes have no perplexity


class Histogram(Exact):
    edges: list[float]  # of w / absmax
    density: list[float]  # of all layers together
    gaussian_density: list[float]


class WeightErrors(Exact):
    codebooks: dict[str, Codebook]
    formats: dict[str, FormatError]
    layers: list[Layer]
    block_sizes: list[BlockSize]
    block_sizes_read: BlockSizeTexts | NotDone | None = None  # what ppl was read on
    histogram: Histogram
    seconds: float


class Difference(Interval):
    difference: float  # from full precision
    p: float | None


class NoiseRow(Exact):
    kind: str  # nf4; block: noise, helpers/fidelity/perturb.py
    seed: int | None
    relative_squared_error: float
    ppl: float
    log_ppl_ratio: Difference
    f1: Difference | None  # None: not scored


class FullScore(Exact):
    ppl: float
    f1: float | None


class Noise(Exact):
    dialogues: int
    tokens: int  # scored
    full: FullScore
    nf4: NoiseRow
    seeds: list[NoiseRow]
    f1_reason: str | None = None  # why F1 was not scored
    seconds: float


class Weights(Exact):
    """What formats do to the full-precision weights, once per study."""

    weights: WeightErrors | NotDone
    noise: Noise | NotDone
    left_out: list[LeftOut] | None = None
