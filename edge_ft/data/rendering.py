"""How rows become what the model reads, chosen from the settings, the columns of the rows and the model's files."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from edge_ft.config import TEXT_TASKS, Minimum, Pooling, ProblemType, RowsConfig, Task, from_plain
from edge_ft.data.chat import end_of_turn
from edge_ft.data.classes import count_places
from edge_ft.data.clock import clock_at, now, reads_clock
from edge_ft.data.columns import Columns, bare_columns, fill_template, find_columns, find_problem, guess_task
from edge_ft.data.readers import Row, column_names
from edge_ft.data.records import has_answer
from edge_ft.data.tokenizer import TextTokenizer
from edge_ft.errors import DataError, ModelError, UsageError
from edge_ft.families import CLASSIFIERS, Family
from edge_ft.utf8 import read_utf8

__all__ = [
    "Rendering",
    "longest_sequence",
    "make_rendering",
    "plain_rendering",
    "trained_rendering",
    "with_pooling",
    "writes_bos",
]


@dataclass(frozen=True)
class Rendering:
    """Template, columns and special tokens, stored with a run and in its bundle, for training and run time alike."""

    task: Task
    chat_template: str | None
    """Text of the jinja template; None: plain text."""
    columns: Columns
    labels: tuple[str, ...]
    """Classes or tags in the order of the logits; for regression the name of the label column."""
    max_length: Annotated[int, Minimum(1)]
    """Tokens; longer rows are cut at their end. An encoder-decoder: tokens of the source and of the target each."""
    bos: Annotated[int | None, Minimum(0)]
    """Id that is put before a plain prompt; None: none."""
    appended_eos: Annotated[int | None, Minimum(0)]
    """Id that is put after the last completion; None where the chat template ends a turn itself."""
    answers: tuple[str, ...] = ()
    """All answers of the training rows where they are few: `classify` chooses among them (text-generation)."""
    pooling: Pooling | None = None
    """How the last hidden states become one embedding (feature-extraction)."""
    normalize: bool = True
    """Whether embeddings are scaled to length 1."""
    rendered_at: str | None = None
    """Local time (ISO 8601) that a chat template with a clock prints in rows; None: it has none, or was not recorded
    by an earlier version, and prints today's."""
    reads_tools: bool = False
    """Whether the chat template gets tools, calls and reasoning; models of earlier versions were trained without."""

    @property
    def problem_type(self) -> ProblemType | None:
        """What the label column holds (text-classification); None for other tasks."""
        return self.columns.problem_type

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, for `from_dict`."""
        return {**asdict(self), "labels": list(self.labels), "answers": list(self.answers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Rendering":
        """Return the rendering that `to_dict` wrote.

        Raises:
            ModelError: it did not write these values.
        """
        try:
            found = from_plain(cls, {"labels": [], **values}, "rendering")
        except ValueError as error:
            raise ModelError(f"the rendering of the rows is not as tune or export wrote it: {error}") from error
        return found


class ModelFiles(Protocol):
    """What the files of a model say; `edge_ft.models.base_model.Base` is one."""

    @property
    def family(self) -> Family:
        """The model's family."""

    @property
    def max_length(self) -> int:
        """Number of positions."""

    @property
    def problem_type(self) -> ProblemType | None:
        """What the logits of the model's own classification head mean."""

    @property
    def pooling(self) -> tuple[Pooling, bool]:
        """How a text becomes one embedding, and whether embeddings are scaled to length 1."""

    def labels(self, task: Task) -> tuple[str, ...]:
        """Return the classes of the model's own head for `task`, in the order of the logits; () where it has none."""


def make_rendering(
    config: RowsConfig,
    columns: Columns,
    task: Task,
    tokenizer: TextTokenizer,
    max_length: int,
    labels: tuple[str, ...] = (),
) -> Rendering:
    """Choose the chat template, BOS and EOS for rows of these columns.

    Without --chat-template, chats, instructions and prompt/completion columns use the model's own template if it has
    one; texts, and the text of --prompt, stay as they are.

    Args:
        config: The user's settings; only the chat template is read.
        columns: Columns of the rows.
        task: Task of the model.
        tokenizer: Its own chat template and special tokens are read.
        max_length: Tokens of the longest sequence.
        labels: Classes or tags in the order of the logits.

    Returns:
        The rendering, without pooling.

    Raises:
        DataError: chats without a template, a template for rows that are not chats, a broken template, or an
            encoder-decoder and rows that are no pairs of prompt and completion.
        ModelError: the tokenizer names no end-of-sequence token.
    """
    if task not in TEXT_TASKS:
        return Rendering(task, None, columns, labels, max_length, None, None)
    if task == "text2text-generation":
        _refuse_all_but_pairs(config, columns)
        template = None
    else:
        template = _chat_template(config.chat_template, columns, tokenizer)
        if template is not None and end_of_turn(template, tokenizer) is not None:
            time = _time_of(template)
            return Rendering(
                task, template, columns, labels, max_length, None, None, rendered_at=time, reads_tools=True
            )
        if template is None and columns.kind == "messages":
            raise DataError(
                "rows of messages need a chat template and there is none: give one with --chat-template FILE"
            )
    if tokenizer.eos_id is None:
        raise ModelError(
            "the tokenizer names no eos_token, without which a model cannot learn to stop: choose one that does"
        )
    bos = tokenizer.bos_id if template is None and task == "text-generation" else None
    if bos is not None and writes_bos(columns, tokenizer):
        bos = None
    return Rendering(
        task,
        template,
        columns,
        labels,
        max_length,
        bos,
        tokenizer.eos_id,
        rendered_at=_time_of(template),
        reads_tools=template is not None,
    )


def writes_bos(columns: Columns, tokenizer: TextTokenizer) -> bool:
    """Return whether the text of --prompt itself begins with the token that the tokenizer puts before a text."""
    if columns.prompt is None or tokenizer.bos_id is None:
        return False
    return tokenizer.encode(fill_template(columns.prompt, lambda _: "x"))[:1] == [tokenizer.bos_id]


def with_pooling(rendering: Rendering, model: ModelFiles, requested: Pooling | None) -> Rendering:
    """Return the rendering with the `requested` pooling, else with that of the model's files (feature-extraction).

    Raises:
        UsageError: a pooling was requested for another task.
        ModelError: the files define a pooling that cannot be exported.
    """
    if rendering.task != "feature-extraction":
        if requested is not None:
            raise UsageError(f"--pooling is for feature-extraction, and the task is {rendering.task}: leave it out")
        return rendering
    pooling, normalize = (requested, True) if requested is not None else model.pooling
    return replace(rendering, pooling=pooling, normalize=normalize)


def longest_sequence(max_length: int | Literal["auto"] | None, model_limit: int) -> int:
    """Return the longest sequence in tokens: `max_length`, else the model's limit and at most 1024.

    Raises:
        DataError: `max_length` is beyond the model's limit, or is `auto`, which only tune and plan can resolve.
    """
    if max_length == "auto":
        raise DataError("--max-length auto is for tune and plan: give a number of tokens here")
    if max_length is not None and max_length > model_limit:
        raise DataError(f"--max-length {max_length} is beyond the model's {model_limit} positions: give at most that")
    return max_length or min(model_limit, 1024)


def trained_rendering(
    own: Rendering, config: RowsConfig, rows: Sequence[Row], tokenizer: TextTokenizer, model_limit: int
) -> Rendering:
    """Return how a trained model renders `rows`: as in training, unless the settings or the columns differ.

    Rows with other columns than the training rows are mapped anew, with the template and labels of `own`.

    Args:
        own: Rendering of the training rows.
        config: The user's settings; its `max_length` replaces that of `own`.
        rows: Rows to render.
        tokenizer: Tokenizer of the model.
        model_limit: Number of positions of the model.

    Returns:
        The rendering of `rows`.

    Raises:
        DataError: the columns cannot be used, settings contradict the training, or --max-length is beyond
            `model_limit`.
    """
    names = column_names(rows)
    if config.max_length is not None:
        own = replace(own, max_length=longest_sequence(config.max_length, model_limit))
    if config.pooling not in (None, own.pooling):
        raise DataError(f"--pooling {config.pooling}: this model was made with {own.pooling or 'none'}, leave it out")
    if config.problem_type not in (None, own.problem_type):
        raise DataError(
            f"--problem-type {config.problem_type}: this model learned {own.problem_type or own.task}, leave it out"
        )
    if config.class_names not in ((), own.labels):
        raise DataError(f"--class-names: this model's classes are {', '.join(own.labels) or 'none'}, leave it out")
    columns = own.columns
    if config.prompt or config.label or not columns.fits(names):
        columns = find_columns(names, config, own.task)
    if (columns.pair is None) != (own.columns.pair is None):
        raise DataError(
            f"this model reads {'one text' if own.columns.pair is None else 'two texts'}: "
            "name the columns as in its training, see --prompt and --text-pair"
        )
    columns = replace(columns, problem_type=own.problem_type, places=_places(rows, columns, own))
    if config.chat_template is None:
        return replace(own, columns=columns)
    with clock_at(own.rendered_at):
        rendering = make_rendering(config, columns, own.task, tokenizer, own.max_length, own.labels)
    return replace(rendering, answers=own.answers)


def plain_rendering(
    model: ModelFiles,
    config: RowsConfig,
    rows: Sequence[Row],
    tokenizer: TextTokenizer,
    task: Task | None = None,
    labels: tuple[str, ...] | None = None,
) -> Rendering:
    """Return how a model that is neither a run nor a bundle renders `rows`.

    Args:
        model: The files of the model.
        config: The user's settings.
        rows: Rows to render; none: columns with the default names of the task.
        tokenizer: Tokenizer of the model.
        task: Task of the model; default what the columns suggest, see `guess_task`.
        labels: Classes of the head; default the model's own. Rows may name classes by their index in the head.

    Returns:
        The rendering of `rows`.

    Raises:
        DataError: the columns cannot be used, a classifier has no classes, or --max-length is beyond the model's limit.
        ModelError: the files define a pooling that cannot be exported, or no end-of-sequence token.
        UsageError: --pooling for another task than feature-extraction, or as many --class-names as the head has not.
    """
    names = column_names(rows)
    task = task or guess_task(names, config, model.family.kind)
    if labels is None:
        labels = config.class_names or model.labels(task)
        if config.class_names and len(labels) != len(model.labels(task)):
            raise UsageError(
                f"--class-names gives {len(labels)} names, the head has {len(model.labels(task))} outputs: name each"
            )
    if task in CLASSIFIERS and not labels:
        raise DataError("this model has no class names of its own: tune it first")
    problem = config.problem_type or model.problem_type
    if rows:
        columns = find_problem(rows, find_columns(names, config, task), problem)
    else:
        columns = bare_columns(task, problem or "single_label_classification")
    if columns.places not in (0, len(labels)):
        raise DataError(
            f"the column {columns.label} has a 0 or 1 for each of {columns.places} classes, and the model has "
            f"{len(labels)}: {', '.join(labels)}"
        )
    longest = longest_sequence(config.max_length, model.max_length)
    return with_pooling(make_rendering(config, columns, task, tokenizer, longest, labels), model, config.pooling)


def _time_of(template: str | None) -> str | None:
    return now().isoformat() if reads_clock(template) else None


def _places(rows: Sequence[Row], columns: Columns, own: Rendering) -> int:
    """Return `Columns.places` of rows for a model that was trained with the rendering `own`.

    Raises:
        DataError: the labels have another length than the model has classes.
    """
    if columns.label is None or own.problem_type in (None, "regression"):
        return 0
    if not any(has_answer(row, columns) for row in rows):
        return own.columns.places
    # [0, 1] can be two classes, or the second one of two: as in the training.
    found = count_places(rows, columns.label, certain=not own.columns.places)
    if found not in (0, len(own.labels)):
        raise DataError(
            f"the column {columns.label} has a 0 or 1 for each of {found} classes, and the model learned "
            f"{len(own.labels)}: {', '.join(own.labels)}"
        )
    return found


def _refuse_all_but_pairs(config: RowsConfig, columns: Columns) -> None:
    """Refuse what an encoder-decoder does not read.

    Raises:
        DataError: a chat template, or rows that are no pairs of prompt and completion.
    """
    if config.chat_template not in (None, "none"):
        raise DataError(
            "--chat-template is for decoders: an encoder-decoder reads the prompt as --prompt writes it, leave it out"
        )
    if columns.kind == "messages" or columns.prompt is None:
        raise DataError(
            "text2text-generation needs a prompt and a completion, and these rows are "
            f"{'chats' if columns.kind == 'messages' else 'single texts'}: "
            "name the columns with --prompt and --completion"
        )


def _chat_template(requested: str | None, columns: Columns, tokenizer: TextTokenizer) -> str | None:
    """Return the text of the chat template for rows of these columns; None: plain text.

    Raises:
        DataError: rows of only a text, or no such file.
    """
    if requested is None:
        requested = "auto" if columns.kind in ("messages", "prompt_completion", "instruction") else "none"
    elif requested != "none" and columns.kind == "text":
        raise DataError("rows with only a text column have no turns for a chat template: leave --chat-template out")
    if requested == "none":
        return None
    if requested == "auto":
        return tokenizer.chat_template
    if not Path(requested).is_file():
        raise DataError(f"--chat-template {requested} is neither auto, none nor a file: give one of these")
    return read_utf8(Path(requested), DataError)
