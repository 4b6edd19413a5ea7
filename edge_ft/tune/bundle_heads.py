"""What comes after a bundle's layers as it learns: the loss, and its gradient by the last layer's output.

A head over the vocabulary is frozen, and computes where a position has a label. A classifier's head is trained in full.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue

from edge_ft.config import ProblemType, Task
from edge_ft.data import IGNORED, Batch, target_mask
from edge_ft.runtime.token_scores import class_scores, log_softmax
from edge_ft.tune.block_graphs import BlockGraphs, Values, as_value

__all__ = ["ClassHead", "Loss", "Parameters", "VocabularyHead", "loss_gradient"]

HEAD_ROWS = 128
"""Labelled positions whose logits are in memory at a time."""
Parameters = Mapping[str, NDArray[np.float32]]
"""Weights and biases of a head, or their gradients, by their names in the model."""
Loss = Callable[[OrtValue, Values], tuple[float, OrtValue]]
"""The last layer's output, and what all graphs read -> loss, and its gradient by that output."""


class VocabularyHead:
    """The head of a model that writes text.

    Attributes:
        parameters: Empty, it is frozen.
    """

    def __init__(self, graphs: BlockGraphs, index: Mapping[str, Any], task: Task) -> None:
        """Take the graphs and weights that `index` names."""
        self.parameters: Parameters = {}
        self._task = task
        self._graphs, self._weights = graphs, graphs.weights.values(index["weights"])
        self._gradient, self._score = index["graph"], index["score"]

    def values(self, parameters: Parameters) -> Values:
        """Return nothing: no parameter is given to the graphs."""
        return {}

    def score(self, hidden: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return nll (nats, float32) and likeliest token of rows [rows, hidden] with these labels."""
        nll, predicted = np.zeros(len(labels), np.float32), np.zeros(len(labels), np.int64)
        for rows, values in _some_rows(hidden, labels):
            found = self._graphs.run(self._score, values, self._weights)
            nll[rows], predicted[rows] = found["nll"].numpy()[:, 0], found["predicted"].numpy()[:, 0]
        return nll, predicted

    def token_nll(
        self, x: OrtValue, shared: Values, batch: Batch, parameters: Values
    ) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Return nll (nats, float32) and likeliest token, shaped as the labels; 0 and -100 where there is no target."""
        at, labels = _targets(batch, self._task)
        nll, predicted = np.zeros(at.shape, np.float32), np.full(at.shape, IGNORED, np.int64)
        where = target_mask(batch["labels"], self._task)
        nll[where], predicted[where] = self.score(x.numpy().reshape(*at.shape, -1)[at], labels)
        return nll, predicted

    def loss(self, batch: Batch, scale: float, parameters: Values, gradients: Parameters) -> Loss:
        """Return the loss of a batch: the summed nll * scale."""
        at, labels = _targets(batch, self._task)
        factor = {"scale": as_value(np.array(scale, np.float32))}

        def loss_of(x: OrtValue, shared: Values) -> tuple[float, OrtValue]:
            whole = x.numpy()
            rows_of = whole.reshape(*at.shape, -1)  # some layers flatten batch and sequence
            chosen, loss = rows_of[at], 0.0
            for rows, values in _some_rows(chosen, labels):
                found = self._graphs.run(self._gradient, values, self._weights, factor)
                loss += float(found["nll"].numpy().sum(dtype=np.float64)) * scale
                chosen[rows] = found["dx"].numpy()
            dx = np.zeros_like(rows_of)
            dx[at] = chosen
            return loss, as_value(dx.reshape(whole.shape))

        return loss_of


class ClassHead:
    """The head of a classifier of texts or of tokens.

    Attributes:
        parameters: As they are in the bundle; trained in place.
    """

    def __init__(
        self, graphs: BlockGraphs, index: Mapping[str, Any], task: Task, problem: ProblemType | None = None
    ) -> None:
        """Take the graphs and weights that `index` names, and copy the parameters.

        Args:
            graphs: Of the bundle.
            index: The head's entry in the index of the training graphs.
            task: Of the bundle.
            problem: What the logits of a text are; None: one class.
        """
        self._graphs, self._weights = graphs, graphs.weights.values(index["weights"])
        self._gradient, self._score = index["graph"], index["score"]
        self._task, self._problem = task, problem
        self.parameters: Parameters = {
            name: _copied(graphs.weights.tensor(place["tensor"]).numpy(), place["transposed"])
            for name, place in index["parameters"].items()
        }

    def values(self, parameters: Parameters) -> Values:
        """Return parameters as the graphs take them; what is changed in place in the arrays is seen."""
        return {f"head.{name}": as_value(array) for name, array in parameters.items()}

    def token_nll(
        self, x: OrtValue, shared: Values, batch: Batch, parameters: Values
    ) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Return nll (nats, float32) and prediction, shaped as the labels; 0 and -100 where there is no target."""
        given, at = batch["labels"], target_mask(batch["labels"], self._task)
        nll, predicted = np.zeros(given.shape, np.float32), np.full(given.shape, IGNORED, given.dtype)
        logits, labels = self._logits(x, shared, batch, parameters)
        nll[at], predicted[at] = (found.ravel() for found in class_scores(logits, labels, self._problem))
        return nll, predicted

    def loss(self, batch: Batch, scale: float, parameters: Values, gradients: Parameters) -> Loss:
        """Return the loss of a batch, the summed nll * scale, which adds the gradients of parameters to `gradients`."""

        def loss_of(x: OrtValue, shared: Values) -> tuple[float, OrtValue]:
            logits, labels = self._logits(x, shared, batch, parameters)
            nll, _ = class_scores(logits, labels, self._problem)
            change = loss_gradient(logits, labels, self._problem) * np.float32(scale)
            if self._task == "token-classification":
                at = target_mask(batch["labels"], self._task).ravel()
                whole = np.zeros((at.size, change.shape[-1]), np.float32)
                whole[at] = change
                change = whole
            given = {"x": x, "dlogits": as_value(change)}
            found = self._graphs.run(self._gradient, given, parameters, self._weights, shared)
            for name, total in gradients.items():
                total += found[f"grad.{name}"].numpy()
            return float(nll.sum(dtype=np.float64)) * scale, found["dx"]

        return loss_of

    def _logits(
        self, x: OrtValue, shared: Values, batch: Batch, parameters: Values
    ) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Return the logits [targets, classes] and their labels."""
        found = self._graphs.run(self._score, {"x": x}, parameters, self._weights, shared)
        logits: NDArray[np.float32] = found["logits"].numpy()
        labels = batch["labels"]
        if self._task == "token-classification":
            at = target_mask(labels, self._task)
            return logits[at.ravel()], labels[at]
        return logits, labels if np.issubdtype(labels.dtype, np.floating) else labels[:, 0]


def loss_gradient(
    logits: NDArray[np.float32], labels: NDArray[Any], problem: ProblemType | None
) -> NDArray[np.float32]:
    """Return the gradient of the summed loss of `class_scores` by the logits [targets, classes]."""
    if problem == "regression":
        return logits - labels
    if problem == "multi_label_classification":
        return np.asarray(1 / (1 + np.exp(-logits)) - labels, np.float32)
    shares: NDArray[np.float32] = np.exp(log_softmax(logits))
    shares[np.arange(len(shares)), labels] -= 1
    return shares


def _copied(array: NDArray[Any], transposed: bool) -> NDArray[np.float32]:
    return np.array(array.T if transposed else array, np.float32, order="C")


def _targets(batch: Batch, task: Task) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return the positions whose next token is a target [batch, seq], and these targets."""
    labels = batch["labels"]
    if task == "text2text-generation":  # the decoder reads the labels one position later
        at = target_mask(labels, task)
        return at, labels[at]
    at = np.zeros(labels.shape, np.bool_)
    at[:, :-1] = labels[:, 1:] != IGNORED
    return at, labels[:, 1:][at[:, :-1]]


def _some_rows(hidden: NDArray[np.float32], labels: NDArray[np.int64]) -> Iterator[tuple[slice, dict[str, OrtValue]]]:
    """Yield some rows at a time, with the inputs of the head for them."""
    for start in range(0, len(labels), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        yield rows, {"x": as_value(hidden[rows]), "labels": as_value(labels[rows, None])}
