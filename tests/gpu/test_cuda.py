"""Trainings and exports on a CUDA device; skipped where there is none."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_ft.config import EvalConfig, ExportConfig, TuneConfig
from edge_ft.errors import WillNotFit
from edge_ft.evaluate import evaluate
from edge_ft.export import export
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.scorer import TorchScorer
from edge_ft.quant.devices import to_device
from edge_ft.quant.layers import FrozenLinear
from edge_ft.tune import tune
from edge_ft.tune.torch_backend import TorchBackend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SETTINGS: dict[str, Any] = {"max_steps": 30, "learning_rate": 1e-2, "split": (0.6, 0.2, 0.2)}


@pytest.mark.parametrize("base_format", ["int4", "int8", "nf4", "bf16", "fp32"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_decoder_learns_on_the_gpu(base_format: Any, compute: Any, llama: Path, sums: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "base_format": base_format, "compute": compute}
    run = tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", **settings))
    report = run.report()
    assert report["device"] == "cuda"
    assert report["peak_device_bytes"] > 0
    assert report["nll"]["best"] < report["nll"]["base"] - 1
    scores = evaluate(str(run.path), EvalConfig(data=str(run.split("validation")), generate=False))
    assert scores["nll"] == pytest.approx(report["nll"]["best"], abs=1e-2)


def test_a_classifier_learns_on_the_gpu(bert: Path, reviews: Path, tmp_path: Path) -> None:
    run = tune(TuneConfig(model=str(bert), data=str(reviews), out=tmp_path / "run", **SETTINGS))
    assert run.report()["nll"]["best"] < run.report()["nll"]["base"]


def test_recomputed_activations_give_the_same_loss(llama: Path, sums: Path, tmp_path: Path) -> None:
    losses = []
    for memory in ("normal", "low"):
        settings = {**SETTINGS, "memory": memory, "compute": "fp32"}
        run = tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / memory, **settings))
        losses.append(run.report()["nll"]["best"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_a_run_trained_on_the_gpu_is_exported(llama: Path, sums: Path, tmp_path: Path) -> None:
    run = tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", **SETTINGS))
    bundle = export(str(run.path), ExportConfig(out=tmp_path / "bundle", lane="adapter"))
    assert abs(bundle.manifest["verification"]["quantization_tax"]) < 1e-2


def test_a_stopped_run_resumes_from_its_checkpoint(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses agree within rounding: a GPU sums attention's gradients in no fixed order."""
    settings: dict[str, Any] = {"model": str(llama), "data": str(sums), "checkpoint_steps": 1, **SETTINGS}
    whole = tune(TuneConfig(out=tmp_path / "whole", **settings))
    update, updates = TorchBackend.update, iter(range(12))
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(TorchBackend, "update", lambda self, *given: (next(updates), update(self, *given))[1])
        tune(TuneConfig(out=tmp_path / "run", **settings))
    run = tune(TuneConfig(out=tmp_path / "run", resume=True, **settings))
    assert run.report()["resumed_from_step"] == 12
    assert run.report()["nll"]["last"] == pytest.approx(whole.report()["nll"]["last"], abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_format", ["int4", "int8", "nf4", "bf16"])
def test_codes_dequantize_to_the_same_weights_on_both_devices(
    base_format: Any, dtype: torch.dtype, llama: Path
) -> None:
    model = load_model(ModelSpec(find_base(str(llama)), "text-generation", base_format))
    layers = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    here = [layer.dequantize(dtype) for layer in layers]
    to_device(model, "cuda")
    for layer, weight in zip(layers, here, strict=True):
        torch.testing.assert_close(layer.dequantize(dtype).cpu(), weight, rtol=0, atol=0)
    assert TorchScorer(model, "text-generation").device.type == "cuda"
    if base_format != "nf4":  # whose embedding and head stay float
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
        assert head.qweight.data_ptr() == embedding.qweight.data_ptr()


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_the_plan_foresees_the_memory_of_the_card(memory: Any, llama: Path, sums: Path, tmp_path: Path) -> None:
    run = tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", memory=memory, **SETTINGS))
    foreseen = json.loads((run.path / "plan.json").read_text())["recommended"]["peak_device_bytes"]
    assert 0.8 < foreseen / run.report()["peak_device_bytes"] < 1.5


def test_a_training_that_a_card_cannot_hold_is_refused_before_its_first_step(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_ft.tune.run.Available.on", lambda self, device: replace(self, device_bytes=1_000_000))
    with pytest.raises(WillNotFit, match="of the GPU"):
        tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", **SETTINGS))
