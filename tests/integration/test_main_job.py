"""A short main job on real weights and rows: the tuned model improves, and the bundle keeps the improvement."""

from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig
from edge_ft.data import collate, encode_rows, read_rows
from edge_ft.evaluate import evaluate
from edge_ft.evaluate.loading import open_run_model
from edge_ft.models.scorer import TorchScorer
from edge_ft.quant.layers import QuantLinear
from edge_ft.runtime import load


def test_the_decoder_learns(smollm2_run: RunFolder) -> None:
    nll = smollm2_run.report()["nll"]
    assert nll["best"] < nll["base"] - 1.0
    assert nll["test"] < nll["test_base"] - 1.0


def test_the_encoder_learns(minilm_run: RunFolder) -> None:
    report = minilm_run.report()
    assert report["nll"]["best"] < report["nll"]["base"] - 0.3
    accuracy = report["metrics"]["accuracy"]
    assert accuracy["test"]["low"] > accuracy["test_base"]["high"]


@pytest.mark.parametrize("name", ["smollm2_bundle", "minilm_bundle"])
def test_the_merged_bundle_keeps_what_was_learned(name: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    found = bundle.manifest["verification"]
    assert bundle.manifest["lane"] == "merged"
    assert found["retained_gain"] >= 0.95
    assert found["quantization_tax"] <= found["limits"]["max_tax"]
    assert found["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-3
    assert found["test"]["nll"]["shipped"] < found["test"]["nll"]["base"] - 0.3


def test_the_adapter_lane_ships_exactly_what_was_trained(smollm2_adapter_bundle: Bundle) -> None:
    found = smollm2_adapter_bundle.manifest["verification"]
    assert abs(found["quantization_tax"]) < 1e-3
    assert found["argmax_agreement"] > 0.99


def test_the_graph_agrees_with_torch_on_held_out_prompts(
    smollm2_int4_run: RunFolder, smollm2_adapter_bundle: Bundle, smollm2_rows: dict[str, Path]
) -> None:
    """Teacher-forced over 20 prompts, every position, at accuracy level 1."""
    model, _base = open_run_model(smollm2_int4_run)
    generator = load(smollm2_adapter_bundle, accuracy_level=1)
    examples = encode_rows(generator.rendering, generator.tokenizer, read_rows(str(smollm2_rows["test"])))[:20]
    for example in examples:
        example.labels = list(example.input_ids)
    agreed = total = 0
    for example in examples:
        batch = collate([example], generator.tokenizer.pad_id, "text-generation")
        _, ours = generator.token_nll(batch)
        _, torchs = TorchScorer(model, "text-generation").token_nll(batch)
        agreed += int((ours[:, 1:] == torchs[:, 1:]).sum())
        total += ours.shape[1] - 1
    assert total > 300
    assert agreed / total >= 0.99


def test_the_adapters_load_with_plain_peft(smollm2_int4_run: RunFolder, minilm_run: RunFolder) -> None:
    for run, model_class in (
        (smollm2_int4_run, AutoModelForCausalLM),
        (minilm_run, AutoModelForSequenceClassification),
    ):
        labels = len(run.rendering()["labels"])
        plain = model_class.from_pretrained(run.base()["path"], **({"num_labels": labels} if labels else {}))
        theirs = PeftModel.from_pretrained(plain, run.adapter).eval()
        ours, base = open_run_model(run)
        weights = {name: parameter for name, parameter in theirs.named_parameters() if "lora_" in name}
        for name, parameter in ours.named_parameters():
            if "lora_" in name:
                np.testing.assert_array_equal(weights[name].detach().numpy(), parameter.detach().numpy())
        assert any(isinstance(module, QuantLinear) for module in ours.modules())
        assert base.family.name in ("llama", "bert")


def test_the_bundle_answers_with_the_expected_sentences(smollm2_bundle: Bundle, smollm2_rows: dict[str, Path]) -> None:
    found = evaluate(str(smollm2_bundle.path), EvalConfig(data=str(smollm2_rows["test"]), limit=30, max_new_tokens=32))
    assert found["metrics"]["exact_match"]["value"] > 0.5
    assert found["metrics"]["verbatim_match"]["value"] > 0.3


def test_an_adapter_bundle_scores_as_its_base_without_the_adapter(
    smollm2_adapter_bundle: Bundle, smollm2_rows: dict[str, Path], smollm2_int4_run: RunFolder
) -> None:
    config = EvalConfig(data=str(smollm2_rows["test"]), adapter="none", generate=False)
    base = evaluate(str(smollm2_adapter_bundle.path), config)
    assert base["nll"] == pytest.approx(smollm2_int4_run.report()["nll"]["test_base"], abs=1e-3)
