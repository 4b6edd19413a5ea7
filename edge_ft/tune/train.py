"""The training of a run: the loop, with its log, its checkpoints and its signals."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import Any

from edge_ft.artifacts import RunFolder
from edge_ft.config import as_plain
from edge_ft.progress import Progress
from edge_ft.tune.checkpoint import Checkpoint, OpenedRun, write_checkpoint
from edge_ft.tune.distributed import Processes
from edge_ft.tune.loop import Callbacks, Fit, StopAtOnce, TrainingRows, fit
from edge_ft.tune.prepare import Job
from edge_ft.tune.trainable_model import TrainableModel

__all__ = ["Interruption", "Metrics", "train"]


def train(opened: OpenedRun, job: Job, model: TrainableModel, processes: Processes, progress: Progress) -> Fit:
    """Train, from the checkpoint if there is one, and write the adapter with the best weights.

    Args:
        opened: The run folder.
        job: With all settings resolved.
        model: Ends with the best weights.
        processes: Those that train together; the main one writes.
        progress: Gets the steps and the evaluations.

    Returns:
        The loop's result.

    Raises:
        UsageError: loss or gradient was too often not finite, or --max-minutes leaves no step.
        KeyboardInterrupt: a signal came; a checkpoint was saved.
    """
    run, checkpoint, backend = opened.folder, opened.checkpoint, model.backend
    if checkpoint is not None:
        backend.restore(checkpoint.backend)
    interruption = Interruption(processes.any)
    log = run.path / "metrics.jsonl" if processes.is_main else None
    rows = TrainingRows(job.prepared.examples["train"], job.prepared.examples["validation"], job.batching)
    with Metrics(log, checkpoint.metrics_bytes if checkpoint else 0) as metrics, interruption.watched():
        callbacks = _RunCallbacks(run, job, model, metrics, interruption, processes)
        fitted = fit(backend, rows, job.config, progress, callbacks, checkpoint.state if checkpoint else None)
    backend.save(run.adapter)
    return fitted


class Interruption:
    """Holds a signal until `poll`; a second Ctrl-C stops at once."""

    def __init__(self, in_any: Callable[[bool], bool] = bool) -> None:
        """Start without a signal.

        Args:
            in_any: Returns whether a flag is set in any of several processes: all of them stop at the same step.
        """
        self.requested = False
        self.in_any = in_any

    def poll(self) -> None:
        """Raise KeyboardInterrupt if a signal has come."""
        if self.in_any(self.requested):
            raise KeyboardInterrupt

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal as Python's `signal` module calls it."""
        if self.requested and number == signal.SIGINT:
            raise StopAtOnce
        self.requested = True

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handle the signals inside this block; outside Python's main thread, which alone can, do nothing."""
        # A background job of a script is started with SIGINT ignored, and stays so.
        before = {
            number: signal.signal(number, self.handle)
            for number in (signal.SIGINT, signal.SIGTERM)
            if threading.current_thread() is threading.main_thread() and signal.getsignal(number) != signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


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

    def sync(self) -> int:
        """Return the size in bytes, once all of it is on the disk."""
        os.fsync(self.fileno())
        return self.tell()


@dataclass
class _RunCallbacks(Callbacks):
    """Writes the run folder while the loop trains; only the main process does."""

    run: RunFolder
    job: Job
    model: TrainableModel
    metrics: Metrics
    interruption: Interruption
    processes: Processes

    def on_plan(self, steps: int) -> None:
        self.job = self.job.with_settings(max_steps=self.job.config.max_steps or steps)
        if self.processes.is_main:
            self.run.write_settings(as_plain(self.job.config))

    def on_metrics(self, line: dict[str, Any]) -> None:
        self.metrics.log(line)

    def on_best(self) -> None:
        self.model.backend.save(self.run.adapter)

    def save(self, state: Fit) -> None:
        if self.processes.is_main:
            identity = {**self.job.identity, "codes_sha256": self.model.codes_sha256}
            settings, backend = as_plain(self.job.config), self.model.backend.state()
            checkpoint = Checkpoint(identity, settings, self.metrics.sync(), state, backend)
            write_checkpoint(self.run.path, checkpoint)

    def poll(self) -> None:
        self.interruption.poll()

    def agree(self, value: float) -> float:
        return self.processes.sum(value if self.processes.is_main else 0.0)
