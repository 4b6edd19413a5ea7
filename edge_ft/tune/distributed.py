"""Training in several processes: each computes its share of the rows of a batch, and all hold the same weights.

Every process makes the same batches and the same decisions; gradients and losses are summed. Only the main process
writes files and messages.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from edge_ft.progress import Progress
from edge_ft.tune import processes

__all__ = ["Processes"]


@dataclass(frozen=True)
class Processes(processes.Processes):
    """Processes that sum tensors over torch's collectives."""

    device: torch.device

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

    def sum(self, value: float) -> float:
        """Return the sum over all processes."""
        return float(self.sum_tensor(torch.tensor(value, dtype=torch.float64)))

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes of tensors of one shape; it may take the place of `tensor`."""
        if self.count > 1:
            tensor = tensor.to(self.device)
            distributed.all_reduce(tensor)
        return tensor
