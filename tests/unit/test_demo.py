"""The demo keeps to its time on a fast and on a slow machine."""

import pytest

from edge_ft.bench.studies.demo import FIXED_RATIO, LONGEST, decoder_minutes


@pytest.mark.parametrize(
    ("spent_s", "encoder_fixed_s", "expected"),
    [
        (60.0, 20.0, LONGEST),  # a fast machine: no more than helps
        (100.0, 60.0, round(6 - 100 / 60 - FIXED_RATIO, 2)),
        (300.0, 200.0, None),  # a slow one: a few steps, by which something is learned
        (0.0, None, None),
    ],
)
def test_the_decoder_trains_in_what_is_left(
    spent_s: float, encoder_fixed_s: float | None, expected: float | None
) -> None:
    assert decoder_minutes(6.0, spent_s, encoder_fixed_s) == expected
