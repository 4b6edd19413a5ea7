"""Embeddings of texts from a feature-extraction bundle."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ft.data import Batch, Framed, pad
from edge_ft.data.contrastive import in_batch_loss, pool
from edge_ft.runtime.encoder import Encoder

__all__ = ["TextEmbedder"]


class TextEmbedder(Encoder):
    """An open feature-extraction bundle."""

    output = "last_hidden_state"

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Compute an embedding of every text.

        Args:
            texts: Texts; the end of one that exceeds the bundle's `max_length` is cut off.

        Returns:
            [texts, hidden] float32, in order; of length 1 unless the model's own files switch normalization off.
        """
        return self.embed_tokenized(self.tokenize(texts))

    def tokenize(self, texts: Sequence[str]) -> list[Framed]:
        """Return the tokens of each text, and how many were cut off."""
        return [self.tokenizer.encode_framed(text, self.rendering.max_length) for text in texts]

    def embed_tokenized(self, texts: Sequence[Framed]) -> NDArray[np.float32]:
        """Compute embeddings as `embed` does, of texts from `tokenize`.

        Args:
            texts: Tokens of each text.

        Returns:
            [texts, hidden] float32, in order.
        """

        def read(row: int, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
            _, mask = pad([texts[row].ids], 0)
            return pool(hidden[None, : mask.shape[1]], mask, self.rendering.pooling)[0]

        if not texts:
            return np.zeros((0, 0), np.float32)
        vectors = np.stack(self.map_outputs(read, texts))
        return normalize(vectors) if self.rendering.normalize else vectors

    def vectors(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the embeddings of a batch's first and second texts, both [batch, hidden] and of length 1."""
        found = [
            normalize(pool(self.logits(ids, mask), mask, self.rendering.pooling))
            for ids, mask in (
                (batch["input_ids"], batch["attention_mask"]),
                (batch["pair_input_ids"], batch["pair_attention_mask"]),
            )
        ]
        return found[0], found[1]

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Return the loss (nats) and the rank of each row's own second text within the batch, both [batch, 1]."""
        return in_batch_loss(*self.vectors(batch), batch)


def normalize(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the vectors [rows, hidden] scaled to length 1."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12), np.float32)
