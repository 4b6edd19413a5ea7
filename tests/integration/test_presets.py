"""What each preset changes in a training."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file
from tiny_models import write_llama

from edge_ft.artifacts import RunFolder
from edge_ft.config import TuneConfig
from edge_ft.tune import tune


@pytest.fixture(scope="module")
def tuned(sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A preset's name to what a tune with it makes of a three-layer model, once each."""
    folder = tmp_path_factory.mktemp("presets")
    model = write_llama(folder / "model", num_hidden_layers=3)
    runs: dict[str, RunFolder] = {}

    def run(name: str) -> RunFolder:
        if name not in runs:
            settings: dict[str, Any] = {"model": str(model), "data": str(sums), "out": folder / name, "compute": "fp32"}
            runs[name] = tune(TuneConfig.from_preset(name, **settings))
        return runs[name]

    return run


def settings(run: RunFolder) -> dict[str, Any]:
    return yaml.safe_load((run.path / "config.yaml").read_text())


def weights(run: RunFolder) -> dict[str, Any]:
    return load_file(run.adapter / "adapter_model.safetensors")


def test_final_layers_trains_only_the_last_two_layers_with_a_higher_rank(tuned: Any) -> None:
    found = weights(tuned("final-layers"))
    assert {name.split(".layers.")[1][0] for name in found} == {"1", "2"}
    assert {min(tensor.shape) for tensor in found.values()} == {32}
    assert {name.split(".layers.")[1][0] for name in weights(tuned("default"))} == {"0", "1", "2"}


def test_thorough_has_more_epochs_a_lower_learning_rate_and_patience(tuned: Any) -> None:
    thorough, default = settings(tuned("thorough")), settings(tuned("default"))
    assert thorough["max_steps"] > default["max_steps"]
    assert thorough["learning_rate"] < default["learning_rate"]
    assert thorough["patience"] is not None


def test_low_memory_has_as_many_steps_of_as_many_rows(tuned: Any) -> None:
    low, default = settings(tuned("low-memory")), settings(tuned("default"))
    assert low["memory"] == "low" != default["memory"]
    assert low["batch_size"] < default["batch_size"]
    assert low["batch_size"] * low["gradient_accumulation"] == default["batch_size"] * default["gradient_accumulation"]
    assert low["max_steps"] == default["max_steps"]
