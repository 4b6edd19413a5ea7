"""The clock that training is reported by: what is not training is put aside."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Stopwatch"]


class Stopwatch:
    """Seconds of a run, and those of the training alone: not what is done under `paused`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.started = [clock(), time.process_time()]
        self.aside = [0.0, 0.0]

    def go_on(self, elapsed: float, seconds: float, cpu_seconds: float) -> None:
        """Count on from these, which it once gave."""
        self.started[0] -= elapsed
        self.started[1] -= cpu_seconds
        self.aside[0] += elapsed - seconds

    @property
    def elapsed(self) -> float:
        """Wall seconds, all of them."""
        return self.clock() - self.started[0]

    @property
    def seconds(self) -> float:
        """Wall seconds of the training."""
        return self.elapsed - self.aside[0]

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of the training, over all threads."""
        return time.process_time() - self.started[1] - self.aside[1]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Looks at the validation rows and checkpoints are not training."""
        began = self.clock(), time.process_time()
        try:
            yield
        finally:
            self.aside[0] += self.clock() - began[0]
            self.aside[1] += time.process_time() - began[1]
