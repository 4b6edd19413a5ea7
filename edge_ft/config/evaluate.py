"""Settings of `edge-ft eval`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from edge_ft.config.shared import BaseFormat, Group, Minimum, RowsConfig, Task, Threads

__all__ = ["EvalConfig"]


@dataclass(frozen=True, kw_only=True)
class EvalConfig(RowsConfig):
    """Settings of an evaluation."""

    data: Annotated[str, Group.INPUT]
    """Rows to score: a JSONL, CSV or Parquet file, a folder saved by `datasets`, or a hub data set id."""
    task: Annotated[Task | None, Group.INPUT] = None
    """Task of a plain model; a run or bundle has its own."""
    adapter: Annotated[str | None, Group.INPUT] = None
    """none: score a run or bundle without its adapter; for a bundle also a run folder, an adapter in PEFT's format, or
    the name of one in the bundle."""
    accuracy_level: Annotated[Literal[1, 4] | None, Group.INPUT] = None
    """Graph of a bundle to score: 1 computes in float, 4 with int8 activations; default: the manifest's choice."""
    base_format: Annotated[BaseFormat, Group.INPUT] = "fp32"
    """Weight format in which to score a plain model; a run is scored in the base format of its training."""
    limit: Annotated[int | None, Group.INPUT, Minimum(1)] = None
    """Score only the first N rows."""
    shots: Annotated[int, Group.EVALUATION, Minimum(0)] = 0
    """Number of example rows put before each prompt (few-shot, text-generation); the maximum length is then the
    model's limit."""
    shots_from: Annotated[str | None, Group.EVALUATION] = None
    """File with the example rows of --shots; default for a run: its train rows; required for bundles and models."""
    generate: Annotated[bool, Group.EVALUATION] = True
    """Also generate an answer to every row and compare it (text generation); takes most of the time."""
    max_new_tokens: Annotated[int, Group.EVALUATION, Minimum(1)] = 64
    """Maximum length of a generated answer in tokens."""
    batch_size: Annotated[int, Group.EVALUATION, Minimum(1)] = 8
    """Rows scored in one forward pass."""
    threads: Threads = None
    """CPU threads; default: OMP_NUM_THREADS, or all CPUs that the process may use."""
