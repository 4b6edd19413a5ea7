"""The classes of a training: their names, and those that a split lacks."""

import re
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
    columns_in,
    count_classes,
    find_labels,
    format_rows,
    is_unnamed,
    record,
    whole_number,
)
from edge_ft.errors import AuditRefused, UsageError
from edge_ft.families import CLASSIFIERS
from edge_ft.progress import Progress

__all__ = [
    "choose_classes",
    "find_absent_classes",
    "find_answer_in_prompt",
    "find_class_problems",
    "find_too_many_classes",
    "join_classes",
]

SHOWN = 5
"""Most classes that a message names."""
MOST = 0.9
"""Share of rows that are nearly all."""
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
            raise UsageError(f"the column {columns.label} has {what} and --class-names gives {join_classes(named)}")
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
        progress.say(f"{what} {join_classes(model_labels)}")
    if columns.places or not set(found) <= set(labels):
        indices = [int(name) if columns.places else class_index(name, labels) for name in found]
        pairs = [f"{name} is {labels[at]}" for name, at in zip(found, indices, strict=True) if at is not None]
        progress.say(f"classes in the rows: {join_classes(pairs)}")
    return labels


def find_class_problems(
    rows: Mapping[str, Sequence[Row]],
    examples: Mapping[str, Sequence[Example]],
    rendering: Rendering,
    model_labels: tuple[str, ...],
    files: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Return findings, as JSON values, about the answers of a training: `find_answer_in_prompt` and the others here.

    Args:
        rows: Rows of each split.
        examples: The same in token ids.
        rendering: How they were encoded.
        model_labels: Classes of the model's own head.
        files: Where each split comes from.
    """
    columns, file = rendering.columns, files["train"]
    return [
        *find_answer_in_prompt(rows["train"], columns, rendering.labels, file),
        *find_too_many_classes(rows, columns, rendering.labels, model_labels, file),
        *find_absent_classes(rows, examples, rendering, files),
    ]


def find_answer_in_prompt(
    rows: Sequence[Row], columns: Columns, labels: tuple[str, ...], file: str
) -> list[dict[str, Any]]:
    """Return a finding `answer-in-prompt`, as JSON values, if the model reads what it is to answer.

    An error where the prompt's template names the column of the answer; a warning where nearly every text holds the
    name of its own class, and few hold another's.

    Args:
        rows: Train rows.
        columns: What they are read by.
        labels: All classes.
        file: Where the rows come from.
    """
    read = columns_in(columns.prompt) | columns_in(columns.pair)
    answer = columns_in(columns.completion) | ({columns.label} if columns.label else set())
    values = {"code": "answer-in-prompt", "file": file, "rows": [], "count": len(rows), "example": ""}
    if both := sorted(read & answer):
        message = f"the prompt holds the column {both[0]}, which is the answer: leave it out of --prompt"
        return [{**values, "severity": "error", "message": message}]
    names = [name for name in labels if len(name) > 2 and whole_number(name) is None]
    if columns.problem_type != "single_label_classification" or len(names) < len(labels) or len(rows) < MANY:
        return []
    patterns = {name: re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE) for name in names}
    own, others = [], 0
    for row in rows:
        found = record(row, columns)
        index = class_index(found.classes[0], labels)
        text = found.prompt + " " + (found.pair or "")
        held = {name for name, pattern in patterns.items() if pattern.search(text)}
        if index is not None and labels[index] in held:
            own.append(row.number)
        others += bool(held - ({labels[index]} if index is not None else set()))
    if len(own) < MOST * len(rows) or others > len(rows) / 2:
        return []
    message = f"{len(own)} of {len(rows)} train rows hold the name of their own class in the text ({format_rows(own)})"
    return [{**values, "severity": "warning", "rows": own, "count": len(own), "message": message}]


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
    if columns.problem_type == "regression" or columns.label is None or labels == known or columns.places:
        return []
    few = count / 2 if columns.problem_type == "single_label_classification" else count
    if len(labels) <= max(MANY, few):
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


def join_classes(names: Sequence[str]) -> str:
    """Return the names of classes as a message lists them: the first few, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
