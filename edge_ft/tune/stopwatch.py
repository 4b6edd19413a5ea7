"""The clock of a training, which can be paused."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Stopwatch"]


class Stopwatch:
    """Seconds of a run, and those of the training alone, which exclude what is done under `paused`."""

    def __init__(
        self, clock: Callable[[], float], elapsed: float = 0.0, seconds: float = 0.0, cpu_seconds: float = 0.0
    ) -> None:
        """Start at the values that an earlier stopwatch of the run gave, measured by `clock` (wall seconds)."""
        self.clock = clock
        self.started = (clock() - elapsed, time.process_time() - cpu_seconds)
        self.excluded = [elapsed - seconds, 0.0]

    @property
    def elapsed(self) -> float:
        """Wall seconds, all of them."""
        return self.clock() - self.started[0]

    @property
    def seconds(self) -> float:
        """Wall seconds of the training."""
        return self.elapsed - self.excluded[0]

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of the training, over all threads."""
        return time.process_time() - self.started[1] - self.excluded[1]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude this block, an evaluation or a checkpoint, from the seconds of the training."""
        began = self.clock(), time.process_time()
        try:
            yield
        finally:
            self.excluded[0] += self.clock() - began[0]
            self.excluded[1] += time.process_time() - began[1]
