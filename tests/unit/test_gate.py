"""The gate computes its figures correctly and refuses for each of its reasons."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from seqeval.metrics import f1_score as seqeval_f1
from sklearn.metrics import f1_score

from edge_ft.config import ExportConfig
from edge_ft.data import Example
from edge_ft.evaluate.gate import FEWEST_ROWS, Limits, evaluate_gate, rows_needed, task_metric_for
from edge_ft.evaluate.scoring import RowScores

LIMITS = Limits(max_tax=0.02, min_retained=0.95, max_metric_drop=0.02)
ROWS = 50


def scores(nll_per_token: float, right: float = 0.8, spread: float = 0.1, seed: int = 0) -> RowScores:
    """Rows of ten tokens around a mean loss."""
    noise = np.random.default_rng(seed).normal(0, spread, ROWS)
    per_token = nll_per_token + noise - noise.mean()
    predicted = [np.where(np.arange(10) < right * 10, 1, 0) for _ in range(ROWS)]
    return RowScores(per_token * 10, np.full(ROWS, 10), np.full(ROWS, int(right * 10)), predicted)


@pytest.mark.parametrize(
    ("given", "over_float", "expected"),
    [
        ((None, None), False, (0.02, 0.95)),
        ((None, None), True, (0.1, 0.5)),
        ((0.0, 0.0), True, (0.0, 0.0)),
        ((0.1, 0.2), False, (0.1, 0.2)),
    ],
)
def test_a_training_over_float_weights_may_lose_more_by_default(
    given: tuple[float | None, float | None], over_float: bool, expected: tuple[float, float]
) -> None:
    """Its tax is all that int4 costs; one over codes has a part of that in its own loss."""
    config = ExportConfig(out=Path("bundle"), max_tax=given[0], min_retained=given[1])
    assert Limits.of(config, over_float=over_float) == Limits(*expected, 0.02)


def test_a_good_export_passes_and_its_figures_add_up() -> None:
    verdict = evaluate_gate(scores(3.0), scores(1.0), scores(1.01), LIMITS, adapter_changes_logits=True)
    assert verdict.reasons == ()
    assert verdict.figures["quantization_tax"] == pytest.approx(0.01)
    assert verdict.figures["retained_gain"] == pytest.approx(1.99 / 2)
    assert verdict.figures["gain"]["low"] <= 2.0 <= verdict.figures["gain"]["high"]
    assert verdict.figures["argmax_agreement"] == 1.0


@pytest.mark.parametrize(
    ("base", "trained", "shipped", "changes", "message"),
    [
        (scores(3.0), scores(1.0), scores(1.03), True, "quantization tax"),
        (scores(1.2), scores(1.0), scores(1.015), True, "retained gain"),
        (scores(3.0), scores(1.0), scores(1.0, right=0.7), True, "--max-metric-drop"),
        (scores(3.0), scores(1.0), scores(1.0), False, "does not change the logits"),
        (scores(1.0), scores(1.0, seed=1), scores(1.0, seed=1), True, "nothing was learned"),
        (scores(1.0), scores(1.5), scores(1.5), True, "nothing was learned"),
    ],
    ids=["tax", "retained", "metric", "adapter", "noise", "worse"],
)
def test_each_reason_to_refuse_refuses(
    base: RowScores, trained: RowScores, shipped: RowScores, changes: bool, message: str
) -> None:
    reasons = evaluate_gate(base, trained, shipped, LIMITS, changes).reasons
    assert any(message in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    ("task", "unit"),
    [
        ("text-generation", "nats per token"),
        ("fill-mask", "nats per token"),
        ("text-classification", "nats per target"),
    ],
)
def test_a_reason_says_what_a_loss_is_of(task: str, unit: str) -> None:
    metric = task_metric_for([], task, ("a", "b"))
    untaught, costly = (
        evaluate_gate(scores(3.0), scores(trained), scores(trained + 0.5), LIMITS, True, metric).reasons[0]
        for trained in (3.0, 1.0)
    )
    assert unit in untaught
    assert "nothing was learned" in untaught
    assert f"+0.5000 {unit}" in costly


def test_the_tax_has_a_paired_interval_and_its_mean_decides() -> None:
    """Both models find the same rows hard: only the differences count, and one above the limit does not refuse."""
    trained = scores(1.0, spread=1.0)
    shipped = replace(trained, nll=trained.nll + 10 * np.linspace(-0.02, 0.058, ROWS))
    verdict = evaluate_gate(scores(5.0), trained, shipped, LIMITS, adapter_changes_logits=True)
    low, high = verdict.figures["tax_interval"]
    assert verdict.figures["quantization_tax"] == pytest.approx(0.019)
    assert 0 < low < 0.019 < LIMITS.max_tax < high < 0.03
    assert verdict.reasons == ()


def test_rows_of_more_targets_weigh_more_in_the_tax_and_its_interval() -> None:
    trained = RowScores(np.array([10.0, 90.0]), np.array([10, 90]), np.array([5, 45]), [np.ones(10), np.ones(90)])
    shipped = replace(trained, nll=trained.nll + np.array([1.0, 0.0]))
    figures = evaluate_gate(trained, trained, shipped, LIMITS, adapter_changes_logits=True).figures
    assert figures["quantization_tax"] == pytest.approx(0.01)
    assert figures["tax_interval"] == pytest.approx([0.0, 0.1])


@pytest.mark.parametrize(
    ("spread", "available", "wanted"), [(0.001, 900, FEWEST_ROWS), (0.001, 90, 90), (1.0, 900, 900)]
)
def test_the_gate_scores_as_many_rows_as_the_interval_needs(spread: float, available: int, wanted: int) -> None:
    trained = scores(1.0)
    shipped = replace(trained, nll=trained.nll + scores(0.0, spread=spread, seed=1).nll)
    assert rows_needed(trained, shipped, available) == wanted


def test_twice_the_spread_needs_four_times_the_rows() -> None:
    trained = scores(1.0)
    few, many = (
        rows_needed(trained, replace(trained, nll=trained.nll + scores(0.0, spread=spread, seed=1).nll), 10**6)
        for spread in (0.1, 0.2)
    )
    assert few > FEWEST_ROWS
    assert many == pytest.approx(4 * few, abs=4)


def test_a_drop_that_can_be_chance_does_not_refuse() -> None:
    """One row of 20 changed its mind: 5 points, and no evidence."""
    trained, shipped = scores(1.0), scores(1.0)
    few = [
        RowScores(s.nll[:20], s.tokens[:20] // 10, s.correct[:20] * 0 + 1, s.predicted[:20]) for s in (trained, shipped)
    ]
    few[1].correct[3] = 0
    base = RowScores(few[0].nll + 20, few[0].tokens, few[0].correct * 0, few[0].predicted)
    verdict = evaluate_gate(base, *few, LIMITS, adapter_changes_logits=True)
    assert verdict.figures["metric_drop"]["value"] == pytest.approx(0.05)
    assert verdict.reasons == ()


def test_the_limits_can_be_changed() -> None:
    loose = Limits(max_tax=0.5, min_retained=0.5, max_metric_drop=0.5)
    assert evaluate_gate(scores(3.0), scores(1.0), scores(1.4, right=0.5), loose, True).reasons == ()


# The metric of each task


def example(labels: list[Any]) -> Example:
    return Example(1, [0] * len(labels), labels, 0, "", 0)


def metric_of(gold: list[list[Any]], found: list[list[Any]], task: str, labels: tuple[str, ...]) -> tuple[str, float]:
    """Name and value of the metric of these rows."""
    metric = task_metric_for([example(row) for row in gold], task, labels)
    counts = np.array([len(row) for row in gold])
    right = np.array([sum(a == b for a, b in zip(*rows, strict=True)) for rows in zip(gold, found, strict=True)])
    return metric.name, metric.value(RowScores(np.ones(len(gold)), counts, right, [np.array(row) for row in found]))


def test_each_task_has_its_own_metric() -> None:
    assert metric_of([[0], [1], [1], [0]], [[0], [1], [0], [0]], "text-classification", ("a", "b")) == (
        "accuracy",
        0.75,
    )
    assert metric_of([[7, 8], [9]], [[7, 1], [9]], "text-generation", ()) == ("token_accuracy", pytest.approx(2 / 3))
    name, value = metric_of([[1.0], [2.0], [4.0]], [[0.1], [0.5], [0.2]], "text-classification", ("price",))
    assert (name, value) == ("spearman", pytest.approx(spearmanr([1, 2, 4], [0.1, 0.5, 0.2]).statistic))
    gold, logits = [[1.0, 0.0], [1.0, 1.0]], [[2.0, 0.5], [1.0, -1.0]]
    name, value = metric_of(gold, logits, "text-classification", ("a", "b"))
    expected = f1_score(np.array(gold), np.array(logits) > 0, average="micro")
    assert (name, value) == ("micro_f1", pytest.approx(expected))


def test_tags_are_scored_by_their_spans() -> None:
    labels = ("B-PER", "I-PER", "O")
    gold, found = [[0, 1, 2, 0], [2, 2]], [[0, 1, 2, 2], [2, 0]]
    tags = [[[labels[tag] for tag in row] for row in rows] for rows in (gold, found)]
    assert metric_of(gold, found, "token-classification", labels) == ("span_f1", pytest.approx(seqeval_f1(*tags)))
    assert metric_of(gold, found, "token-classification", ("x", "y", "z"))[0] == "accuracy"


def test_a_drop_of_the_task_metric_refuses() -> None:
    """Every number in its place before; after shipping none is, while losses stay as they were."""
    gold = np.arange(50.0)
    ranks = task_metric_for([example([number]) for number in gold], "text-classification", ("price",))
    trained, shipped = (
        replace(scores(1.0), predicted=[np.array([number]) for number in column]) for column in (gold, gold[::-1])
    )
    verdict = evaluate_gate(scores(3.0), trained, shipped, LIMITS, True, ranks)
    assert verdict.figures["metric_drop"]["metric"] == "spearman"
    assert verdict.figures["metric_drop"]["value"] == pytest.approx(2)
    assert any("spearman fell from 1.0000 to -1.0000" in reason for reason in verdict.reasons)
    assert evaluate_gate(scores(3.0), trained, trained, LIMITS, True, ranks).reasons == ()


@pytest.mark.parametrize(
    ("row", "labels", "value"),
    [([1.0], ("price",), None), ([0.0, 0.0], ("a", "b"), None), ([0.0, 1.0], ("a", "b"), 0.0)],
)
def test_a_metric_without_a_value_does_not_drop(row: list[float], labels: tuple[str, ...], value: float | None) -> None:
    """All right numbers are equal, or no row has a class."""
    metric = task_metric_for([example(row) for _ in range(ROWS)], "text-classification", labels)
    found = replace(scores(1.0), predicted=[np.array(row)] * ROWS)
    assert evaluate_gate(scores(3.0), found, found, LIMITS, True, metric).figures["metric_drop"]["value"] == value


def embedded(noise: float, swapped: int = 0, nll: float = 1.0) -> RowScores:
    """Rows whose first text is their second one turned a little; `swapped` rows have a neighbour's first vector."""
    random = np.random.default_rng(0)
    second = random.standard_normal((ROWS, 16))
    first = second + 0.1 * random.standard_normal(second.shape)
    first[:swapped] = np.roll(first[:swapped], 1, axis=0)
    sides = [
        side + noise * np.random.default_rng(seed).standard_normal(side.shape)
        for seed, side in enumerate((first, second))
    ]
    a, b = ((side / np.linalg.norm(side, axis=1, keepdims=True)).astype(np.float32) for side in sides)
    ranks = [np.zeros(1, np.int64)] * ROWS
    return RowScores(np.full(ROWS, nll), np.ones(ROWS, np.int64), np.ones(ROWS, np.int64), ranks, (a, b))


def judged(shipped: RowScores) -> Any:
    pairs = [Example(row, [1], [0], 0, "", 0, pair_ids=[row]) for row in range(ROWS)]
    metric = task_metric_for(pairs, "feature-extraction", ())
    return evaluate_gate(embedded(0, nll=3.0), embedded(0), shipped, LIMITS, True, metric)


def test_an_embedder_is_judged_by_its_vectors_and_not_by_a_loss_that_depends_on_the_batch() -> None:
    verdict = judged(embedded(0.05, nll=1.5))
    assert verdict.figures["quantization_tax"] == pytest.approx(0.5)
    assert verdict.figures["metric_drop"]["metric"] == "recall_at_1"
    cosine = verdict.figures["cosine"]
    assert 0.98 < cosine["low"] < cosine["value"] < cosine["high"] < 1
    assert verdict.reasons == ()


def test_vectors_that_turned_away_are_refused_though_every_text_is_still_found() -> None:
    verdict = judged(embedded(0.3))
    assert verdict.figures["metric_drop"]["value"] == 0
    assert len(verdict.reasons) == 1
    assert "mean cosine of 0.9" in verdict.reasons[0]


def test_a_recall_that_fell_is_refused() -> None:
    reasons = judged(embedded(0, swapped=10)).reasons
    assert any("recall_at_1 fell from 1.0000 to 0.8000" in reason for reason in reasons)
