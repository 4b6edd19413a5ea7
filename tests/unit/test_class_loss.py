"""The gradient of a classifier's loss by its logits, beside differences of the loss that evaluations print."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_ft.config import ProblemType
from edge_ft.runtime.token_scores import class_scores
from edge_ft.tune.bundle_heads import loss_gradient

LOGITS = np.array([[0.5, -1.0, 2.0], [0.0, 0.25, -0.5]])


@pytest.mark.parametrize(
    ("problem", "logits", "labels"),
    [
        ("single_label_classification", LOGITS, np.array([2, 0])),
        ("multi_label_classification", LOGITS, np.array([[1, 0, 1], [0, 0, 1]], np.float32)),
        ("regression", LOGITS[:, :1], np.array([[3.0], [-1.0]], np.float32)),
    ],
)
def test_it_is_the_slope_of_the_loss(problem: ProblemType, logits: NDArray[Any], labels: NDArray[Any]) -> None:
    found = loss_gradient(logits, labels, problem)
    for at in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[at] = 1e-5
        higher, lower = (class_scores(logits + sign * step, labels, problem)[0].sum() for sign in (1, -1))
        assert found[at] == pytest.approx((higher - lower) / 2e-5, abs=1e-5)
