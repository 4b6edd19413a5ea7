"""More than one process: each trains on its share of the rows of every batch, and all hold the same weights.

Every process makes the same batches and decides the same; gradients and losses are summed. Only the first one
writes and speaks.
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

__all__ = ["RankedBackend", "Ranks"]


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls, progress: Progress) -> "Ranks":
        """As a launcher (accelerate launch, torchrun) has set the environment; else one process."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            # Set where more than one was asked for, yet accelerate's CPU launcher starts one and numbers none.
            if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ:
                progress.say(
                    "accelerate launch --cpu has started one process, whatever --num_processes says: for more, "
                    "accelerate launch --multi_gpu or torchrun --nproc-per-node N, on a CPU too"
                )
            return cls(device)
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu")
        return cls(state.device, state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    @contextmanager
    def one_after_the_other(self) -> Iterator[None]:
        """The first process does this block before the others."""
        if not self.first:
            self.wait()
        try:
            yield
        finally:
            if self.first:
                self.wait()

    def wait(self) -> None:
        """Until all processes are here."""
        self.of_first(0.0)

    def of_first(self, value: float) -> float:
        """The first process's value."""
        return self.sum(value if self.first else 0.0)

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return self.sum(float(flag)) > 0

    def sum(self, value: float) -> float:
        """Over all processes."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return float(total)


class RankedBackend(TorchBackend):
    """One of several processes; the calls that are marked so must be made by all of them, in the same order."""

    def __init__(self, model: Any, family: Family, task: Task, config: TuneConfig, ranks: Ranks) -> None:
        super().__init__(model, family, task, config)
        self.ranks = ranks
        self.together = True

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside this block the process works on whole batches by itself."""
        self.together = False
        try:
            yield
        finally:
            self.together = True

    def seed(self, seed: int) -> None:
        super().seed(seed + self.ranks.rank)  # other rows, other dropout

    def gradient(self, batch: Batch, targets: int) -> float:
        """By all: the gradient of this process's rows, the loss of all rows."""
        if not self.together:
            return super().gradient(batch, targets)
        own = self._own(batch)
        return self.ranks.sum(super().gradient(own, targets) if own["rows"] else 0.0)

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        """By all: one step over the summed gradients."""
        if self.together:
            # A process whose share was empty has no gradient, and adds nothing.
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            distributed.all_reduce(flat)
            parts = flat.split([parameter.numel() for parameter in self.parameters])
            for parameter, part in zip(self.parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter)
        return super().update(learning_rate, max_grad_norm)

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """By all: each scores its rows, and gets those of all."""
        if not self.together:
            return super().token_nll(batch)
        own = self._own(batch)
        nll, predicted = np.zeros(batch["labels"].shape, np.float32), np.zeros_like(batch["labels"])
        if own["rows"]:
            nll[self.ranks.rank :: self.ranks.world], predicted[self.ranks.rank :: self.ranks.world] = (
                super().token_nll(own)
            )
        for array in (nll, predicted):
            total = torch.from_numpy(array).to(self.device)
            distributed.all_reduce(total)
            array[:] = total.cpu().numpy()
        return nll, predicted

    def save(self, folder: Path) -> None:
        if self.ranks.first:
            super().save(folder)

    def _own(self, batch: Batch) -> Batch:
        """This process's rows of a batch."""
        share = slice(self.ranks.rank, None, self.ranks.world)
        return cast(Batch, {name: values[share] for name, values in batch.items()})  # type: ignore[index]
