"""What of a run decides how its rows are read, kept with the run and in its bundle."""

from dataclasses import asdict, dataclass
from typing import Any

from edge_ft.config import Pooling, ProblemType, Task
from edge_ft.data.columns import Columns

__all__ = ["Rendering"]


@dataclass(frozen=True)
class Rendering:
    """What a run was trained with and its bundle is asked with."""

    task: Task
    chat_template: str | None
    """Text of the jinja template; None is plain text."""
    columns: Columns
    labels: tuple[str, ...]
    """Classes or tags in the order of the logits; of a regression the name of its column."""
    max_length: int
    """Tokens; longer rows are cut at their end. Of an encoder-decoder, source and target may be so long each."""
    bos: int | None
    """Id put in front of a plain prompt."""
    appended_eos: int | None
    """Id put behind the last completion; None where the chat template ends a turn itself."""
    answers: tuple[str, ...] = ()
    """The few answers that its rows had, if they were few: what `classify` chooses from (text-generation)."""
    pooling: Pooling | None = None
    """What of a text's last hidden states is its embedding (feature-extraction)."""
    normalize: bool = True
    """Whether an embedding has length 1."""

    @property
    def problem_type(self) -> ProblemType | None:
        """What the outputs of a text-classification model are; None for other tasks."""
        return self.columns.problem_type

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for `from_dict`."""
        return {**asdict(self), "labels": list(self.labels), "answers": list(self.answers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Rendering":
        """What `to_dict` gave."""
        names = {name: tuple(values.get(name, ())) for name in ("labels", "answers")}
        return cls(**{**values, **names, "columns": Columns(**values["columns"])})
