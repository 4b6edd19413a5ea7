"""What all settings share: types, headings in --help, checks, and conversion from Python and to YAML or JSON."""

from dataclasses import asdict, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from edge_ft.errors import UsageError

__all__ = [
    "INT8_ACTIVATIONS",
    "TEXT_TASKS",
    "BaseFormat",
    "Group",
    "Memory",
    "Pooling",
    "ProblemType",
    "Task",
    "Threads",
    "Weights",
    "accept_python_values",
    "as_plain",
    "check",
    "check_minimum",
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
BaseFormat = Literal["int4", "int8", "nf4", "bf16", "fp32"]
Memory = Literal["high", "normal", "low"]
Weights = Literal["int4", "int8", "int8-dynamic", "int8-static", "fp16", "fp32"]
INT8_ACTIVATIONS: tuple[Weights, ...] = ("int8-dynamic", "int8-static")
"""Weights that are multiplied with activations in int8, at accuracy level 4 and no other."""
Threads = Annotated[int | None, Group.RESOURCES]


def as_plain(config: Any) -> dict[str, Any]:
    """A config as plain YAML/JSON values (paths as text, tuples as lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return {key: plain(value) for key, value in asdict(config).items()}


def accept_python_values(config: Any) -> None:
    """Convert what Python callers may give: text for paths, paths for text, lists for tuples."""
    types = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, Path | str):
            value = Path(value) if types[field.name] in (Path, Path | None) else str(value)
        object.__setattr__(config, field.name, value)


def check(holds: bool, message: str) -> None:
    """Refuse a value.

    Raises:
        UsageError: `holds` is False; with `message`.
    """
    if not holds:
        raise UsageError(message)


def check_minimum(config: Any, minimum: int, *names: str) -> None:
    """Refuse values below `minimum` in the fields of these names; None is accepted.

    Raises:
        UsageError: a value is too small; the message names the flag.
    """
    for name in names:
        value = getattr(config, name)
        check(value is None or value >= minimum, f"--{name.replace('_', '-')} must be at least {minimum}")
