"""The processes that train together, as one of them sees them; here there is only this one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from edge_ft.data import Batch

__all__ = ["Cpu", "Processes"]


@dataclass(frozen=True)
class Cpu:
    """What a `torch.device` says of the CPU."""

    type: str = "cpu"

    def __str__(self) -> str:
        return self.type


@dataclass(frozen=True)
class Processes:
    """The processes of a training, seen from one of them."""

    device: Any = Cpu()
    """Of this process."""
    rank: int = 0
    """Its number; 0 is the main process."""
    count: int = 1

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
        return value

    def own(self, batch: Batch) -> Batch:
        """Return the rows of a batch that are in `share`."""
        return cast(Batch, {name: values[self.share] for name, values in batch.items()})  # type: ignore[index]
