"""Write graphs and the one file of weights that they share, each tensor stored once."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from edge_ft.export.eight_bits import join_further_bits

__all__ = ["write_graphs"]

# A cache line: ONNX Runtime memory-maps the file and computes on the weights in place.
ALIGNMENT = 64
# Smaller tensors stay in the graph file.
EXTERNAL_BYTES = 1024
# ONNX Runtime's accuracy level of products whose activations are int8; it multiplies 8-bit codes fast only there.
INT8_LEVEL = 4


def write_graphs(
    models: Mapping[str, ir.Model], folder: Path, data_name: str, accuracy_levels: tuple[int, ...] = (1, 4)
) -> dict[int, str]:
    """Write graphs `onnx/NAME.onnx` that share the weights in `onnx/DATA_NAME.onnx_data`.

    For each later level there is a variant `onnx/NAME_aLEVEL.onnx`, which differs only in the accuracy_level of
    MatMulNBits (1: float; 4: activations in int8, and products with further bits are 8-bit ones). The same models give
    the same bytes.

    Args:
        models: Lowered graphs, which are not changed, by stem of the file with transformers.js's suffix (`model`,
            `model_q4`).
        folder: The bundle.
        data_name: Stem of the weights file.
        accuracy_levels: One variant of each graph for each level; the first has the plain name.

    Returns:
        By level, the path of the last graph relative to `folder`.
    """
    graphs = {name: model.clone() for name, model in models.items()}
    data = folder / "onnx" / f"{data_name}.onnx_data"
    data.parent.mkdir(parents=True, exist_ok=True)
    offsets: dict[bytes, int] = {}
    with data.open("wb") as file:
        for value in (value for packed in graphs.values() for value in packed.graph.initializers.values()):
            tensor = value.const_value
            assert tensor is not None and value.name is not None
            if tensor.nbytes < EXTERNAL_BYTES:
                continue
            content = tensor.tobytes()
            digest = hashlib.sha256(content).digest()
            if digest not in offsets:
                file.write(bytes(-file.tell() % ALIGNMENT))
                offsets[digest] = file.tell()
                file.write(content)
            value.const_value = ir.ExternalTensor(
                data.name,
                offsets[digest],
                len(content),
                tensor.dtype,
                shape=ir.Shape(tensor.numpy().shape),
                name=value.name,
            )
    paths: dict[int, str] = {}
    for name, packed in graphs.items():
        for level in accuracy_levels:
            if level == INT8_LEVEL:
                join_further_bits(packed.graph)
            for node in packed.graph:
                if node.op_type == "MatMulNBits":
                    node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
            paths[level] = f"onnx/{name}.onnx" if level == accuracy_levels[0] else f"onnx/{name}_a{level}.onnx"
            ir.save(packed, folder / paths[level])
    return paths
