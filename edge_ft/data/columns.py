"""Which columns of a row are the prompt, the answer, the class or the chat."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edge_ft.config import RowsConfig, Task
from edge_ft.data.read import Row
from edge_ft.data.tokenizer import Filled
from edge_ft.errors import DataError, did_you_mean

__all__ = [
    "Columns",
    "Message",
    "Record",
    "answer_of",
    "class_numbers",
    "fill_answer",
    "fill_text",
    "find_columns",
    "find_labels",
    "guess_task",
    "has_answer",
    "is_empty",
    "record",
]

Kind = Literal["messages", "prompt_completion", "instruction", "text", "text_label", "template"]
Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Columns:
    """How a row becomes a record; `prompt` and `completion` are templates that name columns as `{column}`."""

    kind: Kind
    prompt: str | None = None
    """Template of the prompt, or of the text to classify."""
    completion: str | None = None
    """Template of the text that carries the loss."""
    label: str | None = None
    """Column of the class (text-classification)."""

    def fits(self, names: Sequence[str], answer: bool = True) -> bool:
        """Whether rows with the columns `names` have all that `record` reads of them."""
        if self.kind == "messages":
            return "messages" in names
        if self.prompt is None and not answer:
            return False  # rows of text alone have no prompt
        answers = _named(self.completion) | ({self.label} if self.label else set())
        return _named(self.prompt) | (answers if answer else set()) <= set(names)


@dataclass(frozen=True, slots=True)
class Record:
    """One row as the model will be shown it; what a row for inference lacks is None."""

    row: int
    messages: list[Message] | None
    prompt: str
    completion: str | None
    label: str | None


def guess_task(names: Sequence[str], config: RowsConfig, decoder: bool) -> Task:
    """text-classification for --label and for encoders, text-generation for decoders.

    Raises:
        DataError: an encoder, but no column that could hold the class.
    """
    if config.label is None and decoder:
        return "text-generation"
    _label_column(names, config)
    return "text-classification"


def find_columns(names: Sequence[str], config: RowsConfig, task: Task | None) -> Columns:
    """Recognise the columns called `names`, or those that the user's templates name.

    In --prompt and --completion `{column}` is the column's value, `{{` and `}}` are braces, and the escapes
    `\\n`, `\\t` and `\\\\` are newline, tab and backslash, since a shell passes them on as two characters.
    text + label for text-generation: the label is learned on the line below the text.

    Raises:
        DataError: a column that is named but missing, or no known set of columns.
    """
    prompt, completion = (text if text is None else _unescape(text) for text in (config.prompt, config.completion))
    for flag, template in (("--prompt", prompt), ("--completion", completion)):
        _check_template(template, flag, names)
    if task == "text-classification" or (task is None and config.label is not None):
        if completion is not None:
            raise DataError("--completion is for text-generation: a class is named with --label")
        label = _label_column(names, config)
        return Columns("text_label", prompt or _text_template(names, label), None, label)
    if config.label is not None:
        raise DataError(f"--label {config.label} is for text-classification: give --completion to learn its text")
    if prompt is not None:
        return Columns("template", prompt, completion)
    if "messages" in names:
        return Columns("messages")
    if "prompt" in names and "completion" in names:
        return Columns("prompt_completion", "{prompt}", "{completion}")
    if "instruction" in names and "output" in names:
        return Columns("instruction", "{instruction}", "{output}")
    if "text" in names and "label" in names:
        # A decoder's text and its class need something between them.
        return Columns("text_label", "{text}\n", "{label}")
    if "text" in names:
        return Columns("text", None, "{text}")
    raise DataError(
        f"the columns are {', '.join(names)}: name yours with --prompt and --completion, "
        "or call them messages, prompt and completion, instruction and output, or text"
    )


def record(row: Row, columns: Columns, answer: bool = True) -> Record:
    """The row's texts; with `answer` False (inference) a missing completion or label is None.

    Raises:
        DataError: a value that is missing, null or of the wrong kind; the message names the row.
    """
    if columns.kind == "messages":
        messages = _messages(row)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        return Record(row.number, messages, "", answers[-1] if answers else None, None)
    prompt = "" if columns.prompt is None else _fill(columns.prompt, row)
    if columns.kind == "instruction" and row.fields.get("input") not in (None, ""):
        prompt += "\n\n" + _text("input", row)
    completion = label = None
    if columns.completion is not None and (answer or _named(columns.completion) <= row.fields.keys()):
        completion = _fill(columns.completion, row)
    if columns.label is not None and (answer or columns.label in row.fields):
        label = _label(columns.label, row)
    return Record(row.number, None, prompt, completion, label)


def has_answer(row: Row, columns: Columns) -> bool:
    """Whether there is something to learn in the row: an assistant's turn, or a value where the answer or class is."""
    if columns.kind == "messages":
        messages = row.fields.get("messages")
        return not isinstance(messages, list) or any(
            not isinstance(message, dict) or message.get("role") == "assistant" for message in messages
        )  # what is no chat at all is for `record` to refuse
    if columns.label is not None:
        value = row.fields.get(columns.label)
        return not _is_null(value) and str(value).strip() != ""
    return not any(_is_null(row.fields.get(name)) for name in _named(columns.completion))


def is_empty(row: Row) -> bool:
    """Whether nothing is written in any of the row's fields."""
    return all(_is_null(value) or value in ([], {}) or str(value).strip() == "" for value in row.fields.values())


def fill_text(columns: Columns, text: str) -> str:
    """A text put into a prompt template of one column; as it is where it has the template's form already."""
    named = _named(columns.prompt)
    if columns.prompt is None or len(named) != 1:
        return text
    parts = _split(columns.prompt)
    form = "(.*)".join(re.escape(own) for own in parts[::2])
    found = re.fullmatch(form, text, re.DOTALL)
    parts[1::2] = found.groups() if found else [text] * (len(parts) // 2)
    return Filled(parts)


def answer_of(row: Row, columns: Columns) -> str | None:
    """What a row's answer says without the text that --completion puts around it; None where there is none."""
    named = _named(columns.completion)
    if len(named) == 1:
        (name,) = named
        return None if _is_null(row.fields.get(name)) else _text(name, row)
    return record(row, columns, answer=False).completion


def fill_answer(columns: Columns, answer: str) -> str:
    """`answer`, as `answer_of` gives it, in a --completion template of one column; as it is under any other."""
    if columns.completion is None or len(_named(columns.completion)) != 1:
        return answer
    parts = _split(columns.completion)
    parts[1::2] = [answer] * (len(parts) // 2)
    return Filled(parts)


def class_numbers(labels: Sequence[str]) -> tuple[str, ...]:
    """The places of a head's classes as rows may name them: "0", "1", ..."""
    return tuple(map(str, range(len(labels))))


def find_labels(rows: Sequence[Row], columns: Columns) -> tuple[str, ...]:
    """The distinct classes in their order: whole numbers by value, then text by the alphabet."""
    labels = {label for row in rows if (label := record(row, columns).label) is not None}
    return tuple(sorted(labels, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)))


def _label_column(names: Sequence[str], config: RowsConfig) -> str:
    name = config.label or "label"
    if name not in names:
        raise DataError(
            f"no column {name!r} holds the class{did_you_mean(name, list(names))}: "
            f"name it with --label, the columns are {', '.join(names)}"
        )
    return name


def _text_template(names: Sequence[str], label: str) -> str:
    others = [name for name in names if name != label]
    if "text" in others:
        return "{text}"
    if len(others) != 1:
        raise DataError(f'which of {", ".join(names)} is the text to classify? Name it with --prompt "{{column}}"')
    return "{" + others[0] + "}"


# A template's parts: a doubled brace, a column in braces, a brace that belongs to neither.
_PART = re.compile(r"(\{\{|\}\}|\{[^{}]*\}|[{}])")


def _unescape(template: str) -> str:
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], template)


def _check_template(template: str | None, flag: str, names: Sequence[str]) -> None:
    for part in _PART.findall(template or ""):
        if part in ("{", "}"):
            raise DataError(f"{flag} has a lone {part}: write {{{{ and }}}} for braces that are text")
        if part not in ("{{", "}}") and part[1:-1] not in names:
            raise DataError(
                f"{flag} names no column with {part}{did_you_mean(part[1:-1], list(names))}: "
                f"the columns are {', '.join(names)}, and {{{{ and }}}} are braces that are text"
            )


def _named(template: str | None) -> set[str]:
    """The columns that a template names."""
    return {part[1:-1] for part in _PART.findall(template or "") if part not in ("{{", "}}")}


def _split(template: str) -> list[str]:
    """A template's own text and the names of its columns, in turn."""
    parts = [""]
    for at, part in enumerate(_PART.split(template)):
        if at % 2 and part not in ("{{", "}}"):
            parts += [part[1:-1], ""]
        else:
            parts[-1] += part[0] if at % 2 else part
    return parts


def _fill(template: str, row: Row) -> Filled:
    parts = _split(template)
    parts[1::2] = [_text(name, row) for name in parts[1::2]]
    return Filled(parts)


def _text(name: str, row: Row) -> str:
    """The value of a column as text: numbers and booleans in Python's spelling, lists and objects as JSON."""
    value = row.fields.get(name)
    if _is_null(value):
        state = "is null" if name in row.fields else "is missing"
        raise DataError(f"row {row.number}: column {name!r} {state}: fill it in or leave the row out")
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # NaN is how tables say null


def _label(name: str, row: Row) -> str:
    value = _text(name, row).strip()
    given = row.fields[name]
    if isinstance(given, float) and given.is_integer():
        return str(int(given))  # what a table makes of whole numbers with a gap
    if not value or isinstance(given, float | list | dict):
        raise DataError(f"row {row.number}: the class in {name!r} is {value!r}: it must be text or a whole number")
    return value


def _messages(row: Row) -> list[Message]:
    where = f"row {row.number}: messages"
    value: Any = row.fields.get("messages")
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} must be a list of {{role, content}} objects with at least one in it")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"{where} holds {json.dumps(message)[:60]}: role and content must both be text")
        if message.get("role") not in ROLES:
            raise DataError(f"{where} has the role {message.get('role')!r}: it must be one of {', '.join(ROLES)}")
    return [{"role": message["role"], "content": message["content"]} for message in value]
