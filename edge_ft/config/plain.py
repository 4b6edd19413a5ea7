"""Plain JSON values against declared types: what a file of an earlier command holds is checked before it is used."""

import math
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from edge_ft.config.shared import Minimum

__all__ = ["from_plain", "misfit"]

T = TypeVar("T")
_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def misfit(value: Any, hint: Any, place: str) -> str | None:
    """Return where a JSON value differs from a type, as a sentence; None where it fits.

    Objects are TypedDicts, whose further keys are accepted, or dataclasses, whose further keys are not. Numbers must be
    finite and fit into 64 bits; a `Minimum` in `Annotated` is kept.

    Args:
        value: What was read.
        hint: Its type; tuples stand for lists.
        place: Name of the value, for the message.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return None
    if origin is NotRequired:
        return misfit(value, arguments[0], place)
    if origin is Annotated:
        found = misfit(value, arguments[0], place)
        low = next((bound.value for bound in hint.__metadata__ if isinstance(bound, Minimum)), None)
        return found or (f"{place} is {value}, below {low}" if None not in (value, low) and value < low else None)
    if origin in (Union, types.UnionType):
        misfits = [misfit(value, kind, place) for kind in arguments]
        return None if None in misfits else misfits[0]
    if origin is Literal:
        return (
            None if value in arguments else f"{place} is {_shown(value)}, not one of {', '.join(map(str, arguments))}"
        )
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return f"{place} is {_shown(value)}, not a list"
        return _first(misfit(item, arguments[0], f"{place}[{at}]") for at, item in enumerate(value))
    if origin is dict or is_typeddict(hint) or is_dataclass(hint):
        if not isinstance(value, dict):
            return f"{place} is {_shown(value)}, not an object"
        return _misfit_of_keys(value, hint, place)
    return None if _is_a(value, hint) else f"{place} is {_shown(value)}, not {_NAMES[hint]}"


def from_plain(kind: type[T], values: Any, place: str) -> T:
    """A dataclass from the plain values of its fields, nested ones included.

    Args:
        kind: The dataclass.
        values: What was read.
        place: Name of the value, for the message.

    Returns:
        The instance.

    Raises:
        ValueError: the values are not of the declared types; the message says where.
    """
    if found := misfit(values, kind, place):
        raise ValueError(found)
    hints = get_type_hints(kind)
    return kind(**{name: _built(hints[name], value, f"{place}.{name}") for name, value in values.items()})


def _built(hint: Any, value: Any, place: str) -> Any:
    if is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value, place)
    return tuple(value) if isinstance(value, list) else value


def _misfit_of_keys(value: dict[str, Any], hint: Any, place: str) -> str | None:
    if get_origin(hint) is dict:
        of_key, of_value = get_args(hint)
        return _first(
            misfit(key, of_key, f"the key {key!r} of {place}") or misfit(item, of_value, f"{place}.{key}")
            for key, item in value.items()
        )
    hints = get_type_hints(hint, include_extras=True)
    if is_dataclass(hint):
        needed = {each.name for each in fields(hint) if each.default is MISSING and each.default_factory is MISSING}
        if unknown := sorted(value.keys() - hints.keys()):
            return f"{place} has {_shown(unknown[0])}, which this edge-ft does not know"
    else:
        needed = set(hint.__required_keys__)
    if missing := sorted(needed - value.keys()):
        return f"{place} lacks {missing[0]!r}"
    return _first(misfit(value[name], kind, f"{place}.{name}") for name, kind in hints.items() if name in value)


def _is_a(value: Any, hint: Any) -> bool:
    if isinstance(value, bool):
        return hint is bool
    if hint is float and isinstance(value, int | float):
        return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63
    return isinstance(value, hint) and (hint is not int or abs(value) < 2**63)


def _first(found: Any) -> str | None:
    return next((each for each in found if each is not None), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
