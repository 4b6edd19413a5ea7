"""The training of a run: the loop, with its log, its checkpoints and its signals."""

import json
import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from edge_ft.artifacts import RunFolder
from edge_ft.config import as_plain
from edge_ft.files import file_sha256
from edge_ft.progress import Progress
from edge_ft.stopping import held, requested
from edge_ft.tune.checkpoint import Checkpoint, write_checkpoint
from edge_ft.tune.engine import TrainableModel
from edge_ft.tune.loop import Callbacks, Fit, TrainingRows, fit
from edge_ft.tune.opening import OpenedRun
from edge_ft.tune.prepare import Job
from edge_ft.tune.processes import Processes
from edge_ft.tune.stopwatch import Timings

__all__ = ["Metrics", "train"]


def train(
    opened: OpenedRun, job: Job, model: TrainableModel, processes: Processes, progress: Progress, timings: Timings
) -> Fit:
    """Train, from the checkpoint if there is one, and write the adapter with the best weights.

    Args:
        opened: The run folder.
        job: With all settings resolved.
        model: Ends with the best weights.
        processes: Those that train together; the main one writes.
        progress: Gets the steps and the evaluations.
        timings: Gets the seconds of the evaluations and of the checkpoints.

    Returns:
        The loop's result.

    Raises:
        UsageError: loss or gradient was too often not finite, or --max-minutes leaves no step.
        KeyboardInterrupt: a signal came; a checkpoint was saved.
    """
    run, checkpoint, backend = opened.folder, opened.checkpoint, model.backend
    if checkpoint is not None:
        backend.restore(checkpoint.backend)
    log = run.metrics_path if processes.is_main else None
    examples = job.prepared.examples
    rows = TrainingRows(examples["train"], examples["validation"], job.batching, job.watched)
    with Metrics(log, checkpoint.metrics_bytes if checkpoint else 0) as metrics, held():
        callbacks = _RunCallbacks(run, job, model, metrics, processes)
        fitted = fit(backend, rows, job.config, progress, callbacks, checkpoint.state if checkpoint else None, timings)
    backend.save(run.adapter)
    return fitted


class Metrics(FileIO):
    """metrics.jsonl: each line is written at once, and none is written twice by a resumed run.

    Without a buffer a full disk shows when a line is written, not when the file is closed.
    """

    def __init__(self, path: Path | None, keep: int = 0) -> None:
        """Open the file and drop what is behind its first `keep` bytes; without a path nothing is written."""
        super().__init__(path or os.devnull, "ab")
        if path is not None:
            self.truncate(min(keep, self.tell()))
            self.seek(0, os.SEEK_END)

    def log(self, line: dict[str, Any]) -> None:
        """Append one line."""
        data = json.dumps(line).encode() + b"\n"
        while data:
            data = data[self.write(data) :]

    def sync(self) -> tuple[int, str]:
        """Return the size in bytes and the sha256, once all of it is on the disk."""
        os.fsync(self.fileno())
        return self.tell(), file_sha256(Path(str(self.name)))


@dataclass
class _RunCallbacks(Callbacks):
    """Writes the run folder while the loop trains; only the main process does."""

    run: RunFolder
    job: Job
    model: TrainableModel
    metrics: Metrics
    processes: Processes

    def on_plan(self, steps: int) -> None:
        self.job = self.job.with_settings(max_steps=self.job.config.max_steps or steps)
        if self.processes.is_main:
            with self.run.changed():
                self.run.write_settings(as_plain(self.job.config))

    def on_metrics(self, line: dict[str, Any]) -> None:
        self.metrics.log(line)

    def on_best(self) -> None:
        self.model.backend.save(self.run.adapter)

    def save(self, state: Fit) -> None:
        if self.processes.is_main:
            identity = {**self.job.identity, "codes_sha256": self.model.codes_sha256}
            settings, backend = as_plain(self.job.config), self.model.backend.state()
            length, log = self.metrics.sync()
            checkpoint = Checkpoint(identity, settings, length, state, backend, log)
            write_checkpoint(self.run.path, checkpoint)

    def poll(self) -> None:
        if self.processes.any(requested()):  # of several processes, all stop at the same step
            raise KeyboardInterrupt

    def agree(self, value: float) -> float:
        return self.processes.sum(value if self.processes.is_main else 0.0)
