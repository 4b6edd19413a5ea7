"""A few hundred cases of all kinds in every test run, and the planted faults in the long one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    places = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    command = [sys.executable, "-m", "fuzz", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": places})


def test_no_input_ends_in_a_crash_a_traceback_or_a_write_elsewhere(tmp_path: Path) -> None:
    done = fuzz("--cases", "300", "--seed", "1", "--out", str(tmp_path), "--workers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["cases"] >= 300
    assert all(found["cases"] >= 15 for kind, found in report["kinds"].items() if kind != "agreement")


@pytest.mark.long
def test_planted_faults_are_found(tmp_path: Path) -> None:
    done = fuzz("--planted", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
