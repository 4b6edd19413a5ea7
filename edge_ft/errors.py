"""All errors that a user can meet, and the exit codes with which they end a command.

EdgeFTError                70  internal error, unless it is one of these:
├── UsageError              2  wrong flags, files or models
│   ├── DataError           2  rows that cannot be read, or that do not fit the task
│   ├── ModelError          2  a model that cannot be loaded or is not supported
│   ├── BundleError         2  not a bundle, a changed bundle, or one of another version
│   └── MissingExtra        2  a package is missing that an extra installs
├── BudgetFailed            1  a budget or comparison of bench failed
├── GateRefused             3  export or verify refused the bundle: too much quality was lost
├── WillNotFit              4  not enough memory or disk
├── AuditRefused            5  the rows would train nothing, or overlap between the splits
└── Interrupted           130  stopped by the user; the message lists the saved files

A message is one sentence: what is wrong, where, and what to do about it. `one_line` prepares it for the terminal.
"""

import re
from types import ModuleType

__all__ = [
    "AuditRefused",
    "BudgetFailed",
    "BundleError",
    "DataError",
    "EdgeFTError",
    "GateRefused",
    "Interrupted",
    "MissingExtra",
    "ModelError",
    "UsageError",
    "WillNotFit",
    "did_you_mean",
    "one_line",
    "require",
]


class EdgeFTError(Exception):
    """Base class of the errors below; `exit_code` is the exit code of the command."""

    exit_code = 70


class UsageError(EdgeFTError):
    """A flag, file or model that the command cannot use."""

    exit_code = 2


class DataError(UsageError):
    """Rows that cannot be read, or that do not fit the task."""


class ModelError(UsageError):
    """A model that is missing, unreadable or of an unsupported architecture."""


class BundleError(UsageError):
    """A folder that is not a bundle, was changed after the export, or has another version."""


class MissingExtra(UsageError):
    """A package that an extra installs is missing; the message is the pip command."""


class BudgetFailed(EdgeFTError):
    """A measured value does not keep its budget."""

    exit_code = 1


class GateRefused(EdgeFTError):
    """The bundle lost too much of what was trained, or the training improved nothing."""

    exit_code = 3


class WillNotFit(EdgeFTError):
    """Not enough memory or disk."""

    exit_code = 4


class AuditRefused(EdgeFTError):
    """The rows would train nothing, or the splits overlap."""

    exit_code = 5


class Interrupted(EdgeFTError):
    """Stopped by the user."""

    exit_code = 130


def did_you_mean(word: str, known: list[str]) -> str:
    """` (did you mean 'x'?)` with the most similar of `known`, or an empty string."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, those that turn the direction of a text, and halves of surrogate pairs."""
_LONGEST = 1500


def one_line(message: str) -> str:
    """Return a message as one line that a terminal can show.

    What a message quotes may be anything: line breaks become blanks, control characters are written by their number,
    and of a very long text the middle is left out.
    """
    line = _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], " ".join(message.split()))
    return line if len(line) <= _LONGEST else f"{line[:1000]} … {line[-400:]}"


def require(module: str, extra: str) -> ModuleType:
    """Import a module that `edge-ft[extra]` installs.

    Returns:
        The module.

    Raises:
        MissingExtra: it is not installed.
    """
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(f"this needs the package {module!r} ({error}): pip install 'edge-ft[{extra}]'") from error
