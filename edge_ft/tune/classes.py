"""The classes of a training: their names, and those that a split lacks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from edge_ft.config import Task
from edge_ft.data import (
    Columns,
    Example,
    Rendering,
    Row,
    absent_class,
    answer_of,
    class_index,
    class_numbers,
    count_classes,
    find_labels,
    is_unnamed,
)
from edge_ft.errors import AuditRefused, UsageError
from edge_ft.families import CLASSIFIERS
from edge_ft.progress import Progress

__all__ = ["choose_classes", "find_absent_classes", "find_too_many_classes"]

SHOWN = 5
"""Most classes that a message names."""
MANY = 10
"""As many classes are never too many, however few the rows."""


def choose_classes(
    rows: Mapping[str, Sequence[Row]],
    columns: Columns,
    task: Task,
    model_labels: tuple[str, ...],
    progress: Progress,
    named: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """Return the names of the classes in the order of the logits; none for a task without classes.

    A head that knows all classes of the rows, by name or by number, keeps its names, their order and its weights.

    Args:
        rows: Rows of each split.
        columns: Where their class is.
        task: Task of the model.
        model_labels: Classes of the model's own head; none if it has none.
        progress: Gets what becomes of the model's own head.
        named: --class-names; of a head with as many outputs they are its names.

    Raises:
        AuditRefused: there is only one class.
        UsageError: `named` are not the names of the rows' classes, or the task has none.
    """
    if named and (task not in CLASSIFIERS or columns.problem_type == "regression"):
        raise UsageError("--class-names is for classes and tags: leave it out")
    if columns.problem_type == "regression":
        return model_labels if len(model_labels) == 1 else find_labels((), columns)
    if task not in CLASSIFIERS:
        return ()
    found = find_labels([row for split in rows.values() for row in split], columns)
    known = all(class_index(name, model_labels) is not None for name in found)
    if columns.places:
        known = columns.places == len(model_labels)
    known = known and len(model_labels) > 1  # a head with one output gives a number
    labels = model_labels if known else found
    if named:
        labels, known = named, len(named) == len(model_labels)
        model_labels = named if known else model_labels
        unknown = [name for name in found if not columns.places and class_index(name, named) is None]
        if unknown or columns.places not in (0, len(named)):
            what = f"{columns.places} classes" if columns.places else f"the class {unknown[0]!r}"
            raise UsageError(f"the column {columns.label} has {what} and --class-names gives {_join(named)}")
    if labels is model_labels and not set(found) & set(labels) and is_unnamed(labels):
        labels = class_numbers(labels)  # LABEL_0 is no name
    if len(labels) < 2:
        only = f"only the class {labels[0]!r}" if labels else "no class"
        raise AuditRefused(
            f"the column {columns.label} holds {only} in all rows, and a classifier needs at least two "
            "(--allow one-class cannot change that): add rows of another class"
        )
    if model_labels:
        what = "the model's own head is trained further, for" if known else "a new head replaces the model's for"
        progress.say(f"{what} {_join(model_labels)}")
    if not set(found) <= set(labels):
        pairs = zip(class_numbers(labels), labels, strict=True)
        progress.say(f"the rows name classes by number: {_join([f'{number} is {name}' for number, name in pairs])}")
    return labels


def find_absent_classes(
    rows: Mapping[str, Sequence[Row]],
    examples: Mapping[str, Sequence[Example]],
    rendering: Rendering,
    files: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Return a finding `absent-class`, as JSON values, for each split in which a class never occurs.

    Args:
        rows: Rows of each split.
        examples: The same in token ids.
        rendering: With the classes, or the few answers, of the rows.
        files: Where each split comes from.

    Returns:
        The findings. A class that the train rows lack cannot be learned; for other splits only a class counts that
        some split has.
    """
    if rendering.problem_type == "regression":
        return []
    counts = {split: _count(rows[split], examples[split], rendering) for split in rows if rows[split]}
    names = rendering.labels if rendering.task in CLASSIFIERS else tuple(filter(None, rendering.answers))
    anywhere = [name for name in names if any(found[name] for found in counts.values())]
    findings = []
    for split, found in counts.items():
        absent = [name for name in (names if split == "train" else anywhere) if not found[name]]
        if not absent:
            continue
        what = "class" if rendering.task in CLASSIFIERS else "answer"
        findings.append(absent_class(absent, files[split], split, what))
    return findings


def find_too_many_classes(
    rows: Mapping[str, Sequence[Row]], columns: Columns, labels: Sequence[str], known: Sequence[str], file: str
) -> list[dict[str, Any]]:
    """Return a finding `many-classes`, as JSON values, if hardly two rows have the same class.

    Args:
        rows: Rows of each split.
        columns: Where their class is.
        labels: All classes.
        known: Classes of the model's own head; its classes need few rows.
        file: Where the rows come from.
    """
    count = sum(map(len, rows.values()))
    if columns.problem_type != "single_label_classification" or labels == known or columns.places:
        return []
    if len(labels) <= max(MANY, count / 2):
        return []
    message = (
        f"{count} rows have {len(labels)} different classes in the column {columns.label}, such as {labels[0]!r}: "
        "name the column of the class with --label; for numbers give --problem-type regression"
    )
    where = {"code": "many-classes", "severity": "error", "file": file}
    return [{**where, "rows": [], "count": count, "message": message, "example": ""}]


def _count(rows: Sequence[Row], examples: Sequence[Example], rendering: Rendering) -> Counter[str]:
    """Return in how many rows, or words, each class or answer occurs."""
    if rendering.task in CLASSIFIERS:
        return count_classes(examples, rendering)
    return Counter(answer_of(row, rendering.columns) or "" for row in rows) if rendering.answers else Counter()


def _join(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
