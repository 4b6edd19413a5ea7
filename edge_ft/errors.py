"""Every error a user can meet, and the exit code each one ends a command with.

EdgeFTError                70  a defect of ours, unless a subclass says otherwise
├── UsageError              2  wrong flags, files or models
│   ├── DataError           2  rows that cannot be read or mapped
│   ├── ModelError          2  a model that cannot be loaded or is not supported
│   ├── BundleError         2  not a bundle, tampered with, or of another version
│   └── MissingExtra        2  a dependency that the base install leaves out
├── BudgetFailed            1  a bench budget or comparison did not hold
├── GateRefused             3  export or verify found too much lost
├── WillNotFit              4  not enough memory or disk
├── AuditRefused            5  the data would train nothing, or leak
└── Interrupted           130  stopped by the user; what was kept is said

A message is one sentence: what, where, and what to do about it.
"""

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
    "require",
]


class EdgeFTError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 70


class UsageError(EdgeFTError):
    """The command was given something it cannot use."""

    exit_code = 2


class DataError(UsageError):
    """Rows that cannot be read, mapped or labelled."""


class ModelError(UsageError):
    """A model that is missing, unreadable or of an unsupported architecture."""


class BundleError(UsageError):
    """A folder that is not a bundle, or one that was changed after it was written."""


class MissingExtra(UsageError):
    """A feature whose dependency is in an extra; the message names the pip command."""


class BudgetFailed(EdgeFTError):
    """A measured value is outside the budget it was given."""

    exit_code = 1


class GateRefused(EdgeFTError):
    """What would ship is not what was trained, or nothing was trained."""

    exit_code = 3


class WillNotFit(EdgeFTError):
    """Not enough memory or disk for what was asked."""

    exit_code = 4


class AuditRefused(EdgeFTError):
    """The data would train on nothing, or its splits overlap."""

    exit_code = 5


class Interrupted(EdgeFTError):
    """Stopped by the user."""

    exit_code = 130


def did_you_mean(word: str, known: list[str]) -> str:
    """` (did you mean 'x'?)` for the nearest of `known`, or an empty string."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which `edge-ft[extra]` brings.

    Raises:
        MissingExtra: it is not installed; the message is the pip command.
    """
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(f"this needs the package {module!r} ({error}): pip install 'edge-ft[{extra}]'") from error
