"""The signals that stop a command: every phase of every command handles them in the same way.

Ctrl-C (SIGINT), SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread, wherever it is; files are written so
that this leaves none half-written. A part that must end first runs in `held`: there the signal waits for `requested`
to be read. A second signal ends the process at once. Ctrl-Z (SIGTSTP) stops the process until SIGCONT comes, and the
clock with it.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = [
    "SIGNALS",
    "StopAtOnce",
    "end_process",
    "held",
    "requested",
    "running_seconds",
    "stop_if_requested",
    "watched",
]

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

SUSPEND = getattr(signal, "SIGTSTP", None)
"""What Ctrl-Z sends; None on Windows."""


class StopAtOnce(KeyboardInterrupt):
    """Stop without saving."""


class _State:
    """Of this process: there is one set of signal handlers."""

    def __init__(self) -> None:
        self.first: int | None = None
        """The signal that came."""
        self.holds = 0
        """Depth of `held`."""
        self.watching = False
        self.suspended = 0.0
        """Seconds between SIGTSTP and SIGCONT."""


_state = _State()


def requested() -> bool:
    """Return whether a signal has come since `watched` began."""
    return _state.first is not None


def running_seconds() -> float:
    """Return the seconds of a clock that stands still while the process is stopped by Ctrl-Z (SIGTSTP)."""
    return time.monotonic() - _state.suspended


def stop_if_requested() -> None:
    """Raise KeyboardInterrupt if a signal has come and is not held: a library may have swallowed the exception.

    Raises:
        KeyboardInterrupt: a signal has come.
    """
    on_main = threading.current_thread() is threading.main_thread()
    if _state.first is not None and not _state.holds and on_main:
        raise KeyboardInterrupt


@contextmanager
def held() -> Iterator[None]:
    """Let a signal wait until the end of this block, which may ask `requested`.

    Yields:
        Nothing.

    Raises:
        KeyboardInterrupt: at the end, if a signal came in the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = _state.first
    _state.holds += 1
    try:
        yield
    finally:
        _state.holds -= 1
    if before is None:
        stop_if_requested()


@contextmanager
def watched(end: Callable[[], None] | None = None) -> Iterator[None]:
    """Handle the signals inside this block; a block inside it changes nothing.

    Only Python's main thread can: in another one nothing is handled. A signal that is ignored stays so: a script
    starts its background jobs with SIGINT ignored, and nohup ignores SIGHUP.

    Args:
        end: Ends the process at a second signal, from another thread if need be: the main thread may be in a call that
            takes long. None raises StopAtOnce instead, when the main thread is back in Python.

    Yields:
        Nothing.
    """
    if _state.watching or threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: FrameType | None) -> None:
        if _state.first is None:
            _state.first = number
            if not _state.holds:
                raise KeyboardInterrupt
        elif end is None and _is_second(_state.first, number):
            raise StopAtOnce

    before = {number: signal.getsignal(number) for number in SIGNALS}
    _state.first, _state.watching = None, True
    stop_listening = _listen(end) if end is not None else None
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, handle)
    if SUSPEND is not None and signal.getsignal(SUSPEND) == signal.SIG_DFL:
        before[SUSPEND] = signal.signal(SUSPEND, _suspend)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if stop_listening is not None:
            stop_listening()
        _state.first, _state.watching = None, False


def _suspend(*_: object) -> None:
    """Stop this process, as SIGTSTP would have, and take the time until SIGCONT off the clock."""
    began = time.monotonic()
    os.kill(os.getpid(), signal.SIGSTOP)
    _state.suspended += time.monotonic() - began


def end_process() -> None:
    """End this process with exit code 130, whatever it does; for `watched`."""
    os.write(2, b"edge-ft: stopped at once; files that were saved before are whole\n")
    os._exit(130)


def _is_second(first: int, number: int) -> bool:
    """Return whether a later signal means that the process shall end at once.

    The end of a terminal may send SIGHUP twice, systemd sends it after SIGTERM, and a launcher of several processes
    sends SIGTERM after the Ctrl-C that all of them got.
    """
    if number == getattr(signal, "SIGHUP", None):
        return False
    return not (number == signal.SIGTERM and first == signal.SIGINT and "WORLD_SIZE" in os.environ)


def _listen(end: Callable[[], None]) -> Callable[[], None]:
    """Call `end` at a second signal from a thread of its own.

    Python's handlers wait for the main thread; the number of a signal is written to a pipe when it comes.

    Returns:
        A function that ends this.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        first: int | None = None
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number not in SIGNALS:
                    continue
                if first is not None and _is_second(first, number):
                    end()
                first = number if first is None else first

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()

    def stop() -> None:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)

    return stop
