"""The command that reproduces a run: every resolved setting is in it."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["reproducing_command"]

PLACES = ("model", "data", "validation", "test", "chat_template")
"""Settings that may name a file or folder of this machine."""


def reproducing_command(settings: Mapping[str, Any], processes: int = 1) -> str:
    """Return the shell command that gives the same run again, in a folder beside it.

    Args:
        settings: The content of the run's config.yaml, with all that was resolved. Its `max_steps` is the planned
            number of steps, so that `max_minutes`, from which it was computed, is left out.
        processes: How many train together.

    Returns:
        The command; files and folders have absolute paths.
    """
    left_out = ("resume", "show", "include_samples")  # they change nothing of what is learned
    known = {name: value for name, value in settings.items() if value is not None and name not in left_out}
    if known.get("max_steps") is not None:
        known.pop("max_minutes", None)
    known["out"] = f"{Path(settings['out']).absolute()}-again"
    for name in PLACES:
        if name in known and (Path(known[name]).is_dir() or Path(known[name]).is_file()):
            known[name] = str(Path(known[name]).absolute())
    start = "edge-ft" if processes == 1 else f"torchrun --nproc-per-node {processes} -m edge_ft"
    return " ".join([start, "tune", *(shlex.quote(word) for name in known for word in _flags(name, known[name]))])


def _flags(name: str, value: Any) -> Iterator[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        yield flag if value else f"--no-{flag.removeprefix('--')}"
    elif not isinstance(value, list | tuple):
        yield f"{flag}={value}"
    elif value and isinstance(value[0], str):
        yield from (f"{flag}={item}" for item in value)
    elif value:  # numbers: a fixed count of words
        yield from (flag, *map(str, value))
