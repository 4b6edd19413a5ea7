"""An open graph that reads whole texts at once, in batches of similar length."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_ft.artifacts import Bundle
from edge_ft.data import Batch, Framed, eval_batches, pad, target_mask
from edge_ft.errors import BundleError
from edge_ft.families import CLASSIFIERS
from edge_ft.runtime.open_bundle import OpenBundle
from edge_ft.runtime.session import output_size, running
from edge_ft.runtime.token_scores import score_targets

__all__ = ["Encoder"]

T = TypeVar("T")

_BATCH = 16
"""Texts in one run; they are sorted by length first, so little of a batch is padding."""


class Encoder(OpenBundle):
    """An open bundle whose graph reads right-padded rows.

    Attributes:
        labels: Names of the classes, of the tags or of the number; empty for other tasks.

    Raises:
        BundleError: a classifier's manifest has no names of classes or tags, or not as many as the graph has outputs.
    """

    output = "logits"
    """Name of the graph's output."""

    def __init__(
        self, bundle: Bundle, session: ort.InferenceSession, adapter_inputs: dict[str, NDArray[np.float32]]
    ) -> None:
        super().__init__(bundle)
        self.labels = self.rendering.labels
        self._session = session
        self._names = {node.name for node in session.get_inputs()}
        self._adapter_inputs = adapter_inputs
        if bundle.task in CLASSIFIERS and not self.labels:
            raise BundleError(f"{bundle.path} has no class names: export the model again, with its labels")
        classes = output_size(session, self.output) if bundle.task in CLASSIFIERS else len(self.labels)
        if classes != len(self.labels):
            raise BundleError(
                f"{bundle.path} names {len(self.labels)} classes and its graph has {classes} outputs: export it again"
            )

    def logits(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        token_type_ids: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Run the graph.

        Args:
            input_ids: [batch, seq], padded on the right.
            attention_mask: [batch, seq], 1 for tokens and 0 for padding.
            token_type_ids: [batch, seq], which of two texts a token belongs to; None is all 0.

        Returns:
            float32, by task: [batch, num_labels], [batch, seq, num_labels], [batch, seq, vocab], or the last hidden
            states [batch, seq, hidden].
        """
        feed = {"input_ids": input_ids, "attention_mask": attention_mask, **self._adapter_inputs}
        if "token_type_ids" in self._names:
            feed["token_type_ids"] = np.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        with running(self._session):
            return self._session.run([self.output], feed)[0]

    def map_outputs(self, read: Callable[[int, NDArray[np.float32]], T], texts: Sequence[Framed]) -> list[T]:
        """Run the graph on tokenized texts, in batches of similar length.

        Args:
            read: Index of a text and its output without the batch dimension, padding included -> its result.
            texts: Tokens of each text.

        Returns:
            The result of each text, in order.
        """
        results: dict[int, T] = {}
        for rows in eval_batches([len(text.ids) for text in texts], _BATCH):
            input_ids, attention_mask = pad([texts[row].ids for row in rows], self.tokenizer.pad_id)
            type_ids, _ = pad([texts[row].type_ids for row in rows], 0)
            outputs = self.logits(input_ids, attention_mask, type_ids)
            results |= {row: read(row, output) for row, output in zip(rows, outputs, strict=True)}
        return [results[row] for row in range(len(texts))]

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Score the labelled positions of a batch.

        Args:
            batch: Rows as `edge_ft.data.collate` makes them.

        Returns:
            Negative log-likelihood (nats) and likeliest token or tag, both [batch, seq]; 0 and -100 where there is no
            label.
        """
        labels: NDArray[np.int64] = batch["labels"]

        def compute_logits(rows: slice) -> NDArray[np.float32]:
            return self.logits(batch["input_ids"][rows], batch["attention_mask"][rows])

        logits_per_row = labels.shape[1] * output_size(self._session, self.output)
        return score_targets(compute_logits, labels, target_mask(labels, self.bundle.task), logits_per_row)
