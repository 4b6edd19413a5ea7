"""What all settings share: their checks, and how they come from Python and go to YAML or JSON."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from edge_ft.errors import UsageError

__all__ = ["accept_python_values", "as_plain", "check"]


def as_plain(config: Any) -> dict[str, Any]:
    """A config as plain YAML/JSON values (paths as text, tuples as lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return {key: plain(value) for key, value in asdict(config).items()}


def accept_python_values(config: Any) -> None:
    """From Python, paths may be text, texts may be paths, and tuples may be lists."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, Path | str):
            value = Path(value) if field.type in (Path, Path | None) else str(value)
        object.__setattr__(config, field.name, value)


def check(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)
