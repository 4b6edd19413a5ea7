"""Texts that every export scores, so that any device can tell whether a graph computes the same there."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_ft.data import (
    Batch,
    Example,
    Rendering,
    Row,
    TextTokenizer,
    bare_columns,
    collate,
    encode_pair,
    encode_rows,
    target_mask,
)
from edge_ft.families import CLASSIFIERS

__all__ = ["SAME", "probe_examples", "score_probes", "score_scale", "score_tolerance"]

SAME = 1e-3
"""Nats per target token, of a number the share of its half square: two runs of the same weights differ by less, an
adapter must change the scores by more."""

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "Question: How many days are there in three weeks? Answer:",
    "The patient was admitted with acute chest pain and shortness of breath.",
    "Interest rates rose again, and the bank lowered its forecast for the year.",
)
"""Texts of this project: any device can compare its scores with those of the export, without the user's rows."""


class Scorer(Protocol):
    """What scores labelled tokens: every open bundle."""

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """See `edge_ft.runtime.TextGenerator.token_nll`."""


def score_scale(rendering: Rendering, nll: NDArray[np.float64]) -> float:
    """Return the size by which differences of scores `nll` [rows] are measured.

    Logits of classes and tokens are of one size in all models; a predicted number has that of its targets, 0.01 or
    2000, and half its square is its score.
    """
    return float(np.abs(nll).max()) if rendering.problem_type == "regression" else 1.0


def score_tolerance(level: str, max_tax: float, rendering: Rendering, exported: NDArray[np.float64]) -> float:
    """Return by how much scores of one accuracy level may differ from those `exported` [rows] on another machine."""
    scale = score_scale(rendering, exported)
    # The int8 kernels of level 4 round differently on different processors, so the tax is its only limit.
    return SAME * scale if level == "1" else max_tax * max(1.0, scale)


def probe_examples(tokenizer: TextTokenizer, rendering: Rendering) -> list[Example]:
    """Return the probe texts as examples; for a classifier all have its first class, whether right or not."""
    # Each text with the next one: as its answer, or as a pair of unlike texts, whose loss is large and sensitive.
    pairs = list(enumerate(zip(PROBES, (*PROBES[1:], PROBES[0]), strict=True), 1))
    if rendering.task in CLASSIFIERS:
        framed = [tokenizer.encode_framed(text, rendering.max_length) for text in PROBES]
        floats = rendering.problem_type in ("regression", "multi_label_classification")
        labels = [0.0] * len(rendering.labels) if floats else [0]
        return [
            Example(
                row,
                text.ids,
                # The first tag at every position, special tokens included.
                [0] * len(text.ids) if rendering.task == "token-classification" else labels,
                0,
                "",
                0,
            )
            for row, text in enumerate(framed, 1)
        ]
    if rendering.task == "text2text-generation":
        assert rendering.appended_eos is not None
        limit, eos = rendering.max_length, rendering.appended_eos
        return [encode_pair(tokenizer, row, text, answer, eos, limit) for row, (text, answer) in pairs]
    if rendering.task in ("fill-mask", "feature-extraction"):
        rows = [Row(row, {"text": text, "positive": other}) for row, (text, other) in pairs]
        return encode_rows(replace(rendering, columns=bare_columns(rendering.task)), tokenizer, rows)
    encoded = [tokenizer.encode(text)[: rendering.max_length] for text in PROBES]
    return [Example(row, ids, list(ids), 1, "", 0) for row, ids in enumerate(encoded, 1)]


def score_probes(
    scorer: Scorer, examples: Sequence[Example], pad_id: int, task: str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Score examples as one batch.

    Args:
        scorer: An open bundle.
        examples: What `probe_examples` returned.
        pad_id: Token that fills the rows.
        task: Task of the model.

    Returns:
        Negative log-likelihood (nats) and number of targets of each, [examples].
    """
    batch = collate(list(examples), pad_id, task)
    nll, _ = scorer.token_nll(batch)
    targets = target_mask(batch["labels"], task)
    return np.array([row[at].sum() for row, at in zip(nll, targets, strict=True)], np.float64), targets.sum(axis=1)
