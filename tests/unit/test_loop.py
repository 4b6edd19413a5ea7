"""The learning rate of each step, and the number of steps."""

from pathlib import Path
from typing import Any

import pytest

from edge_ft.config import TuneConfig
from edge_ft.tune.schedule import learning_rate_at, planned_steps


def config(**settings: Any) -> TuneConfig:
    return TuneConfig(model="", data="", out=Path("unused"), learning_rate=1e-2, batch_size=4, **settings)


def test_the_rate_rises_then_falls_along_half_a_cosine() -> None:
    rates = [learning_rate_at(step, 100, config(warmup=0.1)) for step in range(1, 101)]
    assert rates[0] == pytest.approx(1e-3)
    assert max(rates) == rates[9] == rates[10] == 1e-2
    assert rates[55] == pytest.approx(5e-3, rel=0.01)
    assert 0 < rates[-1] < 1e-5
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_the_constant_schedule_stays_at_the_peak() -> None:
    settings = config(schedule="constant", warmup=0.0)
    assert {learning_rate_at(step, 10, settings) for step in range(1, 11)} == {1e-2}


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"epochs": 2}, 20),
        ({"epochs": 0.01}, 1),
        ({"epochs": 9, "max_steps": 7}, 7),
        ({"epochs": 2, "gradient_accumulation": 2}, 10),
    ],
)
def test_steps_follow_from_rows_and_epochs_unless_given(settings: dict[str, Any], steps: int) -> None:
    assert planned_steps(40, config(**settings)) == steps
