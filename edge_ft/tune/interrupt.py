"""Ctrl-C and SIGTERM as a question that the loop asks between two pieces of work."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from edge_ft.tune.loop import StopAtOnce

__all__ = ["Interruption"]


class Interruption:
    """A signal is kept until `poll`, but a second Ctrl-C stops at once."""

    def __init__(self, in_any: Callable[[bool], bool] = bool) -> None:
        """`in_any`: whether a flag is set in any of several processes, which then stop at the same step."""
        self.asked = False
        self.in_any = in_any

    def poll(self) -> None:
        """Raise KeyboardInterrupt if a signal has come."""
        if self.in_any(self.asked):
            raise KeyboardInterrupt

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise StopAtOnce
        self.asked = True

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take the signals inside this block; only Python's main thread can, elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[signal.Signals, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            # A job in the background of a script is started with SIGINT ignored, and stays so.
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, self.handle)
        try:
            yield
        finally:
            for taken, handler in before.items():
                signal.signal(taken, handler)
