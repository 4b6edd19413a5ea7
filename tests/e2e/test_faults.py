"""Faults at stages of commands end as documented: what is there is whole, and the command can go on."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "faults.py"


def fill_table(*options: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAULT" not in done.stdout


def test_some_cells_of_the_table() -> None:
    fill_table("--quick")


@pytest.mark.long
def test_the_whole_table() -> None:
    fill_table()
