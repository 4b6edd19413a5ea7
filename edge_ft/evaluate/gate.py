"""The gate: decides from scores of the same rows whether an export lost too much.

Beside the loss it compares one figure, the task metric of the trained and of the shipped model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from edge_ft.config import TEXT_TASKS, TOKEN_TASKS, ExportConfig
from edge_ft.data import Example
from edge_ft.evaluate.metrics import (
    UNDEFINED,
    Metric,
    Statistic,
    correlation,
    estimate,
    marks_spans,
    mean,
    micro_f1,
    ranks,
    ratio,
    span_counts,
)
from edge_ft.evaluate.scoring import RowScores, tag_names

__all__ = [
    "ACCURACY",
    "FEWEST_ROWS",
    "MOST_ROWS",
    "PILOT_ROWS",
    "TAX_PRECISION",
    "Limits",
    "TaskMetric",
    "Verdict",
    "cosine_reasons",
    "evaluate_gate",
    "rows_needed",
    "task_metric_for",
    "vector_cosine",
]

TAX_PRECISION = 0.005
"""Nats per target token by which the tax's 95% interval may differ from its mean, where there are rows enough."""
PILOT_ROWS = 64
"""Rows by which `rows_needed` is found."""
MOST_ROWS = 2048
"""Validation rows that an export reads."""
FEWEST_ROWS = 200
"""Rows that the gate scores where there are as many: 60 rows of one export showed a tax of 0.004, 200 one of 0.0125."""


MAX_TAX, MIN_RETAINED = 0.02, 0.95
"""Default limits of the tax, nats per target token, and of the share of the gain that is left."""
MAX_WHOLE_TAX, MIN_WHOLE_RETAINED = 0.1, 0.5
"""The same where the training was over float weights, so that the tax is all that int4 costs, and the gain is that over
a base in float; a training over codes has a part of that in its own losses (docs/decisions/045 and 048)."""


@dataclass(frozen=True)
class Limits:
    """What an export may lose before it is refused."""

    max_tax: float
    """Nats per target token that the shipped model may be worse than the trained one."""
    min_retained: float
    """Share of the learned gain (base - trained) that must be retained; usually 0 to 1."""
    max_metric_drop: float
    """Largest drop of the task metric (0 to 1), and of the mean cosine of embeddings below 1."""

    @classmethod
    def of(cls, config: ExportConfig, *, over_float: bool = False) -> "Limits":
        """Return the limits of an export; `over_float`: an adapter trained over float weights ships in int4."""
        tax, retained = (MAX_WHOLE_TAX, MIN_WHOLE_RETAINED) if over_float else (MAX_TAX, MIN_RETAINED)
        return cls(
            tax if config.max_tax is None else config.max_tax,
            retained if config.min_retained is None else config.min_retained,
            config.max_metric_drop,
        )


@dataclass(frozen=True)
class Verdict:
    """Figures of the gate, and its reasons to refuse; none: it passes."""

    figures: dict[str, Any]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class TaskMetric:
    """A metric of 0 (a correlation: -1) to 1; higher is better."""

    name: str
    of: Callable[[RowScores], Statistic]
    """Scores of rows -> their metric as a statistic: row numbers [samples, rows] -> [samples]."""
    defined: bool = True
    """False for a correlation with equal numbers and for F1 of rows without a class: it drops nowhere."""
    unit: str = "target"
    """What the loss beside it is a mean of: token or target."""

    def value(self, scores: RowScores) -> float:
        """Return the metric over all rows."""
        return float(self.of(scores)(np.arange(len(scores.nll))[None])[0])


ACCURACY = TaskMetric("accuracy", lambda scores: ratio(scores.correct, scores.tokens))


def evaluate_gate(
    base: RowScores,
    trained: RowScores,
    shipped: RowScores,
    limits: Limits,
    adapter_changes_logits: bool,
    metric: TaskMetric = ACCURACY,
) -> Verdict:
    """Compare the untuned base, the model as trained and the graph as shipped.

    The quantization tax is shipped - trained in nats per target token; its mean decides, and its 95% interval (paired
    over rows, weighted by their targets) says how well these rows know it. The retained gain is
    (base - shipped) / (base - trained). The adapter has learned something if the 95% interval of base - trained, a
    paired bootstrap over rows, is above 0. A drop of the task metric refuses only if its paired interval is above 0
    too, since a difference on a few rows can be chance.

    An embedding model is measured by recall, its task metric, and by the cosine of its vectors with those as trained:
    its loss depends on which texts share a batch, and few rows hardly know it. The cosine does not need many.

    Args:
        base: Scores of the base without the adapter.
        trained: Scores of the model as trained, on the same rows.
        shipped: Scores of the graph, on the same rows.
        limits: What may be lost.
        adapter_changes_logits: Whether the graph's logits differ from those of the base.
        metric: The task metric.

    Returns:
        The figures for the manifest, and the reasons to refuse.
    """
    gain = base.mean_nll - trained.mean_nll
    gained = base.above(trained)
    tax = shipped.mean_nll - trained.mean_nll
    lost = shipped.above(trained)
    retained = (base.mean_nll - shipped.mean_nll) / gain if gain > 0 else None
    before, after = metric.value(trained), metric.value(shipped)
    before_of, after_of = metric.of(trained), metric.of(shipped)
    drop = estimate(lambda rows: before_of(rows) - after_of(rows), len(trained.nll))
    cosine = vector_cosine(trained, shipped)
    unit = f"nats per {metric.unit}"
    reasons = []
    if not adapter_changes_logits:
        reasons.append("the adapter does not change the logits of the graph, which answers as the base")
    if gained["low"] <= 0:
        reasons.append(
            f"nothing was learned (loss of the base - loss as trained: {gain:+.4f} {unit}, 95% interval "
            f"[{gained['low']:+.4f}, {gained['high']:+.4f}] on {len(base.nll)} validation rows)"
        )
    if cosine is None:
        reasons += _loss_reasons(tax, lost, retained, limits, unit)
    else:
        reasons += cosine_reasons(cosine, limits)
    if metric.defined and drop["value"] > limits.max_metric_drop and drop["low"] > 0:
        reasons.append(
            f"{metric.name} fell from {before:.4f} to {after:.4f} (95% interval of the drop "
            f"[{drop['low']:+.4f}, {drop['high']:+.4f}]), more than --max-metric-drop {limits.max_metric_drop:g}"
        )
    figures = {
        "rows": len(base.nll),
        "nll": {"base": base.mean_nll, "trained": trained.mean_nll, "shipped": shipped.mean_nll},
        "gain": {**gained, "value": gain},
        "quantization_tax": tax,
        "tax_interval": [lost["low"], lost["high"]],
        "retained_gain": retained,
        "metric_drop": {"metric": metric.name, **(drop if metric.defined else UNDEFINED)},
        "argmax_agreement": shipped.agreement(trained),
        "adapter_changes_logits": adapter_changes_logits,
        **({} if cosine is None else {"cosine": cosine}),
    }
    return Verdict(figures, tuple(reasons))


def vector_cosine(trained: RowScores, shipped: RowScores) -> Metric | None:
    """Return the mean cosine of the embeddings of two models over both texts of each row; None of other models."""
    if trained.vectors is None or shipped.vectors is None:
        return None
    pairs = zip(trained.vectors, shipped.vectors, strict=True)
    return mean(np.mean([(one * other).sum(1, dtype=np.float64) for one, other in pairs], axis=0))


def cosine_reasons(cosine: Metric, limits: Limits) -> list[str]:
    """Return the reasons to refuse vectors with this cosine to those that they should be."""
    if 1 - cosine["value"] <= limits.max_metric_drop:
        return []
    return [
        f"the embeddings have a mean cosine of {cosine['value']:.4f} (95% interval [{cosine['low']:.4f}, "
        f"{cosine['high']:.4f}]) with those before the rounding: more than --max-metric-drop "
        f"{limits.max_metric_drop:g} below 1"
    ]


def _loss_reasons(tax: float, lost: Metric, retained: float | None, limits: Limits, unit: str) -> list[str]:
    reasons = []
    if tax > limits.max_tax:
        known = f"95% interval [{lost['low']:+.4f}, {lost['high']:+.4f}]"
        reasons.append(f"quantization tax {tax:+.4f} {unit} ({known}) is above --max-tax {limits.max_tax:g}")
    if retained is not None and retained < limits.min_retained:
        reasons.append(f"retained gain {retained:.1%} is under --min-retained {limits.min_retained:.0%}")
    return reasons


def rows_needed(trained: RowScores, shipped: RowScores, available: int) -> int:
    """Return how many rows the gate scores: as many as make the tax's 95% interval `TAX_PRECISION` wide on each side.

    Args:
        trained: Scores of a few rows by the model as trained.
        shipped: Of the same rows, with the weights that ship.
        available: Number of rows that there are.

    Returns:
        At least `FEWEST_ROWS`, where there are as many.
    """
    found, rows = shipped.above(trained), len(trained.nll)
    wanted = rows * ((found["high"] - found["low"]) / (2 * TAX_PRECISION)) ** 2
    return min(available, max(FEWEST_ROWS, math.ceil(wanted)))


def task_metric_for(examples: Sequence[Example], task: str, labels: tuple[str, ...]) -> TaskMetric:
    """Return the metric of a task for scores of `examples`.

    One class per row: accuracy. Several classes: micro F1. Regression: Spearman's correlation, without scipy Pearson's.
    Tags: span F1 where they mark spans and seqeval is installed, else accuracy. Generated text: token accuracy.
    Embeddings: recall at 1 among all rows. Any other task: accuracy.
    """
    if task == "feature-extraction":
        texts = [tuple(example.pair_ids) for example in examples]
        return TaskMetric("recall_at_1", lambda scores: _recall(scores, texts))
    if task == "token-classification" and marks_spans(labels):
        return TaskMetric("span_f1", lambda scores: _span_f1(scores, examples, labels))
    if examples and isinstance(examples[0].labels[0], float):
        gold = np.array([example.labels for example in examples])
        if len(labels) == 1:
            name = "spearman" if find_spec("scipy") is not None else "pearson"
            defined = bool(np.ptp(gold) > 0)
            return TaskMetric(
                name, lambda scores: correlation(np.stack(scores.predicted)[:, 0], gold[:, 0], name), defined
            )
        return TaskMetric(
            "micro_f1", lambda scores: micro_f1(np.stack(scores.predicted) > 0, gold > 0), bool(gold.any())
        )
    name = "token_accuracy" if task in TEXT_TASKS else ACCURACY.name
    return TaskMetric(name, ACCURACY.of, unit="token" if task in TOKEN_TASKS else "target")


def _span_f1(scores: RowScores, examples: Sequence[Example], labels: tuple[str, ...]) -> Statistic:
    counts = span_counts(*tag_names(scores, examples, labels))
    return ACCURACY.of(scores) if counts is None else ratio(*counts)  # no row has a span


def _recall(scores: RowScores, texts: list[tuple[int, ...]]) -> Statistic:
    assert scores.vectors is not None
    return ratio((ranks(*scores.vectors, texts) == 0).astype(np.int64), np.ones(len(texts), np.int64))
