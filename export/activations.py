"""int8 for encoders: matrix products of 8-bit weights and 8-bit activations, by ONNX Runtime's own quantizer.

Weights are symmetric with one scale per output channel, in 7 bits: on processors without VNNI, ONNX Runtime adds two
products of unsigned and signed bytes in 16 bits, where 8-bit weights would saturate. So results are the same on every
machine. Activations are unsigned bytes, with the range of each batch (dynamic) or one that `activation_ranges` chose on
calibration rows (static).
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

from edge_ft.export.activation_ranges import choose_reading, read_inputs
from edge_ft.quant.conversion import is_within

__all__ = ["quantize_activations"]

Feed = dict[str, NDArray[np.int64]]


def quantize_activations(
    model: ir.Model, keep: tuple[str, ...], calibration: Sequence[Feed] | None, threads: int
) -> ir.Model:
    """Quantize the linear layers of a float graph to int8.

    Args:
        model: A lowered float graph, which is not changed; layers whose weights are codes stay as they are.
        keep: Modules that stay float (a classifier's head is small, and its errors go straight into the answer).
        calibration: Inputs whose activations give the static ranges; None for dynamic ranges.
        threads: CPU threads of the calibration.

    Returns:
        A new graph.
    """
    float_model = model.clone()
    layers = []
    for number, node in enumerate(float_model.graph):
        node.name = f"{node.op_type}_{number}"
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.const_value is not None and not is_within(str(weight.name), keep):
            layers.append(node)
    ranges = {} if calibration is None else _fit_inputs(float_model, layers, calibration, threads)
    for node in layers:
        # The quantizer needs types that shape inference does not find after ONNX Runtime's own operators.
        for value in (node.inputs[0], node.outputs[0]):
            if value is not None:
                value.type = ir.TensorType(ir.DataType.FLOAT)
    float_model.metadata_props["onnx.quant.pre_process"] = (
        "onnxruntime.quant"  # else it warns that its own passes have not run
    )
    proto = ir.to_proto(float_model)
    options: dict[str, Any] = {"DefaultTensorType": onnx.TensorProto.FLOAT, "MatMulConstBOnly": True}
    settings: dict[str, Any] = {
        "op_types_to_quantize": ["MatMul"],
        "nodes_to_quantize": [node.name for node in layers],
        "per_channel": True,
        "reduce_range": True,
        "weight_type": QuantType.QInt8,
        "extra_options": options,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        if calibration is None:
            quantize_dynamic(proto, path, **settings)
        else:
            # A product's output stays float, like the bias that is added to it.
            options["OpTypesToExcludeOutputQuantization"] = ["MatMul"]
            options["TensorQuantOverrides"] = ranges
            with _session_threads(threads):  # its own ranges, which ours replace, need one batch
                quantize_static(proto, path, _Reader(calibration[:1]), activation_type=QuantType.QUInt8, **settings)
        quantized = ir.from_proto(onnx.load(path))
    quantized.metadata_props.clear()
    return quantized


def _fit_inputs(
    model: ir.Model, layers: Sequence[ir.Node], feeds: Sequence[Feed], threads: int
) -> dict[str, list[dict[str, Any]]]:
    """Choose the range of every input that `layers` read, and divide it where that keeps them more exact.

    Args:
        model: The float graph, which is changed: an input's divisor becomes a node of it, and part of the weights.
        layers: Products with constant weights.
        feeds: Inputs of the graph.
        threads: CPU threads.

    Returns:
        ONNX Runtime's `TensorQuantOverrides`.
    """
    readers: dict[str, list[ir.Node]] = {}
    for node in layers:
        readers.setdefault(str(node.inputs[0].name), []).append(node)  # type: ignore[union-attr]
    samples = read_inputs(model, list(readers), feeds, threads)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, sample in samples.items():
        nodes = readers[name]
        weight = np.concatenate([_weight(node) for node in nodes], axis=1)
        reading = choose_reading(sample, weight)
        if reading.divisor is not None:
            name = _divide(model, nodes, reading.divisor)
        limits = {"rmin": np.float32(reading.low), "rmax": np.float32(reading.high)}
        found[name] = [{"quant_type": QuantType.QUInt8, **limits}]
    return found


def _weight(node: ir.Node) -> NDArray[np.float32]:
    value = node.inputs[1]
    assert value is not None and value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float32)


def _divide(model: ir.Model, nodes: Sequence[ir.Node], divisor: NDArray[np.float32]) -> str:
    """Divide the input that `nodes` read by a divisor [channels], and multiply their weights by it.

    Returns:
        The name of the divided input.
    """
    value = nodes[0].inputs[0]
    assert value is not None
    name = f"{value.name}.divided"
    factor = ir.Value(name=f"{value.name}.factor", const_value=ir.tensor(1 / divisor, name=f"{value.name}.factor"))
    model.graph.register_initializer(factor)
    product = ir.node("Mul", [value, factor], name=name, outputs=[ir.Value(name=name)])
    model.graph.insert_before(nodes[0], product)
    for node in nodes:
        weight = node.inputs[1]
        assert weight is not None
        weight.const_value = ir.tensor(_weight(node) * divisor[:, None], name=weight.name)
        node.replace_input_with(0, product.outputs[0])
    return name


class _Reader(CalibrationDataReader):
    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Feed | None:  # type: ignore[override]
        return next(self._feeds, None)


@contextmanager
def _session_threads(threads: int) -> Iterator[None]:
    """Give `threads` to the sessions that the calibrator opens: it takes no options, and its own use every core."""

    def options() -> ort.SessionOptions:
        made = made_by_default()
        made.intra_op_num_threads = threads
        return made

    made_by_default = ort.SessionOptions
    with patch.object(ort, "SessionOptions", options):
        yield
