"""Settings from a YAML file, for any command."""

from pathlib import Path
from typing import Any

import cyclopts

from edge_ft.config import without_retired
from edge_ft.errors import UsageError
from edge_ft.utf8 import read_utf8

__all__ = ["settings_in"]


def settings_in(file: Path) -> cyclopts.config.Dict:
    """The settings that a file gives to any command.

    Args:
        file: YAML, one `option: value` a line.

    Returns:
        What cyclopts reads beside the flags.

    Raises:
        UsageError: there is no such file, it is not YAML, or a value is none that an option can have.
    """
    import yaml

    if not file.is_file():
        raise UsageError(f"--config {file}: there is no such file")
    try:
        settings = yaml.safe_load(read_utf8(file))
    # A ValueError: a date that does not exist.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"--config {file} cannot be read as YAML: {error}") from error
    if not isinstance(settings, dict | None):
        raise UsageError(f"--config {file} must hold one `option: value` a line")
    for name, value in (settings or {}).items():
        # Aliases in lists of lists multiply: nine short lines can stand for millions of values.
        if not isinstance(name, str) or not _is_setting(value):
            raise UsageError(
                f"--config {file}: {name} must be an option, with a text, a number, true, false, null or a list of them"
            )
    return cyclopts.config.Dict(
        without_retired(settings or {}, file), source=str(file.absolute()), use_commands_as_keys=False
    )


def _is_setting(value: Any) -> bool:
    return all(isinstance(each, str | int | float | None) for each in (value if isinstance(value, list) else [value]))
