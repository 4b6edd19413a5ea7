"""A score is a value between two bounds: 95% intervals over rows, never a number alone."""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from decimal import Decimal
from importlib.util import find_spec
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from edge_ft.errors import require

__all__ = [
    "Metric",
    "Statistic",
    "accuracy",
    "bootstrap",
    "correlation",
    "exact_match",
    "macro_f1",
    "mean",
    "multi_label_f1",
    "number_metrics",
    "paired",
    "paired_bootstrap",
    "perplexity",
    "proportion",
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


class Metric(TypedDict):
    """A value and its 95% interval."""

    value: float
    low: float
    high: float


def bootstrap(
    values: Numbers, weights: Numbers | None = None, seed: int = 0, samples: int = 2000
) -> tuple[float, float]:
    """95% percentile interval of the weighted mean of `values` [rows], rows drawn with replacement."""
    weights = np.ones(len(values)) if weights is None else weights
    weighted = values * weights
    means = [weighted[rows].sum(1) / weights[rows].sum(1) for rows in _resamples(len(values), seed, samples)]
    return _bounds(np.concatenate(means))


def paired_bootstrap(
    first: Numbers, second: Numbers, weights: Numbers | None = None, seed: int = 0, samples: int = 2000
) -> tuple[float, float]:
    """95% percentile interval of the weighted mean of first - second, the same rows drawn of both."""
    return bootstrap(first - second, weights, seed, samples)


def wilson(hits: int, rows: int) -> tuple[float, float]:
    """95% score interval of hits / rows (Wilson 1927), which stays sensible at 0 and 1."""
    z = 1.959964
    share = hits / rows
    scale = 1 + z**2 / rows
    centre = (share + z**2 / (2 * rows)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean(values: Numbers, weights: Numbers | None = None, seed: int = 0) -> Metric:
    """Weighted mean of `values` [rows] with its bootstrap interval."""
    low, high = bootstrap(values, weights, seed)
    return Metric(value=float(np.average(values, weights=weights)), low=low, high=high)


def proportion(hits: Sequence[bool] | NDArray[np.bool_]) -> Metric:
    """Share of rows that are hits, with its Wilson interval."""
    count = int(np.sum(hits))
    low, high = wilson(count, len(hits))
    return Metric(value=count / len(hits), low=low, high=high)


def accuracy(predicted: NDArray[np.int64], gold: NDArray[np.int64]) -> Metric:
    """Share of rows [rows] whose predicted class is the right one."""
    return proportion(predicted == gold)


def macro_f1(predicted: NDArray[np.int64], gold: NDArray[np.int64], classes: int, seed: int = 0) -> Metric:
    """Mean of the classes' F1 with its bootstrap interval; class indices [rows].

    Classes that occur in neither `predicted` nor `gold` do not count, as in scikit-learn.
    """
    pairs = gold * classes + predicted

    def score(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Macro F1 of each resample; rows [samples, rows]."""
        count = len(rows)
        cells = pairs[rows] + np.arange(count)[:, None] * classes**2
        confusion = np.bincount(cells.ravel(), minlength=count * classes**2).reshape(count, classes, classes)
        right = np.diagonal(confusion, axis1=1, axis2=2)
        seen = confusion.sum(1) + confusion.sum(2)  # [samples, classes] predicted + gold
        f1 = 2 * right / np.maximum(seen, 1)
        return np.asarray(f1.sum(1) / (seen > 0).sum(1))

    return _resampled(score, len(gold), seed)


def multi_label_f1(predicted: NDArray[np.bool_], gold: NDArray[np.bool_], seed: int = 0) -> dict[str, Metric]:
    """`micro_f1` over all labels of all rows, and `macro_f1`, the mean of each class's; both [rows, classes].

    Classes that no row has and none was given do not count.
    """
    hits, seen = predicted & gold, predicted.astype(np.int64) + gold

    def macro(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of each resample; rows [samples, rows]."""
        hit, count = hits[rows].sum(1), seen[rows].sum(1)  # [samples, classes]
        return np.asarray((2 * hit / np.maximum(count, 1)).sum(1) / np.maximum((count > 0).sum(1), 1))

    micro = ratio(2 * hits.sum(1), seen.sum(1))
    return {"micro_f1": _resampled(micro, len(gold), seed), "macro_f1": _resampled(macro, len(gold), seed)}


def number_metrics(predicted: NDArray[Any], gold: NDArray[Any], seed: int = 0) -> dict[str, Metric]:
    """`mse`, `pearson` and, where scipy is installed, `spearman` of numbers [rows]."""
    kinds = ("pearson", "spearman") if find_spec("scipy") is not None else ("pearson",)
    found = {kind: _resampled(correlation(predicted, gold, kind), len(gold), seed) for kind in kinds}
    return {"mse": mean((predicted - gold) ** 2, seed=seed), **found}


def recall(first: NDArray[np.float32], second: NDArray[np.float32], texts: Sequence[Hashable]) -> dict[str, Metric]:
    """`recall_at_1` and `recall_at_10`: how often a row's own second text is among so many nearest to its first.

    Args:
        first: [rows, hidden], of length 1.
        second: The same, of the second texts; each different one stands once among those to choose from.
        texts: What tells the second texts apart [rows].
    """
    places: dict[Hashable, int] = {}
    for row, text in enumerate(texts):
        places.setdefault(text, row)
    scores = first @ second[list(places.values())].T  # [rows, different texts]
    column = {text: at for at, text in enumerate(places)}
    own = scores[np.arange(len(texts)), [column[text] for text in texts]]
    ranks = (scores > own[:, None]).sum(1)
    return {f"recall_at_{count}": proportion(ranks < count) for count in (1, 10)}


def span_metrics(predicted: list[list[str]], gold: list[list[str]], seed: int = 0) -> dict[str, Metric]:
    """`span_f1` of the spans that B- and I- tags make of each row's words, where seqeval is installed.

    A span is right when it begins, ends and is called as the right one (CoNLL 2003).
    """
    counts = span_counts(predicted, gold)
    return {} if counts is None else {"span_f1": _resampled(ratio(*counts), len(gold), seed)}


def span_counts(predicted: list[list[str]], gold: list[list[str]]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Of each row twice the right spans, and those found plus those to find: their ratio is F1.

    None without seqeval, or where no row has a span.
    """
    if find_spec("seqeval") is None or not any(tag[:2] in ("B-", "I-") for row in gold for tag in row):
        return None
    entities = require("seqeval.metrics.sequence_labeling", "metrics").get_entities
    spans = [(set(entities(ours)), set(entities(right))) for ours, right in zip(predicted, gold, strict=True)]
    hits = np.array([2 * len(ours & right) for ours, right in spans])
    return hits, np.array([len(ours) + len(right) for ours, right in spans])


def ratio(parts: Numbers, wholes: Numbers) -> Statistic:
    """The sum of `parts` [rows] over that of `wholes` [rows], 0 where there is none."""
    return lambda rows: parts[rows].sum(1) / np.maximum(wholes[rows].sum(1), 1)


def correlation(predicted: Numbers, gold: Numbers, kind: str) -> Statistic:
    """Pearson's or Spearman's correlation of two columns [rows]; a constant correlates with nothing: 0.

    Raises:
        MissingExtra: Spearman's, and scipy is not installed.
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


def paired(first: Statistic, second: Statistic, rows: int, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of first - second, the same rows drawn of both."""
    return _bounds(np.concatenate([first(drawn) - second(drawn) for drawn in _resamples(rows, seed, 2000)]))


def perplexity(nll: float) -> float:
    """exp of a mean loss in nats per token; the largest float where that overflows."""
    return math.exp(min(nll, 709.0))


def exact_match(answer: str, reference: str) -> bool:
    """Whether an answer says what the reference says.

    A reference of numbers and their units ("9 apples", "$1,200.50", "12 (boys); 15 (girls)") is matched by its numbers
    alone: the answer's first numbers must be they, in order and by value. It starts with a number and has at
    most two other words for each. Any other reference must be equal as SQuAD compares: without case,
    punctuation, articles and extra blanks.
    """
    wanted = _numbers(reference)
    starts = re.match(r"\W*\d", reference) and _numbers(reference.split()[0])
    if starts and len(re.findall(r"[^\W\d_]+", reference)) <= 2 * len(wanted):
        return _numbers(answer)[: len(wanted)] == wanted
    return _words(answer) == _words(reference)


def verbatim_match(answer: str, reference: str) -> bool:
    """Whether an answer is the reference letter by letter, blanks around it apart."""
    return answer.strip() == reference.strip()


def token_f1(answer: str, reference: str) -> float:
    """F1 over the words that both have (SQuAD), 0 to 1; two empty texts agree."""
    said, wanted = _words(answer), _words(reference)
    if not said or not wanted:
        return float(said == wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


def _words(text: str) -> list[str]:
    """Words after SQuAD's normalization: lower case, no ASCII punctuation, no articles."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _numbers(text: str) -> list[Decimal]:
    """Values of the numbers in a text: "1,200" is one, the minus of "10-3" belongs to none, "5G" is none."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    found = re.findall(r"(?<![\w.])-?(?:\$ ?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?![^\W_])", text)
    return [Decimal(re.sub(r"[$, ]", "", number)) for number in found if re.search(r"\d", number)]


def _resamples(rows: int, seed: int, samples: int) -> Iterator[NDArray[np.int64]]:
    """Row indices drawn with replacement, `samples` in all, in chunks [chunk, rows] of bounded memory."""
    random = np.random.default_rng(seed)
    chunk = max(1, 1_000_000 // rows)
    for start in range(0, samples, chunk):
        yield random.integers(rows, size=(min(chunk, samples - start), rows))


def _resampled(score: Statistic, rows: int, seed: int) -> Metric:
    """What `score` gives for all rows, with its bootstrap interval; it takes row numbers [samples, rows]."""
    value = float(score(np.arange(rows)[None])[0])
    low, high = _bounds(np.concatenate([score(chosen) for chosen in _resamples(rows, seed, 2000)]))
    return Metric(value=value, low=low, high=high)


def _bounds(estimates: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(estimates, [2.5, 97.5])
    return float(low), float(high)
