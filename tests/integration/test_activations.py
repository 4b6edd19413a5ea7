"""Encoders with activations in int8: what is rounded, by which ranges, and what is refused."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig, ExportConfig, VerifyConfig
from edge_ft.errors import BundleError, GateRefused, UsageError
from edge_ft.evaluate import evaluate
from edge_ft.evaluate.verify import verify
from edge_ft.export import export
from edge_ft.models.base_model import find_base
from edge_ft.runtime import TextClassifier, load

KINDS = ("int8-dynamic", "int8-static")
TEXTS = ["the film was good", "the film was very very not a bad film a a a"]


@pytest.fixture(scope="module")
def bundles(bert_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """One run in three formats."""
    folder = tmp_path_factory.mktemp("formats")
    return {
        weights: export(str(bert_run.path), ExportConfig(out=folder / weights, weights=weights))
        for weights in ("fp32", *KINDS)  # type: ignore[misc]
    }


def logits(bundle: Bundle) -> NDArray[np.float32]:
    classifier = load(bundle, threads=1, engine="exact")
    assert isinstance(classifier, TextClassifier)
    encoded = [classifier.tokenizer.encode_framed(text, 64).ids for text in TEXTS]
    return np.concatenate([classifier.logits(np.array([ids]), np.ones((1, len(ids)), np.int64)) for ids in encoded])


def operators(bundle: Bundle) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(bundle.graph(), load_external_data=False).graph.node)


@pytest.mark.parametrize("weights", KINDS)
def test_int8_activations_are_close_to_the_float_graph_but_not_equal(weights: str, bundles: dict[str, Bundle]) -> None:
    exact, rounded = logits(bundles["fp32"]), logits(bundles[weights])
    difference = np.abs(exact - rounded).max()
    assert 1e-5 < difference < 0.15 * np.abs(exact).max()
    assert not np.array_equal(logits(bundles["int8-dynamic"]), logits(bundles["int8-static"]))


@pytest.mark.parametrize("weights", KINDS)
def test_every_layer_except_the_head_is_int8(weights: str, bundles: dict[str, Bundle]) -> None:
    found = operators(bundles[weights])
    integer = {"int8-dynamic": "MatMulInteger", "int8-static": "QuantizeLinear"}[weights]
    layers = 2 * 6
    assert found[integer] >= (layers if weights == "int8-dynamic" else 8)
    assert found["MatMul"] == (2 if weights == "int8-dynamic" else 2 + layers)  # pooler and classifier
    assert found["GatherBlockQuantized"] == 1
    kept = onnx.load(bundles[weights].graph())
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in kept.graph.initializer}
    rounded = [array for array in arrays.values() if array.dtype == np.int8 and array.ndim == 2]
    assert len(rounded) == layers
    for array in rounded:
        # 7 bits: 255 * 64 * 2 is below 2^15, where processors without VNNI add in 16 bits.
        assert np.abs(array.astype(int)).max() <= 64
        assert (np.abs(array.astype(int)).max(axis=0) >= 63).all(), "one scale an output channel"


@pytest.mark.parametrize("weights", KINDS)
def test_the_manifest_names_the_method_and_the_bundle_has_no_float_graph(
    weights: str, bundles: dict[str, Bundle]
) -> None:
    manifest = bundles[weights].manifest
    assert manifest["quantization"]["method"] == weights.removeprefix("int8-")
    assert manifest["quantization"]["bits"] == 8
    assert manifest["graphs"] == {"4": "onnx/model_quantized.onnx"}
    assert {name for name in manifest["files"] if name.startswith("onnx/")} == {
        "onnx/model_quantized.onnx",
        "onnx/model_quantized.onnx_data",
    }
    assert bundles[weights].size_bytes < bundles["fp32"].size_bytes
    found = manifest["verification"]
    assert found["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-4
    assert found["by_accuracy_level"]["4"]["probe_nll"] != found["by_accuracy_level"]["1"]["probe_nll"]
    assert found["nll"]["shipped"] == found["by_accuracy_level"]["4"]["nll"]
    with pytest.raises(BundleError, match="no verified graph of accuracy level 1"):
        bundles[weights].graph(1)


@pytest.mark.parametrize("weights", KINDS)
def test_a_bundle_with_int8_activations_can_be_verified_and_evaluated(
    weights: str, bundles: dict[str, Bundle], bert_run: RunFolder
) -> None:
    rows = str(bert_run.split("validation"))
    found = verify(bundles[weights].path, VerifyConfig(data=rows))
    assert found["same_rows"] is True
    assert found["nll"] == pytest.approx(bundles[weights].manifest["verification"]["nll"]["shipped"], abs=1e-3)
    scored = evaluate(str(bundles[weights].path), EvalConfig(data=rows))
    assert scored["nll"] == pytest.approx(found["nll"], abs=1e-3)


@pytest.mark.parametrize("weights", KINDS)
def test_the_gate_refuses_a_bundle_with_int8_activations(weights: Any, bert_run: RunFolder, tmp_path: Path) -> None:
    config = ExportConfig(out=tmp_path / "bundle", weights=weights, max_tax=0.0, min_retained=1.5)
    with pytest.raises(GateRefused, match="--min-retained"):
        export(str(bert_run.path), config)
    assert list(Bundle.open(tmp_path / "bundle.rejected").manifest["graphs"]) == ["4"]


def test_static_ranges_come_from_the_calibration_rows(bert_run: RunFolder, bert_bundle: Bundle, tmp_path: Path) -> None:
    """A base calibrated on one short row has other ranges than one calibrated on all of them."""
    merged = tmp_path / "model"
    _write_with_head(bert_run, merged)
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "a", "label": "praise"}\n', encoding="utf-8")
    scales = []
    for number, rows in enumerate((short, bert_run.split("train"))):
        config = ExportConfig(
            out=tmp_path / str(number), weights="int8-static", data=str(rows), max_tax=9.0, max_length=64
        )
        graph = onnx.load(export(str(merged), config).graph()).graph
        scales.append(
            {
                tensor.name: float(onnx.numpy_helper.to_array(tensor))
                for tensor in graph.initializer
                if tensor.name.endswith("_scale") and not tensor.dims
            }
        )
    same = [name for name in scales[0].keys() & scales[1].keys() if scales[0][name] == scales[1][name]]
    assert len(scales[1]) >= 8
    assert not same, "each input has a range of its rows, and a divisor or none"


def test_models_and_lanes_without_int8_activations_are_refused(
    llama: Path, llama_run: RunFolder, bert_run: RunFolder, bert: Path, tmp_path: Path
) -> None:
    for weights in KINDS:
        config: dict[str, Any] = {"out": tmp_path / "bundle", "weights": weights}
        for source in (llama, llama_run.path):
            with pytest.raises(UsageError, match=f"--weights {weights} is for encoders and llama is none"):
                export(str(source), ExportConfig(**config))
        with pytest.raises(UsageError, match=f"--weights {weights} cannot be used with --lane adapter"):
            export(str(bert_run.path), ExportConfig(**config, lane="adapter"))
    merged = tmp_path / "model"
    _write_with_head(bert_run, merged)
    with pytest.raises(UsageError, match="int8-static measures ranges of activations on rows: give --data"):
        export(str(merged), ExportConfig(out=tmp_path / "bundle", weights="int8-static"))
    export(str(merged), ExportConfig(out=tmp_path / "bundle", weights="int8-dynamic"))


def _write_with_head(run: RunFolder, folder: Path) -> None:
    """The run's merged model as a plain checkpoint."""
    from edge_ft.models.adapted import merge_adapter
    from edge_ft.models.loading import ModelSpec, load_model

    base = find_base(run.base()["path"])
    labels = tuple(run.rendering()["labels"])
    merged: Any = merge_adapter(load_model(ModelSpec(base, "text-classification", labels=labels)), run.adapter)
    merged.save_pretrained(folder)
    for file in run.tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
