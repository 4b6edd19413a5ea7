"""The training of a run: the loop, with its log, its checkpoints and its signals."""

from dataclasses import dataclass, replace
from typing import Any

from edge_ft.artifacts import RunFolder
from edge_ft.config import TuneConfig, as_plain
from edge_ft.progress import Progress
from edge_ft.tune.checkpoint import Checkpoint, write_checkpoint
from edge_ft.tune.distributed import Processes
from edge_ft.tune.interrupt import Interruption
from edge_ft.tune.job import Job
from edge_ft.tune.loop import Backend, Callbacks, Fit, TrainingRows, fit
from edge_ft.tune.metrics_log import Metrics
from edge_ft.tune.opening import OpenedRun
from edge_ft.tune.trainable_model import TrainableModel

__all__ = ["train"]


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
    examples = job.prepared.examples
    rows = TrainingRows(examples["train"], examples["validation"], job.batching)
    identity = {**job.identity, "codes_sha256": model.codes_sha256}
    with Metrics(log, checkpoint.metrics_bytes if checkpoint else 0) as metrics, interruption.watched():
        callbacks = _RunCallbacks(run, identity, job.config, backend, metrics, interruption, processes)
        fitted = fit(backend, rows, job.config, progress, callbacks, checkpoint.state if checkpoint else None)
    backend.save(run.adapter)
    return fitted


@dataclass
class _RunCallbacks(Callbacks):
    """Writes the run folder while the loop trains; only the main process does."""

    run: RunFolder
    identity: dict[str, Any]
    config: TuneConfig
    backend: Backend
    metrics: Metrics
    interruption: Interruption
    processes: Processes

    def on_plan(self, steps: int) -> None:
        self.config = replace(self.config, max_steps=self.config.max_steps or steps)
        if self.processes.is_main:
            self.run.write_settings(as_plain(self.config))

    def on_metrics(self, line: dict[str, Any]) -> None:
        self.metrics.log(line)

    def on_best(self) -> None:
        self.backend.save(self.run.adapter)

    def save(self, state: Fit) -> None:
        if self.processes.is_main:
            settings, size = as_plain(self.config), self.metrics.sync()
            checkpoint = Checkpoint(self.identity, settings, size, state, self.backend.state())
            write_checkpoint(self.run.path, checkpoint)

    def poll(self) -> None:
        self.interruption.poll()

    def agree(self, value: float) -> float:
        return self.processes.broadcast(value)
