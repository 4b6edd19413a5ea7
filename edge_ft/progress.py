"""How long work reports itself; the command line passes in what draws it."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TextIO, TypeVar

__all__ = ["Lines", "Progress", "Silent", "track"]

T = TypeVar("T")


class Progress(Protocol):
    """Takes one-line news and the state of a counted stage."""

    def say(self, text: str) -> None:
        """One line of news."""

    def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """`done` of `total` of a stage are finished; `detail` holds its figures."""


class Silent:
    """Reports nothing."""

    def say(self, text: str) -> None:
        pass

    def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
        pass


class Lines:
    """Plain lines with rate and time left, at most one every few seconds: for logs and pipes."""

    def __init__(self, stream: TextIO | None = None, interval: float = 5.0) -> None:
        self.stream = stream or sys.stderr
        self.interval = interval
        self.stage, self.started, self.shown, self.first = "", 0.0, 0.0, 0

    def say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
        now = time.monotonic()
        if stage != self.stage:
            # A stage may go on after another one came in between: its rate is that of the steps since then.
            self.stage, self.started, self.shown, self.first = stage, now, now, max(done - 1, 0)
        if done == total or now - self.shown >= self.interval:
            self.shown = now
            time_left = eta(done - self.first, total - self.first, now - self.started)
            self.say(f"{stage} {done}/{total}  {time_left}  {detail}".rstrip())


def eta(done: int, total: int, seconds: float) -> str:
    """`12 s, 30 s left` from what is done so far."""
    left = f", {seconds / done * (total - done):.0f} s left" if 0 < done < total else ""
    return f"{seconds:.0f} s{left}"


def track(progress: Progress, stage: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Yield the items and report each one as done."""
    progress.advance(stage, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        progress.advance(stage, done, total)
