"""Log-probabilities, and the loss of labelled positions."""

import numpy as np
import pytest

from edge_ft.runtime import token_scores
from edge_ft.runtime.token_scores import log_softmax, score_targets

LOGITS = np.random.default_rng(0).normal(0, 5, (3, 4, 7)).astype(np.float32)
LABELS = np.array([[1, 2, 3, 4], [-100, 5, -100, 6], [-100] * 4])


def test_log_softmax_is_a_distribution_and_leaves_its_input_alone() -> None:
    before = LOGITS.copy()
    found = log_softmax(LOGITS)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found, LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True)), atol=1e-5)
    np.testing.assert_array_equal(LOGITS, before)


def test_large_logits_do_not_overflow() -> None:
    np.testing.assert_allclose(log_softmax(np.array([1e4, 0], np.float32)), [0, -1e4])


@pytest.mark.parametrize("limit", [1, 28, 1 << 24])
def test_only_targets_are_scored_whatever_fits_at_a_time(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_scores, "MAX_LOGITS", limit)
    nll, predicted = score_targets(lambda rows: LOGITS[rows].copy(), LABELS, LABELS != -100, logits_per_row=28)
    expected = log_softmax(LOGITS)
    for row, at in np.ndindex(LABELS.shape):
        if LABELS[row, at] == -100:
            assert (nll[row, at], predicted[row, at]) == (0, -100)
        else:
            assert nll[row, at] == pytest.approx(-expected[row, at, LABELS[row, at]], abs=1e-5)
            assert predicted[row, at] == LOGITS[row, at].argmax()
