"""Ctrl-C and SIGTERM, held back until the loop polls for them between two batches."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from edge_ft.tune.loop import StopAtOnce

__all__ = ["Interruption"]


class Interruption:
    """Holds a signal until `poll`; a second Ctrl-C stops at once."""

    def __init__(self, in_any: Callable[[bool], bool] = bool) -> None:
        """Start without a signal.

        Args:
            in_any: Returns whether a flag is set in any of several processes: all of them stop at the same step.
        """
        self.requested = False
        self.in_any = in_any

    def poll(self) -> None:
        """Raise KeyboardInterrupt if a signal has come."""
        if self.in_any(self.requested):
            raise KeyboardInterrupt

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal as Python's `signal` module calls it."""
        if self.requested and number == signal.SIGINT:
            raise StopAtOnce
        self.requested = True

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handle the signals inside this block; outside Python's main thread, which alone can, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[signal.Signals, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            # A background job of a script is started with SIGINT ignored, and stays so.
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, self.handle)
        try:
            yield
        finally:
            for taken, handler in before.items():
                signal.signal(taken, handler)
