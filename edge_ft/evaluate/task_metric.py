"""The one figure that a task is judged by, of any choice of rows: what the gate compares before and after shipping."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ft.config import TEXT_TASKS
from edge_ft.data import Example
from edge_ft.evaluate.metrics import Statistic, correlation, ratio, span_counts
from edge_ft.evaluate.scoring import RowScores, tag_names

__all__ = ["ACCURACY", "TaskMetric", "task_metric_for"]


@dataclass(frozen=True)
class TaskMetric:
    """A metric, 0 (or -1, a correlation) to 1 and the higher the better."""

    name: str
    of: Callable[[RowScores], Statistic]
    """The scores of some rows -> a function of row numbers [samples, rows] that gives a value for each sample."""

    def value(self, scores: RowScores) -> float:
        """Of all rows."""
        return float(self.of(scores)(np.arange(len(scores.nll))[None])[0])


ACCURACY = TaskMetric("accuracy", lambda scores: ratio(scores.correct, scores.tokens))


def task_metric_for(examples: Sequence[Example], task: str, labels: tuple[str, ...]) -> TaskMetric:
    """The metric of a task, on the rows that `examples` are.

    Single labels: accuracy. Several labels: micro F1. Numbers: Spearman's correlation (Pearson's without scipy). Tags:
    span F1 where they are spans and seqeval is installed, else accuracy. Text: token accuracy. All others: accuracy.
    """
    spans = any(label[:2] in ("B-", "I-") for label in labels) and find_spec("seqeval") is not None
    if task == "token-classification" and spans:
        return TaskMetric("span_f1", lambda scores: _span_f1(scores, examples, labels))
    if examples and isinstance(examples[0].labels[0], float):
        gold = np.array([example.labels for example in examples])
        if len(labels) == 1:
            name = "spearman" if find_spec("scipy") is not None else "pearson"
            return TaskMetric(name, lambda scores: correlation(np.stack(scores.predicted)[:, 0], gold[:, 0], name))
        return TaskMetric("micro_f1", lambda scores: ratio(*_several(np.stack(scores.predicted) > 0, gold > 0)))
    return TaskMetric("token_accuracy", ACCURACY.of) if task in TEXT_TASKS else ACCURACY


def _several(predicted: NDArray[np.bool_], gold: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any]]:
    return 2 * (predicted & gold).sum(1), predicted.sum(1) + gold.sum(1)


def _span_f1(scores: RowScores, examples: Sequence[Example], labels: tuple[str, ...]) -> Statistic:
    counts = span_counts(*tag_names(scores, examples, labels))
    return ACCURACY.of(scores) if counts is None else ratio(*counts)  # these rows have no span at all
