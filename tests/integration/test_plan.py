"""The plan that a tune makes before its first step."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from edge_ft.artifacts import RunFolder
from edge_ft.config import PlanConfig, TuneConfig
from edge_ft.errors import WillNotFit
from edge_ft.system import Available
from edge_ft.tune import trainable_model as adapted
from edge_ft.tune import tune
from edge_ft.tune.plan import plan

AMPLE = Available(memory_bytes=2**50, disk_bytes=2**50)

FAST: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-2, "split": (0.6, 0.2, 0.2)}


class Heard:
    """Keeps the messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
        self.lines.append(f"{stage} {done}")


@pytest.fixture(scope="module")
def planned(llama: Path, sums: Path) -> dict[str, Any]:
    return plan(PlanConfig(model=str(llama), data=str(sums), split=(0.6, 0.2, 0.2), memory="normal"), available=AMPLE)


def test_a_plan_counts_rows_tokens_steps_and_parameters(planned: dict[str, Any], llama_run: RunFolder) -> None:
    assert planned["rows"] == {"train": 24, "validation": 8, "test": 8} == llama_run.report()["rows"]
    assert planned["steps"] == 24 * 2 // 4
    tokens = planned["tokens"]
    assert 0 < tokens["p50"] <= tokens["p95"] <= tokens["max"] < tokens["total"] <= 24 * tokens["max"]
    assert planned["trainable_parameters"] == llama_run.report()["trainable_parameters"]
    assert planned["findings"] == []
    json.dumps(planned, allow_nan=False)


def test_a_base_too_large_is_refused_before_it_is_loaded(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Available, "here", classmethod(lambda cls, out: Available(1000, AMPLE.disk_bytes)))
    monkeypatch.setattr(adapted, "load_model", None)
    with pytest.raises(WillNotFit, match="take a smaller model"):
        tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", **FAST))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def with_plan(llama: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunFolder, Heard]]:
    heard = Heard()
    settings = TuneConfig(
        model=str(llama), data=str(sums), out=tmp_path_factory.mktemp("planned") / "run", dropout=0.3, show=1, **FAST
    )
    yield tune(settings, heard), heard


def test_a_tune_reports_its_plan_before_its_first_step_and_writes_it(with_plan: tuple[RunFolder, Heard]) -> None:
    run, heard = with_plan
    kept = json.loads((run.path / "plan.json").read_text())
    assert kept["choices"] == [kept["recommended"]]
    assert kept["steps"] == 3 == run.report()["steps"]
    said = next(at for at, line in enumerate(heard.lines) if line.startswith("plan: "))
    assert "3 steps" in heard.lines[said]
    assert said < next(at for at, line in enumerate(heard.lines) if line.startswith("train "))
    assert any("⟦" in line for line in heard.lines)


def test_a_plan_leaves_the_run_as_it_would_have_been(
    with_plan: tuple[RunFolder, Heard], llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_ft.tune.run.make_plan", lambda *_, **__: {})
    without = tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", dropout=0.3, **FAST))
    adapters = [load_file(run.adapter / "adapter_model.safetensors") for run in (with_plan[0], without)]
    assert all((adapters[0][name] == adapters[1][name]).all() for name in adapters[1])


def test_a_tune_that_does_not_fit_is_refused_and_leaves_nothing(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Available, "here", classmethod(lambda cls, out: Available(AMPLE.memory_bytes, 1000)))
    with pytest.raises(WillNotFit, match="free some"):
        tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", **FAST))
    assert list(tmp_path.iterdir()) == []
