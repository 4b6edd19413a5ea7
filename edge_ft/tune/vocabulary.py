"""`--vocabulary rows`: the base of a run has the tokens that its training rows and a general text need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_ft.artifacts import RunFolder
from edge_ft.config import Task, TuneConfig
from edge_ft.data import IGNORED, Example, evenly_spaced
from edge_ft.progress import Progress

if TYPE_CHECKING:
    from edge_ft.models.base_model import Base
    from edge_ft.models.vocabulary import Vocabulary

__all__ = ["Cut", "compare_tokens", "find_vocabulary"]

LABELS_ARE_TOKENS: tuple[Task, ...] = ("text-generation", "text2text-generation", "fill-mask")
"""Tasks whose labels are token ids: those of the others are classes or numbers."""
MEASURED_ROWS = 16
"""Validation rows on which the whole base and the cut one are compared."""


Splits = Mapping[str, Sequence[Example]]
"""The rows of each split."""


@dataclass(frozen=True)
class Cut:
    """How the base of a run was made from a whole one."""

    whole: "Base"
    figures: dict[str, Any]
    """`kept`, `of`, and `tokens_per_row` of each split before and after."""
    rows: tuple[Sequence[Example], Sequence[Example]]
    """Some validation rows, in tokens of the whole base and in those that are kept."""


def find_vocabulary(
    config: TuneConfig, base: "Base", train: Sequence[Example], task: Task, *, resumed: bool
) -> "Vocabulary":
    """Return the tokens that the base of a run keeps: those that an interrupted run has chosen, else by its rows.

    Args:
        config: With the run folder.
        base: The whole model.
        train: The training rows, in its tokens.
        task: What is trained.
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
    used = {at for row in train for ids in (row.input_ids, row.pair_ids) for at in ids}
    if task in LABELS_ARE_TOKENS:
        used |= {int(at) for row in train for at in row.labels if at != IGNORED}
    return choose_vocabulary(base, used)


def compare_tokens(whole: "Base", base: "Base", before: Splits, after: Splits, progress: Progress) -> Cut:
    """Compare the tokens of the rows.

    Args:
        whole: The whole base.
        base: The cut one.
        before: The rows in tokens of the whole model.
        after: The same rows in those that are kept.
        progress: Gets how many tokens a row takes.

    Returns:
        How many tokens are kept, and how many the rows take.
    """
    rows = {
        split: {"before": _mean_length(before[split]), "after": _mean_length(after[split])}
        for split in before
        if before[split]
    }
    kept, of, shown = base.dims.vocabulary, whole.dims.vocabulary, rows["validation"]
    progress.say(
        f"--vocabulary rows: {kept} of {of} tokens are kept; a validation row takes {shown['after']:.1f} tokens, "
        f"before {shown['before']:.1f}"
    )
    uncut = {example.row: example for example in after["validation"] if not example.cut}
    pairs = [
        (example, uncut[example.row]) for example in before["validation"] if not example.cut and example.row in uncut
    ]
    chosen = evenly_spaced(pairs, MEASURED_ROWS)
    figures = {"kept": kept, "of": of, "tokens_per_row": rows}
    return Cut(whole, figures, ([one for one, _ in chosen], [other for _, other in chosen]))


def _mean_length(examples: Sequence[Example]) -> float:
    return round(float(np.mean([len(example.input_ids) for example in examples])), 2)
