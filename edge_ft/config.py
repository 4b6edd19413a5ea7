"""What a user may choose, one frozen dataclass per command.

The same classes are the command-line flags, the keys of `--config FILE.yaml` and the arguments of the
Python API; a field's docstring is its `--help`.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from edge_ft.errors import UsageError, did_you_mean

__all__ = [
    "TEXT_TASKS",
    "BaseFormat",
    "BenchConfig",
    "EvalConfig",
    "ExportConfig",
    "Memory",
    "PlanConfig",
    "Pooling",
    "ProblemType",
    "RowsConfig",
    "RunConfig",
    "Task",
    "TuneConfig",
    "VerifyConfig",
    "Weights",
    "as_plain",
    "preset_file",
]

Task = Literal[
    "text-generation",
    "text2text-generation",
    "text-classification",
    "token-classification",
    "feature-extraction",
    "fill-mask",
]
"""As transformers' pipelines call them."""
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
"""What a text-classification model's outputs are, as transformers' configs call it."""
Pooling = Literal["mean", "cls"]
TEXT_TASKS: tuple[Task, ...] = ("text-generation", "text2text-generation")
"""Tasks whose answer is a text of the model's own; targets are its tokens."""
BaseFormat = Literal["int4", "int8", "nf4", "bf16", "fp32"]
Memory = Literal["high", "normal", "low"]
Weights = Literal["int4", "int8", "int8-dynamic", "int8-static", "fp16", "fp32"]
INT8_ACTIVATIONS: tuple[Weights, ...] = ("int8-dynamic", "int8-static")
"""Weights that are multiplied with activations in int8, at accuracy level 4 and no other."""


PEERS = ("torch", "openvino", "ctranslate2")
"""Engines that `bench` knows besides ONNX Runtime."""


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """How columns of a file become what the model reads."""

    pooling: Pooling | None = None
    """What of a text's hidden states is its embedding (feature-extraction); default what the model's own files say,
    else mean."""

    prompt: str | None = None
    """Template for the prompt, e.g. "{passage} {question}"; the text is as written, \\n and \\t are newline and tab."""
    completion: str | None = None
    """Template for the answer to learn, e.g. "{answer}"."""
    text_pair: str | None = None
    """Template for a second text that is read with the first, e.g. "{passage}" (text-classification)."""
    label: str | None = None
    """Column of the class, of several (a list) or of a number (text-classification), or of the words' tags
    (token-classification)."""
    problem_type: ProblemType | None = None
    """What the label column holds (text-classification); default: lists are several classes, numbers that are not
    all whole are regression, all else one class."""
    chat_template: str | None = None
    """auto (the model's own), none, or a jinja file; default auto, with --prompt none."""
    max_length: int | Literal["auto"] | None = None
    """Longest sequence in tokens; default the model's limit, at most 1024. Longer rows are cut, and said. auto (tune):
    so many that 99% of the rows are whole, in steps of 32. Of an encoder-decoder, prompt and answer each."""

    def __post_init__(self) -> None:
        _accept_python_values(self)
        _check(
            self.max_length in (None, "auto") or (isinstance(self.max_length, int) and self.max_length >= 8),
            "--max-length must be at least 8 tokens, or auto",
        )
        _check(
            self.completion is None or self.prompt is not None,
            "--completion needs --prompt: give both templates",
        )
        _check(
            self.text_pair is None or self.prompt is not None,
            "--text-pair needs --prompt: give the templates of both texts",
        )


@dataclass(frozen=True, kw_only=True)
class TuneConfig(RowsConfig):
    """Everything that `edge-ft tune` can be told."""

    model: str
    """Hub id, local folder, or a GGUF file (or a folder with one)."""
    data: str
    """JSONL, CSV or Parquet file, a folder saved by `datasets`, or a hub data set id."""
    out: Path
    """Run folder to write; must not exist."""
    task: Task | None = None
    """What to learn; guessed from the model and the columns when absent."""
    validation: str | None = None
    """File with the validation rows; otherwise they are split off --data."""
    test: str | None = None
    """File with the test rows, read once at the end; otherwise they are split off --data."""
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, validation and test rows when they come from one file."""
    rank: int = 8
    """Rank of the LoRA update."""
    alpha: float = 16.0
    """LoRA scaling numerator: the update is alpha / rank times B A."""
    dropout: float = 0.0
    """Dropout on the LoRA input, 0 to 1."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Linear layers that get an adapter: all-linear, or name endings such as q_proj,v_proj."""
    layers: str = "all"
    """all, or last:K to adapt only the last K transformer layers, of an encoder-decoder the last K of each stack."""
    base_format: BaseFormat = "int4"
    """What the frozen base is held in while training: int4 or int8 codes as they ship, bitsandbytes' nf4, bf16, or
    float32."""
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    """Numbers of a training step; auto takes bf16 where the processor has it, it is faster and its loss agrees."""
    memory: Memory | None = None
    """What memory is used for, to the same result: high keeps the float weights that the base's codes stand for from
    step to step, low computes activations again instead of keeping them. Default normal, or high where steps are so
    short that it saves much of their time and there is plenty of memory."""
    block_size: Literal[16, 32, 64, 128] = 32
    """Weights per scale of int4 and int8; nf4 has bitsandbytes' 64."""
    calibration_rows: int = 64
    """Training rows over which int4 codes are chosen, of the base and of what a merged export ships (GPTQ,
    arXiv:2210.17323); fewer where they are long. 0: each weight is rounded by itself."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW; default 2e-3 for decoders, 1e-3 for encoders."""
    loraplus_lr_ratio: float = 1.0
    """Learning rate of the B matrices over that of the A matrices (LoRA+, arXiv:2402.12354)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after warm-up."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 switches clipping off."""
    epochs: float | None = None
    """Passes over the training rows; default 2 for decoders, 3 for others."""
    max_steps: int | None = None
    """Optimizer steps; wins over --epochs."""
    max_minutes: float | None = None
    """Stop after so many minutes of training and validation."""
    batch_size: int | None = None
    """Rows in one forward pass; default 4 for decoders, 8 for others."""
    gradient_accumulation: int = 1
    """Forward passes per optimizer step."""
    eval_steps: int | None = None
    """Steps between two looks at the validation rows; default five looks a run."""
    patience: int | None = None
    """Stop after so many looks without a better validation loss; default never."""
    seed: int = 0
    """Seed of the split, the order of rows, dropout and new weights."""
    threads: int | None = None
    """CPU threads; default all cores."""
    checkpoint_minutes: float = 5.0
    """Write a checkpoint at least this often; 0 switches it off."""
    checkpoint_steps: int | None = None
    """Also write a checkpoint every so many steps."""
    resume: bool = False
    """Go on from the checkpoint in --out; from the start where there is none."""
    allow: tuple[str, ...] = ()
    """Audit findings that would refuse the rows but are accepted here, by their codes."""
    show: int = 0
    """Print so many training rows as the model will read them, with the trained tokens marked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = tuple(name for names in self.target_modules for name in names.split(",") if name)
        object.__setattr__(self, "target_modules", names)
        object.__setattr__(self, "allow", tuple(code for codes in self.allow for code in codes.split(",") if code))
        _check(
            len(self.split) == 3 and abs(sum(self.split) - 1) < 1e-6 and min(self.split) >= 0,
            f"--split {' '.join(map(str, self.split))} must be three shares that sum to 1",
        )
        _check(self.rank >= 1, "--rank must be at least 1")
        _check(self.alpha > 0, "--alpha must be above 0")
        _check(0 <= self.dropout < 1, "--dropout must be in [0, 1)")
        _check(self.learning_rate is None or self.learning_rate > 0, "--learning-rate must be above 0")
        _check(self.loraplus_lr_ratio > 0, "--loraplus-lr-ratio must be above 0")
        _check(0 <= self.warmup <= 1, "--warmup is a share of the steps: 0 to 1")
        _check(self.epochs is None or self.epochs > 0, "--epochs must be above 0")
        _check(self.max_steps is None or self.max_steps >= 1, "--max-steps must be at least 1")
        _check(self.max_minutes is None or self.max_minutes > 0, "--max-minutes must be above 0")
        _check(self.batch_size is None or self.batch_size >= 1, "--batch-size must be at least 1")
        _check(self.calibration_rows >= 0, "--calibration-rows cannot be negative")
        _check(self.gradient_accumulation >= 1, "--gradient-accumulation must be at least 1")
        _check(self.eval_steps is None or self.eval_steps >= 1, "--eval-steps must be at least 1")
        _check(self.patience is None or self.patience >= 1, "--patience must be at least 1")
        _check(self.weight_decay >= 0, "--weight-decay cannot be negative")
        _check(self.max_grad_norm >= 0, "--max-grad-norm cannot be negative")
        _check(self.threads is None or self.threads >= 1, "--threads must be at least 1")
        _check(self.checkpoint_minutes >= 0, "--checkpoint-minutes cannot be negative")
        _check(self.checkpoint_steps is None or self.checkpoint_steps >= 1, "--checkpoint-steps must be at least 1")
        _check(self.show >= 0, "--show cannot be negative")
        last_layers(self.layers)

    @property
    def rows_at_once(self) -> int:
        """`batch_size` of settings that a family has settled (`Family.settle`)."""
        assert self.batch_size is not None
        return self.batch_size

    @property
    def base_calibration_rows(self) -> int:
        """Training rows over which the base's codes are chosen: only those of int4 are."""
        return self.calibration_rows if self.base_format == "int4" else 0

    @classmethod
    def from_preset(cls, name: str, **settings: Any) -> Self:
        """The settings of a preset, those given here before them.

        Raises:
            UsageError: there is no such preset.
        """
        import yaml

        return cls(**{**yaml.safe_load(preset_file(name).read_text(encoding="utf-8")), **settings})


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TuneConfig):
    """What `edge-ft plan` can be told: all that a tune can."""

    out: Path = Path("run")
    """Run folder that a tune would write: plan writes nothing, and looks how much room there is."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(RowsConfig):
    """Everything that `edge-ft export` can be told; the rows' fields matter only with --data."""

    out: Path
    """Bundle folder to write; must not exist."""
    weights: Weights | None = None
    """Format of the weights that ship: int4 or int8 codes, fp16 (in the file: computed in float32), or fp32; for
    encoders also int8-dynamic or int8-static (activations in int8 too, their range that of each batch or of train
    rows); default int4, for a run in the adapter lane what it was trained over."""
    lane: Literal["merged", "adapter"] = "merged"
    """merged: the adapter goes into the weights; adapter: base codes untouched, A and B beside them."""
    adapter: Path | None = None
    """PEFT adapter to put on a model SOURCE; trained here or anywhere else."""
    task: Task | None = None
    """Task of a model SOURCE; a run folder knows its own."""
    data: str | None = None
    """Rows to score a model SOURCE on; a run folder brings its own validation and test rows."""
    block_size: Literal[16, 32, 64, 128] | None = None
    """Weights per scale of int4 and int8; default the run's, else 32."""
    max_tax: float = 0.02
    """Refuse when shipped - trained exceeds so many nats per target token."""
    min_retained: float = 0.95
    """Refuse when less than this share of (base - trained) is left in what ships."""
    max_metric_drop: float = 0.02
    """Refuse when the task metric (0 to 1) fell by more than this on the way, and not by chance."""
    threads: int | None = None
    """CPU threads; default all cores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.max_tax >= 0, "--max-tax cannot be negative")
        _check(self.max_metric_drop >= 0, "--max-metric-drop cannot be negative")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(RowsConfig):
    """What `edge-ft verify` can be told: without --data only the files and the graph are checked."""

    data: str | None = None
    """Rows to score: the export's validation rows must score as then; others are only scored, and in the adapter lane
    compared with the base."""
    max_tax: float | None = None
    """Limit of the quantization tax, nats per token, where --data are the export's validation rows, and of accuracy
    level 4's difference on the probe texts; other rows are not held to it. Default the limit of the export."""
    threads: int | None = None
    """CPU threads; default all cores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.max_tax is None or self.max_tax >= 0, "--max-tax cannot be negative")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(RowsConfig):
    """What `edge-ft eval` can be told."""

    data: str
    """JSONL, CSV or Parquet file, a folder saved by `datasets`, or a hub data set id."""
    task: Task | None = None
    """Task of a plain model; runs and bundles know their own."""
    adapter: str | None = None
    """none: score a bundle or run without its adapter."""
    accuracy_level: Literal[1, 4] | None = None
    """Graph of a bundle to score; default the manifest's."""
    base_format: BaseFormat = "fp32"
    """Format in which a plain MODEL is scored; a run is scored in the one it was trained over."""
    shots: int = 0
    """Train examples put before each prompt (text-generation); rows may then be as long as the model's limit."""
    shots_from: str | None = None
    """File to take the shots from; default the run's train rows, a bundle or model has none."""
    generate: bool = True
    """Also generate answers and compare them (text-generation); costs most of the time."""
    max_new_tokens: int = 64
    """Longest generated answer in tokens."""
    limit: int | None = None
    """Score only the first so many rows."""
    batch_size: int = 8
    """Rows scored together."""
    threads: int | None = None
    """CPU threads; default all cores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.shots >= 0, "--shots cannot be negative")
        _check(self.limit is None or self.limit >= 1, "--limit must be at least 1")
        _check(self.max_new_tokens >= 1, "--max-new-tokens must be at least 1")
        _check(self.batch_size >= 1, "--batch-size must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How `edge-ft run` answers."""

    max_new_tokens: int | None = None
    """Longest answer in tokens; default 256, or fewer where the model's limit is nearer."""
    temperature: float = 0.0
    """0 is greedy; above it tokens are sampled."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 is all. fill-mask: tokens given for each mask; 0 is 5."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this much probability."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were already seen less likely (CTRL, arXiv:1909.05858)."""
    seed: int = 0
    """Seed of the sampling."""
    num_beams: int = 1
    """Answers that an encoder-decoder follows side by side, to give the likeliest; 1 is greedy or sampled."""
    length_penalty: float = 1.0
    """With beams: an answer's log-probability is divided by its tokens to this power; above 0 favours long answers."""
    text_pair: str | None = None
    """Second text, for a model that was trained on pairs."""
    stop: tuple[str, ...] = ()
    """Strings at which the answer ends (they are not part of it)."""
    labels: tuple[str, ...] = ()
    """Choose among these answers instead of writing one (text-generation), with a score for each; auto: those that the
    training rows had, where they were few."""
    system: str | None = None
    """System message put before a chat."""
    chat_template: str | None = None
    """auto, none or a jinja file; default what the bundle was trained with."""
    adapter: str | None = None
    """none: answer with the base of an adapter-lane bundle."""
    accuracy_level: Literal[1, 4] | None = None
    """1: exact; 4: activations in int8, if the bundle's verification passed it; default the manifest's."""
    threads: int | None = None
    """CPU threads; default all cores."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(name for names in self.labels for name in names.split(",") if name))
        _check(self.max_new_tokens is None or self.max_new_tokens >= 1, "--max-new-tokens must be at least 1")
        _check(self.temperature >= 0, "--temperature cannot be negative")
        _check(self.top_k >= 0, "--top-k cannot be negative")
        _check(0 < self.top_p <= 1, "--top-p must be in (0, 1]")
        _check(0 <= self.min_p <= 1, "--min-p must be in [0, 1]")
        _check(self.repetition_penalty > 0, "--repetition-penalty must be above 0")
        _check(self.num_beams >= 1, "--num-beams must be at least 1")
        _check(
            self.num_beams == 1 or (self.temperature == 0 and self.repetition_penalty == 1),
            "--num-beams follows the likeliest answers: leave --temperature and --repetition-penalty out",
        )
        _check(
            self.num_beams > 1 or self.length_penalty == 1, "--length-penalty compares beams: give --num-beams above 1"
        )
        _check(self.threads is None or self.threads >= 1, "--threads must be at least 1")


@dataclass(frozen=True, kw_only=True)
class BenchConfig(RowsConfig):
    """What `edge-ft bench` measures, and the budgets that turn it into a gate; the rows' fields go with --data."""

    peers: tuple[str, ...] = ()
    """Other engines to measure in turn with the bundles: torch (eager, float), openvino (encoders: the bundle's own
    graph), ctranslate2 (encoder-decoders: the float base, converted to int8 and to float32)."""
    repeats: int = 5
    """Fresh processes per subject, taken in turn A B A B."""
    threads: int | None = None
    """CPU threads of every subject; default all cores."""
    memory_limit: int | None = None
    """MB that a subject may use; not fitting is a result."""
    prompt_tokens: int = 128
    """Length of the prompt, or of the text to classify, in tokens."""
    new_tokens: int = 32
    """Tokens to decode; with --data also the longest answer."""
    data: str | None = None
    """Rows to score every subject on in the same run: loss, task metrics and answers stand beside its speed."""
    limit: int | None = None
    """Score only the first so many rows of --data."""
    accuracy_level: Literal[1, 4] | None = None
    """Graph of a bundle to measure; default the manifest's."""
    max_ttft_ms: float | None = None
    """Budget: median time to first token (classifiers: latency of one text), milliseconds."""
    min_decode_tps: float | None = None
    """Budget: median decoded tokens per second."""
    max_rss_mb: float | None = None
    """Budget: median peak resident memory, MB."""
    max_size_mb: float | None = None
    """Budget: size on disk, MB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "peers", tuple(name for names in self.peers for name in names.split(",") if name))
        for name in self.peers:
            _check(name in PEERS, f"--peers {name}: there are {', '.join(PEERS)}{did_you_mean(name, list(PEERS))}")
        _check(self.repeats >= 1, "--repeats must be at least 1")
        _check(self.prompt_tokens >= 1, "--prompt-tokens must be at least 1")
        _check(self.new_tokens >= 2, "--new-tokens must be at least 2")
        _check(self.limit is None or self.limit >= 1, "--limit must be at least 1")
        _check(self.threads is None or self.threads >= 1, "--threads must be at least 1")
        _check(self.memory_limit is None or self.memory_limit >= 1, "--memory-limit must be at least 1 MB")


def last_layers(layers: str) -> int | None:
    """The K of `last:K`, or None for `all`.

    Raises:
        UsageError: neither form.
    """
    if layers == "all":
        return None
    head, _, count = layers.partition(":")
    _check(
        head == "last" and count.isdigit() and int(count) >= 1,
        f"--layers {layers}: give all, or last:K with K at least 1",
    )
    return int(count)


def preset_file(name: str) -> Path:
    """The YAML file of a preset, which is like any that --config takes.

    Raises:
        UsageError: there is no such preset.
    """
    files = {file.stem: file for file in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}
    _check(name in files, f"--preset {name}: there are {', '.join(files)}{did_you_mean(name, list(files))}")
    return files[name]


def as_plain(config: Any) -> dict[str, Any]:
    """A config as plain YAML/JSON values (paths as text, tuples as lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return {key: plain(value) for key, value in asdict(config).items()}


def _accept_python_values(config: Any) -> None:
    """From Python, paths may be text, texts may be paths, and tuples may be lists."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, Path | str):
            value = Path(value) if field.type in (Path, Path | None) else str(value)
        object.__setattr__(config, field.name, value)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)
