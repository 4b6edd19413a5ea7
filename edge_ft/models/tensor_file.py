"""A safetensors file written one tensor after the other: the library wants all of them in memory at once."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BYTES", "FileTensor", "write_tensors"]

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a number by safetensors' name of its dtype."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor that is to be written."""

    name: str
    dtype: str
    """safetensors' name of it."""
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[NDArray[Any]]]
    """Its bytes in order, some rows at a time, as arrays of any dtype; called when it is written."""

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * BYTES[self.dtype]


def write_tensors(file: Path, tensors: Sequence[FileTensor], done: Callable[[int, int], None]) -> None:
    """Write a safetensors file.

    Args:
        file: What is written.
        tensors: In the order of the file.
        done: Gets the number of tensors that are written, and of all.

    Raises:
        OSError: the file cannot be written.
    """
    listed: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.size
        listed[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(listed, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for count, tensor in enumerate(tensors, 1):
            for part in tensor.parts():
                stream.write(np.ascontiguousarray(part).data)
            done(count, len(tensors))
