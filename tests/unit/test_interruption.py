"""Signals and the errors of a full disk."""

import errno
import signal

import pytest

from edge_ft.artifacts import disk_full
from edge_ft.tune.loop import StopAtOnce
from edge_ft.tune.train import Interruption


def test_the_second_ctrl_c_stops_at_once() -> None:
    interruption, before = Interruption(), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with interruption.watched():
            interruption.poll()
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)  # launchers send it after the first one
            with pytest.raises(KeyboardInterrupt):
                interruption.poll()
            with pytest.raises(StopAtOnce):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_which_errors_are_a_full_disk() -> None:
    assert disk_full(OSError(errno.ENOSPC, "")) and disk_full(OSError(errno.EFBIG, ""))
    assert disk_full(Exception("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not disk_full(OSError(errno.EACCES, "")) and not disk_full(ValueError("28"))
