"""The label column of a text: one class, several classes or a number."""

import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from edge_ft.config import ProblemType
from edge_ft.data.readers import Row
from edge_ft.errors import DataError, did_you_mean

__all__ = [
    "class_index",
    "class_numbers",
    "class_targets",
    "count_places",
    "guess_problem",
    "is_unnamed",
    "known_class",
    "list_of",
    "read_classes",
    "whole_number",
]

MULTI_LABEL: ProblemType = "multi_label_classification"
LARGEST = 3e38
"""Largest number that float32 can hold, about."""
FLAGS = {"false": 0, "true": 1}
_ITEM = re.compile(r"""\s*(?:"(?:[^"\\]|\\.)*"|'((?:[^'\\]|\\.)*)'|[^\s,'"\[\]]+)\s*(?:,|$)""", re.DOTALL)
"""An item of a list in Python's notation, with the comma behind it."""
_LIKE_A_LIST = re.compile(r"""\[.*,.*\]|[\[({]\s*['"].*[\])}]|\[[-+.\de\s]*\d[-+.\de\s]*\]""", re.DOTALL)
"""Lists in other notations: names without quotes, tuples, sets, and arrays as numpy prints them."""
_PYTHON_WORDS = {"True": True, "False": False, "None": None}


def guess_problem(rows: Sequence[Row], column: str) -> ProblemType:
    """Return what a label column holds: lists of classes, numbers that are not all whole, or single classes.

    Raises:
        DataError: some labels are lists and others are not, or some are booleans and others are not.
    """
    found = [(row.number, row.fields.get(column)) for row in rows]
    known = [(number, value) for number, value in found if not _is_missing(value)]
    _refuse_two_kinds(column, known, lambda value: list_of(value) is not None, "a list", "no list")
    if known and list_of(known[0][1]) is not None:
        return MULTI_LABEL
    _refuse_two_kinds(column, known, lambda value: isinstance(value, bool), "a boolean", "none")
    numbers = [_number(value) for _, value in known]
    finite = [number for number in numbers if number is not None and not math.isnan(number)]
    if len(finite) == len(numbers) and any(not number.is_integer() for number in finite):
        return "regression"
    return "single_label_classification"


def count_places(rows: Sequence[Row], column: str, *, certain: bool = False) -> int:
    """Return the length of labels that are written as a 0 or 1 for every class; 0 for labels that name classes.

    Args:
        rows: The rows.
        column: The label column.
        certain: Whether to return 0 also for labels that could be lists of the classes 0 and 1.

    Returns:
        The length, if all labels are lists of one length, at least 2, and hold only 0, 1, false and true.
    """
    labels = [list_of(row.fields.get(column)) for row in rows if not _is_missing(row.fields.get(column))]
    lists = [label for label in labels if label is not None]
    length = len(lists[0]) if lists else 0
    if length < 2 or len(lists) < len(labels):
        return 0
    if not all(len(label) == length and all(_flag(item) is not None for item in label) for label in lists):
        return 0
    if certain and not any(len(set(label)) < length or isinstance(label[0], bool | float) for label in lists):
        return 0
    return length


def list_of(value: Any) -> list[Any] | None:
    """Return a list, or the list that a text writes in JSON or Python, as tables store it; None for anything else."""
    if isinstance(value, list):
        return value
    text = value.strip() if isinstance(value, str) else ""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
        return found if isinstance(found, list) else None
    return _python_list(text[1:-1])


def read_classes(value: Any, problem: ProblemType | None, where: str, places: int = 0) -> tuple[str, ...]:
    """Return the classes that a label names, or its number as text.

    Args:
        value: The value of the label column; not null.
        problem: What the label column holds; None is one class.
        where: Row and column, for error messages.
        places: Length of a label that is written as a 0 or 1 for every class; 0: labels name classes.

    Returns:
        The names; of a label with `places` the indices of its ones.

    Raises:
        DataError: the value is of another kind.
    """
    if problem == "regression":
        number = _number(value)
        if number is None or not abs(number) <= LARGEST:
            raise DataError(f"{where} is {value!r}: for regression it must be a finite number, at most {LARGEST:.0e}")
        return (str(number),)
    if places:
        return _read_places(value, problem, where, places)
    if problem == MULTI_LABEL:
        return _read_list(value, where)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a table column of whole numbers with a missing value is read as floats
    if isinstance(value, float | list | dict) or not str(value).strip():
        raise DataError(f"{where} is {value!r}: a class must be text or a whole number")
    name = str(value).strip()
    if list_of(name) is not None or _LIKE_A_LIST.fullmatch(name):
        raise DataError(
            f"{where} is {name!r}, which looks like a list and is not one: write several classes as a list in JSON, "
            'such as ["a", "b"], in every row'
        )
    return (name,)


def class_targets(
    classes: tuple[str, ...], problem: ProblemType | None, labels: tuple[str, ...], where: str, places: int = 0
) -> list[int] | list[float]:
    """Return `Example.labels` for the classes that `read_classes` returned.

    Args:
        classes: Classes of the row, or its number.
        problem: What the label column holds; None is one class.
        labels: All classes, in the order of the logits.
        where: The row, for error messages.
        places: As for `read_classes`.

    Raises:
        DataError: a class is not among `labels`.
    """
    if problem == "regression":
        return [float(classes[0])]
    indices = [int(name) if places else known_class(name, labels, where) for name in classes]
    if problem == MULTI_LABEL:
        return [float(index in indices) for index in range(len(labels))]
    return indices


def known_class(name: str, labels: tuple[str, ...], where: str, what: str = "classes") -> int:
    """Return `class_index`.

    Args:
        name: What a row says.
        labels: All classes, in the order of the logits.
        where: The row, for error messages.
        what: What several of them are called.

    Raises:
        DataError: it is not among `labels`.
    """
    index = class_index(name, labels)
    if index is None:
        advice = " (give their names with --class-names)" if is_unnamed(labels) else ""
        raise DataError(
            f"{where}: {name!r} is none of the {what}{did_you_mean(name, list(labels))}: "
            f"they are {', '.join(labels)}{advice}"
        )
    return index


def class_index(name: str, labels: tuple[str, ...]) -> int | None:
    """Return the place among `labels` of the class that a row names; None if it names none.

    By its name; else by its name without regard to case, if that fits one class. Where no class has a number for a
    name, a row may give the number of its class instead: 0 is the first one. `1.0`, which a table makes of 1, is 1. Of
    two classes `false` is the first and `true` the second.
    """
    if name in labels:
        return labels.index(name)
    alike = _by_lower_case(labels).get(name.casefold(), ())
    if len(alike) == 1:
        return alike[0]
    number = whole_number(name)
    if number is None and len(labels) == 2 and not _any_flag(labels):
        number = FLAGS.get(name.lower())
    if number is None:
        return None
    if str(number) in labels:
        return labels.index(str(number))
    return number if not _any_number(labels) and 0 <= number < len(labels) else None


def class_numbers(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the indices of the classes as text: "0", "1", ...; rows may use them instead of names."""
    return tuple(map(str, range(len(labels))))


def is_unnamed(labels: Sequence[str]) -> bool:
    """Return whether the names are those that transformers gives classes without a name."""
    return all(name == f"LABEL_{index}" for index, name in enumerate(labels))


def whole_number(name: str) -> int | None:
    """Return the number that a text spells as `1` or `1.0`; None for any other text."""
    found = re.fullmatch(r"([+-]?[0-9]{1,15})(?:\.0*)?", name)
    return int(found[1]) if found else None


@cache
def _by_lower_case(labels: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for index, label in enumerate(labels):
        found[label.casefold()] = (*found.get(label.casefold(), ()), index)
    return found


@cache
def _any_number(labels: tuple[str, ...]) -> bool:
    return any(whole_number(label) is not None for label in labels)


@cache
def _any_flag(labels: tuple[str, ...]) -> bool:
    return any(label.lower() in FLAGS for label in labels)


def _read_places(value: Any, problem: ProblemType | None, where: str, places: int) -> tuple[str, ...]:
    """Return the indices of the ones of a label with a 0 or 1 for every class.

    Raises:
        DataError: it is no such list, or does not hold exactly one 1 where a row has one class.
    """
    label = list_of(value)
    flags = None if label is None else [_flag(item) for item in label]
    if flags is None or len(flags) != places or None in flags:
        raise DataError(f"{where} is {value!r}: as in the other rows it must be a list of {places} values, each 0 or 1")
    if problem != MULTI_LABEL and sum(map(bool, flags)) != 1:
        raise DataError(
            f"{where} is {value!r}: with one class per row it must hold exactly one 1 "
            f"(for several classes per row: --problem-type {MULTI_LABEL})"
        )
    return tuple(str(place) for place, flag in enumerate(flags) if flag)


def _read_list(value: Any, where: str) -> tuple[str, ...]:
    """Return the different classes of a list of names.

    Raises:
        DataError: it is no list of names.
    """
    label = list_of(value)
    if label is None or not all(isinstance(name, str | int) and not isinstance(name, bool) for name in label):
        raise DataError(
            f"{where} is {value!r}: with several classes per row it must be a list of texts or whole numbers, the "
            "names of its classes; or in every row a list of equal length with a 0 or 1 for each class"
        )
    names = [str(name).strip() for name in label]
    if "" in names:
        raise DataError(f"{where} is {value!r}: the name of a class is blank")
    if len(set(names)) < len(names) and any(isinstance(name, int) for name in label):
        raise DataError(
            f"{where} is {value!r}, which names a class twice: if it has a 0 or 1 for each class, every row must have "
            "one for each class, in a list of equal length"
        )
    return tuple(dict.fromkeys(names))


def _python_list(inner: str) -> list[Any] | None:
    """Return the items of a list in Python's notation, without its brackets; None if it is none."""
    items: list[Any] = []
    at = 0
    while at < len(inner) and inner[at:].strip():
        found = _ITEM.match(inner, at)
        if found is None:
            return None
        text, at = found[0].strip().rstrip(",").strip(), found.end()
        try:
            if text in _PYTHON_WORDS:
                items.append(_PYTHON_WORDS[text])
            elif found[1] is not None:
                items.append(found[1].replace("\\'", "'").replace('\\"', '"').replace("\\\\", "\\"))
            else:
                items.append(json.loads(text))
        except ValueError:
            return None
    return items


def _refuse_two_kinds(
    column: str, known: list[tuple[int, Any]], is_kind: Callable[[Any], bool], kind: str, other: str
) -> None:
    """Refuse a column of which some values are of a kind and others are not.

    Raises:
        DataError: it is so; the message names a row of each.
    """
    first = next((found for found in known if is_kind(found[1])), None)
    second = next((found for found in known if not is_kind(found[1])), None)
    if first is not None and second is not None:
        raise DataError(
            f"row {first[0]}: {column!r} is {first[1]!r}, which is {kind}, and in row {second[0]} it is {second[1]!r}, "
            f"which is {other}: write all labels in one way"
        )


def _flag(value: Any) -> int | None:
    """Return 0 or 1 for a value that is one of them, or false or true; None for any other."""
    return int(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def _is_missing(value: Any) -> bool:
    """Return whether a row has no label; `has_answer` leaves it out."""
    blank = isinstance(value, str) and not value.strip()
    return value is None or blank or (isinstance(value, float) and math.isnan(value))


def _number(value: Any) -> float | None:
    """Return the number that a value is or spells; None for anything else, and for booleans."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and "_" in value:
        return None  # Python reads 1_000 as a number
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
