"""Read the header of a GGUF file: its metadata, and where its tensors lie.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. gguf-py reads the same, but makes several objects for
each token of the vocabulary; here a vocabulary of 262,144 tokens takes a second. Nothing in the file is believed: each
count, length and offset is compared with what the file can hold.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from edge_ft.errors import ModelError

__all__ = ["GgufHeader", "TensorInfo", "is_gguf", "read_header"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""Numpy types of the numbers of the metadata, by their number in the file."""
MAX_DIMENSIONS = 4
MAX_NESTING = 4
LONGEST_KEY = 65535
REMOVED_TYPES = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4"}
"""Types that llama.cpp no longer reads."""
KNOWN_TYPES = {int(kind) for kind in GGMLQuantizationType}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]
    """In torch's order: ggml's dimensions reversed."""
    type: GGMLQuantizationType
    file: Path
    start: int
    """Offset of the first byte in the file."""
    size: int
    """Bytes."""

    @property
    def elements(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape, dtype=object))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, the weights that differ in the last index alone."""
        return self.size * self.shape[-1] // self.elements


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its weights."""

    file: Path
    fields: dict[str, Any]
    """Metadata: numbers, booleans and texts; numeric arrays as numpy arrays, other arrays as lists."""
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """`general.architecture`, or "" where the file has none."""
        return str(self.fields.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or of one of the architecture where it begins with a point."""
        return self.fields.get(f"{self.architecture}{key}" if key.startswith(".") else key, default)


def is_gguf(path: Path) -> bool:
    """Look at the first bytes of a file.

    Returns:
        Whether they are those of a GGUF file.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def read_header(path: Path) -> GgufHeader:
    """Read the metadata and the list of tensors of a GGUF file, without its weights.

    Returns:
        The header.

    Raises:
        ModelError: the file cannot be read, is no GGUF file of version 2 or 3, or is torn or malformed.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 24 or file.read(len(MAGIC)) != MAGIC:
                raise ModelError(f"{path} is not a GGUF file: it does not begin with a GGUF header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).read()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    except MemoryError as error:
        raise ModelError(f"{path} cannot be read: its header does not fit into memory") from error


class _Reader:
    """A position in a mapped file, and what is read from there; every read is bounded by the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.position = path, data, len(data), len(MAGIC)

    def read(self) -> GgufHeader:
        version = self._number(_U32)
        if version & 0xFFFF == 0:
            raise ModelError(f"{self.path} is a big-endian GGUF file: convert it for a little-endian machine")
        if version not in VERSIONS:
            raise ModelError(
                f"{self.path} is of GGUF version {version}, read are versions 2 and 3: convert the model again with a "
                "current llama.cpp"
            )
        tensors, keys = self._number(_U64), self._number(_U64)
        fields: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text("a key", LONGEST_KEY)
            if key in fields:
                raise self._malformed(f"the key {key!r} is there twice")
            fields[key] = self._value(self._number(_U32), key)
        infos = self._tensors(tensors, self._alignment(fields.get("general.alignment", 32)))
        if not isinstance(fields.get("general.architecture", ""), str):
            raise self._malformed("general.architecture is not a text")
        return GgufHeader(self.path, fields, infos)

    def _malformed(self, reason: str) -> ModelError:
        return ModelError(f"{self.path} is a torn or malformed GGUF file: {reason}; download or convert it again")

    def _take(self, size: int, what: str) -> int:
        """Return the position, and move it on by `size` bytes."""
        start = self.position
        if size > self.size - start:
            raise self._malformed(f"it ends inside {what}")
        self.position = start + size
        return start

    def _number(self, form: struct.Struct) -> int:
        return int(form.unpack_from(self.data, self._take(form.size, "its header"))[0])

    def _text(self, what: str, longest: int | None = None) -> str:
        length = self._number(_U64)
        if longest is not None and length > longest:
            raise self._malformed(f"{what} has {length} bytes")
        start = self._take(length, what)
        try:
            return str(self.data[start : self.position], "utf-8")
        except UnicodeDecodeError as error:
            raise self._malformed(f"{what} is not UTF-8") from error

    def _value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind == STRING:
            return self._text(f"the text of {key}")
        if kind == ARRAY:
            if depth == MAX_NESTING:
                raise self._malformed(f"the arrays of {key} are nested more than {MAX_NESTING} deep")
            return self._array(self._number(_U32), self._number(_U64), key, depth)
        if kind not in SCALARS:
            raise self._malformed(f"the value of {key} is of the unknown type {kind}")
        return self._numbers(kind, 1, key)[0].item()

    def _array(self, kind: int, count: int, key: str, depth: int) -> Any:
        if kind == STRING:
            return self._texts(count, key)
        if kind != ARRAY:
            if kind not in SCALARS:
                raise self._malformed(f"the array {key} is of the unknown type {kind}")
            return self._numbers(kind, count, key)
        return [self._value(ARRAY, key, depth + 1) for _ in range(self._at_most(count, 12, key))]

    def _at_most(self, count: int, bytes_each: int, key: str) -> int:
        if count > (self.size - self.position) // bytes_each:
            raise self._malformed(f"it is too short for the {count} values of {key}")
        return count

    def _numbers(self, kind: int, count: int, key: str) -> NDArray[Any]:
        form = np.dtype(SCALARS[kind])
        start = self._take(self._at_most(count, form.itemsize, key) * form.itemsize, key)
        return np.frombuffer(self.data[start : self.position], form)

    def _texts(self, count: int, key: str) -> list[str]:
        """Read the texts of an array: the loop that a vocabulary passes through, so it is written for speed."""
        data, position, unpack, found = self.data, self.position, _U64.unpack_from, []
        try:
            for _ in range(self._at_most(count, 8, key)):
                (length,) = unpack(data, position)
                start, position = position + 8, position + 8 + length
                if position > self.size:
                    raise self._malformed(f"it ends inside {key}")
                found.append(str(data[start:position], "utf-8"))
        except struct.error as error:
            raise self._malformed(f"it ends inside {key}") from error
        except UnicodeDecodeError as error:
            raise self._malformed(f"value {len(found)} of {key} is not UTF-8") from error
        self.position = position
        return found

    def _alignment(self, found: Any) -> int:
        if not isinstance(found, int) or found < 1 or found & (found - 1) or found > self.size:
            raise self._malformed(f"general.alignment is {found!r}, not a power of two")
        return found

    def _tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        listed: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
        for _ in range(self._at_most(count, 32, "the list of tensors")):
            name = self._text("the name of a tensor", LONGEST_KEY)
            if name in listed:
                raise self._malformed(f"the tensor {name!r} is there twice")
            listed[name] = self._tensor(name)
        begin = -(-self.position // alignment) * alignment
        infos = {
            name: TensorInfo(name, shape, kind, self.path, begin + offset, self._bytes(name, shape, kind))
            for name, (shape, kind, offset) in listed.items()
        }
        end, before = begin, ""
        for info in sorted(infos.values(), key=lambda info: info.start):
            if (info.start - begin) % alignment:
                raise self._malformed(f"the tensor {info.name!r} is not aligned to {alignment} bytes")
            if info.start < end:
                raise self._malformed(f"the tensors {before!r} and {info.name!r} share bytes")
            end, before = info.start + info.size, info.name
            if end > self.size:
                raise self._malformed(f"it ends inside the tensor {info.name!r}, {end - self.size} bytes are missing")
        return infos

    def _tensor(self, name: str) -> tuple[tuple[int, ...], GGMLQuantizationType, int]:
        """Return shape, type and offset of the next tensor of the list."""
        dimensions = self._number(_U32)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._malformed(f"the tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._number(_U64) for _ in range(dimensions))[::-1]
        number, offset = self._number(_U32), self._number(_U64)
        if 0 in shape:
            raise self._malformed(f"the tensor {name!r} has no weights")
        if number not in KNOWN_TYPES:
            raise ModelError(
                f"{self.path}: the tensor {name!r} is of type {REMOVED_TYPES.get(number, number)}, which is not known: "
                "convert the model again with a current llama.cpp, for example to Q8_0 or Q4_K_M"
            )
        return shape, GGMLQuantizationType(number), offset

    def _bytes(self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
        block, size = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise self._malformed(f"the rows of {name!r} have {shape[-1]} weights, not a multiple of {block}")
        return int(np.prod(shape, dtype=object)) // block * size
