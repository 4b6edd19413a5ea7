"""A row as the model reads it: the texts, the chat, the class or the tags that its columns hold."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edge_ft.data.classes import list_of, read_classes, whole_number
from edge_ft.data.columns import Columns, columns_in, fill_template, match_template
from edge_ft.data.conversations import (
    Chat,
    Message,
    find_turns,
    has_answer_turn,
    read_history,
    read_tools,
    read_turns,
)
from edge_ft.data.filled import Filled
from edge_ft.data.readers import Row
from edge_ft.data.values import as_text, find_value, is_blank, is_missing
from edge_ft.errors import DataError

__all__ = [
    "Record",
    "answer_of",
    "fill_answer",
    "fill_text",
    "find_labels",
    "has_answer",
    "is_empty",
    "record",
]

TEXT_KEYS = {"role", "content"}
"""Keys of a message that holds only a text."""


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
    chat: Chat | None = None
    """The conversation; its messages are `messages`."""


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
    if (chat := _chat(row, columns, answer)) is not None:
        return chat_record(row.number, chat)
    if columns.kind == "tokens":
        return _tagged_words(row, columns, answer)
    prompt, completion, label = _prompt(row, columns), _completion(row, columns, answer), None
    pair = None if columns.pair is None else _fill(columns.pair, row)
    classes: tuple[str, ...] = ()
    if columns.label is not None and (answer or columns.label in row.fields):
        value, where = _value(columns.label, row), f"row {row.number}: {columns.label!r}"
        classes = read_classes(value, columns.problem_type, where, columns.places)
        label = ", ".join(classes)
    return Record(row.number, None, prompt, completion, label, pair, (), classes)


def chat_record(number: int, chat: Chat) -> Record:
    """Return the record of a conversation; its completion is the last answer that is learned."""
    completion = chat.messages[chat.answers[-1]]["content"] if chat.answers else None
    return Record(number, chat.messages, "", completion, None, chat=chat)


def has_answer(row: Row, columns: Columns) -> bool:
    """Return whether the row has something to learn: an assistant turn, or a value in the answer or label columns."""
    if columns.kind == "messages":
        return has_answer_turn(row.fields.get(columns.messages))
    if columns.label is not None:
        value = row.fields.get(columns.label)
        return not is_missing(value) and str(value).strip() != ""
    answers = [find_value(row.fields, name) for name in columns_in(columns.completion)]
    return not any(is_missing(value) or value == [] for value in answers)


def is_empty(row: Row) -> bool:
    """Return whether all fields of the row are null, blank or empty."""
    return all(map(is_blank, row.fields.values()))


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
        value = find_value(row.fields, name)
        return None if is_missing(value) or find_turns(value) is not None else _text(name, row)
    read = record(row, columns, answer=False)
    # A call is no text that a model could choose.
    plain = read.chat is None or not read.chat.answers or read.chat.messages[read.chat.answers[-1]].keys() <= TEXT_KEYS
    return read.completion if plain else None


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


def _chat(row: Row, columns: Columns, answer: bool) -> Chat | None:
    """Return the conversation of a row; None where its columns hold plain texts and nothing beside them.

    Raises:
        DataError: a turn with an unknown role, or a value that is not a text; the message names the row.
    """
    where = f"row {row.number}: "
    value_of = row.fields.get
    if columns.kind == "messages":
        messages, context = read_turns(value_of(columns.messages), where + columns.messages)
    elif columns.kind in ("prompt_completion", "instruction"):
        first, last = (_only_column(template) for template in (columns.prompt, columns.completion))
        asked, answered = find_turns(value_of(first or "")), find_turns(value_of(last or ""))
        history = read_history(value_of(columns.history or ""), f"{where}column {columns.history!r}")
        extras = not all(is_blank(value_of(name or "")) for name in (columns.system, columns.tools))
        if asked is None and answered is None and not history and not extras:
            return None
        if asked is None:
            messages, context = [*history, {"role": "user", "content": _prompt(row, columns)}], []
        else:
            messages, _ = read_turns(asked, f"{where}column {first!r}")
            messages, context = [*history, *messages], list(range(len(history), len(history) + len(messages)))
        if answered is None:
            completion = _completion(row, columns, answer)
            messages += [] if completion is None else [{"role": "assistant", "content": completion}]
        elif answered:
            turns, silent = read_turns(answered, f"{where}column {last!r}")
            context += [len(messages) + at for at in silent]
            messages += turns
    else:
        return None
    return _with_extras(row, columns, Chat(messages, None, tuple(context)))


def _with_extras(row: Row, columns: Columns, chat: Chat) -> Chat:
    """Return the conversation with the system message and the tools that columns of their own hold."""
    tools = read_tools(row.fields.get(columns.tools or ""), f"row {row.number}: column {columns.tools!r}")
    system = row.fields.get(columns.system or "")
    if is_blank(system):
        return Chat(chat.messages, tools, chat.context)
    text = as_text(system, f"row {row.number}: column {columns.system!r}")
    if chat.messages[0]["role"] != "system":
        first: Message = {"role": "system", "content": text}
        return Chat([first, *chat.messages], tools, tuple(at + 1 for at in chat.context))
    other = chat.messages[0]["content"] != text
    return Chat(chat.messages, tools, chat.context, (f"the column {columns.system!r}",) if other else ())


def _only_column(template: str | None) -> str | None:
    """Return the column of a template that is nothing but one column."""
    names = columns_in(template)
    return next(iter(names)) if len(names) == 1 else None


def _prompt(row: Row, columns: Columns) -> str:
    prompt = "" if columns.prompt is None else _fill(columns.prompt, row)
    if columns.kind == "instruction" and row.fields.get("input") not in (None, ""):
        prompt += "\n\n" + _text("input", row)
    return prompt


def _completion(row: Row, columns: Columns, answer: bool) -> str | None:
    """Return the answer; None for a row without one, unless `answer` requires it."""
    if columns.completion is None:
        return None
    fields, names = row.fields, columns_in(columns.completion)
    known = all(name in fields or find_value(fields, name) is not None for name in names)
    return _fill(columns.completion, row) if answer or known else None


def _fill(template: str, row: Row) -> Filled:
    return fill_template(template, lambda name: _text(name, row))


def _value(name: str, row: Row) -> Any:
    value = find_value(row.fields, name)
    if is_missing(value):
        raise DataError(
            f"row {row.number}: column {name!r} is {'null' if name in row.fields else 'missing'}: "
            "fill it in or remove the row"
        )
    return value


def _text(name: str, row: Row) -> str:
    return as_text(_value(name, row), f"row {row.number}: column {name!r}")
