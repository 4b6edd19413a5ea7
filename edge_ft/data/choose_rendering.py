"""How rows are rendered: as a run or bundle was trained to, or as the settings and the rows' columns say."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

from edge_ft.config import Pooling, ProblemType, RowsConfig, Task
from edge_ft.data.chat import end_of_turn
from edge_ft.data.classes import class_numbers
from edge_ft.data.columns import Columns, find_columns, find_problem, guess_task
from edge_ft.data.encoders import ENCODERS
from edge_ft.data.readers import Row, column_names
from edge_ft.data.records import find_labels
from edge_ft.data.rendering import Rendering
from edge_ft.data.seq2seq import check_pairs
from edge_ft.data.tokenizer import TextTokenizer
from edge_ft.errors import DataError, ModelError, UsageError
from edge_ft.families import CLASSIFIERS, Kind

__all__ = ["longest_sequence", "make_rendering", "rendering_for", "with_pooling"]


class HasPooling(Protocol):
    """A model whose files say how it makes one vector of a text."""

    @property
    def pooling(self) -> tuple[Pooling, bool]:
        """The pooling, and whether vectors are normalized to length 1."""


def make_rendering(
    config: RowsConfig,
    columns: Columns,
    task: Task,
    tokenizer: TextTokenizer,
    max_length: int,
    labels: tuple[str, ...] = (),
) -> Rendering:
    """Choose template, BOS and EOS for rows of these columns.

    Without --chat-template, chats, instructions and prompt/completion columns get the model's own template if
    it has one; texts and what --prompt writes stay as written.

    Raises:
        DataError: chats without a template, a template for rows that are no chat, or a broken one.
        ModelError: the tokenizer names no end-of-sequence token.
    """
    if task in ENCODERS:
        return Rendering(task, None, columns, labels, max_length, None, None)
    if task == "text2text-generation":
        check_pairs(columns, config.chat_template)
        if tokenizer.eos_id is None:
            raise ModelError("the tokenizer names no eos_token, so a model could not learn to stop")
        return Rendering(task, None, columns, labels, max_length, None, tokenizer.eos_id)
    chosen = config.chat_template
    if chosen is None:
        chosen = "auto" if columns.kind in ("messages", "prompt_completion", "instruction") else "none"
    elif chosen != "none" and columns.kind == "text":
        raise DataError("rows with only a text column have no turns for a chat template: leave --chat-template out")
    if chosen == "auto":
        template = tokenizer.chat_template
    elif chosen == "none":
        template = None
    elif Path(chosen).is_file():
        template = Path(chosen).read_text(encoding="utf-8")
    else:
        raise DataError(f"--chat-template {chosen} is neither auto, none nor a file")
    if template is not None and end_of_turn(template, tokenizer) is not None:
        return Rendering(task, template, columns, labels, max_length, None, None)
    if template is None and columns.kind == "messages":
        raise DataError("rows of messages need a chat template, and none applies: give one with --chat-template FILE")
    if tokenizer.eos_id is None:
        raise ModelError("the tokenizer names no eos_token, so a model could not learn to stop")
    return Rendering(
        task,
        template,
        columns,
        labels,
        max_length,
        tokenizer.bos_id if template is None else None,
        tokenizer.eos_id,
    )


def with_pooling(rendering: Rendering, model: HasPooling, asked: Pooling | None) -> Rendering:
    """The rendering of an embedder with how it makes one vector of a text: as `asked`, else as its own files say.

    Raises:
        UsageError: `asked` of another task.
        ModelError: the files say what cannot be exported.
    """
    if rendering.task != "feature-extraction":
        if asked is not None:
            raise UsageError(f"--pooling is for feature-extraction, and this is {rendering.task}")
        return rendering
    pooling, normalize = (asked, True) if asked is not None else model.pooling
    return replace(rendering, pooling=pooling, normalize=normalize)


def longest_sequence(max_length: int | Literal["auto"] | None, model_limit: int) -> int:
    """The longest sequence in tokens: what was asked for, within what the model allows; else at most 1024.

    Raises:
        DataError: more was asked for than the model allows, or `auto`, which only a tune finds out.
    """
    if max_length == "auto":
        raise DataError("--max-length auto is for tune and plan: give a number of tokens here")
    if max_length is not None and max_length > model_limit:
        raise DataError(f"--max-length {max_length} is beyond the model's {model_limit} positions")
    return max_length or min(model_limit, 1024)


def rendering_for(
    config: RowsConfig,
    rows: Sequence[Row],
    tokenizer: TextTokenizer,
    own: Rendering | None,
    *,
    kind: Kind = "decoder",
    task: Task | None = None,
    model_limit: int,
    labels: tuple[str, ...] = (),
    problem_type: ProblemType | None = None,
) -> Rendering:
    """How `rows` are rendered: as `own` says where its columns are there and nothing else was asked for.

    Rows with other columns than the training rows had are mapped anew, with the template and labels of
    `own`. A `config.max_length` replaces the length of `own`; without `own` see `longest_sequence`.

    Raises:
        DataError: the rows have no columns that can be used, or --max-length is beyond `model_limit`.
    """
    names = column_names(rows)
    if own is not None:
        if config.max_length is not None:
            own = replace(own, max_length=longest_sequence(config.max_length, model_limit))
        asked = any(
            value is not None
            for value in (
                *(config.prompt, config.completion, config.label, config.chat_template, config.text_pair),
                *(config.problem_type, config.pooling),
            )
        )
        if not asked and own.columns.fits(names):
            return own
        if config.pooling not in (None, own.pooling):
            raise DataError(f"--pooling {config.pooling}: this model was made with {own.pooling or 'none'}")
        if config.problem_type not in (None, own.problem_type):
            raise DataError(f"--problem-type {config.problem_type}: this model was trained for {own.problem_type}")
        mapped = config.prompt or config.label or not own.columns.fits(names)
        columns = find_columns(names, config, own.task) if mapped else own.columns
        if (columns.pair is None) != (own.columns.pair is None):
            texts = "one text" if own.columns.pair is None else "two texts"
            raise DataError(
                f"this model reads {texts}: name the columns as it was trained, see --prompt and --text-pair"
            )
        columns = replace(columns, problem_type=own.problem_type)
        if config.chat_template is None:
            return replace(own, columns=columns)
        anew = make_rendering(config, columns, own.task, tokenizer, own.max_length, own.labels)
        return replace(anew, answers=own.answers)
    task = task or guess_task(names, config, kind)
    if task in CLASSIFIERS and not labels:
        raise DataError("this model has no class names of its own: tune it first")
    longest = longest_sequence(config.max_length, model_limit)
    columns = find_problem(rows, find_columns(names, config, task), config.problem_type or problem_type)
    numbers = class_numbers(labels)
    if task in CLASSIFIERS and columns.problem_type != "regression":
        found = set(find_labels(rows, columns))
        if not found <= set(labels) and found <= set(numbers):
            labels = numbers  # rows that name classes by their place in the head
    return make_rendering(config, columns, task, tokenizer, longest, labels)
