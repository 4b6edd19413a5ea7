"""How work reports its progress, and what displays it: nothing, plain lines, or bars on a terminal."""

import _thread
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO, TypeVar

from edge_ft.stopping import running_seconds, stop_if_requested

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["Lines", "Progress", "ProgressBars", "Silent", "heartbeat", "say_if_slow", "track"]

T = TypeVar("T")


class Progress(Protocol):
    """Receives messages, and the state of a stage whose steps are counted."""

    def say(self, text: str) -> None:
        """Report a message of one line."""

    def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Report the state of a stage.

        Args:
            stage: Its name.
            done: Finished steps.
            total: All steps; 0 where they cannot be counted.
            detail: Figures to show beside them.
        """


class Silent:
    """Reports nothing."""

    def say(self, text: str) -> None:
        """Ignore a message."""

    def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Ignore the state of a stage."""


class Lines:
    """Plain lines for logs and pipes: one every few seconds, with the elapsed and the remaining time."""

    def __init__(self, stream: TextIO | None = None, interval: float = 4.0) -> None:
        self.stream = stream or sys.stderr
        self.interval = interval
        self.stage, self.started, self.first, self.shown = "", 0.0, 0, running_seconds()
        self.count, self.counting = "", False

    def say(self, text: str) -> None:
        """Print a message."""
        self.counting = False
        self._print(text)

    def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Print the state of a stage: when it is finished, and otherwise if nothing was printed for `interval`."""
        if total == 0 and self.counting and stage != self.stage:
            return  # a part of that step is counted, and reported on its own
        now = running_seconds()
        if total or stage != self.stage:
            self.count, self.counting = f" {done}/{total}" if total else "", done < total
        if stage != self.stage:
            # A stage that continues after another one is timed from here on.
            self.stage, self.started, self.first = stage, now, max(done - 1, 0)
        if 0 < done == total or now - self.shown >= self.interval:
            time_left = eta(done - self.first, total - self.first, now - self.started)
            self._print(f"{stage}{self.count}  {time_left}  {detail}".rstrip())

    def _print(self, text: str) -> None:
        self.shown = running_seconds()
        print(text, file=self.stream, flush=True)


class ProgressBars:
    """A progress bar on stderr with the elapsed and the remaining time of a stage; messages scroll above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
        )
        # Not Console(stderr=True), which would follow sys.stderr when the output of libraries is silenced.
        self._display = RichProgress(*columns, console=Console(file=sys.stderr), transient=True)
        self._task: TaskID | None = None
        self._stage, self._counting = "", False

    def __enter__(self) -> "ProgressBars":
        self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.stop()

    def say(self, text: str) -> None:
        """Print a message above the bar."""
        self._counting = False
        self._display.console.print(text, markup=False, highlight=False)

    def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Move the bar of `stage`; another stage gets a new bar."""
        if total == 0 and (self._counting or stage == self._stage):
            return  # a part of that step is counted, and has a bar of its own; the elapsed time moves by itself
        self._counting = done < total
        if stage != self._stage or self._task is None:
            if self._task is not None:
                self._display.remove_task(self._task)
            self._stage, self._task = stage, self._display.add_task(stage, total=total or None, count="", detail="")
        count = f"{done}/{total}" if total else ""
        self._display.update(self._task, completed=done, total=total or None, count=count, detail=detail)


def eta(done: int, total: int, seconds: float) -> str:
    """`12 s, 30 s left`: the elapsed time, and the remaining time at the same rate."""
    left = f", {seconds / done * (total - done):.0f} s left" if 0 < done < total else ""
    return f"{seconds:.0f} s{left}"


def track(progress: Progress, stage: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Yield the items, and report each one as done when the next is taken."""
    progress.advance(stage, 0, total)
    for done, item in enumerate(items, 1):
        stop_if_requested()
        yield item
        progress.advance(stage, done, total)


@contextmanager
def heartbeat(progress: Progress, step: str, seconds: float = 1.0) -> Iterator[None]:
    """Report a step that cannot be counted: at its start, and with the elapsed time until it ends.

    Parts of it may be counted by `advance`; those are shown while they last.

    Args:
        progress: Receives the reports.
        step: What the block does.
        seconds: Time between two reports.

    Yields:
        Nothing.
    """
    ended, reporting = threading.Event(), threading.Lock()

    def repeat() -> None:
        while not ended.wait(seconds):
            with reporting:
                if not ended.is_set():
                    progress.advance(step, 0, 0)

    stop_if_requested()
    progress.say(step)
    progress.advance(step, 0, 0)
    # Not threading.Thread: where memory ends its start() and join() wait for ever for a thread that could not begin.
    with suppress(RuntimeError, MemoryError):
        _thread.start_new_thread(repeat, ())
    try:
        yield
    finally:
        with reporting:  # nothing is reported after the end of the step
            ended.set()


@contextmanager
def say_if_slow(progress: Progress, step: str, seconds: float = 2.0) -> Iterator[None]:
    """Report a step once, if it is not over after some seconds.

    Args:
        progress: Receives the message.
        step: What the block does.
        seconds: How long it may be silent.

    Yields:
        Nothing.
    """
    ended, reporting = threading.Event(), threading.Lock()

    def wait() -> None:
        if not ended.wait(seconds):
            with reporting:
                if not ended.is_set():
                    progress.say(step)

    with suppress(RuntimeError, MemoryError):  # no memory for a thread: no message
        _thread.start_new_thread(wait, ())
    try:
        yield
    finally:
        with reporting:
            ended.set()
