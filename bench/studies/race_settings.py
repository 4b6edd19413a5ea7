"""What is raced, and which trainings of it are done: the flags of the training study."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edge_ft.config import Memory, Task
from edge_ft.errors import UsageError

__all__ = ["Race", "Trainings"]


@dataclass(frozen=True, kw_only=True)
class Race:
    """What is trained on what: the same for every training of an --out folder."""

    model: str
    """Hub id, local folder or GGUF file."""
    data: str
    """Rows, as edge-ft tune takes them; a tenth each are validation and test rows where no file is given for them."""
    validation: str | None = None
    """Rows that both trainers may choose their best weights by."""
    test: str | None = None
    """Held-out rows, on which both are scored and by which neither chooses."""
    prompt: str | None = None
    """As in edge-ft tune."""
    completion: str | None = None
    """As in edge-ft tune."""
    label: str | None = None
    """As in edge-ft tune."""
    task: Task | None = None
    """As in edge-ft tune."""
    train_rows: int | None = None
    """Number of training rows, sampled once; default: all."""
    validation_rows: int | None = None
    """Number of validation rows, sampled once; default: as many as --eval-rows."""
    eval_rows: int | None = None
    """Number of held-out rows, sampled once; default: all."""
    epochs: float | None = None
    """Epochs of both trainers; default: that of edge-ft tune, and 2 for the baseline."""
    rank: int = 8
    """Rank of both adapters."""
    batch_size: int | None = None
    """Rows in a batch of both trainers; default: that of edge-ft tune, and 8 for the baseline."""
    max_length: int | None = None
    """As in edge-ft tune."""
    eval_steps: int | None = None
    """Steps of edge-ft between evaluations; the baseline is scored after as many rows. Default: that of edge-ft tune,
    and 12 for the baseline."""
    max_minutes: float | None = None
    """As in edge-ft tune; the baseline trains as many minutes at most, without evaluations."""
    base_format: Literal["int4", "int8", "fp32"] | None = None
    """Base format of edge-ft; default: that of edge-ft tune. With --same-recipe the baseline trains over the
    dequantized weights."""
    compute: Literal["auto", "fp32", "bf16"] | None = None
    """Compute precision of edge-ft; default: that of edge-ft tune. The baseline computes in float32."""
    memory: Memory | None = None
    """Memory mode of edge-ft; default: that of edge-ft tune."""
    threads: int | None = None
    """CPU threads of both; default: all CPUs that the process may use."""

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        if (self.threads or 1) < 1 or (self.eval_steps or 1) < 1:
            raise UsageError("--threads and --eval-steps must be at least 1")

    def tune_settings(self, rows: Path) -> dict[str, Any]:
        """The `TuneConfig` of ours, without what differs between trainings; options left out keep their defaults."""
        names = ("epochs", "batch_size", "base_format", "compute", "memory", "max_minutes", "eval_steps")
        given = {name: getattr(self, name) for name in names}
        return {
            **{name: getattr(self, name) for name in ("model", "prompt", "completion", "label", "task")},
            **{name: getattr(self, name) for name in ("rank", "max_length")},
            **{name: value for name, value in given.items() if value is not None},
            "data": str(rows / "train.jsonl"),
            "validation": str(rows / "validation.jsonl"),
            "test": str(rows / "test.jsonl"),
            "split": [1.0, 0.0, 0.0],
        }


@dataclass(frozen=True, kw_only=True)
class Trainings:
    """Which trainings of a race are done."""

    seeds: int = 3
    """Number of seeds: training runs of each trainer on the same rows."""
    baseline_rates: str = "2e-4,5e-4,1e-3,2e-3"
    """Learning rates of the baseline's sweep on seed 0, separated by commas."""
    same_recipe: bool = False
    """Train the baseline with the batches, schedule and layers of edge-ft: the curves must agree, and only the speed
    differs."""
    bundle: bool = False
    """With --same-recipe also train a bundle of the model, by ONNX Runtime, and ours in float32 where it computes in
    bfloat16."""
    library_seeds: int | None = None
    """Of how many seeds the baseline is also trained with the default learning rate of transformers' Trainer; default:
    all."""

    def __post_init__(self) -> None:
        """Refuse rates that are not numbers, and numbers that are not positive."""
        try:
            rates = self.rates
        except ValueError as error:
            raise UsageError(f"--baseline-rates {self.baseline_rates}: give numbers with commas between") from error
        if self.seeds < 1 or min(rates) <= 0:
            raise UsageError("--seeds and --baseline-rates must be above 0")
        if self.library_seeds is not None and self.library_seeds < 0:
            raise UsageError("--library-seeds must be at least 0")
        if self.bundle and not self.same_recipe:
            raise UsageError("--bundle compares trainings of --same-recipe: give both")

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates of the sweep."""
        return tuple(float(rate) for rate in self.baseline_rates.split(","))
