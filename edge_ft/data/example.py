"""One row in token ids, and what is learned of it."""

from dataclasses import dataclass, field

__all__ = ["IGNORED", "Example"]

IGNORED = -100
"""Label of a token that carries no loss (PyTorch's ignore_index)."""


@dataclass(slots=True)
class Example:
    """One row in token ids."""

    row: int
    """Number of the row in the user's file."""
    input_ids: list[int]
    labels: list[int] | list[float]
    """What is learned, by task. Tokens of a vocabulary or tags: as long as `input_ids`, -100 where there is no loss.
    Text2text-generation: the target, of its own length.
    Text-classification: the class index alone; 0. or 1. for every class (multi-label); the number (regression).
    Feature-extraction: 0 alone, the rank that the row's own second text should have."""
    prompt_length: int
    """Tokens before the last completion."""
    reference: str
    """The right answer: text of the last completion, or name of the class."""
    cut: int
    """Tokens lost to max_length."""
    unlearned_turns: int = 0
    """Assistant turns without loss, because the chat template would write them differently at run time."""
    cut_targets: int = 0
    """Tokens with loss among those lost to max_length."""
    token_type_ids: list[int] = field(default_factory=list)
    """As long as `input_ids`, or empty where they are all 0."""
    apart: bool = False
    """The answer is a sequence of its own (text2text-generation)."""
    pair_ids: list[int] = field(default_factory=list)
    """Tokens of a text of its own that belongs to this one (feature-extraction)."""

    @property
    def read(self) -> int:
        """Positions that the prompt takes of those an answer has."""
        return 0 if self.apart else self.prompt_length

    @property
    def targets(self) -> int:
        """How many labels carry loss."""
        return sum(isinstance(label, float) or label != IGNORED for label in self.labels)
