"""The demo keeps to its time on a fast and on a slow machine."""

from pathlib import Path
from typing import Any

import pytest

from edge_ft.bench.studies.demo import FIXED_RATIO, LONGEST, decoder_minutes
from edge_ft.bench.studies.rows import main as rows


@pytest.mark.parametrize(
    ("spent_s", "encoder_fixed_s", "expected"),
    [
        (60.0, 20.0, LONGEST),  # a fast machine: no more than helps
        (60.0, 36.0, round(6 - 1 - 0.6 * FIXED_RATIO, 2)),
        (300.0, 200.0, None),  # a slow one: a few steps, by which something is learned
        (0.0, None, None),
    ],
)
def test_the_decoder_trains_in_what_is_left(
    spent_s: float, encoder_fixed_s: float | None, expected: float | None
) -> None:
    assert decoder_minutes(6.0, spent_s, encoder_fixed_s) == expected


@pytest.mark.parametrize("kind", ["support", "departments", "transcripts"])
def test_the_rows_of_the_tutorials_are_enough(kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(kind, out=tmp_path)
    assert Path(capsys.readouterr().out.strip()).exists()  # the model, and nothing else
    assert len((tmp_path / "test.jsonl").read_text().splitlines()) == 60
