"""What the settings of several commands share: types, headings in --help, checks, and how rows are read."""

import math
import re
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from edge_ft.errors import UsageError

__all__ = [
    "ABOVE_0",
    "INT8_ACTIVATIONS",
    "TEXT_TASKS",
    "TOKEN_TASKS",
    "BaseFormat",
    "Group",
    "Maximum",
    "Memory",
    "Minimum",
    "Pooling",
    "ProblemType",
    "RowsConfig",
    "Seed",
    "Task",
    "Threads",
    "Weights",
    "accept_python_values",
    "as_plain",
    "check",
    "check_minimums",
    "unescape",
]


class Group(Enum):
    """The headings under which --help lists the options, in this order. A field names its own by `Annotated`."""

    INPUT = "Model and data"
    ROWS = "Rows"
    LORA = "LoRA"
    BASE = "Weights of the base"
    BUNDLE = "Bundle"
    GATE = "Quality gate"
    TRAINING = "Training"
    EVALUATION = "Evaluation"
    GENERATION = "Generation"
    MEASUREMENT = "Measurement"
    BUDGETS = "Budgets (exit code 1 where one is missed)"
    RESOURCES = "Memory and threads"
    CHECKPOINTS = "Checkpoints"
    FILES = "Settings from files"
    OUTPUT = "Output"


@dataclass(frozen=True)
class Minimum:
    """The lowest value of a setting, as metadata of its type."""

    value: int
    excluded: bool = False
    """Whether only greater values are accepted."""


@dataclass(frozen=True)
class Maximum:
    """The highest value of a setting, as metadata of its type."""

    value: int


ABOVE_0 = Minimum(0, excluded=True)
Seed = Annotated[int, Minimum(0), Maximum(2**32 - 1)]
"""What numpy and torch both take as a seed, on every system."""


Task = Literal[
    "text-generation",
    "text2text-generation",
    "text-classification",
    "token-classification",
    "feature-extraction",
    "fill-mask",
]
"""As transformers' pipelines call them."""
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
"""What a text-classification model's outputs are, as transformers' configs call it."""
Pooling = Literal["mean", "cls"]
TEXT_TASKS: tuple[Task, ...] = ("text-generation", "text2text-generation")
"""Tasks whose answer is generated text; the loss is over its tokens."""
TOKEN_TASKS: tuple[Task, ...] = (*TEXT_TASKS, "fill-mask")
"""Tasks whose loss is a mean over tokens; of others over targets, which are classes, numbers or texts."""
BaseFormat = Literal["int4", "int8", "nf4", "bf16", "fp32"]
Memory = Literal["high", "normal", "low"]
Weights = Literal["int4", "int8", "int8-dynamic", "int8-static", "fp16", "fp32"]
INT8_ACTIVATIONS: tuple[Weights, ...] = ("int8-dynamic", "int8-static")
"""Weights that are multiplied with activations in int8, at accuracy level 4 and no other."""
ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
Threads = Annotated[int | None, Group.RESOURCES, Minimum(1), Maximum(1024)]


MAY_HOLD_COMMAS = ("class_names",)
"""Options whose values are used as they are where there are several; a single one is split at its commas."""


def as_plain(config: Any) -> dict[str, Any]:
    """A config as plain YAML/JSON values (paths as text, tuples as lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return {key: plain(value) for key, value in asdict(config).items()}


def accept_python_values(config: Any) -> None:
    """Convert what callers may give: text for paths, paths for text, lists for tuples, words joined by commas."""
    types = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in MAY_HOLD_COMMAS and len(value) > 1:
            value = tuple(map(str, value))
        elif types[field.name] == tuple[str, ...]:  # --peers a,b is --peers a b
            value = tuple(part for text in value for part in text.split(",") if part)
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, Path | str):
            value = Path(value) if types[field.name] in (Path, Path | None) else str(value)
        object.__setattr__(config, field.name, value)


def unescape(text: str) -> str:
    r"""Replace the escapes `\n`, `\t` and `\\` by newline, tab and backslash.

    A shell passes them on as two characters. Every option that holds a text accepts them; texts from files and standard
    input are used as they are.

    Returns:
        The text; another character after a backslash stays as it is.
    """
    return re.sub(r"\\([nt\\])", lambda escape: ESCAPES[escape[1]], text)


def check(holds: bool, message: str) -> None:
    """Refuse a value.

    Raises:
        UsageError: `holds` is False; with `message`.
    """
    if not holds:
        raise UsageError(message)


def check_minimums(config: Any) -> None:
    """Refuse numbers below the `Minimum` or above the `Maximum` of their field, or not finite; None is accepted.

    Raises:
        UsageError: a value is too small, too large or not finite; the message names the flag.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value, flag = getattr(config, name), f"--{name.replace('_', '-')}"
        finite = not isinstance(value, float) or math.isfinite(value)
        check(finite, f"{flag} is {value}: it must be a finite number")
        for bound in getattr(hint, "__metadata__", ()) if value is not None else ():
            if isinstance(bound, Minimum):
                how = "above" if bound.excluded else "at least"
                holds = value > bound.value or (value == bound.value and not bound.excluded)
                check(holds, f"{flag} must be {how} {bound.value}")
            elif isinstance(bound, Maximum):
                check(value <= bound.value, f"{flag} must be at most {bound.value}")


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """How the columns of a file become the text that the model reads."""

    prompt: Annotated[str | None, Group.ROWS] = None
    r"""Template of the prompt, e.g. "{passage} {question}"; in all templates \n is a newline, \t a tab, and a doubled
    backslash one backslash."""
    completion: Annotated[str | None, Group.ROWS] = None
    """Template of the expected answer, e.g. "{answer}"; needs --prompt."""
    text_pair: Annotated[str | None, Group.ROWS] = None
    """Template of a second text that the model reads with the first, e.g. "{passage}" (text-classification)."""
    label: Annotated[str | None, Group.ROWS] = None
    """Column with a class, a list of classes or a number (text-classification), or with a tag for each word
    (token-classification)."""
    class_names: Annotated[tuple[str, ...], Group.ROWS] = ()
    """Names of the classes or tags in the order of the model's outputs, or of the numbers in the rows, where the model
    has none: a,b,c, or one with each --class-names where a name holds a comma."""
    problem_type: Annotated[ProblemType | None, Group.ROWS] = None
    """Kind of the labels (text-classification); default: multi-label for lists, regression if any number is
    not an integer, else single-label."""
    pooling: Annotated[Pooling | None, Group.ROWS] = None
    """Pooling of the token embeddings (feature-extraction); default: as the model's files say, else mean."""
    chat_template: Annotated[str | None, Group.ROWS] = None
    """Chat template: auto (the model's own), none, or a Jinja file; default: auto, or none with --prompt."""
    max_length: Annotated[int | Literal["auto"] | None, Group.ROWS] = None
    """Maximum tokens per row, longer rows are truncated; auto (tune and plan only) covers 99% of the rows; default: the
    model's limit, at most 1024."""

    def __post_init__(self) -> None:
        accept_python_values(self)
        check_minimums(self)
        check(
            self.max_length in (None, "auto") or (isinstance(self.max_length, int) and self.max_length >= 8),
            "--max-length must be at least 8 tokens, or auto",
        )
        object.__setattr__(self, "class_names", tuple(name.strip() for name in self.class_names))
        check(
            len(set(self.class_names) - {""}) == len(self.class_names) != 1,
            "--class-names must be at least two different names",
        )
        check(
            self.completion is None or self.prompt is not None,
            "--completion needs --prompt: give both templates",
        )
        check(
            self.text_pair is None or self.prompt is not None,
            "--text-pair needs --prompt: give the templates of both texts",
        )
