"""Write a GGUF file: blocks of 4-bit codes as they are, names and order of llama.cpp, metadata through gguf-py.

A block of 32 codes with scale s and integer zero point z is a Q4_1 block with d = s and m = -s·z, and where every zero
point of a tensor is 8, a Q4_0 block. Layouts: `block_q4_0` and `block_q4_1` in ggml's ggml-common.h.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ft.errors import UsageError, require
from edge_ft.models.gguf_names import Heads, architecture_of, gguf_names, to_file
from edge_ft.quant.blockwise import Codes, dequantize, unpack_nibbles

__all__ = ["BLOCK", "Blocks", "file_tensors", "pack_blocks", "write_gguf_file"]

BLOCK = 32
"""Weights of a block of Q4_0 and Q4_1."""
LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Blocks:
    """A tensor as it lies in the file."""

    data: NDArray[Any]
    """float32 or float16 as they are; of blocks uint8 [rows, bytes]."""
    type: str
    """gguf-py's name."""


def pack_blocks(codes: Codes, name: str = "the weight") -> Blocks:
    """Write 4-bit codes as Q4_1 blocks, or as Q4_0 blocks if every zero point is 8; with further bits as Q8_0 blocks.

    Args:
        codes: Of 4 bits, in blocks of 32 or a multiple of it; rows are a multiple of 32 long.
        name: Of the weight, for an error.

    Returns:
        The blocks, of 4 bits with the same codes; scales are rounded to float16, as the format has them.

    Raises:
        UsageError: the codes do not fit into such blocks.
    """
    if codes.bits != 4:
        raise UsageError(
            f"{name} has codes of {codes.bits} bits, and a GGUF file takes those of 4: use --weights int4, fp16 or fp32"
        )
    if codes.block_size % BLOCK or codes.in_features % BLOCK:
        raise UsageError(
            f"{name} has {codes.in_features} columns in blocks of {codes.block_size}, and GGUF's 4-bit blocks hold "
            f"{BLOCK} weights: use --block-size {BLOCK}, or --weights fp16"
        )
    if codes.fine is not None:
        return _eight_bit_blocks(dequantize(codes))
    rows, blocks = codes.scales.shape
    repeat, count = codes.block_size // BLOCK, codes.in_features // BLOCK
    values = unpack_nibbles(codes.qweight, codes.block_size).reshape(rows, -1, BLOCK)[:, :count]
    zero_points = np.repeat(unpack_nibbles(codes.zero_points, blocks), repeat, axis=1)[:, :count].astype(np.float32)
    scales = np.repeat(codes.scales, repeat, axis=1)[:, :count]
    if not (np.abs(scales) * 15 <= LARGEST).all():
        raise UsageError(f"{name} has a scale beyond float16, which GGUF's 4-bit blocks hold: use --weights fp32")
    d = scales.astype("<f2")
    numbers, kind = [d], "Q4_0"
    if (zero_points != 8).any():
        # of the scale as it is stored, so that the zero point itself stays as near to 0 as float16 allows
        numbers, kind = [d, (-d.astype(np.float32) * zero_points).astype("<f2")], "Q4_1"
    low, high = values[..., : BLOCK // 2], values[..., BLOCK // 2 :]
    parts = [np.ascontiguousarray(number).view(np.uint8).reshape(rows, count, 2) for number in numbers]
    return Blocks(np.concatenate([*parts, low | (high << np.uint8(4))], axis=2).reshape(rows, -1), kind)


def _eight_bit_blocks(weight: NDArray[np.float32]) -> Blocks:
    """Round a weight to Q8_0 blocks: int8 numbers with one scale, the largest of a block is 127."""
    blocks = weight.reshape(len(weight), -1, BLOCK)
    d = (np.abs(blocks).max(axis=2, keepdims=True) / 127).astype("<f2")
    step = d.astype(np.float32)
    numbers = np.clip(np.rint(np.divide(blocks, step, out=np.zeros_like(blocks), where=step > 0)), -127, 127)
    parts = [np.ascontiguousarray(part).view(np.uint8) for part in (d, numbers.astype(np.int8))]
    return Blocks(np.concatenate(parts, axis=2).reshape(len(weight), -1), "Q8_0")


def file_tensors(
    architecture: str, layers: int, heads: Heads, weights: Mapping[str, Codes | Blocks | NDArray[Any]]
) -> dict[str, Blocks]:
    """Name and arrange the weights of a model as in a GGUF file.

    Args:
        architecture: `general.architecture`.
        layers: Number of layers.
        heads: Numbers of its attention heads.
        weights: By parameter of the transformers model: codes, blocks, or float32 or float16 numbers.

    Returns:
        The tensors by name.

    Raises:
        UsageError: a parameter has no name in GGUF, or its codes do not fit.
    """
    row = architecture_of(architecture, "the model")
    names = gguf_names(architecture, layers, weights)
    if lost := [name for name, found in names.items() if found is None]:
        raise UsageError(
            f"{lost[0]} has no name in a GGUF file of architecture {architecture}: export a bundle instead"
        )
    tensors = {}
    for name, weight in weights.items():
        blocks = pack_blocks(weight, name) if isinstance(weight, Codes) else weight
        if not isinstance(blocks, Blocks):
            blocks = Blocks(blocks, "F16" if blocks.dtype == np.float16 else "F32")
        tensors[str(names[name])] = Blocks(to_file(row, str(names[name]), heads, blocks.data), blocks.type)
    return tensors


def write_gguf_file(file: Path, architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, Blocks]) -> None:
    """Write a GGUF file.

    Args:
        file: What is written.
        architecture: `general.architecture`.
        fields: Keys of the header; one that begins with a point is the architecture's; None is left out. Whole
            numbers are written with 32 bits, arrays of them signed.
        tensors: By name.

    Raises:
        MissingExtra: gguf is not installed.
        OSError: the file cannot be written.
    """
    gguf = require("gguf", "train")
    writer = gguf.GGUFWriter(str(file), architecture)
    for key, value in fields.items():
        if value is not None:
            full = f"{architecture}{key}" if key.startswith(".") else key
            writer.add_key_value(full, value, *_value_type(gguf.GGUFValueType, value))
    for name, blocks in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(blocks.data), raw_dtype=gguf.GGMLQuantizationType[blocks.type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _value_type(kinds: Any, value: Any) -> tuple[Any, ...]:
    """Return gguf-py's type of a value, and of the items of a list."""
    if isinstance(value, list):
        (item,) = _value_type(kinds, value[0])
        return kinds.ARRAY, kinds.INT32 if item is kinds.UINT32 else item
    kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}[type(value)]
    return (kind,)
