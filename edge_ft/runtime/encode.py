"""Labels from an encoder bundle."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_ft.artifacts import Bundle
from edge_ft.data import Batch, Rendering, TextTokenizer, eval_batches
from edge_ft.errors import BundleError

__all__ = ["Classification", "TextClassifier"]

_BATCH = 16
"""Texts in one run; they are sorted by length first, so little of it is padding."""


@dataclass(frozen=True)
class Classification:
    """The likeliest label of one text."""

    label: str
    scores: dict[str, float]
    """Probability of every label."""
    prompt_tokens: int
    """Tokens read, [CLS] and [SEP] included."""
    cut: int
    """Tokens of the text that were beyond what the model reads."""


class TextClassifier:
    """An open text-classification bundle.

    Raises:
        BundleError: its manifest names no classes.
    """

    def __init__(
        self, bundle: Bundle, session: ort.InferenceSession, adapter_inputs: dict[str, NDArray[np.float32]]
    ) -> None:
        self.tokenizer = TextTokenizer.load(bundle.path)
        self.rendering = Rendering.from_dict(bundle.manifest["rendering"])
        self.labels = self.rendering.labels
        if not self.labels:
            raise BundleError(f"{bundle.path} names no classes: export the model again, with its labels")
        self._session = session
        self._names = {node.name for node in session.get_inputs()}
        self._adapter_inputs = adapter_inputs

    def classify(self, texts: Sequence[str]) -> list[Classification]:
        """Label every text, in order; texts longer than the bundle's rows were are cut as those were."""
        encoded = [self.tokenizer.encode_classifier(text, self.rendering.max_length) for text in texts]
        logits = np.zeros((len(texts), len(self.labels)), np.float32)
        for rows in eval_batches([len(ids) for ids, _ in encoded], _BATCH):
            longest = max(len(encoded[row][0]) for row in rows)
            input_ids = np.full((len(rows), longest), self.tokenizer.pad_id, np.int64)
            attention_mask = np.zeros_like(input_ids)
            for place, row in enumerate(rows):
                ids = encoded[row][0]
                input_ids[place, : len(ids)] = ids
                attention_mask[place, : len(ids)] = 1
            logits[rows] = self.logits(input_ids, attention_mask)
        return [
            Classification(
                label=self.labels[int(scores.argmax())],
                scores=dict(zip(self.labels, scores.tolist(), strict=True)),
                prompt_tokens=len(ids),
                cut=cut,
            )
            for scores, (ids, cut) in zip(np.exp(_log_softmax(logits)), encoded, strict=True)
        ]

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Negative log-likelihood (nats) of the right class, and the likeliest class, both [batch, 1]."""
        log_probabilities = _log_softmax(self.logits(batch["input_ids"], batch["attention_mask"]))
        rows = np.arange(len(log_probabilities))
        return -log_probabilities[rows, batch["labels"][:, 0]][:, None], log_probabilities.argmax(axis=-1)[:, None]

    def logits(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of every label.

        Args:
            input_ids: [batch, seq], padded on the right.
            attention_mask: [batch, seq], 1 for tokens and 0 for padding.

        Returns:
            [batch, num_labels] float32.
        """
        feed = {"input_ids": input_ids, "attention_mask": attention_mask, **self._adapter_inputs}
        if "token_type_ids" in self._names:
            feed["token_type_ids"] = np.zeros_like(input_ids)
        logits: NDArray[np.float32] = self._session.run(["logits"], feed)[0]
        return logits


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
