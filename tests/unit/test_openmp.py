"""How OpenMP's threads wait: they spin where nothing else runs, and what the user set stays."""

import os
from pathlib import Path

import pytest

from edge_ft import openmp
from edge_ft.openmp import set_waiting


@pytest.fixture(autouse=True)
def four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(openmp, "usable_cpus", lambda: 4)


def waiting(tmp_path: Path, running: int, given: dict[str, str] | None = None) -> dict[str, str]:
    load, environment = tmp_path / "loadavg", dict(given or {})
    load.write_text(f"3.50 2.10 1.00 {running}/310 4711\n")
    set_waiting(environment, load)
    return environment


def test_threads_spin_where_all_processors_are_idle(tmp_path: Path) -> None:
    assert waiting(tmp_path, running=1) == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}


def test_threads_sleep_beside_a_busy_process(tmp_path: Path) -> None:
    assert waiting(tmp_path, running=2) == {"OMP_WAIT_POLICY": "PASSIVE"}


def test_threads_spin_where_enough_other_processors_are_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "usable_cpus", lambda: 2)
    assert "GOMP_SPINCOUNT" in waiting(tmp_path, running=3)
    assert "GOMP_SPINCOUNT" not in waiting(tmp_path, running=4)


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": ""}])
def test_a_policy_of_the_user_stays(tmp_path: Path, given: dict[str, str]) -> None:
    assert waiting(tmp_path, running=1, given=given) == given


def test_a_count_of_the_user_stays(tmp_path: Path) -> None:
    assert waiting(tmp_path, running=1, given={"GOMP_SPINCOUNT": "7"})["GOMP_SPINCOUNT"] == "7"


@pytest.mark.parametrize("text", [None, "", "0.1 0.2"])
def test_threads_sleep_where_nothing_says_what_runs(tmp_path: Path, text: str | None) -> None:
    load, environment = tmp_path / "loadavg", dict[str, str]()
    if text is not None:
        load.write_text(text)
    set_waiting(environment, load)
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE"}
