"""Problems of the training rows, found before training, with row numbers; `docs/audit.md` explains each code."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edge_ft.data.batches import Example
from edge_ft.data.chat import render_chat
from edge_ft.data.class_audit import find_odd_classes
from edge_ft.data.columns import ANSWERS, Columns
from edge_ft.data.conversations import Chat, exchange
from edge_ft.data.filled import Filled
from edge_ft.data.readers import Row
from edge_ft.data.records import Record
from edge_ft.data.tokenizer import TextTokenizer
from edge_ft.data.values import is_blank

__all__ = [
    "CODES",
    "Finding",
    "audit",
    "find_empty_answers",
    "find_unused",
    "format_rows",
    "preview",
    "shorten",
    "template_marks",
]

CODES = (
    "nothing-to-learn",
    "leak",
    "one-class",
    "many-classes",
    "answer-in-prompt",
    "truncated",
    "unused",
    "unlabelled",
    "empty-row",
    "empty-prompt",
    "empty-completion",
    "unlearned-turns",
    "duplicated",
    "contradicting",
    "template-in-text",
    "imbalance",
    "encoding",
    "untrained-reference",
    "comment-lines",
    "absent-class",
    "similar-classes",
    "missing-class",
    "joined-classes",
    "few-rows",
)
"""Every code; the first five refuse the rows."""

ANSWER_COLUMNS = {*ANSWERS, "label", "tags", "messages", "conversations"}
"""Columns that rows for inference may have beside their prompt, as training rows do."""
MAX_SHARE, MAX_RATIO = 0.9, 10
"""Classes are imbalanced when one has more than this share of the rows, or this many times the rows of another."""

# U+FFFD is what a decoder puts for bytes it cannot read; the others are UTF-8 read as Latin-1 or Windows-1252
# ("Ã©" for "é", "â€™" for "’"), and control characters that only a wrong code page leaves in a text.
_UNREADABLE = re.compile(
    "\ufffd|[\u00c2\u00c3][\u0080-\u00bf\u0152-\u0178\u201a-\u2030]|\u00e2\u20ac|[\u0080-\u0084\u0086-\u009f]"
)
_MARKS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]", "<|user|>", "<|assistant|>")
"""Texts with which widespread chat templates begin a turn."""


@dataclass(frozen=True)
class Finding:
    """A problem of the rows."""

    code: str
    """One of CODES."""
    severity: Literal["error", "warning"]
    """error: the rows cannot be trained on, and the caller refuses them."""
    rows: list[int]
    """Numbers of all affected rows in the user's file."""
    message: str
    example: str = ""
    """The beginning of the first affected row."""
    lost: tuple[int, ...] = ()
    """truncated: how many tokens of its answer each of the rows loses."""

    def plain(self, **where: str) -> dict[str, Any]:
        """Return JSON values: `code, severity, rows, count, message, example`, and the fields of `where`."""
        values = {**asdict(self), **where, "count": len(self.rows), "lost": list(self.lost)}
        return {key: value for key, value in values.items() if value != []}


@dataclass(frozen=True)
class _Rows:
    """The rows of one file, as texts and as token ids."""

    records: Sequence[Record]
    examples: Sequence[Example]

    def where(self, holds: Callable[[Record, Example], bool]) -> list[int]:
        pairs = zip(self.records, self.examples, strict=True)
        return [record.row for record, example in pairs if holds(record, example)]

    def finding(
        self, code: str, rows: list[int], message: str, *, refuse: bool = False, lost: tuple[int, ...] = ()
    ) -> list[Finding]:
        """Return one finding about `rows`, or none where there are no such rows."""
        if not rows:
            return []
        text = f"{len(rows)} of {len(self.examples)} rows {message} ({format_rows(rows)})"
        example = next(preview(record) for record in self.records if record.row == rows[0])
        return [Finding(code, "error" if refuse else "warning", rows, text, example, lost)]


def audit(
    records: Sequence[Record], examples: Sequence[Example], max_length: int, marks: Sequence[str] = ()
) -> list[Finding]:
    """Return the findings about the rows of one file.

    Args:
        records: The rows as texts.
        examples: The same rows in token ids.
        max_length: Tokens of the longest sequence.
        marks: Texts that only a chat template should write, see `template_marks`.
    """
    rows = _Rows(records, examples)
    return [
        *_find_lost_tokens(rows, max_length),
        *_find_empty_texts(rows),
        *_find_repeated_rows(rows),
        *_find_suspicious_texts(rows, marks),
        *_find_class_balance(rows),
        *_find_odd_names(rows),
    ]


def find_unused(
    rows: Sequence[Row], columns: Columns, unread: Mapping[int, Sequence[str]], answers: bool = True
) -> list[Finding]:
    """Return the account of all that the rows say and that nothing reads: a finding for each set of rows.

    Args:
        rows: The rows of one file.
        columns: The columns that are read.
        unread: By the number of a row, the parts of it that were left out after its columns were read, see
            `Example.unread`.
        answers: Whether answers are read; else a column that holds them is not missed.

    Returns:
        Findings, each with the names of what is not used.
    """
    names = {name for row in rows for name in row.fields}
    read = columns.read(names) | (set() if answers else ANSWER_COLUMNS)
    found: dict[str, list[int]] = {}
    for row in rows:
        unused = [name for name, value in row.fields.items() if name not in read and not is_blank(value)]
        for what in (*(f"the column {name!r}" for name in unused), *unread.get(row.number, ())):
            found.setdefault(what, []).append(row.number)
    together: dict[tuple[int, ...], list[str]] = {}
    for what, numbers in found.items():
        together.setdefault(tuple(numbers), []).append(what)
    first = {row.number: row for row in reversed(rows)}
    return [
        Finding(
            "unused",
            "warning",
            list(numbers),
            f"{len(numbers)} of {len(rows)} rows have {_enumerate(names)}, which the model does not read "
            f"({format_rows(numbers)})",
            shorten(json.dumps(first[numbers[0]].fields, ensure_ascii=False, default=str)),
        )
        for numbers, names in together.items()
    ]


def find_empty_answers(records: Sequence[Record], examples: Sequence[Example]) -> list[Finding]:
    """Return a finding of the rows whose answer has no text, if there are any; see `audit`."""
    rows = _Rows(records, examples)
    # Labels are floats for several classes, of which a row may have none, and for numbers.
    empty = rows.where(
        lambda record, example: not isinstance(example.labels[0], float) and _has_empty_answer(record, example)
    )
    return rows.finding("empty-completion", empty, "have an empty answer")


def template_marks(template: str | None, tokenizer: TextTokenizer) -> tuple[str, ...]:
    """Return texts that only a chat template should write.

    These are the control tokens, and the texts with which `template` and other chat templates begin a turn.
    """
    found = {*_MARKS, *(token for token in tokenizer.control_tokens.values() if len(token) > 1)}
    if template is not None:
        written = render_chat(template, exchange("\ufffd", "\ufffd"), False, tokenizer)
        found |= {line for line in re.split("[\n\ufffd]", written) if re.match(r"[<\[#|]..", line)}
    return tuple(sorted(mark for mark in found if not any(mark != other and other in mark for other in found)))


def preview(record: Record) -> str:
    """Return the beginning of a row on one line of at most 120 characters."""
    if record.messages is not None:
        return shorten(" | ".join(f"{message['role']}: {message['content']}" for message in record.messages))
    answer = record.label if record.label is not None else record.completion
    return shorten(" → ".join(part for part in (str(record.prompt), str(record.pair or ""), str(answer or "")) if part))


def shorten(text: str) -> str:
    """Return the beginning of a text on one line of at most 120 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 120 else line[:119] + "…"


def format_rows(rows: Sequence[int]) -> str:
    """Return `row 3`, or `rows 1, 2, 3, 4, 5, ...`: at most five row numbers."""
    numbers = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    return f"row{'s' if len(rows) > 1 else ''} {numbers}"


def _enumerate(names: Sequence[str]) -> str:
    """Return `the columns 'a', 'b' and tools` of names of columns and other parts."""
    columns = [name.removeprefix("the column ") for name in names if name.startswith("the column ")]
    others = [name for name in names if not name.startswith("the column ")]
    words = [*([f"the column{'s' if len(columns) > 1 else ''} " + ", ".join(columns)] if columns else []), *others]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" and {words[-1]}"


def _find_lost_tokens(rows: _Rows, max_length: int) -> list[Finding]:
    untrained = rows.where(lambda _, example: not example.targets)
    cut = [example for example in rows.examples if example.cut]
    lost = tuple(example.cut_targets for example in cut)
    message = f"are longer than {max_length} tokens and lose {sum(example.cut for example in cut)} tokens at their end"
    if any(lost):
        message += f", {sum(lost)} of them of answers, up to {max(lost)} in a row"
    return [
        *rows.finding(
            "nothing-to-learn",
            untrained,
            f"have no token to learn within {max_length} tokens",
            refuse=len(untrained) == len(rows.examples),
        ),
        *rows.finding("truncated", [example.row for example in cut], message, lost=lost),
    ]


def _find_empty_texts(rows: _Rows) -> list[Finding]:
    return [
        *rows.finding("empty-prompt", rows.where(lambda record, _: _has_empty_prompt(record)), "have an empty prompt"),
        *find_empty_answers(rows.records, rows.examples),
        *rows.finding(
            "unlearned-turns",
            rows.where(lambda _, example: example.unlearned_turns > 0),
            "have assistant turns without loss: the chat template writes them differently at run time",
        ),
    ]


def _find_repeated_rows(rows: _Rows) -> list[Finding]:
    """Return findings about rows that equal an earlier one, as the model reads them, or differ only in the answer."""
    answers_of: dict[str, set[str]] = {}
    repeated, contradicting = [], []
    for record in rows.records:
        if record.messages is not None:
            chat = record.chat or Chat(record.messages)
            last = chat.answers[-1] if chat.answers else len(chat.messages) - 1
            prompt, answer = json.dumps([chat.messages[:last], chat.tools]), json.dumps(chat.messages[last])
        else:
            prompt = record.prompt + (record.pair or "")
            answer = record.label if record.label is not None else record.completion or ""
        answers = answers_of.setdefault(prompt, set())
        if answer in answers:
            repeated.append(record.row)
        elif answers and prompt:
            contradicting.append(record.row)
        answers.add(answer)
    return [
        *rows.finding("duplicated", repeated, "repeat an earlier row; equal rows stay in one split"),
        *rows.finding("contradicting", contradicting, "have another answer than an earlier row with the same prompt"),
    ]


def _find_suspicious_texts(rows: _Rows, marks: Sequence[str]) -> list[Finding]:
    found = {mark for record in rows.records for value in _values(record) for mark in marks if mark in value}
    return [
        *rows.finding(
            "template-in-text",
            rows.where(lambda record, _: any(mark in value for value in _values(record) for mark in found)),
            f"hold {', '.join(map(repr, sorted(found)))}, which a chat template writes: in a value it is plain text",
        ),
        *rows.finding(
            "encoding",
            rows.where(lambda record, _: any(_UNREADABLE.search(value) for value in _values(record))),
            "hold characters of a text that was read in the wrong encoding, such as \ufffd or Ã©",
        ),
    ]


def _find_odd_names(rows: _Rows) -> list[Finding]:
    if any(isinstance(example.labels[0], float) and len(example.labels) == 1 for example in rows.examples):
        return []  # numbers
    return [finding for found in find_odd_classes(rows.records) for finding in rows.finding(*found)]


def _find_class_balance(rows: _Rows) -> list[Finding]:
    labelled = [record for record in rows.records if record.label is not None or record.classes]
    answers = Counter(record.classes for record in labelled)
    tags = Counter(tag for record in labelled for tag in record.classes if record.words)
    if len(tags or answers) == 1:
        (only,) = tags or [", ".join(classes) or "none" for classes in answers]
        return rows.finding(
            "one-class",
            rows.where(lambda *_: True),
            f"are of the one class {only!r}: a classifier needs at least two",
            refuse=True,
        )
    # Several classes per row, tags and numbers are unevenly distributed by nature.
    one_class = all(len(example.labels) == 1 and isinstance(example.labels[0], int) for example in rows.examples)
    if not labelled or not one_class:
        return []
    names = Counter(example.reference for example in rows.examples)
    (commonest, most), (rarest, least) = names.most_common()[0], names.most_common()[-1]
    if most <= MAX_SHARE * len(rows.records) and most <= MAX_RATIO * least:
        return []
    return rows.finding(
        "imbalance",
        rows.where(lambda _, example: example.reference == rarest),
        f"are of class {rarest!r}, {most} of {commonest!r}: a model that always answers {commonest!r} is right in "
        f"{most / len(rows.records):.0%} of the rows",
    )


def _values(record: Record) -> list[str]:
    """Return the texts of the row itself, without the literal text of --prompt and --completion."""
    if record.messages is not None:
        return [message["content"] for message in record.messages]
    return [
        value
        for text in (record.prompt, record.pair, record.completion)
        if text is not None
        for value in (text.parts[1::2] if isinstance(text, Filled) else [text])
    ]


def _has_empty_answer(record: Record, example: Example) -> bool:
    """Return whether a row teaches the model to end an answer at once, in any of its turns."""
    if record.messages is None:
        return not example.reference
    chat = record.chat or Chat(record.messages)
    turns = [record.messages[at] for at in chat.answers]
    return any(not turn["content"].strip() and turn.keys() <= {"role", "content"} for turn in turns)


def _has_empty_prompt(record: Record) -> bool:
    """Return whether the row has a prompt, but no text in it; rows of only a text have no prompt."""
    if record.messages is not None:
        return not any(message["content"].strip() for message in record.messages if message["role"] != "assistant")
    values = record.prompt.parts[1::2] if isinstance(record.prompt, Filled) else []
    return bool(values) and not any(value.strip() for value in values)
