"""Metrics with their 95% intervals over rows."""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from decimal import Decimal
from importlib.util import find_spec
from itertools import chain
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from edge_ft.errors import require

__all__ = [
    "UNDEFINED",
    "MaybeMetric",
    "Metric",
    "Statistic",
    "correlation",
    "estimate",
    "exact_match",
    "interval",
    "macro_f1",
    "marks_spans",
    "mean",
    "micro_f1",
    "multi_label_f1",
    "number_metrics",
    "perplexity",
    "proportion",
    "ranks",
    "ratio",
    "recall",
    "span_counts",
    "span_metrics",
    "token_f1",
    "verbatim_match",
    "wilson",
]

Numbers = NDArray[np.floating[Any]] | NDArray[np.integer[Any]]

Statistic = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""Row numbers [samples, rows] -> a value for each sample."""

SAMPLES, SEED = 2000, 0
"""Resamples of a bootstrap, and the seed that draws them."""


class Metric(TypedDict):
    """A value and its 95% interval."""

    value: float
    low: float
    high: float


class Undefined(TypedDict):
    """A metric that has no value for these rows."""

    value: None
    low: None
    high: None


MaybeMetric = Metric | Undefined
UNDEFINED = Undefined(value=None, low=None, high=None)


def interval(statistic: Statistic, rows: int) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of a statistic over `rows` rows, drawn with replacement."""
    estimates = np.concatenate([statistic(drawn) for drawn in _resamples(rows)])
    low, high = np.percentile(estimates, [2.5, 97.5])
    return float(low), float(high)


def estimate(statistic: Statistic, rows: int) -> Metric:
    """Return the value of a statistic over all rows, with its bootstrap interval."""
    low, high = interval(statistic, rows)
    return Metric(value=float(statistic(np.arange(rows)[None])[0]), low=low, high=high)


def wilson(hits: int, rows: int) -> tuple[float, float]:
    """Return the 95% score interval of hits / rows (Wilson 1927), which stays sensible at 0 and 1."""
    z = 1.959964
    share = hits / rows
    scale = 1 + z**2 / rows
    centre = (share + z**2 / (2 * rows)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean(values: Numbers, weights: Numbers | None = None) -> Metric:
    """Return the weighted mean of `values` [rows] with its bootstrap interval; `weights` [rows] are at least 1."""
    weights = np.ones(len(values)) if weights is None else weights
    return estimate(ratio(values * weights, weights), len(values))


def proportion(hits: Sequence[bool] | NDArray[np.bool_]) -> Metric:
    """Return the share of rows that are hits, with its Wilson interval."""
    count = int(np.sum(hits))
    low, high = wilson(count, len(hits))
    return Metric(value=count / len(hits), low=low, high=high)


def macro_f1(predicted: NDArray[np.int64], gold: NDArray[np.int64], classes: int) -> Metric:
    """Return the mean F1 of the classes, of class indices [rows].

    Classes that occur in neither `predicted` nor `gold` do not count, as in scikit-learn.
    """
    one_hot = np.eye(classes, dtype=np.bool_)
    return _macro_f1(one_hot[predicted], one_hot[gold])


def multi_label_f1(predicted: NDArray[np.bool_], gold: NDArray[np.bool_]) -> dict[str, MaybeMetric]:
    """Return `micro_f1` over all labels, and `macro_f1`, the mean F1 of the classes; both arrays [rows, classes].

    Classes that occur in neither `predicted` nor `gold` do not count. Both are undefined if no row has a class.
    """
    if not gold.any():
        return {"micro_f1": UNDEFINED, "macro_f1": UNDEFINED}
    return {"micro_f1": estimate(micro_f1(predicted, gold), len(gold)), "macro_f1": _macro_f1(predicted, gold)}


def _macro_f1(predicted: NDArray[np.bool_], gold: NDArray[np.bool_]) -> Metric:
    """Return the mean F1 of the classes; both arrays [rows, classes]."""
    hits, seen = (predicted & gold).astype(np.float64), predicted.astype(np.float64) + gold

    def macro(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the macro F1 of each resample; rows [samples, rows]."""
        # How often each row occurs in each resample, [samples, rows].
        drawn = np.array([np.bincount(sample, minlength=len(gold)) for sample in rows], np.float64)
        right, count = drawn @ hits, drawn @ seen  # [samples, classes]
        return np.asarray((2 * right / np.maximum(count, 1)).sum(1) / np.maximum((count > 0).sum(1), 1))

    return estimate(macro, len(gold))


def micro_f1(predicted: NDArray[np.bool_], gold: NDArray[np.bool_]) -> Statistic:
    """Return F1 over all labels of all rows as a statistic; both arrays [rows, classes]."""
    return ratio(2 * (predicted & gold).sum(1), predicted.sum(1) + gold.sum(1))


def number_metrics(predicted: NDArray[Any], gold: NDArray[Any]) -> dict[str, MaybeMetric]:
    """Return `mse`, `pearson` and, where scipy is installed, `spearman` of numbers [rows].

    A correlation is undefined where all predictions or all right numbers are equal.
    """
    kinds = ("pearson", "spearman") if find_spec("scipy") is not None else ("pearson",)
    defined = np.ptp(predicted) > 0 and np.ptp(gold) > 0
    correlations = {
        kind: estimate(correlation(predicted, gold, kind), len(gold)) if defined else UNDEFINED for kind in kinds
    }
    return {"mse": mean((predicted - gold) ** 2), **correlations}


def recall(first: NDArray[np.float32], second: NDArray[np.float32], texts: Sequence[Hashable]) -> dict[str, Metric]:
    """Return `recall_at_1` and `recall_at_10`: how often a row's own second text is among the 1 or 10 nearest.

    Args:
        first: Embeddings of the first texts [rows, hidden], of length 1.
        second: Embeddings of the second texts [rows, hidden], of length 1; equal texts are one candidate.
        texts: Identifies the second texts [rows].
    """
    found = ranks(first, second, texts)
    return {f"recall_at_{count}": proportion(found < count) for count in (1, 10)}


def ranks(first: NDArray[np.float32], second: NDArray[np.float32], texts: Sequence[Hashable]) -> NDArray[np.int64]:
    """Return for each row how many second texts are nearer than its own; arguments as of `recall`."""
    places = {text: row for row, text in reversed(list(enumerate(texts)))}  # the first row of each text
    scores = first @ second[list(places.values())].T  # [rows, different texts]
    column = {text: index for index, text in enumerate(places)}
    own = scores[np.arange(len(texts)), [column[text] for text in texts]]
    found: NDArray[np.int64] = (scores > own[:, None]).sum(1)
    return found


def marks_spans(tags: Iterable[str]) -> bool:
    """Return whether there are B- and I- tags, and seqeval is installed, which reads their spans."""
    return find_spec("seqeval") is not None and any(tag[:2] in ("B-", "I-") for tag in tags)


def span_metrics(predicted: list[list[str]], gold: list[list[str]]) -> dict[str, Metric]:
    """Return `span_f1` of the spans that B- and I- tags mark in each row, where seqeval is installed.

    A span is right when its start, its end and its name are (CoNLL 2003).
    """
    counts = span_counts(predicted, gold)
    return {} if counts is None else {"span_f1": estimate(ratio(*counts), len(gold))}


def span_counts(predicted: list[list[str]], gold: list[list[str]]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Return for each row twice the right spans, and the predicted plus the gold spans: their ratio is F1.

    None without seqeval, or where no row has a span.
    """
    if not marks_spans(chain.from_iterable(gold)):
        return None
    entities = require("seqeval.metrics.sequence_labeling", "metrics").get_entities
    spans = [(set(entities(found)), set(entities(right))) for found, right in zip(predicted, gold, strict=True)]
    hits = np.array([2 * len(found & right) for found, right in spans])
    return hits, np.array([len(found) + len(right) for found, right in spans])


def ratio(parts: Numbers, wholes: Numbers) -> Statistic:
    """Return the statistic sum of `parts` [rows] / sum of `wholes` [rows], 0 where both are 0; wholes are integers."""
    return lambda rows: parts[rows].sum(1) / np.maximum(wholes[rows].sum(1), 1)


def correlation(predicted: Numbers, gold: Numbers, kind: str) -> Statistic:
    """Return Pearson's or Spearman's correlation of two columns [rows] as a statistic; 0 where one is constant.

    Raises:
        MissingExtra: `kind` is spearman, and scipy is not installed.
    """
    ranked = require("scipy.stats", "metrics").rankdata if kind == "spearman" else None

    def score(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        columns = (
            (predicted[rows], gold[rows]) if ranked is None else (ranked(x[rows], axis=1) for x in (predicted, gold))
        )
        a, b = (column - column.mean(1, keepdims=True) for column in columns)
        scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
        return np.asarray(np.divide((a * b).sum(1), scale, out=np.zeros(len(rows)), where=scale > 0))

    return score


def perplexity(nll: float) -> float:
    """Return exp of a mean loss in nats per token; the largest float where that overflows."""
    return math.exp(min(nll, 709.0))


def exact_match(answer: str, reference: str) -> bool:
    """Return whether an answer means the same as the reference.

    A reference of numbers and their units ("9 apples", "$1,200.50", "12 (boys); 15 (girls)"), which starts with a
    number and has at most two other words per number, is matched by its numbers alone: they must be the first numbers
    of the answer, in order and by value. Any other reference must be equal as in SQuAD: without case, punctuation,
    articles and extra spaces.
    """
    wanted = _numbers(reference)
    starts = re.match(r"\W*\d", reference) and _numbers(reference.split()[0])
    if starts and len(re.findall(r"[^\W\d_]+", reference)) <= 2 * len(wanted):
        return _numbers(answer)[: len(wanted)] == wanted
    return _words(answer) == _words(reference)


def verbatim_match(answer: str, reference: str) -> bool:
    """Return whether an answer equals the reference, except for spaces around it."""
    return answer.strip() == reference.strip()


def token_f1(answer: str, reference: str) -> float:
    """Return F1 over the common words (SQuAD), 0 to 1; of two empty texts 1."""
    found, wanted = _words(answer), _words(reference)
    if not found or not wanted:
        return float(found == wanted)
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted))


def _words(text: str) -> list[str]:
    """Return the words after SQuAD's normalization: lower case, no ASCII punctuation, no articles."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _numbers(text: str) -> list[Decimal]:
    """Return the numbers in a text: "1,200" is one number, "10-3" holds 10 and 3, "5G" holds none."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    found = re.findall(r"(?<![\w.])-?(?:\$ ?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?![^\W_])", text)
    return [Decimal(re.sub(r"[$, ]", "", number)) for number in found if re.search(r"\d", number)]


def _resamples(rows: int) -> Iterator[NDArray[np.int64]]:
    """Yield row numbers drawn with replacement, `SAMPLES` times, in chunks [samples, rows] of bounded memory."""
    random = np.random.default_rng(SEED)
    chunk = max(1, 1_000_000 // rows)
    for start in range(0, SAMPLES, chunk):
        yield random.integers(rows, size=(min(chunk, SAMPLES - start), rows))
