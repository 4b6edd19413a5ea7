"""Which columns of a row are the prompt, the answer, the class or the chat."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from edge_ft.config import ProblemType, RowsConfig, Task
from edge_ft.data.classes import guess_problem, read_classes, sort_classes
from edge_ft.data.readers import Row
from edge_ft.data.tokenizer import Filled
from edge_ft.errors import DataError, did_you_mean
from edge_ft.families import Kind

__all__ = [
    "Columns",
    "Message",
    "Record",
    "answer_of",
    "bare_columns",
    "fill_answer",
    "fill_text",
    "find_columns",
    "find_labels",
    "find_problem",
    "guess_task",
    "has_answer",
    "is_empty",
    "record",
]

Form = Literal["messages", "prompt_completion", "instruction", "text", "text_label", "template", "tokens", "pair"]
Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""
ROLES = ("system", "user", "assistant")
SENTENCE_PAIRS = (("text", "text_pair"), ("question", "passage"), ("premise", "hypothesis"), ("sentence1", "sentence2"))
"""Columns that are recognised as two texts to classify together."""
RELATED_PAIRS = (
    *(("anchor", "positive"), ("question", "answer"), ("query", "passage"), ("prompt", "completion")),
    ("instruction", "output"),
)
"""Columns that are recognised as a text and what should be found with it."""
WORDS, TAGS = ("tokens", "words"), ("tags", "ner_tags", "pos_tags")
"""Columns that are recognised as the words of a row and a tag for each."""


@dataclass(frozen=True)
class Columns:
    """How a row becomes a record; `prompt` and `completion` are templates that name columns as `{column}`."""

    kind: Form
    prompt: str | None = None
    """Template of the prompt, or of the text to classify; tokens: the column of the words."""
    completion: str | None = None
    """Template of the text that carries the loss; pair: of the text that should be found with the first."""
    label: str | None = None
    """Column of the class, the classes or the number (text-classification), or of the tags (token-classification)."""
    pair: str | None = None
    """Template of a second text to classify with the first."""
    problem_type: ProblemType | None = None
    """What is in the label column (text-classification)."""

    def fits(self, names: Sequence[str], answer: bool = True) -> bool:
        """Whether rows with the columns `names` have all that `record` reads of them."""
        if self.kind == "messages":
            return "messages" in names
        if self.prompt is None and not answer:
            return False  # rows of text alone have no prompt
        answers = _named(self.completion) | ({self.label} if self.label else set())
        return _named(self.prompt) | _named(self.pair) | (answers if answer else set()) <= set(names)


@dataclass(frozen=True, slots=True)
class Record:
    """One row as the model will be shown it; what a row for inference lacks is None."""

    row: int
    messages: list[Message] | None
    prompt: str
    completion: str | None
    label: str | None
    """The class, several with commas between, or the tags with blanks between."""
    pair: str | None = None
    """The second text of two."""
    words: tuple[str, ...] = ()
    """token-classification: what is tagged."""
    classes: tuple[str, ...] = ()
    """The class, the classes, the number as text, or a tag for each word."""


def guess_task(names: Sequence[str], config: RowsConfig, kind: Kind) -> Task:
    """What the columns are for: text-generation for a decoder without --label, text2text-generation for an
    encoder-decoder; for an encoder words with tags, a text with a label, two texts that belong together, or text alone.

    Raises:
        DataError: an encoder, but no columns that it could learn from.
    """
    if kind == "encoder-decoder":
        return "text2text-generation"
    if config.label is None and kind == "decoder":
        return "text-generation"
    if _first(WORDS, names) and (config.label or _first(TAGS, names)):
        return "token-classification"
    if config.label is None and "label" not in names:
        if config.completion is not None or (config.prompt is None and _two(RELATED_PAIRS, names)):
            return "feature-extraction"
        if config.prompt is None and list(names) == ["text"]:
            return "fill-mask"
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
    pair = None if config.text_pair is None else _unescape(config.text_pair)
    for flag, template in (("--prompt", prompt), ("--completion", completion), ("--text-pair", pair)):
        _check_template(template, flag, names)
    if task == "text-classification" or (task is None and config.label is not None):
        if completion is not None:
            raise DataError("--completion is for text-generation: a class is named with --label")
        label = _label_column(names, config)
        if prompt is None:
            prompt, pair = _two(SENTENCE_PAIRS, names) or (_text_template(names, label), None)
        return Columns("text_label", prompt, None, label, pair)
    for flag, value in (("--text-pair", config.text_pair), ("--problem-type", config.problem_type)):
        if value is not None:
            raise DataError(f"{flag} is for text-classification, and this is {task}")
    if task == "token-classification":
        return _tag_columns(names, config, prompt)
    if config.label is not None:
        raise DataError(f"--label {config.label} is for text-classification: give --completion to learn its text")
    if task == "feature-extraction":
        return _related_columns(names, prompt, completion)
    if task == "fill-mask":
        return Columns("template", prompt or _text_template(names, ""))
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
    if columns.kind == "tokens":
        return _tagged(row, columns, answer)
    prompt = "" if columns.prompt is None else _fill(columns.prompt, row)
    if columns.kind == "instruction" and row.fields.get("input") not in (None, ""):
        prompt += "\n\n" + _text("input", row)
    completion = label = None
    if columns.completion is not None and (answer or _named(columns.completion) <= row.fields.keys()):
        completion = _fill(columns.completion, row)
    pair = None if columns.pair is None else _fill(columns.pair, row)
    classes: tuple[str, ...] = ()
    if columns.label is not None and (answer or columns.label in row.fields):
        problem = columns.problem_type or "single_label_classification"
        classes = read_classes(_value(columns.label, row), problem, f"row {row.number}: {columns.label!r}")
        label = ", ".join(classes)
    return Record(row.number, None, prompt, completion, label, pair, (), classes)


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


def find_labels(rows: Sequence[Row], columns: Columns) -> tuple[str, ...]:
    """The distinct classes or tags in their order; for a number the name of its column."""
    if columns.problem_type == "regression":
        return (str(columns.label),)
    return sort_classes({name for row in rows for name in record(row, columns).classes})


def find_problem(rows: Sequence[Row], columns: Columns, asked: ProblemType | None) -> Columns:
    """`columns` that know what their label column holds: what was `asked` for, or what the values look like."""
    if columns.kind != "text_label" or columns.label is None:
        return columns
    return replace(columns, problem_type=asked or guess_problem(rows, columns.label))


def bare_columns(task: Task, problem_type: ProblemType | None = None) -> Columns:
    """How a model is asked that no rows were seen for."""
    known: dict[Task, Columns] = {
        "text-classification": Columns("text_label", "{text}", None, "label", problem_type=problem_type),
        "token-classification": Columns("tokens", "{tokens}", None, "tags"),
        "fill-mask": Columns("template", "{text}"),
        "feature-extraction": Columns("pair", "{text}", "{positive}"),
    }
    return known.get(task, Columns("prompt_completion", "{prompt}", "{completion}"))


def _label_column(names: Sequence[str], config: RowsConfig) -> str:
    name = config.label or "label"
    if name not in names:
        raise DataError(
            f"no column {name!r} holds the class{did_you_mean(name, list(names))}: "
            f"name it with --label, the columns are {', '.join(names)}"
        )
    return name


def _first(known: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in known if name in names), None)


def _two(known: Sequence[tuple[str, str]], names: Sequence[str]) -> tuple[str, str] | None:
    """Templates of the first two columns of `known` that are both there."""
    return next((("{" + a + "}", "{" + b + "}") for a, b in known if a in names and b in names), None)


def _tag_columns(names: Sequence[str], config: RowsConfig, prompt: str | None) -> Columns:
    words, tags = _first(WORDS, names), config.label or _first(TAGS, names)
    if prompt is not None:
        words = prompt[1:-1]
        if words not in names:
            raise DataError(f"--prompt {prompt}: the words to tag are one column that holds a list, as in {{tokens}}")
    if words is None or tags is None or tags not in names:
        raise DataError(
            f"the columns are {', '.join(names)}: words are called tokens, or named with --prompt, and their tags tags "
            "or ner_tags, or named with --label"
        )
    return Columns("tokens", "{" + words + "}", None, tags)


def _related_columns(names: Sequence[str], prompt: str | None, completion: str | None) -> Columns:
    if prompt is None:
        prompt, completion = _two(RELATED_PAIRS, names) or (None, None)
    if prompt is None or completion is None:
        raise DataError(
            f"the columns are {', '.join(names)}: name the two texts that belong together with --prompt and "
            "--completion, or call them anchor and positive, or question and answer"
        )
    return Columns("pair", prompt, completion)


def _tagged(row: Row, columns: Columns, answer: bool) -> Record:
    """The words of a row and, where it has them, their tags."""
    (name,) = _named(columns.prompt)
    words = _names(name, row)
    tags: tuple[str, ...] = ()
    if columns.label is not None and (answer or columns.label in row.fields):
        tags = _names(columns.label, row)
        if len(tags) != len(words):
            raise DataError(f"row {row.number} has {len(words)} words in {name!r} and {len(tags)} in {columns.label!r}")
    return Record(row.number, None, " ".join(words), None, " ".join(tags) if tags else None, None, words, tags)


def _names(name: str, row: Row) -> tuple[str, ...]:
    value = _value(name, row)
    if not isinstance(value, list) or not all(isinstance(item, str | int) for item in value):
        raise DataError(f"row {row.number}: column {name!r} must be a list of texts or whole numbers")
    return tuple(map(str, value))


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


def _value(name: str, row: Row) -> Any:
    """What stands in a column; not null."""
    value = row.fields.get(name)
    if _is_null(value):
        state = "is null" if name in row.fields else "is missing"
        raise DataError(f"row {row.number}: column {name!r} {state}: fill it in or leave the row out")
    return value


def _text(name: str, row: Row) -> str:
    """The value of a column as text: numbers and booleans in Python's spelling, lists and objects as JSON."""
    value = _value(name, row)
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # NaN is how tables say null


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
