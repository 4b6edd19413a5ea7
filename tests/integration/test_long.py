"""Tests of real models that take minutes: float bundles, and a chat."""

from pathlib import Path
from typing import Any

import pytest

from edge_ft.artifacts import RunFolder
from edge_ft.bench.studies.datasets import decoder_weights
from edge_ft.config import ExportConfig, RunConfig
from edge_ft.export import export
from edge_ft.runtime import TextGenerator, load

pytestmark = pytest.mark.long


@pytest.mark.parametrize("lane", ["merged", "adapter"])
@pytest.mark.parametrize("run_name", ["smollm2_run", "minilm_run"])
def test_float_bundles_of_the_real_models_agree_with_torch(
    run_name: str, lane: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run: RunFolder = request.getfixturevalue(run_name)
    # The adapter was trained over codes; over the float base it is another model, and the gate may say so.
    limits = {"max_tax": 1.0, "min_retained": 0.0, "max_metric_drop": 1.0}
    bundle = export(str(run.path), ExportConfig(out=tmp_path / "bundle", weights="fp32", lane=lane, **limits))
    found = bundle.manifest["verification"]
    assert found["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-3
    assert found["adapter_changes_logits"] is True


def test_a_chat_that_reuses_its_cache_answers_as_one_that_reads_everything_again(tmp_path: Path) -> None:
    bundle = export(str(decoder_weights()), ExportConfig(out=tmp_path / "bundle"))
    generator = load(bundle, engine="exact")
    assert isinstance(generator, TextGenerator)
    config = RunConfig(max_new_tokens=24)
    chat = generator.chat(config)
    chat.send("Name three fruits.")
    again = chat.send("Which of them is yellow?")
    assert again.cached_tokens > 20
    assert again.text == generator.generate([*chat.messages[:-1]], config).text
