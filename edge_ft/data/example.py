"""One row in token ids, and the labels that are learned."""

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
    """By task. Tokens or tags: as long as `input_ids`, -100 where there is no loss.
    Text2text-generation: the target sequence, of its own length.
    Text-classification: [class index]; 0.0 or 1.0 for every class (multi-label); [number] (regression).
    Feature-extraction: [0], the rank that the row's own second text should have."""
    prompt_length: int
    """Tokens before the last completion."""
    reference: str
    """The right answer: the text of the last completion, or the name of the class."""
    cut: int
    """Tokens beyond max_length, which were cut off."""
    unlearned_turns: int = 0
    """Assistant turns without loss, because the chat template would write them differently at run time."""
    cut_targets: int = 0
    """Tokens with loss among the tokens that were cut off."""
    token_type_ids: list[int] = field(default_factory=list)
    """As long as `input_ids`, or empty where they are all 0."""
    separate_target: bool = False
    """The answer is a sequence of its own (text2text-generation)."""
    pair_ids: list[int] = field(default_factory=list)
    """Tokens of the second text (feature-extraction)."""

    @property
    def shared_positions(self) -> int:
        """Positions that the prompt takes from those that the answer could use."""
        return 0 if self.separate_target else self.prompt_length

    @property
    def targets(self) -> int:
        """Number of labels that carry loss."""
        return sum(isinstance(label, float) or label != IGNORED for label in self.labels)
