"""The weights in the graph of a decoder's bundle, by the names of the model that it was exported from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edge_ft.models.dims import ModelDims
from edge_ft.quant.blockwise import Codes, pack_nibbles

__all__ = ["bundle_weights"]

JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers that an export joins, and what each is made of."""


def bundle_weights(graph: Path, dims: ModelDims) -> dict[str, Codes | NDArray[Any]]:
    """Read the weights of a graph.

    Of parameters with the same values the graph holds one, and so does the result.

    Args:
        graph: The main graph of a decoder's bundle.
        dims: Of its model.

    Returns:
        By parameter, codes or float numbers; without a head that is tied to the embedding.
    """
    model = ir.load(graph)
    held = {
        name: value.const_value for name, value in model.graph.initializers.items() if value.const_value is not None
    }

    def array(value: Any) -> NDArray[Any]:
        cast = value.producer()  # of scales in float16
        return held[(value if cast is None else cast.inputs[0]).name].numpy()

    found: dict[str, Codes | NDArray[Any]] = {}
    fine: dict[str, NDArray[np.uint8]] = {}
    for node in model.graph:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        first = 1 if node.op_type == "MatMulNBits" else 0
        weight = node.inputs[first]
        assert weight is not None
        module, _, part = str(weight.name).rpartition(".")
        if part == "fine":
            fine[module] = array(weight).reshape(len(array(weight)), -1, node.attributes["block_size"].as_int() // 2)
            continue
        scales = array(node.inputs[first + 1 if first else 2])
        zeros = node.inputs[3] if len(node.inputs) > 3 else None
        bits, block = (node.attributes[name].as_int() for name in ("bits", "block_size"))
        rows, blocks = len(array(weight)), scales.size // len(array(weight))
        columns = node.attributes["K"].as_int() if first else blocks * block
        symmetric = np.full((rows, blocks), 2 ** (bits - 1), np.uint8)
        zero_points = pack_nibbles(symmetric) if bits == 4 else symmetric
        codes = Codes(
            array(weight).reshape(rows, blocks, -1),
            scales.reshape(rows, blocks).astype(np.float32),
            zero_points if zeros is None else array(zeros).reshape(rows, -1),
            columns,
            4 if bits == 4 else 8,
        )
        found[f"{module}.weight"] = codes
    for module, further in fine.items():
        found[f"{module}.weight"] = replace(found[f"{module}.weight"], fine=further)  # type: ignore[type-var]
    for name, tensor in held.items():
        if name.endswith((".weight", ".bias")):
            values = tensor.numpy().astype(np.float32)
            gemma = dims.config.model_type.startswith("gemma") and name.endswith("norm.weight")
            found[name] = values - 1 if gemma else values  # the graph holds what Gemma multiplies by
    if dims.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    return {part: value for name, weight in found.items() for part, value in _parts(name, weight, dims)}


def _parts(name: str, weight: Codes | NDArray[Any], dims: ModelDims) -> list[tuple[str, Codes | NDArray[Any]]]:
    """Cut a weight or bias into those of the layers that were joined."""
    layer = name.split(".")[-2] if "." in name else ""
    if layer not in JOINED or dims.config.model_type == "phi3":  # whose own layers are these
        return [(name, weight)]
    query, key = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    sizes = (query, key, key) if layer == "qkv_proj" else (dims.intermediate, dims.intermediate)
    parts, start = [], 0
    for part, size in zip(JOINED[layer], sizes, strict=True):
        rows = slice(start, start + size)
        parts.append((name.replace(layer, part), weight.rows(rows) if isinstance(weight, Codes) else weight[rows]))
        start += size
    return parts
