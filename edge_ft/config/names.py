"""The types of settings that several commands share."""

from typing import Annotated, Literal

from edge_ft.config.fields import Group

__all__ = [
    "INT8_ACTIVATIONS",
    "TEXT_TASKS",
    "BaseFormat",
    "Memory",
    "Pooling",
    "ProblemType",
    "Task",
    "Threads",
    "Weights",
]

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
