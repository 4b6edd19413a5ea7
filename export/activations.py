"""int8 for encoders: matrix products of 8-bit weights and 8-bit activations, by ONNX Runtime's own quantizer.

The weights of a layer are symmetric, one scale an output channel, in 7 bits: where the processor has no VNNI, ONNX
Runtime adds two products of unsigned and signed bytes in 16 bits, and 8-bit weights would saturate there. So the
integers are the same on every machine. Activations are unsigned bytes over a range of their own, that of each batch
(dynamic) or that of calibration rows (static).
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

from edge_ft.quant.layers import is_within

__all__ = ["quantize_activations"]

Feed = dict[str, NDArray[np.int64]]


def quantize_activations(model: ir.Model, keep: tuple[str, ...], calibration: Sequence[Feed] | None) -> ir.Model:
    """A graph of `lowering.lower` with its linear layers in int8, `model` itself as it was.

    Args:
        model: A float graph; layers over codes stay as they are.
        keep: Modules that stay float (a classifier's head: small, and its errors are those of the answer).
        calibration: Inputs whose activations give the static ranges; None for dynamic ones.
    """
    float_model = model.clone()
    layers = []
    for number, node in enumerate(float_model.graph):
        node.name = f"{node.op_type}_{number}"
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.const_value is not None and not is_within(str(weight.name), keep):
            layers.append(node.name)
            # The quantizer asks for types that shape inference does not find behind ONNX Runtime's own operators.
            for value in (node.inputs[0], node.outputs[0]):
                if value is not None:
                    value.type = ir.TensorType(ir.DataType.FLOAT)
    float_model.metadata_props["onnx.quant.pre_process"] = "onnxruntime.quant"  # it would ask for its own passes
    proto = ir.to_proto(float_model)
    settings: dict[str, Any] = {
        "op_types_to_quantize": ["MatMul"],
        "nodes_to_quantize": layers,
        "per_channel": True,
        "reduce_range": True,
        "weight_type": QuantType.QInt8,
    }
    options: dict[str, Any] = {"DefaultTensorType": onnx.TensorProto.FLOAT, "MatMulConstBOnly": True}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        if calibration is None:
            quantize_dynamic(proto, path, extra_options=options, **settings)
        else:
            # The sum of a product stays float, as the bias that is added to it.
            options["OpTypesToExcludeOutputQuantization"] = ["MatMul"]
            quantize_static(
                proto, path, _Reader(calibration), activation_type=QuantType.QUInt8, extra_options=options, **settings
            )
        quantized = ir.from_proto(onnx.load(path))
    quantized.metadata_props.clear()
    return quantized


class _Reader(CalibrationDataReader):
    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Feed | None:  # type: ignore[override]
        return next(self._feeds, None)
