"""Rows of similar length go together, so that little of a batch is padding."""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from edge_ft.data.render import IGNORED, Example

__all__ = ["Batch", "collate", "eval_batches", "target_mask", "train_batches"]

WINDOW = 50
"""Batches that are sorted by length together: enough for even lengths, few enough to stay random."""


class Batch(TypedDict):
    """Examples of one forward pass, padded on the right."""

    input_ids: NDArray[np.int64]
    """[batch, seq]"""
    attention_mask: NDArray[np.int64]
    """[batch, seq], 1 on tokens and 0 on padding."""
    labels: NDArray[np.int64]
    """[batch, seq], -100 where there is no loss; text-classification: [batch, 1]."""
    rows: list[int]
    """Numbers of the rows in the user's file."""


def collate(examples: Sequence[Example], pad_id: int, task: str) -> Batch:
    """Pad examples to the longest of them."""
    shape = (len(examples), max(len(example.input_ids) for example in examples))
    input_ids = np.full(shape, pad_id, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    for index, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[index, :length] = example.input_ids
        attention_mask[index, :length] = 1
        if task == "text-generation":
            labels[index, :length] = example.labels
    if task == "text-classification":
        labels = np.array([example.labels for example in examples], np.int64)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        rows=[example.row for example in examples],
    )


def target_mask(labels: NDArray[Any], task: str) -> NDArray[np.bool_]:
    """Where a batch's `labels` [batch, targets] are targets: what is scored, and what `token_nll` is about."""
    at: NDArray[np.bool_] = labels != IGNORED
    if task == "text-generation":
        at[:, 0] = False  # the first token is given, not predicted
    return at


def train_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of one epoch in batches: each index once, similar lengths together, batches in random order."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), WINDOW * batch_size):
        window = sorted(order[start : start + WINDOW * batch_size].tolist(), key=lengths.__getitem__)
        batches += _chunks(window, batch_size)
    return [batches[index] for index in random.permutation(len(batches))]


def eval_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches, from the shortest to the longest."""
    return _chunks(sorted(range(len(lengths)), key=lengths.__getitem__), batch_size)


def _chunks(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
