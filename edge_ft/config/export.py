"""Settings of `edge-ft export` and `edge-ft verify`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_ft.config.fields import check
from edge_ft.config.names import Task, Weights
from edge_ft.config.rows import RowsConfig

__all__ = ["ExportConfig", "VerifyConfig"]


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
        check(self.max_tax >= 0, "--max-tax cannot be negative")
        check(self.max_metric_drop >= 0, "--max-metric-drop cannot be negative")


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
        check(self.max_tax is None or self.max_tax >= 0, "--max-tax cannot be negative")
