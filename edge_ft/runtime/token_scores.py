"""Log-probabilities, and the loss of given tokens, tags or whole answers, from logits."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ft.config import ProblemType
from edge_ft.runtime.cache import KVCache

__all__ = ["answer_nll", "class_scores", "log_softmax", "score_targets"]

MAX_LOGITS = 1 << 24
"""Logits held at a time while scoring (64 MB); a larger batch is scored in parts."""


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the log-probabilities over the last axis, as a new array of the same shape."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def class_scores(
    logits: NDArray[np.float32], labels: NDArray[Any], problem: ProblemType | None
) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Score the logits of a classifier; as `edge_ft.models.scorer.class_losses`.

    Args:
        logits: [targets, classes].
        labels: int64 [targets]; float32 [targets, classes] for several classes or a number.
        problem: What the logits are; None: one class.

    Returns:
        Loss (nats) and prediction, both shaped as the labels.
    """
    if problem == "regression":
        return (logits - labels) ** 2 / 2, logits
    if problem == "multi_label_classification":
        loss = np.maximum(logits, 0) - logits * labels + np.log1p(np.exp(-np.abs(logits)))
        return loss, (logits > 0).astype(np.float32)
    return -log_softmax(logits)[np.arange(len(logits)), labels], logits.argmax(axis=-1)


def score_targets(
    compute_logits: Callable[[slice], NDArray[np.float32]],
    labels: NDArray[np.int64],
    targets: NDArray[np.bool_],
    logits_per_row: int,
) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Score labelled positions, a few rows at a time.

    Args:
        compute_logits: Rows of the batch -> their logits [rows, seq, classes], aligned with the labels.
        labels: [batch, seq].
        targets: [batch, seq], True where a label is scored.
        logits_per_row: Number of logits that one row takes; it decides how many rows are computed together.

    Returns:
        Negative log-likelihood (nats, float32) and likeliest class (int64), both [batch, seq]; 0 and -100 where there
        is no target.
    """
    nll = np.zeros(labels.shape, np.float32)
    predicted = np.full(labels.shape, -100, np.int64)
    step = max(1, MAX_LOGITS // logits_per_row)
    for start in range(0, len(labels), step):
        for row, row_logits in enumerate(compute_logits(slice(start, start + step)), start):
            at = targets[row]
            scores = row_logits[at]  # [targets, classes], a copy: overwritten below, since a vocabulary is large
            if not len(scores):
                continue
            predicted[row, at] = scores.argmax(axis=-1)
            scores -= scores.max(axis=-1, keepdims=True)
            chosen = scores[np.arange(len(scores)), labels[row, at]]
            nll[row, at] = np.log(np.exp(scores, out=scores).sum(axis=-1)) - chosen
    return nll, predicted


def answer_nll(cache: KVCache, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Score whole answers to one prompt; the prompt is read once, and so is what answers have in common.

    An answer's score is the sum over its tokens, stop token included, so that "no" and "not sure" compete as whole
    answers: dividing by their lengths would favour answers whose later tokens are certain.

    Args:
        cache: Empty, or holding a beginning of the prompt.
        prompt_ids: At least one token.
        answers: Token ids of each answer, at least one.

    Returns:
        Negative log-likelihood (nats) of each answer, [answers].
    """
    cache.rewind(prompt_ids)
    # Log-probabilities [vocab] after the prompt and after each cached token of an answer.
    after = [log_softmax(cache.extend(prompt_ids[len(cache.ids) :]))]
    nll = np.zeros(len(answers))
    # In the order of their tokens, answers with a common beginning follow each other, and it is read once.
    for index in sorted(range(len(answers)), key=lambda at: tuple(answers[at])):
        ids = answers[index]
        shared = cache.rewind([*prompt_ids, *ids]) - len(prompt_ids)
        del after[shared + 1 :]
        if rest := ids[shared:-1]:
            after.extend(log_softmax(cache.extend_each(rest)))
        nll[index] = -sum(float(after[at][token]) for at, token in enumerate(ids))
    return nll
