"""Scores that a run keeps are found by what the rows say to the model, and only all together."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_ft.data import Example
from edge_ft.evaluate.kept_scores import find_scores, write_scores
from edge_ft.evaluate.scoring import RowScores

EXAMPLES = [Example(row, [1, 2, row], [-100, 2, row], 1, "", 0) for row in (3, 4, 5)]
SCORES = RowScores(
    np.array([1.0, 2.0, 3.0]), np.array([2, 2, 2]), np.array([0, 1, 2]), [np.array([row, 7]) for row in (3, 4, 5)]
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_scores(tmp_path / "scores.safetensors", EXAMPLES, {"base": SCORES})
    return tmp_path / "scores.safetensors"


def test_some_of_the_rows_in_another_order_are_found(file: Path) -> None:
    found = find_scores(file, "base", [EXAMPLES[2], EXAMPLES[0]])
    assert found is not None
    assert (found.nll.tolist(), found.correct.tolist()) == ([3.0, 1.0], [2, 0])
    assert [list(predicted) for predicted in found.predicted] == [[5, 7], [3, 7]]


def test_other_rows_and_models_are_not(file: Path) -> None:
    for other in (replace(EXAMPLES[0], input_ids=[1, 2, 9]), replace(EXAMPLES[0], labels=[-100, -100, 3])):
        assert find_scores(file, "base", [*EXAMPLES, other]) is None
    assert find_scores(file, "tuned", EXAMPLES) is None
    file.write_bytes(file.read_bytes()[:-1])
    assert find_scores(file, "base", EXAMPLES) is None
    assert find_scores(file.with_name("none"), "base", EXAMPLES) is None
