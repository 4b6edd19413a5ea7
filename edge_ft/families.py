"""What differs between model families, a row each.

Everything that is not in a row is read from the model's own config or modules.
"""

from dataclasses import dataclass
from typing import Literal

from edge_ft.config import Task
from edge_ft.errors import ModelError

__all__ = ["FAMILIES", "Family", "Kind", "family_of"]

Kind = Literal["decoder", "encoder", "encoder-decoder"]


@dataclass(frozen=True)
class Family:
    """One `model_type` of a transformers config."""

    name: str
    """`model_type` in config.json."""
    tasks: tuple[Task, ...]
    """What can be tuned and exported; the first is the default."""
    layers: str
    """Dotted name of the list of transformer layers inside the task model."""
    head: tuple[str, ...]
    """Dotted names of the modules that make the output. LoRA leaves them alone; a classifier's stay float and are
    trained in full."""
    kind: Kind
    """decoder: causal, with a KV cache; encoder: bidirectional, one pass; encoder-decoder: one of each."""
    learning_rate: float
    """Peak rate for LoRA, chosen by measurement (docs/decisions/010)."""

    @property
    def decoder(self) -> bool:
        """Whether it is one decoder and nothing else."""
        return self.kind == "decoder"


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", ("text-generation",), "model.layers", ("lm_head",), "decoder", 2e-3),
        Family("bert", ("text-classification",), "bert.encoder.layer", ("bert.pooler", "classifier"), "encoder", 1e-3),
    )
}


def family_of(model_type: str, task: Task | None = None) -> Family:
    """The row of a `model_type`.

    Raises:
        ModelError: no such row, or the family cannot do `task`; the message names what is supported.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(f"{name} ({', '.join(row.tasks)})" for name, row in FAMILIES.items())
        raise ModelError(f"models of type {model_type!r} are not supported; supported are: {known}")
    if task is not None and task not in family.tasks:
        raise ModelError(f"a {model_type} model does {', '.join(family.tasks)} here, not {task}")
    return family
