"""The race on a GPU, on tiny models and whatever device there is: same rows, one table, failures reported."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_llama

from edge_ft.bench.studies import gpu, kept_jobs, race_worker
from edge_ft.bench.studies.gpu import TRAININGS, GpuRace, main, run
from edge_ft.errors import EdgeFTError, UsageError


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Trainings in this process instead of one each; holds the jobs that were done."""
    done: list[dict[str, Any]] = []

    def here(job: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        done.append(job)
        return race_worker.work(job | {"started": 0.0})

    monkeypatch.setattr(kept_jobs, "run_worker", here)
    return done


def test_every_training_learns_the_same_rows(
    jobs: list[dict[str, Any]], sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_llama(tmp_path / "llama", intermediate_size=128)  # bitsandbytes' own layer wants multiples of 64
    race = GpuRace(model=str(model), data=str(sums), steps=12, warm_up=2, learning_rate=1e-2)
    main(race=race, out=tmp_path / "gpu", json=tmp_path / "gpu.json", quiet=True)
    found = json.loads((tmp_path / "gpu.json").read_text())
    results = found["results"]
    assert [(result["trainer"], result["base_format"]) for result in results] == list(TRAININGS)
    by_base: dict[str, list[float]] = {}
    for result in results:
        assert result["tokens_per_second"] > 0
        assert 0 <= result["padding"] < 0.5
        assert result["nll_after"] < result["nll_before"] - 0.5
        by_base.setdefault(result["base_format"], []).append(result["nll_before"])
    assert found["versions"].keys() == set(gpu.LIBRARIES)
    for base_format in ("nf4", "bf16"):  # the same base on both sides, up to the arithmetic's rounding
        ours, baseline = by_base[base_format]
        assert ours == pytest.approx(baseline, rel=0.02)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(TRAININGS)
    assert "| PEFT + Trainer | nf4 | 8 |" in table[5]

    jobs.clear()
    assert run(race, tmp_path / "gpu", (8,)) == results
    assert not jobs, "all results are kept"
    with pytest.raises(UsageError, match="holds results with steps 12, not 13"):
        run(replace(race, steps=13), tmp_path / "gpu", (8,))


def test_a_training_that_fails_is_reported_and_the_others_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worker(job: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        if job["trainer"] == "baseline":
            raise EdgeFTError("out of memory")
        return {
            **{"tokens_per_second": 1e3, "nll_before": 2.0, "nll_after": 1.0, "held_bytes": 2 * 10**6},
            "peak_bytes": 3 * 10**6,
        }

    monkeypatch.setattr(kept_jobs, "run_worker", worker)
    results = run(GpuRace(model="m", data="d", steps=2, warm_up=1), tmp_path, (4,))
    assert [result.get("error") for result in results] == [None] * 3 + ["out of memory"] * 2
    lines = gpu.table(results).splitlines()
    assert lines[2] == "| edge-ft | int4 | 4 | 1,000 | 2, 3 | 2.0000 | 1.0000 |"
    assert lines[-1] == "| PEFT + Trainer | bf16 | 4 | failed |  |  |  |"


def test_options_that_measure_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="--warm-up"):
        GpuRace(model="m", data="d", steps=9, warm_up=9)
    with pytest.raises(UsageError, match="--batch-sizes"):
        main(race=GpuRace(model="m", data="d"), batch_sizes="8,x")
