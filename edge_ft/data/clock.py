"""The time that a chat template prints: that of the moment, or of the moment when a model's rows were rendered."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime

__all__ = ["clock_at", "now", "reads_clock", "strftime_now"]

_stopped: ContextVar[datetime | None] = ContextVar("stopped", default=None)


def now() -> datetime:
    """Return the local time, to the second; inside `clock_at` the time that it was given."""
    return _stopped.get() or datetime.now().replace(microsecond=0)


def strftime_now(form: str) -> str:
    """Return `now` in a format of strftime: what chat templates call to print the date."""
    return now().strftime(form)


def reads_clock(template: str | None) -> bool:
    """Return whether a chat template may print the time."""
    return template is not None and "strftime_now" in template


@contextmanager
def clock_at(time: str | None) -> Iterator[None]:
    """Stop the clock of chat templates at `time` (ISO 8601) for the block; None lets it run.

    Yields:
        Nothing.
    """
    token = _stopped.set(None if time is None else datetime.fromisoformat(time))
    try:
        yield
    finally:
        _stopped.reset(token)
