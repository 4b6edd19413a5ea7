"""Short tunes that tests stop and resume, and what must be equal afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from edge_ft.artifacts import RunFolder
from edge_ft.config import TuneConfig
from edge_ft.tune import tune
from edge_ft.tune.torch_backend import TorchBackend

__all__ = ["LONG", "SHORT", "adapter", "lines", "settings", "stopped_at"]

LONG: dict[str, Any] = {
    "max_steps": 250,
    "eval_steps": 10,
    "learning_rate": 5e-3,
    "split": (0.6, 0.2, 0.2),
    "threads": 1,
    "checkpoint_steps": 1,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "dropout": 0.1,
    "base_format": "int4",
    "compute": "fp32",
}
SHORT = {**LONG, "max_steps": 12, "eval_steps": 4}


def settings(model: Path, rows: Path, out: Path, **others: Any) -> TuneConfig:
    """A tune of `SHORT` length; other fields of TuneConfig as given."""
    return TuneConfig(**{"model": str(model), "data": str(rows), "out": out, **SHORT, **others})


def adapter(run: RunFolder) -> dict[str, bytes]:
    """The bytes of each tensor of the saved adapter."""
    return {name: tensor.tobytes() for name, tensor in load_file(run.adapter / "adapter_model.safetensors").items()}


def lines(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the measured times."""
    found = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in found]


def stopped_at(config: TuneConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune until `step` updates are done, then fail without saving, as a killed process does."""
    update, updates = TorchBackend.update, [0]

    def failing(self: TorchBackend, *arguments: Any) -> float:
        if updates[0] == step:
            raise ZeroDivisionError
        updates[0] += 1
        return update(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(TorchBackend, "update", failing)
        tune(config)
