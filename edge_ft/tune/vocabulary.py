"""`--vocabulary rows`: the base of a run has the tokens that its training rows and a general text need."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_ft.artifacts import RunFolder
from edge_ft.config import Task, TuneConfig
from edge_ft.data import IGNORED, Example
from edge_ft.progress import Progress

if TYPE_CHECKING:
    from edge_ft.models.base_model import Base
    from edge_ft.models.vocabulary import Vocabulary
    from edge_ft.tune.prepare import Prepared

__all__ = ["compare_tokens", "find_vocabulary"]

LABELS_ARE_TOKENS: tuple[Task, ...] = ("text-generation", "text2text-generation", "fill-mask")
"""Tasks whose labels are token ids: those of the others are classes or numbers."""


def find_vocabulary(config: TuneConfig, base: "Base", whole: "Prepared", resumed: bool) -> "Vocabulary":
    """Return the tokens that the base of a run keeps: those that an interrupted run has chosen, else by its rows.

    Args:
        config: With the run folder.
        base: The whole model.
        whole: The rows, in its tokens.
        resumed: Whether the folder holds an interrupted run.

    Returns:
        The tokens.

    Raises:
        ModelError: a kind of tokenizer that cannot be cut, or a damaged record of the interrupted run.
    """
    from edge_ft.models.vocabulary import Vocabulary, choose_vocabulary

    recorded = RunFolder(config.out).vocabulary
    if resumed and recorded.is_file():
        return Vocabulary.read(recorded)
    train = whole.examples["train"]
    used = {at for row in train for ids in (row.input_ids, row.pair_ids) for at in ids}
    if whole.task in LABELS_ARE_TOKENS:
        used |= {int(at) for row in train for at in row.labels if at != IGNORED}
    return choose_vocabulary(base, used)


def compare_tokens(base: "Base", before: "Prepared", after: "Prepared", progress: Progress) -> dict[str, Any]:
    """Return how many tokens are kept, and how many the rows take.

    Args:
        base: The cut one.
        before: The rows in tokens of the whole model.
        after: The same rows in those that are kept.
        progress: Gets both in a sentence.

    Returns:
        `kept`, `of`, and `tokens_per_row` of each split before and after.
    """
    from edge_ft.models.vocabulary import RECORD, Vocabulary

    vocabulary = Vocabulary.read(base.path / RECORD)
    rows = {
        split: {"before": _mean_length(before.examples[split]), "after": _mean_length(after.examples[split])}
        for split in before.examples
        if before.examples[split]
    }
    found = {"kept": len(vocabulary.rows), "of": vocabulary.tokens, "tokens_per_row": rows}
    shown = rows["validation"]
    progress.say(
        f"--vocabulary rows: {found['kept']} of {found['of']} tokens are kept; a validation row takes "
        f"{shown['after']:.1f} tokens, before {shown['before']:.1f}"
    )
    return found


def _mean_length(examples: Sequence[Example]) -> float:
    return round(float(np.mean([len(example.input_ids) for example in examples])), 2)
