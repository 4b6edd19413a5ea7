"""How rows become what the model reads: stored with a run and in its bundle."""

from dataclasses import asdict, dataclass
from typing import Any

from edge_ft.config import Pooling, ProblemType, Task
from edge_ft.data.columns import Columns

__all__ = ["Rendering"]


@dataclass(frozen=True)
class Rendering:
    """Template, columns and special tokens, the same in training and at run time."""

    task: Task
    chat_template: str | None
    """Text of the jinja template; None: plain text."""
    columns: Columns
    labels: tuple[str, ...]
    """Classes or tags in the order of the logits; for regression the name of the label column."""
    max_length: int
    """Tokens; longer rows are cut at their end. An encoder-decoder: tokens of the source and of the target each."""
    bos: int | None
    """Id that is put before a plain prompt; None: none."""
    appended_eos: int | None
    """Id that is put after the last completion; None where the chat template ends a turn itself."""
    answers: tuple[str, ...] = ()
    """All answers of the training rows where they are few: `classify` chooses among them (text-generation)."""
    pooling: Pooling | None = None
    """How the last hidden states become one embedding (feature-extraction)."""
    normalize: bool = True
    """Whether embeddings are scaled to length 1."""

    @property
    def problem_type(self) -> ProblemType | None:
        """What the label column holds (text-classification); None for other tasks."""
        return self.columns.problem_type

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, for `from_dict`."""
        return {**asdict(self), "labels": list(self.labels), "answers": list(self.answers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Rendering":
        """Return the rendering that `to_dict` wrote."""
        names = {name: tuple(values.get(name, ())) for name in ("labels", "answers")}
        return cls(**{**values, **names, "columns": Columns(**values["columns"])})
