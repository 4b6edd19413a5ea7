"""Training by torch: on the GPU or the CPU, in one process or several."""

from typing import Any

import torch

from edge_ft.artifacts import RunFolder
from edge_ft.config import TuneConfig
from edge_ft.progress import Progress
from edge_ft.system import Available, use_threads
from edge_ft.tune.distributed import Processes
from edge_ft.tune.finish import finish
from edge_ft.tune.loop import Fit
from edge_ft.tune.memory_mode import refuse_large_base, resolve_base_format, resolve_memory, settle_memory
from edge_ft.tune.opening import OpenedRun
from edge_ft.tune.prepare import Job
from edge_ft.tune.trainable_model import TrainableModel, load_trainable_model

__all__ = ["TorchEngine"]


class TorchEngine:
    """See `edge_ft.tune.engine.Engine`."""

    packages: tuple[str, ...] = ("torch", "transformers", "peft")

    def resolve(self, config: TuneConfig) -> TuneConfig:
        """Return the settings as they are: it knows every option."""
        return config

    def join(self, progress: Progress) -> Processes:
        """Return the processes that a launcher has started, or this one alone."""
        return Processes.from_environment(progress)

    def alone(self) -> Processes:
        """Return this process as the only one."""
        return Processes(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def use_threads(self, threads: int | None) -> int:
        """Set the number of CPU threads of torch."""
        return use_threads(threads)

    def choose_memory(self, job: Job, available: Available, processes: Processes) -> Job:
        """Choose the base format and --memory by what fits."""
        job = resolve_base_format(job, available, processes.device, processes.count)
        return resolve_memory(job, available, processes.device, processes.count)

    def refuse_large(self, job: Job, available: Available) -> None:
        """Refuse a base whose weights alone exceed the available memory."""
        refuse_large_base(job.base, job.config, available)

    def load(
        self, job: Job, processes: Processes, progress: Progress, known: OpenedRun | None = None, *, keep: bool = False
    ) -> TrainableModel:
        """Load the base with a fresh adapter."""
        codes, grid = (known.codes, known.grid) if known is not None else (None, None)
        return load_trainable_model(job, processes, progress, codes, grid=grid, keep=keep)

    def finish(
        self, run: RunFolder, job: Job, model: TrainableModel, fitted: Fit, progress: Progress
    ) -> dict[str, Any] | None:
        """Choose the codes of the merged model, and train its scales."""
        return finish(run, job, model, fitted, progress)

    def settle_memory(self, job: Job, model: TrainableModel) -> Job:
        """Choose --memory normal in place of high if cached weights save little."""
        return settle_memory(job, model)
