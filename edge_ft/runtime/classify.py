"""Labels and numbers of texts from a text-classification bundle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ft.config import ProblemType
from edge_ft.data import Batch
from edge_ft.errors import UsageError
from edge_ft.runtime.encoder import Encoder
from edge_ft.runtime.token_scores import class_scores, log_softmax

__all__ = ["Classification", "TextClassifier"]


@dataclass(frozen=True)
class Classification:
    """The result for one text or one pair of texts."""

    label: str | list[str] | float
    """As the training rows' labels: the likeliest class, the list of classes above 0.5, or the number."""
    scores: dict[str, float]
    """Probability of every class, summing to 1 if a text has exactly one class; for a regression, its number."""
    prompt_tokens: int
    """Tokens read, [CLS] and [SEP] included."""
    cut: int
    """Tokens of the text that exceeded `max_length` and were not read."""


class TextClassifier(Encoder):
    """An open text-classification bundle."""

    @property
    def problem(self) -> ProblemType:
        """Kind of its outputs: one class, several classes or a number."""
        return self.rendering.problem_type or "single_label_classification"

    def classify(self, texts: Sequence[str | tuple[str, str]]) -> list[Classification]:
        """Classify texts or pairs of texts.

        Args:
            texts: Texts, or pairs for a model that was trained on pairs; those that exceed the bundle's `max_length`
                are cut as the training rows were.

        Returns:
            A result for each, in order.

        Raises:
            UsageError: pairs for a model that was trained on single texts, or the reverse.
        """
        pairs = [(text, None) if isinstance(text, str) else text for text in texts]
        wanted = self.rendering.columns.pair is not None
        if any((second is not None) != wanted for _, second in pairs):
            reads = "pairs of texts" if wanted else "single texts"
            raise UsageError(f"{self.bundle.path} was trained on {reads}: give {reads}")
        encoded = [self.tokenizer.encode_framed(first, self.rendering.max_length, second) for first, second in pairs]

        def read(row: int, logits: NDArray[np.float32]) -> Classification:
            scores, text = self._probabilities(logits), encoded[row]
            named = dict(zip(self.labels, scores.tolist(), strict=True))
            return Classification(self._label(scores), named, len(text.ids), text.cut)

        return self.map_outputs(read, encoded)

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Return the loss (nats) and the prediction, shaped as the labels; as `edge_ft.models.scorer.class_losses`."""
        labels = batch["labels"]
        logits = self.logits(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
        found = class_scores(logits, labels if np.issubdtype(labels.dtype, np.floating) else labels[:, 0], self.problem)
        return found[0].reshape(labels.shape), found[1].reshape(labels.shape)

    def _probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.problem == "regression":
            return logits
        if self.problem == "multi_label_classification":
            return np.asarray(1 / (1 + np.exp(-logits)), np.float32)
        return np.exp(log_softmax(logits))

    def _label(self, scores: NDArray[np.float32]) -> str | list[str] | float:
        if self.problem == "regression":
            return float(scores[0])
        if self.problem == "multi_label_classification":
            return [label for label, score in zip(self.labels, scores, strict=True) if score > 0.5]
        return self.labels[int(scores.argmax())]
