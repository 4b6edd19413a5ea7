"""Graphs that share one file of weights, in which each tensor is stored once."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edge_ft.export.packing import write_graphs


def model_of(*weights: np.ndarray) -> ir.Model:
    """Adds every weight to its input."""
    x = ir.val("x", ir.DataType.FLOAT, ())
    tensors = [
        ir.val(f"w{index}", const_value=ir.tensor(weight, name=f"w{index}")) for index, weight in enumerate(weights)
    ]
    nodes = [ir.node("Add", [x, tensor]) for tensor in tensors]
    for index, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].type = f"y{index}", ir.TensorType(ir.DataType.FLOAT)
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=tensors, opset_imports={"": 21}, name="adds")
    return ir.Model(graph, ir_version=10)


def quantized_model() -> ir.Model:
    x = ir.val("x", ir.DataType.FLOAT, (1, 64))
    tensors = [
        ir.val("w.qweight", const_value=ir.tensor(np.full((32, 2, 16), 0x5A, np.uint8), name="w.qweight")),
        ir.val("w.scales", const_value=ir.tensor(np.ones((32, 2), np.float32), name="w.scales")),
    ]
    attributes = {"K": 64, "N": 32, "bits": 4, "block_size": 32, "accuracy_level": 1}
    node = ir.node("MatMulNBits", [x, *tensors], attributes, domain="com.microsoft", version=1)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=tensors, opset_imports=opsets, name="linear")
    return ir.Model(graph, ir_version=10)


def external(path: Path) -> dict[str, dict[str, str]]:
    """The place of each tensor that is not in the graph file, by name."""
    proto = onnx.load(path, load_external_data=False)
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in proto.graph.initializer
        if tensor.external_data
    }


@settings(max_examples=10, deadline=None)
@given(st.lists(arrays(np.float32, st.integers(0, 600), elements=st.sampled_from([0.0, 1.0])), min_size=1, max_size=5))
def test_onnxruntime_reads_back_every_weight(
    tmp_path_factory: pytest.TempPathFactory, weights: list[np.ndarray]
) -> None:
    folder = tmp_path_factory.mktemp("packed")
    paths = write_graphs({"model": model_of(*weights)}, folder, "model", (1,))
    session = ort.InferenceSession(str(folder / paths[1]), providers=["CPUExecutionProvider"])
    for output, weight in zip(session.run(None, {"x": np.zeros((), np.float32)}), weights, strict=True):
        np.testing.assert_array_equal(output, weight)


def test_equal_bytes_are_stored_once_whatever_their_shape(tmp_path: Path) -> None:
    weight = np.arange(1024, dtype=np.float32)
    write_graphs({"model": model_of(weight, weight.reshape(32, 32), weight + 1)}, tmp_path, "model", (1,))
    places = external(tmp_path / "onnx/model.onnx")
    assert places["w0"]["offset"] == places["w1"]["offset"] != places["w2"]["offset"]
    assert {place["location"] for place in places.values()} == {"model.onnx_data"}
    assert (tmp_path / "onnx/model.onnx_data").stat().st_size == 2 * weight.nbytes


def test_tensors_start_on_cache_lines_and_small_ones_stay_in_the_graph(tmp_path: Path) -> None:
    model = model_of(np.ones(300, np.float32), np.zeros(301, np.float32), np.ones(10, np.float32))
    write_graphs({"model": model}, tmp_path, "model", (1,))
    places = external(tmp_path / "onnx/model.onnx")
    assert places.keys() == {"w0", "w1"}
    assert all(int(place["offset"]) % 64 == 0 for place in places.values())


def test_variants_differ_only_in_the_accuracy_level(tmp_path: Path) -> None:
    model = quantized_model()
    assert write_graphs({"model_q4": model}, tmp_path, "model_q4") == {
        1: "onnx/model_q4.onnx",
        4: "onnx/model_q4_a4.onnx",
    }
    exact, fast = (onnx.load(tmp_path / "onnx" / name) for name in ("model_q4.onnx", "model_q4_a4.onnx"))
    levels = [
        next(attribute for attribute in proto.graph.node[0].attribute if attribute.name == "accuracy_level")
        for proto in (exact, fast)
    ]
    assert [level.i for level in levels] == [1, 4]
    levels[1].i = 1
    assert exact == fast
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {
        "model_q4.onnx",
        "model_q4_a4.onnx",
        "model_q4.onnx_data",
    }


def test_writing_a_model_does_not_change_it(tmp_path: Path) -> None:
    model = quantized_model()
    write_graphs({"model_q4": model}, tmp_path, "model_q4")
    assert not any(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values())
    assert next(iter(model.graph)).attributes["accuracy_level"].as_int() == 1
