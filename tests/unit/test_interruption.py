"""Signals in any phase, and the errors of a full disk and of no memory."""

import contextlib
import errno
import signal
from collections.abc import Iterator

import pytest

from edge_ft import stopping
from edge_ft.errors import ModelError
from edge_ft.files import disk_full, out_of_memory
from edge_ft.progress import Silent, heartbeat, track
from edge_ft.stopping import StopAtOnce, held, requested, stop_if_requested, watched


@pytest.fixture(autouse=True)
def own_handler() -> Iterator[None]:
    """A job in the background, or under nohup, is started with signals ignored, which `watched` respects."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    for number in stopping.SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", stopping.SIGNALS, ids=lambda number: number.name)
def test_each_signal_stops_at_once_what_need_not_end_first(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), watched():
        signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_a_held_part_ends_first() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), watched():
        with held():
            signal.raise_signal(signal.SIGTERM)
            assert requested()
            done.append("held")
        done.append("after")
    assert done == ["held"]
    assert not requested()


def test_a_second_signal_ends_a_held_part() -> None:
    with pytest.raises(StopAtOnce), watched(), held():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("first", "later", "launched"),
    [("SIGINT", "SIGTERM", True), ("SIGTERM", "SIGHUP", False), ("SIGHUP", "SIGHUP", False)],
)
def test_signals_that_systems_send_in_pairs_are_one(
    first: str, later: str, launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if launched:
        monkeypatch.setenv("WORLD_SIZE", "2")
    reached = []
    with pytest.raises(KeyboardInterrupt) as stopped, watched(), held():
        signal.raise_signal(getattr(signal, first))
        signal.raise_signal(getattr(signal, later))
        reached.append(True)
    assert reached and stopped.type is KeyboardInterrupt


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with watched():
            signal.raise_signal(signal.SIGHUP)
            assert not requested()
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_an_interrupt_that_a_library_swallowed_is_raised_again() -> None:
    with watched():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            next(iter(track(Silent(), "rows", [1], 1)))
        with pytest.raises(KeyboardInterrupt), heartbeat(Silent(), "loading"):
            pass
        with held():
            stop_if_requested()  # what is held asks when it can stop


def test_which_errors_are_a_full_disk() -> None:
    assert disk_full(OSError(errno.ENOSPC, "")) and disk_full(OSError(errno.EFBIG, ""))
    assert disk_full(Exception("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not disk_full(OSError(errno.EACCES, "")) and not disk_full(ValueError("28"))


def test_which_errors_are_no_memory() -> None:
    assert out_of_memory(MemoryError()) and out_of_memory(OSError(errno.ENOMEM, ""))
    torch = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    assert out_of_memory(RuntimeError(torch))
    try:
        try:
            raise RuntimeError(torch)
        except RuntimeError as error:
            raise ModelError("cannot be loaded") from error
    except ModelError as error:
        assert out_of_memory(error)
    assert not out_of_memory(ModelError("a folder named out of memory")) and not out_of_memory(ValueError("12"))
