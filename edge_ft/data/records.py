"""A row as the model reads it: the texts, the chat, the class or the tags that its columns hold."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edge_ft.data.classes import list_of, read_classes, whole_number
from edge_ft.data.columns import Columns, columns_in, fill_template, match_template
from edge_ft.data.readers import Row
from edge_ft.data.tokenizer import Filled
from edge_ft.errors import DataError

__all__ = [
    "Message",
    "Record",
    "answer_of",
    "fill_answer",
    "fill_text",
    "find_labels",
    "has_answer",
    "is_empty",
    "record",
]

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Record:
    """The texts of one row; a row for inference has None where its answer would be."""

    row: int
    """Number of the row in the user's file."""
    messages: list[Message] | None
    prompt: str
    completion: str | None
    label: str | None
    """The class, several classes joined by commas, or the tags joined by spaces."""
    pair: str | None = None
    """The second of two texts that are classified together."""
    words: tuple[str, ...] = ()
    """The words to tag (token-classification)."""
    classes: tuple[str, ...] = ()
    """The class, the classes, the number as text, or one tag per word."""


def record(row: Row, columns: Columns, answer: bool = True) -> Record:
    """Read the texts of a row.

    Args:
        row: The row.
        columns: The columns to read.
        answer: Whether a missing completion or label is an error; False for inference.

    Returns:
        The record.

    Raises:
        DataError: a value is missing, null or of the wrong kind; the message names the row.
    """
    if columns.kind == "messages":
        messages = _messages(row)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        return Record(row.number, messages, "", answers[-1] if answers else None, None)
    if columns.kind == "tokens":
        return _tagged_words(row, columns, answer)
    prompt = "" if columns.prompt is None else _fill(columns.prompt, row)
    if columns.kind == "instruction" and row.fields.get("input") not in (None, ""):
        prompt += "\n\n" + _text("input", row)
    completion = label = None
    if columns.completion is not None and (answer or columns_in(columns.completion) <= row.fields.keys()):
        completion = _fill(columns.completion, row)
    pair = None if columns.pair is None else _fill(columns.pair, row)
    classes: tuple[str, ...] = ()
    if columns.label is not None and (answer or columns.label in row.fields):
        value, where = _value(columns.label, row), f"row {row.number}: {columns.label!r}"
        classes = read_classes(value, columns.problem_type, where, columns.places)
        label = ", ".join(classes)
    return Record(row.number, None, prompt, completion, label, pair, (), classes)


def has_answer(row: Row, columns: Columns) -> bool:
    """Return whether the row has something to learn: an assistant turn, or a value in the answer or label columns."""
    if columns.kind == "messages":
        messages = row.fields.get("messages")
        return not isinstance(messages, list) or any(
            not isinstance(message, dict) or message.get("role") == "assistant" for message in messages
        )  # `record` refuses values that are not a chat, with a better message
    if columns.label is not None:
        value = row.fields.get(columns.label)
        return not _is_null(value) and str(value).strip() != ""
    return not any(_is_null(row.fields.get(name)) for name in columns_in(columns.completion))


def is_empty(row: Row) -> bool:
    """Return whether all fields of the row are null, blank or empty."""
    return all(_is_null(value) or value in ([], {}) or str(value).strip() == "" for value in row.fields.values())


def fill_text(columns: Columns, text: str) -> str:
    """Return `text` in a prompt template of one column.

    A text that already has the template's form is split into its values; other templates leave it as it is.
    """
    if columns.prompt is None or len(columns_in(columns.prompt)) != 1:
        return text
    values: Iterator[str] = iter(match_template(columns.prompt, text) or ())
    return fill_template(columns.prompt, lambda _: next(values, text))


def answer_of(row: Row, columns: Columns) -> str | None:
    """Return the answer of a row without the text that --completion puts around it; None where there is none."""
    names = columns_in(columns.completion)
    if len(names) == 1:
        (name,) = names
        return None if _is_null(row.fields.get(name)) else _text(name, row)
    return record(row, columns, answer=False).completion


def fill_answer(columns: Columns, answer: str) -> str:
    """Return `answer`, as `answer_of` returns it, in a --completion template of one column; else unchanged."""
    if columns.completion is None or len(columns_in(columns.completion)) != 1:
        return answer
    return fill_template(columns.completion, lambda _: answer)


def find_labels(rows: Sequence[Row], columns: Columns) -> tuple[str, ...]:
    """Return the distinct classes or tags, numbers by value before texts; for regression the name of the column.

    If all of them are whole numbers, `1.0`, which a table makes of 1, is 1.
    """
    if columns.problem_type == "regression":
        return (str(columns.label),)
    if columns.places:
        return tuple(map(str, range(columns.places)))
    names = {name for row in rows for name in record(row, columns).classes}
    numbers = {name: whole_number(name) for name in names}
    if None not in numbers.values():
        names = {str(number) for number in numbers.values()}
    return tuple(sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)))


def _tagged_words(row: Row, columns: Columns, answer: bool) -> Record:
    (name,) = columns_in(columns.prompt)
    words = _names(name, row)
    tags: tuple[str, ...] = ()
    if columns.label is not None and (answer or columns.label in row.fields):
        tags = tuple(tag.strip() for tag in _names(columns.label, row))
        if len(tags) != len(words):
            raise DataError(
                f"row {row.number} has {len(words)} words in {name!r} and {len(tags)} in {columns.label!r}: "
                "give every word one tag"
            )
    return Record(row.number, None, " ".join(words), None, " ".join(tags) if tags else None, None, words, tags)


def _names(name: str, row: Row) -> tuple[str, ...]:
    value = _value(name, row)
    items = list_of(value)
    if items is None or not all(isinstance(item, str | int) and not isinstance(item, bool) for item in items):
        raise DataError(
            f"row {row.number}: column {name!r} must be a list of texts or whole numbers"
            + (', such as ["a", "b"]: a text is not split into words' if isinstance(value, str) else "")
        )
    return tuple(map(str, items))


def _fill(template: str, row: Row) -> Filled:
    return fill_template(template, lambda name: _text(name, row))


def _value(name: str, row: Row) -> Any:
    value = row.fields.get(name)
    if _is_null(value):
        raise DataError(
            f"row {row.number}: column {name!r} is {'null' if name in row.fields else 'missing'}: "
            "fill it in or remove the row"
        )
    return value


def _text(name: str, row: Row) -> str:
    """Return the value of a column as text: numbers and booleans as Python writes them, lists and objects as JSON."""
    value = _value(name, row)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # tables store null as NaN


def _messages(row: Row) -> list[Message]:
    where = f"row {row.number}: messages"
    value: Any = row.fields.get("messages")
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} must be a list of at least one {{role, content}} object")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"{where} holds {json.dumps(message)[:60]}: role and content must both be text")
        if message.get("role") not in ROLES:
            raise DataError(f"{where} has the role {message.get('role')!r}: it must be one of {', '.join(ROLES)}")
    return [{"role": message["role"], "content": message["content"]} for message in value]
