"""Training in several processes: each computes its share of the rows of a batch, and all hold the same weights.

Every process makes the same batches and the same decisions; gradients and losses are summed. Only the main process
writes files and messages.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from edge_ft.config import Task, TuneConfig
from edge_ft.data import Batch
from edge_ft.families import Family
from edge_ft.progress import Progress
from edge_ft.tune.torch_backend import TorchBackend

__all__ = ["DistributedBackend", "Processes"]


@dataclass(frozen=True)
class Processes:
    """The processes of a training, seen from one of them."""

    device: torch.device
    """Of this process."""
    rank: int = 0
    """Its number; 0 is the main process."""
    count: int = 1

    @classmethod
    def from_environment(cls, progress: Progress) -> "Processes":
        """Join the processes that a launcher (accelerate launch, torchrun) has started; without one, be the only one.

        Args:
            progress: Gets a warning if accelerate's CPU launcher ignored --num_processes.

        Returns:
            The processes, seen from this one.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            # Set when more than one was requested, yet accelerate's CPU launcher starts one and numbers none.
            if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ:
                progress.say(
                    "accelerate launch --cpu starts one process and ignores --num_processes: to use several, run "
                    "accelerate launch --multi_gpu or torchrun --nproc-per-node N, on a CPU too"
                )
            return cls(device)
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu")
        return cls(state.device, state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """The rows of a batch that this process computes."""
        return slice(self.rank, None, self.count)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run this block in the main process before it runs in the others."""
        if not self.is_main:
            self.wait()
        try:
            yield
        finally:
            if self.is_main:
                self.wait()

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.sum(0.0)

    def broadcast(self, value: float) -> float:
        """Return the main process's value."""
        return self.sum(value if self.is_main else 0.0)

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set in any process."""
        return self.sum(float(flag)) > 0

    def sum(self, value: float) -> float:
        """Return the sum over all processes."""
        if self.count == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return float(total)


class DistributedBackend(TorchBackend):
    """The backend of one of the processes; of a single process, a plain `TorchBackend`.

    All processes must call `gradient`, `update` and `token_nll` in the same order.
    """

    def __init__(self, model: Any, family: Family, task: Task, config: TuneConfig, processes: Processes) -> None:
        """Prepare the optimizer, as `TorchBackend` does.

        Args:
            model: A `peft.PeftModel`, on the device of this process.
            family: Of the base.
            task: What is trained.
            config: Its compute, memory and weight decay count.
            processes: Those that train together.
        """
        super().__init__(model, family, task, config)
        self.processes = processes

    @contextmanager
    def unshared(self) -> Iterator[None]:
        """Work on whole batches in this process alone, inside this block."""
        before, self.processes = self.processes, Processes(self.device)
        try:
            yield
        finally:
            self.processes = before

    def seed(self, seed: int) -> None:
        """Seed the random numbers of dropout, differently in each process: each has other rows."""
        super().seed(seed + self.processes.rank)

    def gradient(self, batch: Batch, targets: int) -> float:
        """Accumulate the gradient of this process's rows; return the loss of all rows."""
        own = self._own(batch)
        return self.processes.sum(super().gradient(own, targets) if own["rows"] else 0.0)

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        """Take one step over the summed gradients; return their norm before clipping."""
        if self.processes.count > 1:
            # A process whose share was empty has no gradient, and adds nothing.
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            distributed.all_reduce(flat)
            parts = flat.split([parameter.numel() for parameter in self.parameters])
            for parameter, part in zip(self.parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter)
        return super().update(learning_rate, max_grad_norm)

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Score this process's rows; return the scores of all rows."""
        if self.processes.count == 1:
            return super().token_nll(batch)
        own = self._own(batch)
        nll, predicted = np.zeros(batch["labels"].shape, np.float32), np.zeros_like(batch["labels"])
        if own["rows"]:
            nll[self.processes.share], predicted[self.processes.share] = super().token_nll(own)
        for array in (nll, predicted):
            total = torch.from_numpy(array).to(self.device)
            distributed.all_reduce(total)
            array[:] = total.cpu().numpy()
        return nll, predicted

    def save(self, folder: Path) -> None:
        """Write the current weights, in the main process alone."""
        if self.processes.is_main:
            super().save(folder)

    def _own(self, batch: Batch) -> Batch:
        """This process's rows of a batch."""
        return cast(Batch, {name: values[self.processes.share] for name, values in batch.items()})  # type: ignore[index]
