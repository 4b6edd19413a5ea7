"""What the value of a column may be where a text is expected: a text or a number. Anything else is refused."""

import json
import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from edge_ft.errors import DataError

__all__ = ["as_text", "column_of", "find_value", "is_blank", "is_chat", "is_missing", "parse_json", "shown"]


def is_missing(value: Any) -> bool:
    """Return whether a value is null; tables store null as NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_blank(value: Any) -> bool:
    """Return whether a value says nothing: null, a blank text, an empty list or object."""
    return is_missing(value) or value in ([], {}) or (isinstance(value, str) and not value.strip())


def as_text(value: Any, where: str) -> str:
    """Return a text as it is, and a number as JSON writes it.

    Args:
        value: The value of a column or of a key.
        where: Its row and name, for error messages.

    Raises:
        DataError: null, a boolean, a list, an object, or a number that is not finite.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if isinstance(value, bool):
        fix = 'write the word that the model should read, such as "yes" or "true"'
    elif is_chat(value):
        fix = "leave --prompt and --completion out, so that it is read as a chat"
    elif isinstance(value, dict | list) and (inside := _first_text(value)):
        name = where.rpartition("column ")[2].strip("'")
        fix = f'name a text in it, as in --prompt or --completion "{{{name}.{inside}}}", or write it as text'
    else:
        fix = "write a text"
    raise DataError(f"{where} is {shown(value)}, which is not a text: {fix}")


def is_chat(value: Any) -> bool:
    """Return whether a value is a list of turns with roles."""
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(isinstance(turn, dict) and bool({"role", "from"} & turn.keys()) for turn in turns)


def shown(value: Any) -> str:
    """Return a value as JSON, with what it is, and at most 60 characters of it."""
    names = {bool: "the boolean", dict: "the object", list: "the list", int: "the number", float: "the number"}
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{names.get(type(value), '')} {text if len(text) <= 60 else text[:59] + '…'}".strip()


def column_of(name: str, names: Collection[str]) -> str:
    """Return the column that a name in a text template reads: its own, or the one before the first dot."""
    return name if name in names else name.partition(".")[0]


def find_value(fields: Mapping[str, Any], name: str) -> Any:
    """Return the value of a column, or what lies inside it: `answers.text.0` is fields["answers"]["text"][0].

    Returns:
        The value; None where there is none.
    """
    if name in fields:
        return fields[name]
    value: Any = fields
    for key in name.split("."):
        if isinstance(value, list) and key.isdecimal():
            value = value[int(key)] if int(key) < len(value) else None
        else:
            value = value.get(key) if isinstance(value, Mapping) else None
    return value


def parse_json(value: Any) -> Any:
    """Return the list or object that a text spells as JSON, as tables store them; any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _first_text(value: Any, depth: int = 4) -> str | None:
    """Return the path of the first text in a list or object, as a template names it; None where there is none."""
    if depth == 0:
        return None
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, str) and not (isinstance(key, str) and ("." in key or key.startswith("_"))):
            return str(key)
        if isinstance(inner, dict | list) and (path := _first_text(inner, depth - 1)):
            return f"{key}.{path}"
    return None
