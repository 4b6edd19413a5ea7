"""What does the arithmetic of a training's steps, as the loop sees it."""

from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from edge_ft.data import Batch
from edge_ft.evaluate.scoring import Scorer

__all__ = ["Backend", "count_trained"]


class Backend(Scorer, Protocol):
    """The arithmetic of a step."""

    def seed(self, seed: int) -> None:
        """Seed the random numbers of dropout."""

    def gradient(self, batch: Batch, targets: int) -> float:
        """Accumulate the gradient of the batch's summed loss / `targets`; return that loss (nats)."""

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        """Take one optimizer step over the accumulated gradient; return its norm before clipping."""

    def discard(self) -> None:
        """Drop the accumulated gradient."""

    def keep_best(self) -> None:
        """Store the current weights as the best so far."""

    def restore_best(self) -> None:
        """Set the weights to the best so far."""

    def swap_best(self) -> None:
        """Exchange the weights and the best so far."""

    def repair(self) -> bool:
        """If a weight or a moment is not finite, restore the best weights and clear the moments; return whether."""

    def save(self, folder: Path) -> None:
        """Write the current weights as a PEFT adapter."""

    def state(self) -> dict[str, NDArray[Any]]:
        """Return weights, moments and best weights by flat names; the arrays may share memory with them."""

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Return to the moment at which `state` was taken."""


def count_trained(backend: Backend) -> int:
    """Return how many numbers are trained."""
    return sum(array.size for name, array in backend.state().items() if name.startswith("parameters."))
