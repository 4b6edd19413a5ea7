"""Training in several processes: each computes its share of the rows of a batch, and all hold the same weights.

Every process makes the same batches and the same decisions; gradients and losses are summed. Only the main process
writes files and messages.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, distributed

from edge_ft.data import Batch
from edge_ft.progress import Progress

__all__ = ["Processes"]


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

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set in any process."""
        return self.sum(float(flag)) > 0

    def sum(self, value: float) -> float:
        """Return the sum over all processes."""
        return float(self.sum_tensor(torch.tensor(value, dtype=torch.float64)))

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes of tensors of one shape; it may take the place of `tensor`."""
        if self.count > 1:
            tensor = tensor.to(self.device)
            distributed.all_reduce(tensor)
        return tensor

    def own(self, batch: Batch) -> Batch:
        """Return the rows of a batch that are in `share`."""
        return cast(Batch, {name: values[self.share] for name, values in batch.items()})  # type: ignore[index]
