"""What a label column holds: one class, several, or a number, each with its own loss, scores and metrics."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score

from edge_ft.data import Row
from edge_ft.data.classes import class_targets, guess_problem, read_classes
from edge_ft.errors import DataError
from edge_ft.evaluate.metrics import multi_label_f1, number_metrics


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (["a", "b", None], "single_label_classification"),
        ([1, 2.0, "3"], "single_label_classification"),
        (["0.5", "a"], "single_label_classification"),
        ([0.5, 1], "regression"),
        (["0.5", "1", ""], "regression"),
        ([["a"], []], "multi_label_classification"),
        ([True, False], "single_label_classification"),
    ],
)
def test_the_problem_type_is_inferred_from_the_values(values: list[Any], problem: str) -> None:
    assert guess_problem([Row(n, {"label": value}) for n, value in enumerate(values)], "label") == problem


def test_values_become_targets() -> None:
    several = read_classes(["b", "a", "b"], "multi_label_classification", "row 1")
    assert several == ("b", "a")
    assert read_classes('["b"]', "multi_label_classification", "row 1") == ("b",)
    assert class_targets(several, "multi_label_classification", ("a", "b", "c"), "row 1") == [1.0, 1.0, 0.0]
    assert class_targets((), "multi_label_classification", ("a", "b"), "row 1") == [0.0, 0.0]
    assert class_targets(read_classes("-100", "regression", "row 1"), "regression", ("score",), "row 1") == [-100.0]
    assert class_targets(("b",), "single_label_classification", ("a", "b"), "row 1") == [1]


@pytest.mark.parametrize(
    ("value", "problem", "message"),
    [
        ("a", "regression", "for regression it must be a finite number"),
        (float("inf"), "regression", "for regression it must be a finite number"),
        ("a", "multi_label_classification", "a list of texts"),
        ([["a"]], "multi_label_classification", "a list of texts"),
        (0.5, "single_label_classification", "text or a whole number"),
    ],
)
def test_other_values_are_refused(value: Any, problem: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_classes(value, problem, "row 7")


def test_the_metrics_equal_those_of_libraries() -> None:
    random = np.random.default_rng(0)
    ours, right = random.random((60, 4)) > 0.6, random.random((60, 4)) > 0.5
    found = multi_label_f1(ours, right)
    for name in ("micro", "macro"):
        assert found[f"{name}_f1"]["value"] == pytest.approx(f1_score(right, ours, average=name))
        assert found[f"{name}_f1"]["low"] < found[f"{name}_f1"]["value"] < found[f"{name}_f1"]["high"]
    gold = random.normal(size=80)
    said = gold + random.normal(size=80)
    numbers = number_metrics(said, gold)
    assert numbers["pearson"]["value"] == pytest.approx(pearsonr(said, gold).statistic)
    assert numbers["spearman"]["value"] == pytest.approx(spearmanr(said, gold).statistic)
    assert numbers["mse"]["value"] == pytest.approx(((said - gold) ** 2).mean())
