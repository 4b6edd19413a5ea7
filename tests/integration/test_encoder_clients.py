"""An encoder bundle's graph in plain ONNX Runtime and in OpenVINO, without edge-ft."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from models_table import OPENVINO_EXACT, record, record_client, release
from numpy.typing import NDArray
from tiny_models import ENCODERS, padded_ids, tiny_encoder_config, write_encoder
from transformers import AutoModelForSequenceClassification

from edge_ft.config import ExportConfig
from edge_ft.export import export
from edge_ft.runtime import TextClassifier, load

Feed = dict[str, NDArray[np.int64]]


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A base with a head of each family, in a format, made once."""
    made: dict[tuple[str, str], Path] = {}

    def bundle(name: str, weights: str) -> Path:
        if (name, weights) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{weights}")
            model = write_encoder(folder / "model", tiny_encoder_config(name))
            AutoModelForSequenceClassification.from_pretrained(model, num_labels=3).save_pretrained(model)
            config: dict[str, Any] = {"out": folder / "bundle", "weights": weights}
            made[name, weights] = export(str(model), ExportConfig(**config)).path
        return made[name, weights]

    return bundle


def answers(bundle: Path) -> tuple[Feed, NDArray[np.float32]]:
    """A padded batch, and our runtime's logits for it."""
    classifier = load(bundle, threads=1, engine="exact")
    assert isinstance(classifier, TextClassifier)
    ids, mask = padded_ids(classifier.tokenizer.pad_id)
    return {"input_ids": ids, "attention_mask": mask}, classifier.logits(ids, mask)


@pytest.mark.parametrize("name", ENCODERS)
def test_plain_onnxruntime_runs_the_graph_on_the_models_own_inputs(
    name: str, bundle_of: Callable[[str, str], Path]
) -> None:
    bundle = bundle_of(name, "fp32")
    feed, expected = answers(bundle)
    session = ort.InferenceSession(bundle / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    if name in ("albert", "bert", "electra"):
        feed["token_type_ids"] = np.zeros_like(feed["input_ids"])
    assert {node.name for node in session.get_inputs()} == set(feed)
    assert [node.name for node in session.get_outputs()] == ["logits"]
    np.testing.assert_allclose(session.run(None, feed)[0], expected, atol=1e-5)
    record(name, onnxruntime="same logits")
    client = f"plain ONNX Runtime {release('onnxruntime')}"
    record_client(name, "text-classification", "fp32", client, "the model's own input names, the same logits")


@pytest.mark.parametrize(
    ("name", "weights"),
    [*((name, "fp32") for name in ENCODERS), ("distilbert", "int4"), ("distilbert", "int8-dynamic")],
)
def test_openvino_reads_the_graph(name: str, weights: str, bundle_of: Callable[[str, str], Path]) -> None:
    openvino = pytest.importorskip("openvino")
    bundle = bundle_of(name, weights)
    feed, expected = answers(bundle)
    [graph] = (bundle / "onnx").glob("model*.onnx")
    compiled = openvino.Core().compile_model(str(graph), "CPU", OPENVINO_EXACT)
    if name in ("albert", "bert", "electra"):
        feed["token_type_ids"] = np.zeros_like(feed["input_ids"])
    found = compiled(feed)["logits"]
    within = 0.02 if weights == "int8-dynamic" else 0.001
    np.testing.assert_allclose(found, expected, atol=within)
    record(name, openvino="same logits")
    client = f"OpenVINO {release('openvino')}, ONNX frontend"
    record_client(name, "text-classification", weights, client, f"the same logits within {within}")
