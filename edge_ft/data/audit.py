"""What the rows would do to training, said before it starts, with row numbers; `docs/audit.md` lists the codes."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edge_ft.data.chat import exchange, render_chat
from edge_ft.data.columns import Record
from edge_ft.data.example import Example
from edge_ft.data.tokenizer import Filled, TextTokenizer

__all__ = ["CODES", "Finding", "audit", "template_marks"]

CODES = (
    "nothing-to-learn",
    "leak",
    "one-class",
    "truncated",
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
)
"""Every code; the first three refuse the rows."""

SHARE, RATIO = 0.9, 10
"""Classes are out of balance when one has more than this share of the rows, or so many times the rows of another."""

# U+FFFD is what a decoder puts for bytes it cannot read; the others are UTF-8 read as Latin-1 or Windows-1252
# ("Ã©" for "é", "â€™" for "’"), and control characters that only a wrong code page leaves in a text.
_UNREADABLE = re.compile(
    "\ufffd|[\u00c2\u00c3][\u0080-\u00bf\u0152-\u0178\u201a-\u2030]|\u00e2\u20ac|[\u0080-\u0084\u0086-\u009f]"
)
_MARKS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]", "<|user|>", "<|assistant|>")
"""How widespread chat templates begin a turn, whatever this model's own looks like."""


@dataclass(frozen=True)
class Finding:
    """Something about the data that the user should know."""

    code: str
    """One of CODES."""
    severity: Literal["error", "warning"]
    """error: training on these rows makes no sense, the caller refuses."""
    rows: list[int]
    """Numbers of all rows it holds for, in the user's file."""
    message: str
    example: str = ""
    """The first of these rows, or the beginning of it."""
    lost: tuple[int, ...] = ()
    """truncated: how many tokens of its answer each of the rows loses."""

    def plain(self, **where: str) -> dict[str, Any]:
        """JSON values: `code, severity, rows, count, message, example`, and `where` it was found."""
        values = {**asdict(self), **where, "count": len(self.rows), "lost": list(self.lost)}
        return {key: value for key, value in values.items() if value != []}


def audit(
    records: Sequence[Record], examples: Sequence[Example], max_length: int, marks: Sequence[str] = ()
) -> list[Finding]:
    """Findings over the rows of one file, `examples` being the encoded `records`; an empty list is good news.

    Args:
        marks: Texts that only a chat template should write.
    """
    findings = []
    texts = {record.row: excerpt(record) for record in records}
    pairs = list(zip(records, examples, strict=True))

    def find(code: str, rows: list[int], message: str, refuse: bool = False, lost: tuple[int, ...] = ()) -> None:
        if rows:
            text = f"{len(rows)} of {len(examples)} rows {message} ({numbered(rows)})"
            findings.append(Finding(code, "error" if refuse else "warning", rows, text, texts[rows[0]], lost))

    def rows_where(holds: Callable[[Record, Example], bool]) -> list[int]:
        return [record.row for record, example in pairs if holds(record, example)]

    untrained = rows_where(lambda _, example: not example.targets)
    find(
        "nothing-to-learn",
        untrained,
        f"have no token to learn within {max_length} tokens",
        refuse=len(untrained) == len(examples),
    )
    cut = [example for example in examples if example.cut]
    lost = tuple(example.cut_targets for example in cut)
    message = f"are longer than {max_length} tokens and lose {sum(example.cut for example in cut)} tokens at their end"
    if any(lost):
        message += f", {sum(lost)} of them of answers, up to {max(lost)} in a row"
    find("truncated", [example.row for example in cut], message, lost=lost)
    find("empty-prompt", rows_where(lambda record, _: _is_blank(record)), "have an empty prompt")
    find(
        "empty-completion",
        rows_where(lambda _, example: not example.reference and not _said_apart(example)),
        "have an empty answer",
    )
    find(
        "unlearned-turns",
        rows_where(lambda _, example: example.unlearned_turns > 0),
        "have assistant turns without loss, since the chat template would write them differently at run time",
    )
    again, contradicting = _repeated(records)
    find("duplicated", again, "repeat an earlier row; equal rows stay in one split")
    find("contradicting", contradicting, "give another answer than an earlier row with the same prompt")
    found = {mark for record in records for value in _values(record) for mark in marks if mark in value}
    find(
        "template-in-text",
        rows_where(lambda record, _: any(mark in value for value in _values(record) for mark in found)),
        f"hold {', '.join(map(repr, sorted(found)))}, which a chat template writes: read as plain text in a value",
    )
    find(
        "encoding",
        rows_where(lambda record, _: any(_UNREADABLE.search(value) for value in _values(record))),
        "hold characters of a text that was read in the wrong encoding, such as \ufffd or Ã©",
    )
    names = Counter(name for record in records for name in record.classes)
    answers = Counter(record.classes for record in records)
    if names and len(names if any(record.words for record in records) else answers) == 1:
        rows = rows_where(lambda *_: True)
        only = ", ".join(next(iter(answers)) if len(answers) == 1 else names)
        find("one-class", rows, f"are of the one class {only!r}: there is nothing to tell apart", True)
    # Among a row's several classes or tags, and among numbers, some are rare by nature.
    elif names and all(len(example.labels) == 1 and isinstance(example.labels[0], int) for example in examples):
        (commonest, most), (rarest, least) = names.most_common()[0], names.most_common()[-1]
        if most > SHARE * len(examples) or most > RATIO * least:
            find(
                "imbalance",
                rows_where(lambda _, example: example.reference == rarest),
                f"are of class {rarest!r}, {most} of {commonest!r}: always answering {commonest!r} is right in "
                f"{most / len(examples):.0%}",
            )
    return findings


def template_marks(template: str | None, tokenizer: TextTokenizer) -> tuple[str, ...]:
    """Texts that only a chat template should write: control tokens, and how this and other templates begin a turn."""
    found = {*_MARKS, *(token for token in tokenizer.control_tokens.values() if len(token) > 1)}
    if template is not None:
        written = render_chat(template, exchange("\ufffd", "\ufffd"), False, tokenizer)
        found |= {line for line in re.split("[\n\ufffd]", written) if re.match(r"[<\[#|]..", line)}
    return tuple(sorted(mark for mark in found if not any(mark != other and other in mark for other in found)))


def excerpt(record: Record) -> str:
    """The beginning of a row as a person would recognise it, on one line of at most 120 characters."""
    if record.messages is not None:
        text = " | ".join(f"{message['role']}: {message['content']}" for message in record.messages)
    else:
        answer = record.label if record.label is not None else record.completion
        text = " → ".join(part for part in (str(record.prompt), str(record.pair or ""), str(answer or "")) if part)
    return shortened(text)


def shortened(text: str) -> str:
    """The text on one line of at most 120 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 120 else line[:119] + "…"


def numbered(rows: Sequence[int]) -> str:
    """`row 3`, or `rows 1, 2, ...`"""
    named = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    return f"row{'s' if len(rows) > 1 else ''} {named}"


def _values(record: Record) -> list[str]:
    """What the row itself says, without the text of --prompt and --completion."""
    if record.messages is not None:
        return [message["content"] for message in record.messages]
    return [
        value
        for text in (record.prompt, record.pair, record.completion)
        if text is not None
        for value in (text.parts[1::2] if isinstance(text, Filled) else [text])
    ]


def _said_apart(example: Example) -> bool:
    """Whether the answer is numbers, such as which of several classes hold: none of them is an answer."""
    return isinstance(example.labels[0], float)


def _is_blank(record: Record) -> bool:
    """Whether the model is asked, but with nothing; rows of text alone ask nothing."""
    if record.messages is not None:
        return not any(message["content"].strip() for message in record.messages if message["role"] != "assistant")
    asked = record.prompt.parts[1::2] if isinstance(record.prompt, Filled) else []
    return bool(asked) and not any(value.strip() for value in asked)


def _repeated(records: Sequence[Record]) -> tuple[list[int], list[int]]:
    """Rows that the model reads as an earlier one, and rows that differ from an earlier one in their answer alone."""
    seen: dict[str, set[str]] = {}
    again, contradicting = [], []
    for record in records:
        asked = json.dumps(record.messages[:-1]) if record.messages else record.prompt + (record.pair or "")
        answer = record.label if record.label is not None else record.completion or ""
        answers = seen.setdefault(asked, set())
        if answer in answers:
            again.append(record.row)
        elif answers and asked:
            contradicting.append(record.row)
        answers.add(answer)
    return again, contradicting
