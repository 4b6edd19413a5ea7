"""Texts that belong together: each is told from the other second texts of its batch (feature-extraction)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ft.data.batches import Batch

__all__ = ["SCALE", "TOGETHER", "duplicate_texts", "in_batch_loss", "pool"]

SCALE = 20.0
"""Cosines are multiplied by it (Reimers & Gurevych's MultipleNegativesRankingLoss)."""
TOGETHER = 32
"""Rows that are scored together, whatever the batch size of training: the loss grows with their number."""


def duplicate_texts(batch: Batch) -> NDArray[np.bool_]:
    """[batch, batch]: where another row's second text is right as well, since either of its texts is the same."""
    same = np.zeros((len(batch["rows"]),) * 2, np.bool_)
    for ids in (batch["input_ids"], batch["pair_input_ids"]):
        same |= (ids[:, None] == ids[None]).all(-1)
    np.fill_diagonal(same, False)
    return same


def in_batch_loss(
    first: NDArray[np.float32], second: NDArray[np.float32], batch: Batch
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Loss and rank of each row's own second text among those of its batch.

    Henderson et al., arXiv:1705.00652: cross-entropy over the scaled cosines with every second text.

    Args:
        first: [batch, hidden], of length 1.
        second: The same, of the second texts.

    Returns:
        nll (nats) and rank (0 is the nearest), both [batch, 1].
    """
    scores = np.where(duplicate_texts(batch), -np.inf, SCALE * first @ second.T)
    own = np.diagonal(scores)[:, None]
    shifted = scores - scores.max(1, keepdims=True)
    nll = np.log(np.exp(shifted).sum(1, keepdims=True)) - np.diagonal(shifted)[:, None]
    return nll.astype(np.float32), (scores > own).sum(1, keepdims=True)


def pool(hidden: NDArray[Any], attention_mask: NDArray[np.int64], pooling: str | None) -> NDArray[np.float32]:
    """One vector a text: the first token's, or the mean of all; [batch, seq, hidden] -> [batch, hidden]."""
    if pooling == "cls":
        return np.asarray(hidden[:, 0], np.float32)
    mask = attention_mask[:, :, None].astype(np.float32)
    return np.asarray((hidden * mask).sum(1) / np.maximum(mask.sum(1), 1), np.float32)
