"""The same run on a CUDA device: skipped where there is none."""

from pathlib import Path
from typing import Any

import pytest
import torch

from edge_ft.base.load import find_base, load_model
from edge_ft.base.scorer import TorchScorer
from edge_ft.config import EvalConfig, ExportConfig, TuneConfig
from edge_ft.evaluate import evaluate
from edge_ft.export import export
from edge_ft.tune import tune

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SETTINGS: dict[str, Any] = {"max_steps": 30, "learning_rate": 1e-2, "split": (0.6, 0.2, 0.2)}


@pytest.mark.parametrize("base_format", ["int4", "int8", "nf4", "fp32"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_decoder_learns_on_the_device(
    base_format: Any, compute: Any, llama: Path, sums: Path, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "base_format": base_format, "compute": compute}
    run = tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", **settings))
    report = run.report()
    assert report["device"] == "cuda"
    assert report["nll"]["best"] < report["nll"]["base"] - 1
    scores = evaluate(str(run.path), EvalConfig(data=str(run.split("validation")), generate=False))
    assert scores["nll"] == pytest.approx(report["nll"]["best"], abs=1e-2)


def test_a_classifier_learns_on_the_device(bert: Path, reviews: Path, tmp_path: Path) -> None:
    run = tune(TuneConfig(model=str(bert), data=str(reviews), out=tmp_path / "run", **SETTINGS))
    assert run.report()["nll"]["best"] < run.report()["nll"]["base"]


def test_recomputing_gives_the_same_adapter(llama: Path, sums: Path, tmp_path: Path) -> None:
    losses = []
    for memory in ("normal", "low"):
        settings = {**SETTINGS, "memory": memory, "compute": "fp32"}
        run = tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / memory, **settings))
        losses.append(run.report()["nll"]["best"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_a_run_from_the_device_is_exported(llama: Path, sums: Path, tmp_path: Path) -> None:
    run = tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", **SETTINGS))
    bundle = export(str(run.path), ExportConfig(out=tmp_path / "bundle", lane="adapter"))
    assert abs(bundle.manifest["verification"]["quantization_tax"]) < 1e-2


def test_codes_mean_the_same_on_both_devices(llama: Path) -> None:
    base = find_base(str(llama))
    model = load_model(base, "text-generation", "int4")
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    here = layer.dequantize()  # type: ignore[operator]
    there = layer.to("cuda").dequantize()  # type: ignore[operator]
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=0)
    assert TorchScorer(model.to("cuda"), "text-generation").device.type == "cuda"
