"""Give a graph with LoRA inputs the values that it answers with, without any ONNX library.

The values are a safetensors file beside the graph, from which ONNX Runtime reads them as external data. The graph with
values is the graph without them and a few bytes more: two protobuf messages after each other are one message, in which
lists are joined (protobuf.dev, "Last One Wins"), here the list of initializers.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from edge_ft.files import atomic_file

__all__ = ["adapter_name", "write_default_graph", "write_values"]

# Numbers of the fields in onnx.proto.
MODEL_GRAPH, GRAPH_INITIALIZER = 7, 5
DIMS, DATA_TYPE, NAME, RAW_DATA, EXTERNAL_DATA, DATA_LOCATION = 1, 2, 8, 9, 13, 14
KEY, VALUE = 1, 2
FLOAT, EXTERNAL = 1, 1


def adapter_name(folder: Path) -> str:
    """Return the name under which a bundle keeps the adapter of a run or of a folder."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip(".-")[:64]
    return name if name not in ("", "none") else "adapter"


def write_values(path: Path, values: Mapping[str, NDArray[np.float32]]) -> None:
    """Write an adapter's values, by the name of the input, as a safetensors file."""
    with atomic_file(path) as file:
        file.write_bytes(save({name: np.ascontiguousarray(value, np.float32) for name, value in values.items()}))


def write_default_graph(source: Path, target: Path, inputs: Mapping[str, tuple[int, ...]], values: Path) -> None:
    """Write a graph with LoRA inputs again, with values for them.

    Args:
        source: The graph without values.
        target: The graph to write, in the same folder.
        inputs: By the name of each input without a value, the shape of the value that changes nothing.
        values: What `write_values` wrote, in the same folder; a LoRA input that it lacks gets the value that changes
            nothing.
    """
    offsets = _offsets(values)
    initializers = (
        _initializer(name, *offsets[name], values.name) if name in offsets else _initializer(name, shape)
        for name, shape in inputs.items()
    )
    graph = b"".join(_field(GRAPH_INITIALIZER, each) for each in initializers)
    with atomic_file(target) as file:
        file.write_bytes(source.read_bytes() + _field(MODEL_GRAPH, graph))


def _offsets(values: Path) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Return shape, offset and length in bytes of each tensor of a safetensors file."""
    with values.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    found = {}
    for name in header.keys() - {"__metadata__"}:
        start, end = header[name]["data_offsets"]
        found[name] = tuple(header[name]["shape"]), 8 + size + start, end - start
    return found


def _initializer(name: str, shape: Iterable[int], offset: int = 0, length: int = 0, location: str = "") -> bytes:
    """Return a TensorProto, whose numbers are in the file `location`, or which is empty."""
    head = b"".join(_field(DIMS, size) for size in shape) + _field(DATA_TYPE, FLOAT) + _field(NAME, name.encode())
    if not length:
        return head + _field(RAW_DATA, b"")
    entries = {"location": location, "offset": str(offset), "length": str(length)}
    for key, value in entries.items():
        head += _field(EXTERNAL_DATA, _field(KEY, key.encode()) + _field(VALUE, value.encode()))
    return head + _field(DATA_LOCATION, EXTERNAL)


def _field(number: int, value: int | bytes) -> bytes:
    """Return a field of a protobuf message: a number, or bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
