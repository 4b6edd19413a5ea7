"""Score examples with any model that gives log-probabilities: the same arithmetic for torch and ONNX."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edge_ft.config import TEXT_TASKS
from edge_ft.data import IGNORED, Batch, Example, Rendering, TextTokenizer, collate, eval_batches, target_mask
from edge_ft.data.contrastive import SCORED_TOGETHER, in_batch_loss
from edge_ft.errors import AuditRefused
from edge_ft.evaluate.metrics import (
    UNDEFINED,
    MaybeMetric,
    Metric,
    macro_f1,
    marks_spans,
    mean,
    multi_label_f1,
    number_metrics,
    perplexity,
    proportion,
    recall,
    span_metrics,
)
from edge_ft.progress import Progress, track

__all__ = [
    "Answerer",
    "Batching",
    "Embedder",
    "RowScores",
    "ScoredRow",
    "Scorer",
    "drop_unscorable",
    "format_prediction",
    "row_scores",
    "scorable",
    "score",
    "summary",
]


class Scorer(Protocol):
    """A model that can be scored."""

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Return nll (nats) and the likeliest token or class, both shaped as the labels; valid where `target_mask`."""


@runtime_checkable
class Answerer(Scorer, Protocol):
    """A model that can generate answers."""

    def answer(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """Return the greedy continuation of one prompt, without its stop token."""


@runtime_checkable
class Embedder(Scorer, Protocol):
    """A model that embeds texts."""

    def vectors(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the embeddings of a batch's first and second texts, [batch, hidden] each, of length 1."""


@dataclass(frozen=True)
class Batching:
    """How examples become batches."""

    task: str
    pad_id: int
    """Token id of the padding."""
    size: int = 8
    """Rows per batch; feature-extraction always has `SCORED_TOGETHER`."""


@dataclass(frozen=True)
class RowScores:
    """One entry per row, in the order of the examples."""

    nll: NDArray[np.float64]
    """Summed over the row's targets, nats."""
    tokens: NDArray[np.int64]
    """Targets of the row (classifier: 1)."""
    correct: NDArray[np.int64]
    """Targets whose likeliest token or class is the right one."""
    predicted: list[NDArray[Any]]
    """Likeliest token or class of each target; 1 or 0 for each of several classes; a number; a rank."""
    vectors: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    """Embeddings of the rows' first and second texts [rows, hidden] (feature-extraction)."""

    @property
    def mean_nll(self) -> float:
        """Nats per target token."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def accuracy(self) -> float:
        """Share of targets that the model found likeliest."""
        return float(self.correct.sum() / self.tokens.sum())

    @property
    def rows(self) -> "list[ScoredRow]":
        """The entries of each row, without its vectors: what `row_scores` put together."""
        numbers = (values.tolist() for values in (self.nll, self.tokens, self.correct))
        return [ScoredRow(*row) for row in zip(*numbers, self.predicted, strict=True)]

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the losses and predictions as flat arrays, to be stored; the vectors are left out."""
        arrays: dict[str, NDArray[Any]] = {name: getattr(self, name) for name in ("nll", "tokens", "correct")}
        return arrays | {"predicted": np.concatenate(self.predicted)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "RowScores":
        """Return the scores whose `to_arrays` is this."""
        nll, tokens, correct, predicted = (arrays[name] for name in ("nll", "tokens", "correct", "predicted"))
        return cls(nll, tokens, correct, np.split(predicted, np.cumsum(tokens)[:-1]))

    def at(self, rows: Sequence[int]) -> "RowScores":
        """Return the scores of some rows, without their vectors."""
        scored = self.rows
        return row_scores([scored[row] for row in rows])

    def above(self, other: "RowScores") -> Metric:
        """Return by how much the loss is above that of the same rows in `other`, in nats per target token.

        The 95% interval is a paired bootstrap over rows, weighted by their targets.
        """
        return mean((self.nll - other.nll) / self.tokens, self.tokens)

    def agreement(self, other: "RowScores") -> float:
        """Return the share of targets for which both scores have the same likeliest token or class."""
        same = (int((a == b).sum()) for a, b in zip(self.predicted, other.predicted, strict=True))
        return float(sum(same) / self.tokens.sum())


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """An entry of each field of `RowScores`."""

    nll: float
    tokens: int
    correct: int
    predicted: NDArray[Any]
    vectors: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None


def scorable(examples: Sequence[Example]) -> list[Example]:
    """Return the examples that have a target: an answer that is empty, or wholly cut off, has none."""
    return [example for example in examples if example.targets]


def drop_unscorable(
    examples: Sequence[Example], where: str, max_length: int, progress: Progress
) -> tuple[list[Example], dict[str, int]]:
    """Keep the examples that have a target, and report those that were dropped or cut.

    Args:
        examples: Encoded rows.
        where: Name of the data, for messages.
        max_length: Tokens of the longest sequence, for messages.
        progress: Receives the messages.

    Returns:
        The scorable examples, and their number as `rows`, the number of `dropped` and of `cut` ones, and the
        `cut_tokens`.

    Raises:
        AuditRefused: no example is left.
    """
    kept = scorable(examples)
    cut = [example.cut for example in examples if example.cut]
    dropped = len(examples) - len(kept)
    if cut:
        progress.say(f"{where}: {len(cut)} row(s) lose {sum(cut)} tokens beyond the longest sequence of {max_length}")
    if dropped:
        progress.say(f"{where}: {dropped} row(s) are not scored: their answer is empty or wholly cut off")
    if not kept:
        raise AuditRefused(
            f"{where}: no row has an answer to score: all are empty or wholly cut off by --max-length {max_length}"
        )
    return kept, {"rows": len(kept), "dropped": dropped, "cut": len(cut), "cut_tokens": sum(cut)}


def score(
    scorer: Scorer,
    examples: Sequence[Example],
    batching: Batching,
    progress: Progress,
    stage: str,
    poll: Callable[[], None] = lambda: None,
    found: "dict[int, ScoredRow] | None" = None,
) -> RowScores:
    """Score every example, in batches of similar length.

    Args:
        scorer: The model; an `Embedder` for feature-extraction.
        examples: Rows with at least one target each.
        batching: How they become batches.
        progress: Receives the state of the scoring.
        stage: Name of the stage for `progress`.
        poll: Called before each batch; may raise to stop the scoring.
        found: Rows that were scored before, by index; gets the others as they are scored.

    Returns:
        The scores, in the order of `examples`.
    """
    embeds = batching.task == "feature-extraction"
    lengths = [len(example.input_ids) for example in examples]
    batches = eval_batches(lengths, SCORED_TOGETHER if embeds else batching.size)
    found = {} if found is None else found
    for indices in track(progress, stage, batches, len(batches)):
        poll()
        if found.keys() >= set(indices):
            continue
        batch = collate([examples[index] for index in indices], batching.pad_id, batching.task)
        vectors: list[Any] = [None] * len(indices)
        if embeds:
            assert isinstance(scorer, Embedder)
            pair = scorer.vectors(batch)
            scored = in_batch_loss(*pair, batch)
            vectors = list(zip(*pair, strict=True))
        else:
            scored = scorer.token_nll(batch)
        labels, targets = batch["labels"], target_mask(batch["labels"], batching.task)
        for index, at, nll, predicted, label, pair in zip(indices, targets, *scored, labels, vectors, strict=True):
            right = int((predicted[at] == label[at]).sum())
            found[index] = ScoredRow(float(nll[at].sum()), int(at.sum()), right, predicted[at], pair)
    return row_scores([found[index] for index in range(len(examples))])


def row_scores(rows: Sequence[ScoredRow]) -> RowScores:
    """Return the scores of rows together."""
    sides = [side for row in rows if (side := row.vectors) is not None]
    return RowScores(
        np.array([row.nll for row in rows], np.float64),
        np.array([row.tokens for row in rows], np.int64),
        np.array([row.correct for row in rows], np.int64),
        [row.predicted for row in rows],
        (np.stack([first for first, _ in sides]), np.stack([second for _, second in sides])) if sides else None,
    )


def tag_names(
    scores: RowScores, examples: Sequence[Example], labels: tuple[str, ...]
) -> tuple[list[list[str]], list[list[str]]]:
    """Return the names of the tags of each row's words: the predicted and the right ones."""
    return (
        [[labels[index] for index in row] for row in scores.predicted],
        [[labels[int(label)] for label in example.labels if label != IGNORED] for example in examples],
    )


def format_prediction(predicted: NDArray[Any], rendering: Rendering, tokenizer: TextTokenizer) -> str:
    """Return the prediction of one row of an encoder, an entry of `RowScores.predicted`, as text."""
    labels = rendering.labels
    if rendering.task == "fill-mask":
        return tokenizer.decode([int(token) for token in predicted])
    if rendering.task == "feature-extraction":
        return f"rank {int(predicted[0]) + 1}"
    if rendering.problem_type == "regression":
        return f"{float(predicted[0]):.4g}"
    if rendering.problem_type == "multi_label_classification":
        return ", ".join(label for label, holds in zip(labels, predicted, strict=True) if holds)
    return " ".join(labels[int(index)] for index in predicted)


def summary(scores: RowScores, examples: Sequence[Example], task: str, labels: tuple[str, ...]) -> dict[str, Any]:
    """Return the loss and the task metrics of scored rows, each with its 95% interval over rows.

    Args:
        scores: Scores of `examples`.
        examples: The rows.
        task: Task of the model.
        labels: Classes or tags in the order of the logits.

    Returns:
        `nll` (nats per target token), `perplexity` and their intervals, and `metrics`; a metric that these rows leave
        undefined has the value None. For regression and feature-extraction the perplexity and its interval are None.
    """
    metrics: dict[str, MaybeMetric]
    right = scores.correct / scores.tokens
    has_perplexity = task != "feature-extraction"  # its loss grows with the number of rows in a batch
    if task in TEXT_TASKS or task == "fill-mask":
        metrics = {"token_accuracy": mean(right, scores.tokens)}
    elif task == "feature-extraction":
        assert scores.vectors is not None
        metrics = {**recall(*scores.vectors, [tuple(example.pair_ids) for example in examples])}
    elif task == "token-classification":
        spans = span_metrics(*tag_names(scores, examples, labels))
        metrics = {
            "accuracy": mean(right, scores.tokens),
            **({"span_f1": UNDEFINED} if marks_spans(labels) else {}),  # no row has a span
            **spans,
        }
    elif isinstance(examples[0].labels[0], float):
        gold = np.array([example.labels for example in examples])
        predicted = np.stack(scores.predicted)
        has_perplexity = len(labels) > 1
        metrics = (
            multi_label_f1(predicted > 0, gold > 0) if has_perplexity else number_metrics(predicted[:, 0], gold[:, 0])
        )
    else:
        gold = np.array([example.labels[0] for example in examples])
        predicted = np.array([int(classes[0]) for classes in scores.predicted])
        metrics = {"accuracy": proportion(predicted == gold), "macro_f1": macro_f1(predicted, gold, len(labels))}
    per_token = mean(scores.nll / scores.tokens, scores.tokens)
    return {
        "nll": scores.mean_nll,
        "nll_interval": [per_token["low"], per_token["high"]],
        "perplexity": perplexity(scores.mean_nll) if has_perplexity else None,
        "perplexity_interval": [perplexity(per_token["low"]), perplexity(per_token["high"])]
        if has_perplexity
        else None,
        "metrics": metrics,
    }
