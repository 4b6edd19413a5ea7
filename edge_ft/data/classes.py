"""The label column of a text: one class, several classes or a number."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from edge_ft.config import ProblemType
from edge_ft.data.readers import Row
from edge_ft.errors import DataError, did_you_mean

__all__ = ["class_numbers", "class_targets", "guess_problem", "read_classes"]


def guess_problem(rows: Sequence[Row], column: str) -> ProblemType:
    """Return what a label column holds: lists of classes, numbers that are not all whole, or single classes."""
    values = [row.fields.get(column) for row in rows]
    if any(isinstance(value, list) for value in values):
        return "multi_label_classification"
    numbers = [_number(value) for value in values if value not in (None, "")]
    known = [number for number in numbers if number is not None and not math.isnan(number)]
    if len(known) == len(numbers) and any(not number.is_integer() for number in known):
        return "regression"
    return "single_label_classification"


def read_classes(value: Any, problem: ProblemType | None, where: str) -> tuple[str, ...]:
    """Return the classes that a label names, or its number as text.

    Args:
        value: The value of the label column; not null.
        problem: What the label column holds; None is one class.
        where: Row and column, for error messages.

    Raises:
        DataError: the value is of another kind.
    """
    if problem == "multi_label_classification":
        if isinstance(value, str):  # tables store lists as text
            with suppress(ValueError):
                value = json.loads(value)
        if not isinstance(value, list) or not all(isinstance(name, str | int) for name in value):
            raise DataError(
                f"{where} is {value!r}: with several classes per row it must be a list of texts or whole numbers"
            )
        return tuple(dict.fromkeys(str(name).strip() for name in value))
    if problem == "regression":
        number = _number(value)
        if number is None or not math.isfinite(number):
            raise DataError(f"{where} is {value!r}: for regression it must be a finite number")
        return (str(number),)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a table column of whole numbers with a missing value is read as floats
    if isinstance(value, float | list | dict) or not str(value).strip():
        raise DataError(f"{where} is {value!r}: a class must be text or a whole number")
    return (str(value).strip(),)


def class_targets(
    classes: tuple[str, ...], problem: ProblemType | None, labels: tuple[str, ...], where: str
) -> list[int] | list[float]:
    """Return `Example.labels` for the classes that `read_classes` returned.

    Args:
        classes: Classes of the row, or its number.
        problem: What the label column holds; None is one class.
        labels: All classes, in the order of the logits.
        where: The row, for error messages.

    Raises:
        DataError: a class is not among `labels`.
    """
    if problem == "regression":
        return [float(classes[0])]
    for name in classes:
        if name not in labels:
            raise DataError(
                f"{where}: {name!r} is none of the classes{did_you_mean(name, list(labels))}: "
                f"they are {', '.join(labels)}"
            )
    if problem == "multi_label_classification":
        return [float(label in classes) for label in labels]
    return [labels.index(classes[0])]


def class_numbers(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the indices of the classes as text: "0", "1", ...; rows may use them instead of names."""
    return tuple(map(str, range(len(labels))))


def _number(value: Any) -> float | None:
    """Return the number that a value is or spells; None for anything else, and for booleans."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
