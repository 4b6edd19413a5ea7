"""The comparison on a GPU, on tiny models and whatever device there is: same rows, one table, failures told."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_llama

from edge_ft.bench.studies import gpu
from edge_ft.bench.studies import gpu_worker as gpu_trainer
from edge_ft.bench.studies.gpu import TRAININGS, main, run
from edge_ft.errors import EdgeFTError, UsageError


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings in this process instead of one each."""
    monkeypatch.setattr(gpu, "run_worker", lambda job, doing, threads, module: gpu_trainer.work(job | {"started": 0.0}))


@pytest.mark.usefixtures("here")
def test_every_training_learns_the_same_rows(sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_llama(tmp_path / "llama", intermediate_size=128)  # bitsandbytes' own layer wants multiples of 64
    out = tmp_path / "gpu.json"
    main(model=str(model), data=str(sums), out=out, steps=12, warm_up=2, learning_rate=1e-2, quiet=True)
    found = json.loads(out.read_text())
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
        ours, rival = by_base[base_format]
        assert ours == pytest.approx(rival, rel=0.02)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(TRAININGS)
    assert "| PEFT + Trainer | nf4 | 8 |" in table[5]


def test_a_training_that_fails_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def worker(job: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        if job["trainer"] == "rival":
            raise EdgeFTError("out of memory")
        return {
            **{"tokens_per_second": 1e3, "nll_before": 2.0, "nll_after": 1.0, "held_bytes": 2 * 10**6},
            "peak_bytes": 3 * 10**6,
        }

    monkeypatch.setattr(gpu, "run_worker", worker)
    results = run({"max_steps": 2}, tmp_path / "gpu.json", batch_sizes=(4,), warm_up=1)
    assert [result.get("error") for result in results] == [None] * 3 + ["out of memory"] * 2
    assert json.loads((tmp_path / "gpu.json").read_text())["results"] == results
    lines = gpu.table(results).splitlines()
    assert lines[2] == "| edge-ft | int4 | 4 | 1,000 | 2, 3 | 2.0000 | 1.0000 |"
    assert lines[-1] == "| PEFT + Trainer | bf16 | 4 | failed | | | |"


@pytest.mark.parametrize(
    ("option", "named"), [({"batch_sizes": "8,x"}, "--batch-sizes"), ({"warm_up": 9}, "--warm-up")]
)
def test_options_that_measure_nothing_are_refused(option: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        main(model="m", data="d", steps=9, **option)
