"""Contrastive pairs (feature-extraction): a text must be nearer to its own second text than to others."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ft.data.batches import Batch

__all__ = ["SCALE", "SCORED_TOGETHER", "duplicate_texts", "in_batch_loss", "pool"]

SCALE = 20.0
"""Factor of the cosine similarities (MultipleNegativesRankingLoss of sentence-transformers)."""
SCORED_TOGETHER = 32
"""Rows per scored batch, whatever the training batch size: the loss grows with the number of rows in a batch."""


def duplicate_texts(batch: Batch) -> NDArray[np.bool_]:
    """Return [batch, batch]: whether another row's second text is also right, since one of the row's texts is equal."""
    first, second = ((ids[:, None] == ids[None]).all(-1) for ids in (batch["input_ids"], batch["pair_input_ids"]))
    return np.asarray((first | second) & ~np.eye(len(first), dtype=np.bool_))


def in_batch_loss(
    first: NDArray[np.float32], second: NDArray[np.float32], batch: Batch
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Loss and rank of each row's own second text among the second texts of its batch.

    Cross-entropy over the scaled cosine similarities (Henderson et al., arXiv:1705.00652).

    Args:
        first: Embeddings of the first texts [batch, hidden], of length 1.
        second: Embeddings of the second texts [batch, hidden], of length 1.
        batch: The texts, to find equal ones.

    Returns:
        nll (nats) and rank (0 is the nearest), both [batch, 1].
    """
    scores = np.where(duplicate_texts(batch), -np.inf, SCALE * first @ second.T)
    own = np.diagonal(scores)[:, None]
    shifted = scores - scores.max(1, keepdims=True)
    nll = np.log(np.exp(shifted).sum(1, keepdims=True)) - np.diagonal(shifted)[:, None]
    return nll.astype(np.float32), (scores > own).sum(1, keepdims=True)


def pool(hidden: NDArray[Any], attention_mask: NDArray[np.int64], pooling: str | None) -> NDArray[np.float32]:
    """Return one embedding per text, of its first token (cls) or the mean: [batch, seq, hidden] -> [batch, hidden]."""
    if pooling == "cls":
        return np.asarray(hidden[:, 0], np.float32)
    mask = attention_mask[:, :, None].astype(np.float32)
    return np.asarray((hidden * mask).sum(1) / np.maximum(mask.sum(1), 1), np.float32)
