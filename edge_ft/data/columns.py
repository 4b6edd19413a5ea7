"""Which columns of the rows hold the prompt, the answer, the class or the chat.

They are named by text templates: `{column}` stands for a column's value, `{column.key.0}` for a text inside it, and
`{{` and `}}` are braces.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edge_ft.config import ProblemType, RowsConfig, Task, unescape
from edge_ft.data.classes import count_places, guess_problem
from edge_ft.data.filled import Filled
from edge_ft.data.readers import Row
from edge_ft.data.values import column_of
from edge_ft.errors import DataError, did_you_mean
from edge_ft.families import Kind

__all__ = [
    "Columns",
    "bare_columns",
    "chat_columns",
    "columns_in",
    "fill_template",
    "find_columns",
    "find_problem",
    "guess_task",
    "match_template",
    "with_extras",
]

Form = Literal["messages", "prompt_completion", "instruction", "text", "text_label", "template", "tokens", "pair"]
SENTENCE_PAIRS = (("text", "text_pair"), ("question", "passage"), ("premise", "hypothesis"), ("sentence1", "sentence2"))
"""Names of two columns whose texts are classified together."""
CONTRASTIVE_PAIRS = (
    *(("anchor", "positive"), ("question", "answer"), ("query", "passage"), ("prompt", "completion")),
    ("instruction", "output"),
)
"""Names of two columns that hold a text and the text that should be retrieved for it."""
WORDS, TAGS = ("tokens", "words"), ("tags", "ner_tags", "pos_tags")
"""Names of the columns that hold a list of words and one tag per word."""
CONVERSATIONS = ("messages", "conversations", "conversation")
"""Names of the column that holds a conversation as a list of turns."""
ANSWERS = ("summary", "highlights", "answer", "answers", "response", "output", "completion", "target")
"""Names of columns that are an answer to the text beside them."""
# A template's parts: a doubled brace, a column in braces, a brace that belongs to neither.
_PART = re.compile(r"(\{\{|\}\}|\{[^{}]*\}|[{}])")


@dataclass(frozen=True)
class Columns:
    """How a row becomes a record; `prompt`, `completion` and `pair` are templates that name columns as `{column}`."""

    kind: Form
    prompt: str | None = None
    """Template of the prompt, or of the text to classify; tokens: the column of the words."""
    completion: str | None = None
    """Template of the text that carries the loss; pair: of the text that should be retrieved for the first."""
    label: str | None = None
    """Column of the class, the classes or the number (text-classification), or of the tags (token-classification)."""
    pair: str | None = None
    """Template of a second text that is classified together with the first."""
    problem_type: ProblemType | None = None
    """What the label column holds (text-classification)."""
    places: int = 0
    """Length of labels that are written as a 0 or 1 for every class; 0: labels name classes."""
    messages: str = "messages"
    """Column of the turns (kind messages)."""
    system: str | None = None
    """Column of the system message, of rows that become chats."""
    history: str | None = None
    """Column of earlier pairs of a prompt and its answer, of rows that become chats."""
    tools: str | None = None
    """Column of the functions that the assistant may call, of rows that become chats."""

    def fits(self, names: Sequence[str], answer: bool = True) -> bool:
        """Return whether rows with the columns `names` have every column that `record` needs."""
        if self.prompt is None and not answer and self.kind != "messages":
            return False  # rows of only a text have no prompt
        return self.needed(names, answer) <= set(names)

    def needed(self, names: Collection[str], answer: bool = True) -> set[str]:
        """Return the columns of `names` that every row needs, with or without those of its answer."""
        if self.kind == "messages":
            return {self.messages}
        templates = columns_in(self.prompt) | columns_in(self.pair) | (columns_in(self.completion) if answer else set())
        return {column_of(name, names) for name in templates} | ({self.label} if self.label and answer else set())

    def read(self, names: Collection[str]) -> set[str]:
        """Return the columns of `names` that `record` reads where a row has them."""
        extra = {self.system, self.history, self.tools} - {None}
        return self.needed(names) | {str(name) for name in extra} | ({"input"} if self.kind == "instruction" else set())


TEXT_COLUMNS = {
    ("messages",): Columns("messages"),
    ("prompt", "completion"): Columns("prompt_completion", "{prompt}", "{completion}"),
    ("instruction", "output"): Columns("instruction", "{instruction}", "{output}"),
    ("text", "label"): Columns("text_label", "{text}\n", "{label}"),  # a separator between the text and its class
    ("text",): Columns("text", None, "{text}"),
}
"""Columns that a decoder learns from, by their names; the first that are all there are used."""


def guess_task(names: Sequence[str], config: RowsConfig, kind: Kind) -> Task:
    """Return the task that the kind of model and the column names suggest.

    A decoder without --label: text-generation. An encoder-decoder: text2text-generation. An encoder: tagged words,
    a text with a label, a pair of texts, or a text alone.

    Raises:
        DataError: an encoder, and no columns that it can learn from.
    """
    if kind == "encoder-decoder":
        return "text2text-generation"
    if config.label is None and kind == "decoder":
        return "text-generation"
    if _first(WORDS, names) and (config.label or _first(TAGS, names)):
        return "token-classification"
    if config.label is None and "label" not in names:
        if config.completion is not None or (config.prompt is None and _two(CONTRASTIVE_PAIRS, names)):
            return "feature-extraction"
        if config.prompt is None and list(names) == ["text"]:
            return "fill-mask"
    _label_column(names, config)
    return "text-classification"


def find_columns(names: Sequence[str], config: RowsConfig, task: Task) -> Columns:
    """Return the columns that the user's templates name, or that are recognised by name.

    In --prompt, --completion and --text-pair `{column}` is the column's value, `{{` and `}}` are braces, and the
    escapes `\\n`, `\\t` and `\\\\` are newline, tab and backslash, since a shell passes them on as two characters.
    text + label for text-generation: the model learns to write the label on the line below the text.

    Args:
        names: All columns of the rows.
        config: Templates and label column that the user named.
        task: Task of the model.

    Raises:
        DataError: a named column is missing, or no known set of columns was found.
    """
    prompt, completion, pair = (
        None if text is None else unescape(text) for text in (config.prompt, config.completion, config.text_pair)
    )
    for flag, template in (("--prompt", prompt), ("--completion", completion), ("--text-pair", pair)):
        _check_template(template, flag, names)
    if task == "text-classification":
        if completion is not None:
            raise DataError("--completion is for text-generation: name the column of the class with --label")
        label = _label_column(names, config)
        if prompt is None:
            prompt, pair = _two(SENTENCE_PAIRS, names) or (_text_template(names, label), None)
        return Columns("text_label", prompt, None, label, pair)
    for flag, value in (("--text-pair", config.text_pair), ("--problem-type", config.problem_type)):
        if value is not None:
            raise DataError(f"{flag} is for text-classification, and the task is {task}: leave it out")
    if task == "token-classification":
        return _tag_columns(names, config, prompt)
    if config.label is not None:
        raise DataError(f"--label {config.label} is for text-classification: give --completion to learn its text")
    if task == "feature-extraction":
        if prompt is None:
            prompt, completion = _two(CONTRASTIVE_PAIRS, names) or (None, None)
        if prompt is None or completion is None:
            raise DataError(
                f"the columns are {', '.join(names)}: name a text and the text that should be retrieved for it with "
                "--prompt and --completion, or call them anchor and positive, or question and answer"
            )
        return Columns("pair", prompt, completion)
    if task == "fill-mask":
        return Columns("template", prompt or _text_template(names, ""))
    if prompt is not None:
        return Columns("template", prompt, completion)
    return _text_columns(names, task)


def chat_columns(names: Sequence[str]) -> Columns | None:
    """Return the columns of conversations that are lists of turns, by their names; None where there are none."""
    turns = _first(CONVERSATIONS, names)
    return None if turns is None else with_extras(Columns("messages", messages=turns), names)


def find_problem(rows: Sequence[Row], columns: Columns, requested: ProblemType | None) -> Columns:
    """Return `columns` with the `requested` problem type, or the one that the values of the label column suggest.

    Raises:
        DataError: the labels of some rows are of another kind than those of others.
    """
    if columns.kind != "text_label" or columns.label is None:
        return columns
    problem = requested or guess_problem(rows, columns.label)
    places = 0 if problem == "regression" else count_places(rows, columns.label)
    return replace(columns, problem_type=problem, places=places)


def bare_columns(task: Task, problem_type: ProblemType | None = None) -> Columns:
    """Return the default columns of a task, for a model that comes without rows."""
    known: dict[Task, Columns] = {
        "text-classification": Columns("text_label", "{text}", None, "label", problem_type=problem_type),
        "token-classification": Columns("tokens", "{tokens}", None, "tags"),
        "fill-mask": Columns("template", "{text}"),
        "feature-extraction": Columns("pair", "{text}", "{positive}"),
    }
    return known.get(task, Columns("prompt_completion", "{prompt}", "{completion}"))


def fill_template(template: str, value_of: Callable[[str], str]) -> Filled:
    """Return the template with each column replaced by `value_of` its name."""
    parts = _split(template)
    parts[1::2] = map(value_of, parts[1::2])
    return Filled(parts)


def match_template(template: str, text: str) -> tuple[str, ...] | None:
    """Return the value of each column in a text that `template` could have produced; None for any other text."""
    found = re.fullmatch("(.*)".join(map(re.escape, _split(template)[::2])), text, re.DOTALL)
    return None if found is None else found.groups()


def _check_template(template: str | None, flag: str, names: Sequence[str]) -> None:
    """Check that a template, given with `flag`, names only columns that exist.

    Raises:
        DataError: an unknown column or a single brace.
    """
    for part in _PART.findall(template or ""):
        if part in ("{", "}"):
            raise DataError(f"{flag} has a lone {part}: write {{{{ and }}}} for braces that are text")
        inside = re.fullmatch(r"[^.]+(\.[^\W_]\w*)+", part[1:-1]) and column_of(part[1:-1], names) in names
        if part not in ("{{", "}}") and part[1:-1] not in names and not inside:
            raise DataError(
                f"{flag} names no column with {part}{did_you_mean(part[1:-1], list(names))}: "
                f"the columns are {', '.join(names)}; write {{{{ and }}}} for braces that are text"
            )


def columns_in(template: str | None) -> set[str]:
    """Return the columns that a template names; none for None."""
    return {part[1:-1] for part in _PART.findall(template or "") if part not in ("{{", "}}")}


def _split(template: str) -> list[str]:
    """Return the template's literal texts and its column names in turn, a literal text first and last."""
    parts = [""]
    for index, part in enumerate(_PART.split(template)):
        if index % 2 and part not in ("{{", "}}"):
            parts += [part[1:-1], ""]
        else:
            parts[-1] += part[0] if index % 2 else part
    return parts


def with_extras(columns: Columns, names: Sequence[str]) -> Columns:
    """Return the columns of a chat, or of a prompt, with those of `names` that belong to a conversation."""
    history = "history" if columns.kind != "messages" and "history" in names else None
    tools = "tools" if "tools" in names else None
    return replace(columns, system=_first(("system", "system_prompt"), names), history=history, tools=tools)


def _text_columns(names: Sequence[str], task: Task) -> Columns:
    """Return the columns that a model learns to write from, by their names.

    Raises:
        DataError: no set of columns is known, or it is not clear which is to be learned.
    """
    if task == "text-generation" and (chat := chat_columns(names)):
        return chat
    found = next((columns for needed, columns in TEXT_COLUMNS.items() if set(needed) <= set(names)), None)
    if found is None and {"chosen", "rejected"} <= set(names):
        prompt = '--prompt "{prompt}"' if "prompt" in names else "--prompt with the column of the prompt,"
        raise DataError(
            "these rows are preferences (chosen, rejected), and a model is trained on one answer for each prompt: to "
            f'train on the chosen ones give {prompt} --completion "{{chosen}}", or, where they are lists of messages, '
            "call their column messages and remove the others"
        )
    if found is None:
        raise DataError(
            f"the columns are {', '.join(names)}: name yours with --prompt and --completion, "
            "or call them messages, conversations, prompt and completion, instruction and output, or text"
        )
    if found.kind == "text" and (answer := _first(ANSWERS, names)):
        raise DataError(
            f"the columns are {', '.join(names)}: to learn the {answer} of each text give "
            f'--prompt "{{text}}" --completion "{{{answer}}}"; to learn the text alone give '
            '--prompt "" --completion "{text}"'
        )
    extendable = task == "text-generation" and found.kind in ("prompt_completion", "instruction")
    return with_extras(found, names) if extendable else found


def _label_column(names: Sequence[str], config: RowsConfig) -> str:
    name = config.label or "label"
    if name not in names:
        raise DataError(
            f"no column {name!r} holds the class{did_you_mean(name, list(names))}: "
            f"name it with --label; the columns are {', '.join(names)}"
        )
    return name


def _first(known: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in known if name in names), None)


def _two(known: Sequence[tuple[str, str]], names: Sequence[str]) -> tuple[str, str] | None:
    """Return templates of the first pair of `known` columns of which both are in `names`."""
    return next((("{" + a + "}", "{" + b + "}") for a, b in known if a in names and b in names), None)


def _tag_columns(names: Sequence[str], config: RowsConfig, prompt: str | None) -> Columns:
    words, tags = _first(WORDS, names), config.label or _first(TAGS, names)
    if prompt is not None:
        words = prompt[1:-1]
        if words not in names:
            raise DataError(
                f"--prompt {prompt} must name only the column that holds the list of words to tag, as in {{tokens}}"
            )
    if words is None or tags is None or tags not in names:
        raise DataError(
            f"the columns are {', '.join(names)}: call the words tokens or name them with --prompt, "
            "and call their tags tags or ner_tags or name them with --label"
        )
    return Columns("tokens", "{" + words + "}", None, tags)


def _text_template(names: Sequence[str], label: str) -> str:
    others = [name for name in names if name != label]
    if "text" in others:
        return "{text}"
    if len(others) != 1:
        raise DataError(f'which of {", ".join(names)} is the text to classify? Name it with --prompt "{{column}}"')
    return "{" + others[0] + "}"
