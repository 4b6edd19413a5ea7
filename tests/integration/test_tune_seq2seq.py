"""An encoder-decoder learns over a bundle, and the bundle then answers with what it learned."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from once import once
from peft import PeftModel
from safetensors.numpy import load_file
from tiny_models import T5_SHAPES, write_t5
from trainable_bundles import losses_of_both, trainable_bundle

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig, ExportConfig, RunConfig, TuneConfig, VerifyConfig
from edge_ft.data import collate, encode_rows, read_rows
from edge_ft.evaluate import evaluate
from edge_ft.evaluate.verify import verify
from edge_ft.export import export
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.lora import without_weights
from edge_ft.models.scorer import TorchScorer
from edge_ft.runtime import load
from edge_ft.tune import tune

STEPS = 40
NAME = "learning-t5-relu-tied"


@pytest.fixture(scope="module")
def model(work: Path) -> Path:
    return once(work / NAME, lambda path: write_t5(path, **T5_SHAPES["t5, relu, tied"]))


@pytest.fixture(scope="module")
def bundle(work: Path, model: Path) -> Bundle:
    return Bundle.open(once(work / f"{NAME}.bundle", lambda out: trainable_bundle(model, out)))


def settings(bundle: Bundle, sums: Path, out: Path, **changes: Any) -> TuneConfig:
    chosen: dict[str, Any] = {"max_steps": 16, "eval_steps": 8, "learning_rate": 1e-2, "split": (0.6, 0.2, 0.2)}
    return TuneConfig(model=str(bundle.path), data=str(sums), out=out, threads=1, **{**chosen, **changes})


@pytest.fixture(scope="module")
def run(work: Path, bundle: Bundle, sums: Path) -> RunFolder:
    return RunFolder.open(once(work / "learned-t5", lambda out: tune(settings(bundle, sums, out))))


def test_the_losses_are_those_of_the_torch_backend(bundle: Bundle, model: Path, sums: Path, tmp_path: Path) -> None:
    given = settings(bundle, sums, tmp_path, max_steps=STEPS, learning_rate=3e-3, eval_steps=STEPS)
    ours, theirs = losses_of_both(given, model)
    assert len(ours) == STEPS and ours[-1] < ours[0] / 2
    np.testing.assert_allclose(ours, theirs, atol=5e-4)


def test_its_adapter_opens_in_plain_peft_and_scores_as_in_the_bundle(
    run: RunFolder, bundle: Bundle, model: Path
) -> None:
    base = load_model(ModelSpec(find_base(str(model)), "text2text-generation", "int4"))
    tuned = TorchScorer(
        without_weights(PeftModel.from_pretrained(base, str(run.adapter))).eval(), "text2text-generation"
    )
    opened: Any = load(bundle, adapter=run.path, engine="exact", threads=1)
    examples = encode_rows(opened.rendering, opened.tokenizer, read_rows(str(run.split("test"))))
    batch = collate(examples, opened.tokenizer.pad_id, "text2text-generation")
    np.testing.assert_allclose(opened.token_nll(batch)[0], tuned.token_nll(batch)[0], atol=1e-4)


def test_the_bundle_answers_with_what_it_learned(run: RunFolder, bundle: Bundle, tmp_path: Path) -> None:
    report = run.report()
    assert report["nll"]["best"] < report["nll"]["base"] - 1
    folder = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    data = str(run.split("validation"))
    given = EvalConfig(data=data, adapter=str(run.path), generate=False)
    assert evaluate(str(folder), given)["nll"] == pytest.approx(report["nll"]["best"], abs=1e-4)
    added = export(str(run.path), ExportConfig(onto=folder, name="mine"))
    assert added.manifest["verification"]["nll"]["shipped"] == pytest.approx(report["nll"]["best"], abs=1e-4)
    assert evaluate(str(folder), replace(given, adapter="none"))["nll"] == pytest.approx(
        report["nll"]["base"], abs=1e-4
    )
    verify(folder, VerifyConfig(data=data))
    opened: Any = load(folder, engine="exact", threads=1)
    assert report["samples"]
    for sample in report["samples"]:
        prompt = sample["prompt"].removesuffix("</s>")  # the tokenizer ends the prompt by itself
        answer = opened.generate(prompt, RunConfig(max_new_tokens=8)).text
        assert answer.strip() == sample["tuned"].strip()


def test_the_last_layers_of_both_stacks_alone_are_trained(bundle: Bundle, sums: Path, tmp_path: Path) -> None:
    given = settings(bundle, sums, tmp_path / "last", layers="last:1", target_modules=("q",), max_steps=2)
    names = load_file(tune(given).adapter / "adapter_model.safetensors")
    layers = ("encoder.block.1.layer.0.SelfAttention", "decoder.block.1.layer.0.SelfAttention")
    layers = (*layers, "decoder.block.1.layer.1.EncDecAttention")
    assert set(names) == {f"base_model.model.{layer}.q.lora_{side}.weight" for layer in layers for side in "AB"}
