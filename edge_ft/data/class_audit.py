"""Classes that are missing, and names of classes that look like slips of the person or program that wrote them."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from edge_ft.data.batches import IGNORED, Example
from edge_ft.data.records import Record
from edge_ft.data.rendering import Rendering

__all__ = ["absent_class", "count_classes", "find_odd_classes"]

SHOWN = 5
"""Most classes that a message names."""

MISSING = {"nan", "null", "na", "n/a", "<na>", "#n/a", "none", "undefined", "nil", "-", "?"}
"""Texts that programs write where there is no value, in lower case."""


def absent_class(absent: Sequence[str], file: str, split: str, what: str) -> dict[str, Any]:
    """Return a finding `absent-class`, as JSON values.

    Args:
        absent: Names of the classes or answers.
        file: Where the rows come from.
        split: What the rows are called.
        what: class or answer.
    """
    effect = "nothing is learned about it" if split == "train" else "their scores say nothing about it"
    names = ", ".join(absent[:SHOWN]) + (f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else "")
    return {
        "code": "absent-class",
        "severity": "warning",
        "file": file,
        "rows": [],
        "count": len(absent),
        "split": split,
        "classes": list(absent),
        "message": f"none of the {split} rows has the {what} {names}: {effect}",
        "example": "",
    }


def count_classes(examples: Sequence[Example], rendering: Rendering) -> Counter[str]:
    """Return how often each class or tag occurs."""
    labels, several = rendering.labels, rendering.problem_type == "multi_label_classification"
    indices = (
        (place for place, holds in enumerate(example.labels) if holds)
        if several
        else (int(index) for index in example.labels if index != IGNORED)
        for example in examples
    )
    return Counter(labels[index] for found in indices for index in found)


def find_odd_classes(records: Sequence[Record]) -> Iterator[tuple[str, list[int], str]]:
    """Yield the code, the rows and the message of each finding about the names of classes.

    Args:
        records: Rows with one class, several classes or tags each.

    Yields:
        `similar-classes`: names that differ only in case, blanks, or as 1 and 1.0 do. `missing-class`: a name that
        stands for a missing value. `joined-classes`: a name that joins those of other classes.
    """
    counts = Counter(name for record in records for name in set(record.classes))
    groups: dict[str, list[str]] = {}
    for name, _ in counts.most_common():
        groups.setdefault(_key(name), []).append(name)
    rarer = {name: group[0] for group in groups.values() for name in group[1:]}
    if rarer:
        pairs = ", ".join(f"{other!r} beside {usual!r}" for other, usual in list(rarer.items())[:3])
        message = (
            f"have a class whose name differs from another's only in case, blanks or the form of a number: {pairs}"
        )
        yield "similar-classes", _rows_with(records, rarer), message
    if any(record.words for record in records):
        return  # tags
    missing = [name for name in counts if name.lower() in MISSING]
    if missing:
        message = (
            f"have the class {', '.join(map(repr, missing))}, which many programs write where there is none: "
            "leave the value empty if it is missing"
        )
        yield "missing-class", _rows_with(records, missing), message
    joined = [name for name in counts if _joins(name, counts)]
    if joined:
        message = f"have the class {joined[0]!r}, which joins others: write several classes as a list, in every row"
        yield "joined-classes", _rows_with(records, joined), message


def _key(name: str) -> str:
    """Return what similar names have in common."""
    return re.sub(r"^([+-]?\d+)\.0*$", r"\1", " ".join(name.casefold().split()))


def _joins(name: str, names: Counter[str]) -> bool:
    """Return whether a name consists of several of the `names`, with a sign between them."""
    for sign in ",;|/+&":
        parts = [part.strip() for part in name.split(sign)]
        if len(parts) > 1 and all(part in names for part in parts):
            return True
    return False


def _rows_with(records: Sequence[Record], names: Iterable[str]) -> list[int]:
    wanted = set(names)
    return [record.row for record in records if wanted.intersection(record.classes)]
