"""Products with further bits become 8-bit products where activations are int8."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edge_ft.export.packing import write_graphs
from edge_ft.quant.blockwise import Codes, dequantize, quantize_finely

ROWS, BLOCK = 48, 32


def weight_of(blocks: int) -> Codes:
    return quantize_finely(np.random.default_rng(0).standard_normal((ROWS, blocks * BLOCK)).astype(np.float32), BLOCK)


def two_products(codes: Codes, also_read: bool = False) -> ir.Model:
    """The layer as an export writes it: a product of 4-bit codes, and one of the further bits of its rows."""
    x = ir.val("x", ir.DataType.FLOAT, (1, codes.in_features))
    tensors = [
        ir.val(f"layer.{name}", const_value=ir.tensor(array, name=f"layer.{name}"))
        for name, array in (
            ("qweight", codes.qweight),
            ("scales", codes.scales),
            ("zero_points", codes.zero_points),
            ("fine", codes.fine),
            ("sixteen", np.array(16, np.float32)),
        )
    ]
    codes4, scales, points, fine, sixteen = tensors
    attributes = {"K": codes.in_features, "N": ROWS, "bits": 4, "block_size": BLOCK, "accuracy_level": 1}
    first, further = (
        ir.node("MatMulNBits", operands, attributes, domain="com.microsoft", version=1)
        for operands in ([x, codes4, scales, points], [x, fine, scales])
    )
    divide = ir.node("Div", [further.outputs[0], sixteen])
    total = ir.node("Add", [first.outputs[0], divide.outputs[0]])
    outputs = [total.outputs[0], *([divide.outputs[0]] if also_read else [])]
    for index, output in enumerate(outputs):
        output.name, output.type = f"y{index}", ir.TensorType(ir.DataType.FLOAT)
    nodes, opsets = [first, further, divide, total], {"": 21, "com.microsoft": 1}
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=tensors, opset_imports=opsets, name="layer")
    return ir.Model(graph, ir_version=10)


def products(path: Path) -> list[int]:
    """Bits of each product of a graph."""
    return [node.attributes["bits"].as_int() for node in ir.load(path).graph if node.op_type == "MatMulNBits"]


@pytest.mark.parametrize("blocks", [2, 3])
def test_one_8_bit_product_computes_what_two_did(tmp_path: Path, blocks: int) -> None:
    codes = weight_of(blocks)
    paths = write_graphs({"model": two_products(codes)}, tmp_path, "model")
    assert products(tmp_path / paths[1]) == [4, 4]
    assert products(tmp_path / paths[4]) == [8]
    # Int8 holds these activations exactly: whole numbers, of which one in each block is 127.
    x = np.random.default_rng(1).integers(-127, 128, (1, codes.in_features)).astype(np.float32)
    x[:, ::BLOCK] = 127
    for level, path in paths.items():
        session = ort.InferenceSession(tmp_path / path, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"x": x})
        assert np.allclose(found, x @ dequantize(codes).T, rtol=1e-4, atol=1e-2), level


def test_the_codes_are_in_the_file_once(tmp_path: Path) -> None:
    codes = weight_of(2)
    assert codes.fine is not None
    write_graphs({"model": two_products(codes)}, tmp_path, "model")
    once = codes.qweight.nbytes + codes.fine.nbytes
    assert once <= (tmp_path / "onnx" / "model.onnx_data").stat().st_size < 1.5 * once


def test_products_stay_where_another_operator_reads_one(tmp_path: Path) -> None:
    paths = write_graphs({"model": two_products(weight_of(2), also_read=True)}, tmp_path, "model")
    assert products(tmp_path / paths[4]) == [4, 4]
