"""`edge-ft tune` over a bundle: the same run as over the model, by onnxruntime and numpy."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from once import once
from peft import PeftModel
from safetensors.numpy import load_file
from trainable_bundles import losses_of_both, trainable_bundle

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig, ExportConfig, TuneConfig
from edge_ft.errors import Interrupted, ModelError, UsageError
from edge_ft.evaluate import evaluate
from edge_ft.export import export, export_gguf
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.progress import Silent
from edge_ft.tune import onnx_backend, tune
from edge_ft.tune.plan import plan
from edge_ft.tune.prepare import prepare_job

STEPS = 40


@pytest.fixture(scope="module")
def bundle(work: Path, llama: Path) -> Bundle:
    return Bundle.open(once(work / "learning-llama-chat.bundle", lambda out: trainable_bundle(llama, out)))


def settings(model: Path, sums: Path, out: Path, **changes: Any) -> TuneConfig:
    chosen: dict[str, Any] = {"max_steps": 12, "eval_steps": 4, "learning_rate": 1e-2, "split": (0.6, 0.2, 0.2)}
    return TuneConfig(model=str(model), data=str(sums), out=out, threads=1, **{**chosen, **changes})


@pytest.fixture(scope="module")
def run(work: Path, bundle: Bundle, sums: Path) -> RunFolder:
    return RunFolder.open(once(work / "learned", lambda out: tune(settings(bundle.path, sums, out))))


def test_a_run_over_a_bundle_has_what_every_run_has(run: RunFolder, bundle: Bundle) -> None:
    report = run.report()
    assert report["nll"]["best"] < report["nll"]["base"] - 1
    assert report["steps"] == 12 and report["device"] == "cpu"
    assert set(report["versions"]) == {"edge-ft", "onnxruntime", "numpy"}
    assert report["answers"]["rows"] == 8 and report["samples"]
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert run.settings()["compute"] == "fp32" and run.settings()["calibration_rows"] == 0
    assert (run.path / "plan.json").is_file() and (run.path / "splits" / "test.jsonl").is_file()


def test_its_adapter_opens_in_plain_peft_and_scores_as_reported(run: RunFolder, llama: Path) -> None:
    base = find_base(str(llama))
    model = PeftModel.from_pretrained(load_model(ModelSpec(base, "text-generation", "int4")), str(run.adapter))
    given = replace(settings(llama, run.split("train"), run.path), validation=str(run.split("validation")))
    job = prepare_job(replace(given, test=str(run.split("test"))), Silent())
    from edge_ft.evaluate.scoring import Batching, score
    from edge_ft.models.scorer import TorchScorer

    batching = Batching("text-generation", job.tokenizer.pad_id)
    scores = score(TorchScorer(model, "text-generation"), job.prepared.examples["test"], batching, Silent(), "test")
    assert scores.mean_nll == pytest.approx(run.report()["nll"]["test"], abs=1e-5)


def test_a_run_over_a_bundle_is_scored_by_the_bundle(run: RunFolder) -> None:
    given = EvalConfig(data=str(run.split("test")), generate=False)
    assert evaluate(str(run.path), given)["nll"] == pytest.approx(run.report()["nll"]["test"], abs=1e-4)
    base = evaluate(str(run.path), replace(given, adapter="none"))["nll"]
    assert base == pytest.approx(run.report()["nll"]["test_base"], abs=1e-4)


def test_a_run_is_not_scored_by_another_bundle(run: RunFolder, bundle: Bundle, tmp_path: Path) -> None:
    copy = RunFolder(Path(shutil.copytree(run.path, tmp_path / "run")))
    given = EvalConfig(data=str(run.split("test")), generate=False)
    for there, message in ((tmp_path / "gone", "gone is gone, over which"), (bundle.path, "its weights have changed")):
        base = {**copy.base(), "model": str(there), "path": str(there), "content_sha256": "0"}
        (copy.path / "base.json").write_text(json.dumps(base))
        (copy.path / "files.json").unlink(missing_ok=True)
        with pytest.raises(ModelError, match=message):
            evaluate(str(copy.path), given)


def test_a_run_over_a_bundle_has_no_model_to_export(run: RunFolder, bundle: Bundle, tmp_path: Path) -> None:
    for format in ("bundle", "gguf"):
        given = ExportConfig(out=tmp_path / "out.gguf", format=format)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=f"edge-ft export {run.path} --onto {bundle.path}"):
            (export if format == "bundle" else export_gguf)(str(run.path), given)


def test_the_losses_are_those_of_the_torch_backend(bundle: Bundle, llama: Path, sums: Path, tmp_path: Path) -> None:
    given = settings(bundle.path, sums, tmp_path / "none", max_steps=STEPS, learning_rate=3e-3)
    ours, theirs = losses_of_both(given, llama)
    assert len(ours) == STEPS and ours[-1] < ours[0] / 2
    np.testing.assert_allclose(ours, theirs, atol=5e-4)


@contextmanager
def stopping_after(updates: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interrupt a run after so many optimizer steps."""
    left, update = updates, onnx_backend.OnnxBackend.update

    def stop(self: Any, rate: float, norm: float) -> float:
        nonlocal left
        found = update(self, rate, norm)
        left -= 1
        if left == 0:
            from edge_ft.tune import train as training

            monkeypatch.setattr(training, "requested", lambda: True)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(onnx_backend.OnnxBackend, "update", stop)
        yield


def test_a_resumed_run_ends_with_the_same_bytes(
    run: RunFolder, bundle: Bundle, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(bundle.path, sums, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Interrupted), stopping_after(6, patch):
        tune(given)
    name = "adapter_model.safetensors"
    (checkpoint,) = (folder for folder in given.out.iterdir() if "checkpoint" in folder.name)
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    # The weights, the best ones, and two moments of each.
    assert size < 4 * (given.out / "adapter" / name).stat().st_size + 64_000
    resumed = tune(replace(given, resume=True))
    assert resumed.report()["resumed_from_step"] == 6
    assert (resumed.adapter / name).read_bytes() == (run.adapter / name).read_bytes()


def test_low_memory_learns_the_same(run: RunFolder, bundle: Bundle, sums: Path, tmp_path: Path) -> None:
    low = tune(settings(bundle.path, sums, tmp_path / "low", memory="low"))
    assert low.report()["nll"]["best"] == pytest.approx(run.report()["nll"]["best"], abs=1e-4)


def test_the_last_layers_alone_are_trained(bundle: Bundle, sums: Path, tmp_path: Path) -> None:
    last = tune(
        settings(bundle.path, sums, tmp_path / "last", layers="last:1", target_modules=("q_proj",), max_steps=2)
    )
    names = load_file(last.adapter / "adapter_model.safetensors")
    assert set(names) == {f"base_model.model.model.layers.1.self_attn.q_proj.lora_{side}.weight" for side in "AB"}


def test_a_plan_over_a_bundle(bundle: Bundle, sums: Path, tmp_path: Path) -> None:
    found = plan(settings(bundle.path, sums, tmp_path / "run"))
    assert [choice["memory"] for choice in found["choices"]] == ["normal", "low"] * 2
    assert found["recommended"]["seconds"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_format": "nf4"}, "--base-format nf4: a bundle is trained over the weights that it holds"),
        ({"block_size": 64}, "--block-size 64"),
        ({"calibration_rows": 8}, "--calibration-rows 8"),
        ({"compute": "bf16"}, "--compute bf16"),
        ({"memory": "high"}, "--memory high"),
        ({"dropout": 0.1}, "--dropout 0.1"),
        ({"target_modules": ("q_prj",)}, "--target-modules q_prj: no linear layer has this name"),
        ({"layers": "last:9"}, "--layers last:9: this model has 2 layers"),
    ],
)
def test_options_of_the_other_backend_are_refused_by_name(
    changes: dict[str, Any], message: str, bundle: Bundle, sums: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        tune(settings(bundle.path, sums, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_bundle_that_cannot_learn_is_refused_with_its_reason(llama: Path, sums: Path, tmp_path: Path) -> None:
    without = export(str(llama), ExportConfig(out=tmp_path / "bundle", trainable=False, threads=1))
    with pytest.raises(UsageError, match="cannot learn: it was exported with --no-trainable"):
        tune(settings(without.path, sums, tmp_path / "run"))
