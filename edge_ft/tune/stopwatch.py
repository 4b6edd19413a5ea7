"""The clock of a training, which can be paused, and the seconds of its stages."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from edge_ft.energy import Energy
from edge_ft.stopping import running_seconds

__all__ = ["Stopwatch", "Timings"]


@dataclass
class Timings:
    """Wall seconds of the stages of a command, in the order in which they began."""

    clock: Callable[[], float] = running_seconds
    energy: Energy = field(default_factory=Energy)
    """Read at the end of each stage."""
    seconds: dict[str, float] = field(default_factory=dict)
    _inside: float = field(default=0.0, init=False)
    """Of the stages inside the present one."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds of this block to those of a stage, without those of the stages inside it."""
        began, before, self._inside = self.clock(), self._inside, 0.0
        self.seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            whole = self.clock() - began
            self.seconds[name] += whole - self._inside
            self._inside = before + whole
            self.energy.read()

    @property
    def text(self) -> str:
        """The stages of at least a tenth of a second, as `load 4.1, train 72.0`, and their sum."""
        stages = [f"{name} {seconds:.1f}" for name, seconds in self.seconds.items() if seconds >= 0.1]
        return f"{', '.join(stages)}; {sum(self.seconds.values()):.1f} in all"

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count seconds of one stage as those of another, which was a part of it."""
        self.seconds[source] -= seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds


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
