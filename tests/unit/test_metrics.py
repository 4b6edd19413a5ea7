"""Metrics agree with their definitions, and their intervals are as wide as theory predicts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import f1_score

from edge_ft.evaluate.metrics import (
    UNDEFINED,
    exact_match,
    interval,
    macro_f1,
    mean,
    number_metrics,
    perplexity,
    proportion,
    ratio,
    token_f1,
    verbatim_match,
    wilson,
)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("The answer is 9.", "9 apples"),
        ("9.0", "9"),
        ("$1,200.50 in all", "1200.5 dollars"),
        ("-3 degrees", "\u22123"),
        ("10-3", "10 and 3"),
        ("12 boys, 15 girls, 27 in all", "12 (boys); 15 (girls)"),
        ("5:30 p.m.", "5:30"),
        (".5", "0.5"),
        ("1,2", "1 2"),
        ("the  Eiffel Tower!", "Eiffel tower"),
        ("", "The."),
    ],
)
def test_answers_that_match(answer: str, reference: str) -> None:
    assert exact_match(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("19", "9 apples"),
        ("8, no, 9", "9"),
        ("3", "-3"),
        ("none", "9"),
        ("12 boys", "12 boys and 15 girls"),
        ("3 eggs", "chapter 3"),
        ("x", "..5"),
        ("Paris, France", "Paris"),
    ],
)
def test_answers_that_do_not_match(answer: str, reference: str) -> None:
    assert not exact_match(answer, reference)


def test_token_f1_is_that_of_squad() -> None:
    assert token_f1("the cat sat", "A cat stood up") == pytest.approx(2 * 1 / (2 + 3))
    assert token_f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert token_f1("The", "a") == 1
    assert token_f1("dog", "the") == 0


@given(st.text(max_size=30), st.text(max_size=30))
def test_text_scores_are_symmetric_and_bounded(first: str, second: str) -> None:
    assert exact_match(first, first)
    assert 0 <= token_f1(first, second) == token_f1(second, first) <= 1


def test_macro_f1_is_that_of_scikit_learn() -> None:
    gold = np.array([0, 0, 1, 1, 1, 3])
    predicted = np.array([0, 1, 1, 1, 3, 3])
    # Class 2 occurs nowhere and does not count; the others have 2/3 each.
    assert macro_f1(predicted, gold, 5)["value"] == pytest.approx((2 / 3 + 2 / 3 + 2 / 3) / 3)
    perfect = macro_f1(gold, gold, 5)
    assert (perfect["value"], perfect["low"], perfect["high"]) == (1, 1, 1)
    many = np.random.default_rng(0).integers(0, 4, 400)
    noisy = np.where(np.arange(400) % 4 == 0, (many + 1) % 4, many)
    score = macro_f1(noisy, many, 4)
    assert score["low"] < score["value"] < score["high"]
    assert score["high"] - score["low"] == pytest.approx(2 * 1.96 * math.sqrt(0.75 * 0.25 / 400), rel=0.2)


def test_class_metrics_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(3)
    for classes in (2, 5):
        gold, predicted = random.integers(0, classes, (2, 60))
        assert macro_f1(predicted, gold, classes)["value"] == pytest.approx(f1_score(gold, predicted, average="macro"))
        # Of one class a row, micro F1 is accuracy.
        assert proportion(predicted == gold)["value"] == pytest.approx(f1_score(gold, predicted, average="micro"))


def test_spearman_is_that_of_scipy_with_ties() -> None:
    random = np.random.default_rng(4)
    gold = random.integers(0, 6, 200).astype(float)
    predicted = gold + random.normal(0, 2, 200).round()
    found = number_metrics(predicted, gold)["spearman"]
    assert found["value"] == pytest.approx(spearmanr(predicted, gold).statistic)
    assert found["low"] < found["value"] < found["high"]
    assert number_metrics(np.exp(gold), gold)["spearman"]["value"] == pytest.approx(1)
    assert number_metrics(np.zeros(200), gold)["spearman"] == UNDEFINED, "not 0"


def test_accuracy_is_never_certain() -> None:
    assert proportion([True, False, True, True])["value"] == 0.75
    sure = proportion([True] * 10)
    assert (sure["value"], sure["high"]) == pytest.approx((1, 1))
    assert sure["low"] == pytest.approx(0.722, abs=1e-3)  # Wilson's for 10 of 10
    assert wilson(0, 10) == pytest.approx((0, 0.278), abs=1e-3)
    assert wilson(5, 10) == pytest.approx((0.237, 0.763), abs=1e-3)


def test_a_bootstrap_interval_is_as_wide_as_theory_predicts() -> None:
    values = np.random.default_rng(1).normal(5, 2, 1000)
    found = mean(values)
    low, high = found["low"], found["high"]
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(1000), rel=0.1)
    assert mean(values) == found, "seeded"


def test_weights_are_tokens_of_a_row() -> None:
    nll, tokens = np.array([1.0, 4.0]), np.array([3, 1])
    found = mean(nll, tokens)
    assert found["value"] == pytest.approx(7 / 4)
    assert (found["low"], found["high"]) == (1, 4)


def test_a_paired_interval_ignores_what_both_share() -> None:
    shared = np.random.default_rng(2).normal(0, 10, 200)
    ones = np.ones(200)
    first, second = ratio(shared + 0.1, ones), ratio(shared, ones)
    low, high = interval(lambda rows: first(rows) - second(rows), 200)
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1)


def test_perplexity_is_finite() -> None:
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert math.isfinite(perplexity(1e6))


def test_a_verbatim_match_needs_equal_case_and_punctuation() -> None:
    assert verbatim_match(" It rained, again.", "It rained, again. ")
    assert not verbatim_match("it rained again", "It rained, again.")
    assert exact_match("it rained again", "It rained, again.")


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("5G networks are fast", "5 dogs bark"),
        ("1. Boil water", "1 banana was left on the table"),
        ("5", "5G networks"),
    ],
)
def test_a_text_that_starts_with_a_digit_is_not_a_number(answer: str, reference: str) -> None:
    assert not exact_match(answer, reference)
