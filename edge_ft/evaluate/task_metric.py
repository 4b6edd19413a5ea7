"""The task metric: the one figure by which the gate compares the trained and the shipped model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from edge_ft.config import TEXT_TASKS
from edge_ft.data import Example
from edge_ft.evaluate.metrics import Statistic, correlation, micro_f1, ratio, span_counts
from edge_ft.evaluate.scoring import RowScores, tag_names

__all__ = ["ACCURACY", "TaskMetric", "task_metric_for"]


@dataclass(frozen=True)
class TaskMetric:
    """A metric of 0 (a correlation: -1) to 1; higher is better."""

    name: str
    of: Callable[[RowScores], Statistic]
    """Scores of rows -> their metric as a statistic: row numbers [samples, rows] -> [samples]."""

    def value(self, scores: RowScores) -> float:
        """Return the metric over all rows."""
        return float(self.of(scores)(np.arange(len(scores.nll))[None])[0])


ACCURACY = TaskMetric("accuracy", lambda scores: ratio(scores.correct, scores.tokens))


def task_metric_for(examples: Sequence[Example], task: str, labels: tuple[str, ...]) -> TaskMetric:
    """Return the metric of a task for scores of `examples`.

    One class per row: accuracy. Several classes: micro F1. Regression: Spearman's correlation, without scipy Pearson's.
    Tags: span F1 where they mark spans and seqeval is installed, else accuracy. Generated text: token accuracy. Any
    other task: accuracy.
    """
    spans = any(label[:2] in ("B-", "I-") for label in labels) and find_spec("seqeval") is not None
    if task == "token-classification" and spans:
        return TaskMetric("span_f1", lambda scores: _span_f1(scores, examples, labels))
    if examples and isinstance(examples[0].labels[0], float):
        gold = np.array([example.labels for example in examples])
        if len(labels) == 1:
            name = "spearman" if find_spec("scipy") is not None else "pearson"
            return TaskMetric(name, lambda scores: correlation(np.stack(scores.predicted)[:, 0], gold[:, 0], name))
        return TaskMetric("micro_f1", lambda scores: micro_f1(np.stack(scores.predicted) > 0, gold > 0))
    return TaskMetric("token_accuracy", ACCURACY.of) if task in TEXT_TASKS else ACCURACY


def _span_f1(scores: RowScores, examples: Sequence[Example], labels: tuple[str, ...]) -> Statistic:
    counts = span_counts(*tag_names(scores, examples, labels))
    return ACCURACY.of(scores) if counts is None else ratio(*counts)  # no row has a span
