"""Settings of `edge-ft tune` and `edge-ft plan`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from edge_ft.config.shared import (
    ABOVE_0,
    BaseFormat,
    Group,
    Maximum,
    Memory,
    Minimum,
    RowsConfig,
    Seed,
    Task,
    Threads,
    check,
)
from edge_ft.errors import did_you_mean

__all__ = ["PlanConfig", "TuneConfig", "last_layers", "preset_file", "without_retired"]


RETIRED: dict[str, Any] = {"loraplus_lr_ratio": 1.0}
"""Options that no longer exist, and the default that settings saved by earlier versions name."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig(RowsConfig):
    """Settings of a training."""

    model: Annotated[str, Group.INPUT]
    """Hub id, checkpoint folder, GGUF file, or folder with one GGUF file."""
    data: Annotated[str, Group.INPUT]
    """Rows to train on: a JSONL, CSV or Parquet file, a folder saved by `datasets`, or a hub data set id."""
    out: Annotated[Path, Group.INPUT]
    """Run folder to write; it must not exist, except with --resume."""
    task: Annotated[Task | None, Group.INPUT] = None
    """Task to train for; default: inferred from the model and the columns."""
    validation: Annotated[str | None, Group.INPUT] = None
    """File with the validation rows; default: a share of --data."""
    test: Annotated[str | None, Group.INPUT] = None
    """File with the test rows, which are scored once at the end; default: a share of --data."""
    split: Annotated[tuple[float, float, float], Group.INPUT] = (0.8, 0.1, 0.1)
    """Shares of --data for training, validation and test."""
    allow: Annotated[tuple[str, ...], Group.ROWS] = ()
    """Codes of audit findings to accept that would otherwise stop the command, e.g. leak."""
    show: Annotated[int, Group.ROWS, Minimum(0)] = 0
    """Number of training rows to print as the model reads them, with the trained tokens marked."""
    rank: Annotated[int, Group.LORA, Minimum(1), Maximum(65536)] = 8
    """Rank of the LoRA matrices A and B."""
    alpha: Annotated[float, Group.LORA, ABOVE_0] = 16.0
    """LoRA scaling: the weights change by (alpha / rank) * B A."""
    dropout: Annotated[float, Group.LORA] = 0.0
    """Dropout probability of the LoRA input."""
    target_modules: Annotated[tuple[str, ...], Group.LORA] = ("all-linear",)
    """Linear layers to adapt: all-linear, or name suffixes, e.g. q_proj,v_proj."""
    layers: Annotated[str, Group.LORA] = "all"
    """Transformer layers to adapt: all, or last:K for the last K (in an encoder-decoder the last K of each stack)."""
    base_format: Annotated[BaseFormat | None, Group.BASE] = None
    """Weight format of the frozen base: int4 or int8 (as in ONNX Runtime), nf4 (as in bitsandbytes), bf16, or fp32;
    default: for decoders bf16 or fp32, as the processor computes, if such weights take little of the memory; else int4.
    What export writes is int4 in both cases; --lane adapter ships the codes of the training if int4 is given."""
    block_size: Annotated[Literal[16, 32, 64, 128], Group.BASE] = 32
    """Weights that share one scale in int4 and int8; in nf4 it is always 64."""
    vocabulary: Annotated[Literal["all", "rows"], Group.BASE] = "all"
    """Tokens of the base: all, or rows for those that the training rows and a general text need, which makes the
    embedding smaller; every text can still be written, some with more tokens."""
    calibration_rows: Annotated[int, Group.BASE, Minimum(0)] = 256
    """Maximum number of training rows that calibrate GPTQ (arXiv:2210.17323), the int4 quantization of the base and of
    a merged export; 0 rounds to nearest instead."""
    learning_rate: Annotated[float | None, Group.TRAINING, ABOVE_0] = None
    """Peak learning rate of AdamW; default: 1e-3 for encoders, 2e-3 for others, and less for decoders wider than
    576."""
    schedule: Annotated[Literal["cosine", "constant"], Group.TRAINING] = "cosine"
    """Learning rate after the warm-up: a cosine down to 0, or constant."""
    warmup: Annotated[float, Group.TRAINING] = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Group.TRAINING, Minimum(0)] = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[float, Group.TRAINING, Minimum(0)] = 1.0
    """Norm to which gradients are clipped; 0 turns clipping off."""
    epochs: Annotated[float | None, Group.TRAINING, ABOVE_0, Maximum(100_000)] = None
    """Passes over the training rows; default: 2 for decoders, 3 for others."""
    max_steps: Annotated[int | None, Group.TRAINING, Minimum(1)] = None
    """Number of optimizer steps; overrides --epochs."""
    finish_steps: Annotated[int | None, Group.TRAINING, Minimum(0)] = None
    """Steps that train the scales of the merged int4 model after the adapter; default: none, an export chooses its
    codes."""
    max_minutes: Annotated[float | None, Group.TRAINING, ABOVE_0] = None
    """Stop after this many minutes of training and validation."""
    batch_size: Annotated[int | None, Group.TRAINING, Minimum(1)] = None
    """Rows in one forward pass; default: 8, or fewer long ones, with as many passes in a step as make 8."""
    gradient_accumulation: Annotated[int | None, Group.TRAINING, Minimum(1)] = None
    """Forward passes per optimizer step; default: 1, or what --batch-size leaves of a step of long rows."""
    compute: Annotated[Literal["auto", "fp32", "bf16"], Group.TRAINING] = "auto"
    """Compute precision; auto is bf16 where the processor supports it and the loss agrees with fp32, else fp32."""
    seed: Annotated[Seed, Group.TRAINING] = 0
    """Random seed of the split, the order of rows, dropout and new weights."""
    eval_steps: Annotated[int | None, Group.EVALUATION, Minimum(1)] = None
    """Optimizer steps between evaluations on the validation rows; default: five evaluations in a run."""
    eval_rows: Annotated[int | None, Group.EVALUATION, Minimum(1)] = None
    """Validation rows of each of these evaluations but the last, which scores all; default: as many as take 1/20 of
    the training's time."""
    patience: Annotated[int | None, Group.EVALUATION, Minimum(1)] = None
    """Stop after this many evaluations without a lower validation loss; default: never."""
    memory: Annotated[Memory | None, Group.RESOURCES] = None
    """Memory mode, with the same result: high keeps dequantized weights between steps (faster), low recomputes
    activations (slower); default: high if steps are short and memory is plentiful, else normal."""
    threads: Threads = None
    """CPU threads; default: OMP_NUM_THREADS, or all CPUs that the process may use."""
    checkpoint_minutes: Annotated[float, Group.CHECKPOINTS, Minimum(0)] = 5.0
    """Maximum minutes between checkpoints; 0 turns these checkpoints off."""
    checkpoint_steps: Annotated[int | None, Group.CHECKPOINTS, Minimum(1)] = None
    """Also write a checkpoint every N optimizer steps."""
    include_samples: Annotated[bool, Group.OUTPUT] = False
    """Show three rows of the data in report.html, with the answers before and after the training."""
    resume: Annotated[bool, Group.CHECKPOINTS] = False
    """Resume the run in --out from its checkpoint, or from the start where it has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            len(self.split) == 3 and abs(sum(self.split) - 1) < 1e-6 and min(self.split) >= 0,
            f"--split {' '.join(map(str, self.split))} must be three shares that sum to 1, as 0.8 0.1 0.1",
        )
        check(
            not self.finish_steps or self.base_format not in ("int8", "nf4"),
            f"--finish-steps {self.finish_steps} makes an int4 model, and the base is {self.base_format}",
        )
        check(0 <= self.dropout < 1, "--dropout must be at least 0 and below 1")
        check(0 <= self.warmup <= 1, "--warmup is a share of the steps: 0 to 1")
        last_layers(self.layers)

    @property
    def rows_at_once(self) -> int:
        """`batch_size` of settings that `Family.resolve` completed."""
        assert self.batch_size is not None
        return self.batch_size

    @property
    def passes(self) -> int:
        """`gradient_accumulation`; 1 where it is left open."""
        return self.gradient_accumulation or 1

    @property
    def frozen_format(self) -> BaseFormat:
        """`base_format`; int4 where it is left open."""
        return self.base_format or "int4"

    @property
    def base_calibration_rows(self) -> int:
        """Training rows over which the codes of the base are chosen; 0 for all formats but int4."""
        return self.calibration_rows if self.frozen_format == "int4" else 0

    @classmethod
    def from_preset(cls, name: str, **settings: Any) -> Self:
        """The settings of a preset, overridden by those given here.

        Returns:
            The settings.

        Raises:
            UsageError: there is no such preset.
        """
        import yaml

        return cls(**{**yaml.safe_load(preset_file(name).read_text(encoding="utf-8")), **settings})


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TuneConfig):
    """Settings of a plan: those of the training."""

    out: Annotated[Path, Group.INPUT] = Path("run")
    """Run folder that tune would write; plan writes nothing and measures the free disk space there."""


def last_layers(layers: str) -> int | None:
    """Read the value of --layers.

    Returns:
        The K of `last:K`; None for `all`.

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


def without_retired(settings: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Saved settings without the options that no longer exist.

    Args:
        settings: Plain values by the names of options.
        where: The file that holds them, for the message.

    Returns:
        The settings that today's options know.

    Raises:
        UsageError: a retired option has another value than its default.
    """
    for name, default in RETIRED.items():
        value = settings.get(name, default)
        check(
            value == default,
            f"{where}: the option {name} no longer exists, and without it {value} cannot be reproduced: "
            f"only its default {default} is accepted",
        )
    return {name: value for name, value in settings.items() if name not in RETIRED}


def preset_file(name: str) -> Path:
    """The YAML file of a preset.

    Returns:
        Its path; the format is that of --config.

    Raises:
        UsageError: there is no such preset.
    """
    files = {file.stem: file for file in sorted((Path(__file__).parents[1] / "presets").glob("*.yaml"))}
    check(name in files, f"--preset {name}: choose from {', '.join(files)}{did_you_mean(name, list(files))}")
    return files[name]
