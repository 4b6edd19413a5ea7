"""An open graph that reads whole texts at once, in batches of similar length."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_ft.artifacts import Bundle
from edge_ft.data import Batch, Rendering, TextTokenizer, eval_batches, pad
from edge_ft.data.tokenizer import Framed
from edge_ft.errors import BundleError
from edge_ft.runtime.task import OneTask

__all__ = ["Encoder", "log_softmax"]

_BATCH = 16
"""Texts in one run; they are sorted by length first, so little of it is padding."""


class Encoder(OneTask):
    """A graph over right-padded rows, its tokenizer, and how it was trained."""

    output = "logits"
    """What the graph gives."""
    needs_labels = False
    """Whether its outputs are classes that the manifest must name."""

    def __init__(
        self, bundle: Bundle, session: ort.InferenceSession, adapter_inputs: dict[str, NDArray[np.float32]]
    ) -> None:
        self.bundle = bundle
        self.tokenizer = TextTokenizer.load(bundle.path)
        self.rendering = Rendering.from_dict(bundle.manifest["rendering"])
        self.labels = self.rendering.labels
        self._session = session
        self._names = {node.name for node in session.get_inputs()}
        self._adapter_inputs = adapter_inputs
        if self.needs_labels and not self.labels:
            raise BundleError(f"{bundle.path} names no classes: export the model again, with its labels")

    def logits(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        token_type_ids: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """The graph's output.

        Args:
            input_ids: [batch, seq], padded on the right.
            attention_mask: [batch, seq], 1 for tokens and 0 for padding.
            token_type_ids: [batch, seq], which of two texts a token is of; None is all 0.

        Returns:
            float32, of the task: [batch, num_labels], [batch, seq, num_labels], [batch, seq, vocab], or the last
            hidden states [batch, seq, hidden].
        """
        feed = {"input_ids": input_ids, "attention_mask": attention_mask, **self._adapter_inputs}
        if "token_type_ids" in self._names:
            feed["token_type_ids"] = np.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        output: NDArray[np.float32] = self._session.run([self.output], feed)[0]
        return output

    def of_batch(self, batch: Batch) -> NDArray[np.float32]:
        """`logits` of a batch's first texts."""
        return self.logits(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))

    def of_texts(self, texts: Sequence[Framed]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Each text's number and its output, without a batch's axis but with its padding; not in order."""
        for rows in eval_batches([len(text.ids) for text in texts], _BATCH):
            input_ids, attention_mask = pad([texts[row].ids for row in rows], self.tokenizer.pad_id)
            kinds, _ = pad([texts[row].type_ids for row in rows], 0)
            yield from zip(rows, self.logits(input_ids, attention_mask, kinds), strict=True)


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Log-probabilities over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
