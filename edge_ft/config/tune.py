"""Settings of `edge-ft tune` and `edge-ft plan`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from edge_ft.config.fields import check
from edge_ft.config.names import BaseFormat, Memory, Task
from edge_ft.config.rows import RowsConfig
from edge_ft.errors import did_you_mean

__all__ = ["PlanConfig", "TuneConfig", "last_layers", "preset_file"]


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
        check(
            len(self.split) == 3 and abs(sum(self.split) - 1) < 1e-6 and min(self.split) >= 0,
            f"--split {' '.join(map(str, self.split))} must be three shares that sum to 1",
        )
        check(self.rank >= 1, "--rank must be at least 1")
        check(self.alpha > 0, "--alpha must be above 0")
        check(0 <= self.dropout < 1, "--dropout must be in [0, 1)")
        check(self.learning_rate is None or self.learning_rate > 0, "--learning-rate must be above 0")
        check(self.loraplus_lr_ratio > 0, "--loraplus-lr-ratio must be above 0")
        check(0 <= self.warmup <= 1, "--warmup is a share of the steps: 0 to 1")
        check(self.epochs is None or self.epochs > 0, "--epochs must be above 0")
        check(self.max_steps is None or self.max_steps >= 1, "--max-steps must be at least 1")
        check(self.max_minutes is None or self.max_minutes > 0, "--max-minutes must be above 0")
        check(self.batch_size is None or self.batch_size >= 1, "--batch-size must be at least 1")
        check(self.calibration_rows >= 0, "--calibration-rows cannot be negative")
        check(self.gradient_accumulation >= 1, "--gradient-accumulation must be at least 1")
        check(self.eval_steps is None or self.eval_steps >= 1, "--eval-steps must be at least 1")
        check(self.patience is None or self.patience >= 1, "--patience must be at least 1")
        check(self.weight_decay >= 0, "--weight-decay cannot be negative")
        check(self.max_grad_norm >= 0, "--max-grad-norm cannot be negative")
        check(self.threads is None or self.threads >= 1, "--threads must be at least 1")
        check(self.checkpoint_minutes >= 0, "--checkpoint-minutes cannot be negative")
        check(self.checkpoint_steps is None or self.checkpoint_steps >= 1, "--checkpoint-steps must be at least 1")
        check(self.show >= 0, "--show cannot be negative")
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


def last_layers(layers: str) -> int | None:
    """The K of `last:K`, or None for `all`.

    Raises:
        UsageError: neither form.
    """
    if layers == "all":
        return None
    head, _, count = layers.partition(":")
    check(
        head == "last" and count.isdigit() and int(count) >= 1,
        f"--layers {layers}: give all, or last:K with K at least 1",
    )
    return int(count)


def preset_file(name: str) -> Path:
    """The YAML file of a preset, which is like any that --config takes.

    Raises:
        UsageError: there is no such preset.
    """
    files = {file.stem: file for file in sorted((Path(__file__).parents[1] / "presets").glob("*.yaml"))}
    check(name in files, f"--preset {name}: there are {', '.join(files)}{did_you_mean(name, list(files))}")
    return files[name]
