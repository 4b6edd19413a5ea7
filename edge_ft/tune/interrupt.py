"""How a run stops: signals, held back until the loop polls for them, and the message about what is saved."""

import shlex
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from edge_ft.artifacts import disk_full
from edge_ft.errors import Interrupted, WillNotFit
from edge_ft.tune.checkpoint import has_checkpoint, read_checkpoint
from edge_ft.tune.loop import StopAtOnce
from edge_ft.tune.opening import OpenedRun

__all__ = ["Interruption", "explain_stop"]


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


@contextmanager
def explain_stop(opened: OpenedRun, is_main: bool) -> Iterator[None]:
    """If this block is interrupted or fails, say which files are saved and how to resume.

    A new folder is removed if nothing was learned: the same command can then be given again.

    Args:
        opened: The run folder.
        is_main: Whether this is the main process. The others explain and remove nothing: the main process may still
            be writing when they stop.

    Yields:
        Nothing.

    Raises:
        Interrupted: in place of a KeyboardInterrupt.
        WillNotFit: the disk or the GPU's memory is full.
    """
    run = opened.folder
    resume = f"edge-ft tune --config {shlex.quote(str(run.config_path))} --resume"
    try:
        yield
    except Exception as error:
        from torch import OutOfMemoryError

        learned = run.adapter.is_dir() or has_checkpoint(run.path)
        if opened.is_new and is_main and not learned:
            shutil.rmtree(run.path, ignore_errors=True)
        if disk_full(error):
            again = f"run {resume}" if run.path.is_dir() else "run the same command again"
            raise WillNotFit(f"the disk is full and training stopped: free some space, then {again}") from error
        if isinstance(error, OutOfMemoryError):
            raise WillNotFit(
                "the GPU's memory is too small for this run: give a smaller --batch-size or --max-length, or "
                "--memory low"
            ) from error
        raise
    except KeyboardInterrupt:
        if not is_main:
            raise Interrupted("stopped") from None
        saved = f"the best adapter so far is in {run.adapter}" if run.adapter.is_dir() else "no adapter is saved yet"
        checkpoint = read_checkpoint(run.path)
        where = f"resume from step {checkpoint.step}" if checkpoint else "start again from step 0, without a checkpoint"
        raise Interrupted(f"stopped; {saved}; to {where}: {resume}") from None
