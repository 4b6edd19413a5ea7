"""Settings of `edge-ft eval`."""

from dataclasses import dataclass
from typing import Literal

from edge_ft.config.fields import check
from edge_ft.config.names import BaseFormat, Task
from edge_ft.config.rows import RowsConfig

__all__ = ["EvalConfig"]


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
        check(self.shots >= 0, "--shots cannot be negative")
        check(self.limit is None or self.limit >= 1, "--limit must be at least 1")
        check(self.max_new_tokens >= 1, "--max-new-tokens must be at least 1")
        check(self.batch_size >= 1, "--batch-size must be at least 1")
