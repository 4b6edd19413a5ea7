"""How a checkpoint stores a tensor, and how that becomes float32: as it is, times a scale, or bitsandbytes' codes."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from edge_ft.errors import ModelError, require

__all__ = ["FLOATS", "Entry", "FourBit", "Scaled", "Stored", "find_stored"]

FLOATS = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes that need no scale."""
FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("_scale_inv", "_scale")
"""What follows the name of an FP8 or int8 weight in that of its scale, by which it is multiplied. DeepSeek's
`weight_scale_inv` is multiplied as well, whatever its name says."""
OF_ACTIVATIONS = (
    *("input_scale", "activation_scale", "input_global_scale", "input_zero_point", "k_scale", "v_scale", "q_scale"),
    *("output_scale", "weight_format"),
)
"""Last names of tensors that a quantized checkpoint holds for activations and kernels: float weights need none."""
FOUR_BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
"""What follows the name of a 4-bit weight of bitsandbytes in those of its other tensors."""
BLOCK = 128
"""Rows and columns with one scale, unless the config says otherwise (DeepSeek-V3, Qwen3-FP8)."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    file: Path
    key: str
    dtype: str
    """safetensors' name of it."""
    shape: tuple[int, ...]

    def load(self) -> Tensor:
        """Return the tensor as it is stored."""
        with safe_open(self.file, "pt") as tensors:
            whole: Tensor = tensors.get_tensor(self.key)
        return whole


@dataclass(frozen=True)
class Stored:
    """A tensor of a model whose numbers are stored as they are."""

    entry: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that `read` returns rows of."""
        return self.entry.shape

    @property
    def parts(self) -> tuple[Entry, ...]:
        """All stored tensors that it is read from."""
        return (self.entry,)

    def read(self, rows: slice, transposed: bool = False) -> Tensor:
        """Return rows of the tensor or of its transpose, float32: a copy, since pages stay in memory while mapped."""
        with safe_open(self.entry.file, "pt") as tensors:
            if not self.entry.shape:
                return tensors.get_tensor(self.entry.key).to(torch.float32, copy=True)
            part = tensors.get_slice(self.entry.key)
            part = part[:, rows].T if transposed else part[rows]
            return part.to(torch.float32, copy=True)


@dataclass(frozen=True)
class Scaled(Stored):
    """A matrix of FP8 or int8 numbers; each block of rows and columns is multiplied by a scale of its own."""

    scale: Entry
    """A number, or [N], [N, 1] or [rows of blocks, columns of blocks]."""
    block: tuple[int, int]
    """Rows and columns of a block."""
    factor: float = 1.0
    """That the product is multiplied by."""

    @property
    def parts(self) -> tuple[Entry, ...]:
        """The numbers and the scale."""
        return self.entry, self.scale

    def read(self, rows: slice, transposed: bool = False) -> Tensor:
        """Return rows of the matrix or of its transpose, float32."""
        part, (height, width) = super().read(rows, transposed), self.shape
        scale = self.scale.load().to(torch.float32).reshape(-1, math.ceil(width / self.block[1]))
        down, across = torch.arange(height) // self.block[0], torch.arange(width) // self.block[1]
        if transposed:
            return part * scale[down][:, across[rows]].T * self.factor
        return part * scale[down[rows]][:, across] * self.factor


@dataclass(frozen=True)
class FourBit(Stored):
    """bitsandbytes' nf4 or fp4 codes (Dettmers et al., arXiv:2305.14314)."""

    others: tuple[Entry, ...]
    """Its scales, its table of values, and what describes them."""
    size: tuple[int, ...]
    """Shape of the matrix."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, not of its codes."""
        return self.size

    @property
    def parts(self) -> tuple[Entry, ...]:
        """The codes and what belongs to them."""
        return self.entry, *self.others

    def read(self, rows: slice, transposed: bool = False) -> Tensor:
        """Return rows of the matrix or of its transpose, float32."""
        whole = _dequantize_4bit(self)
        return (whole.T if transposed else whole)[rows].clone()


@lru_cache(maxsize=1)  # its rows are read one part after the other
def _dequantize_4bit(stored: FourBit) -> Tensor:
    """Return the matrix as bitsandbytes computes it: in the dtype that was saved, then float32."""
    require("bitsandbytes", "train")
    from bitsandbytes.functional import QuantState, dequantize_4bit

    values = {entry.key.removeprefix(f"{stored.entry.key}."): entry.load() for entry in stored.others}
    state = QuantState.from_dict(values, device=torch.device("cpu"))
    # As in edge_ft.quant.nf4: the CPU kernel reads wrong scales where blocks run over the ends of rows.
    size = math.prod(stored.size)
    state.shape = torch.Size((math.ceil(size / state.blocksize), state.blocksize))
    packed = stored.entry.load().contiguous().view(torch.uint8).flatten()
    missing = state.shape.numel() // 2 - len(packed)
    packed = torch.nn.functional.pad(packed, (0, missing)).unsqueeze(1)
    return dequantize_4bit(packed, state).flatten()[:size].view(stored.size).to(torch.float32)


def find_stored(entries: Mapping[str, Entry], block: tuple[int, int] | None, scaled: bool) -> dict[str, Stored | str]:
    """Find out how each tensor is stored.

    Args:
        entries: All tensors in the files of a checkpoint, by their keys.
        block: Rows and columns with one scale, if the config says it.
        scaled: Whether the config says that FP8 weights have scales.

    Returns:
        By key, how it is read, or in words why it cannot be read. Scales and other parts of a weight, and what a
        checkpoint holds for the activations of quantized layers, have no line of their own.
    """
    found: dict[str, Stored | str] = {}
    for key, entry in entries.items():
        if key.rpartition(".")[2] in OF_ACTIVATIONS:
            continue
        try:
            found[key] = _how(entry, entries, block, scaled)
        except ModelError as error:
            found[key] = str(error)
    parts = {part.key for stored in found.values() if isinstance(stored, Stored) for part in stored.parts[1:]}
    return {key: stored for key, stored in found.items() if key not in parts}


def _how(entry: Entry, entries: Mapping[str, Entry], block: tuple[int, int] | None, scaled: bool) -> Stored:
    """Return how a tensor is read.

    Raises:
        ModelError: it cannot be read, in words that follow its name.
    """
    key, stem = entry.key, entry.key.rpartition(".")[0]
    states = [other for name, other in entries.items() if name.startswith(f"{key}.quant_state.")]
    if states:
        others = [entries[f"{key}.{part}"] for part in FOUR_BIT if f"{key}.{part}" in entries]
        size = json.loads(bytes(states[0].load().tolist()).decode())["shape"]
        return FourBit(entry, (*others, states[0]), tuple(int(length) for length in size))
    scale = next((entries[f"{key}{ending}"] for ending in SCALES if f"{key}{ending}" in entries), None)
    if scale is None and entry.dtype in FLOAT8:
        scale = entries.get(f"{stem}.scale")
    if scale is None and entry.dtype == "I8" and f"{stem}.SCB" in entries:
        return Scaled(entry, entries[f"{stem}.SCB"], (1, entry.shape[-1]), 1 / 127)
    if scale is not None:
        if entry.dtype not in (*FLOAT8, "I8") or len(entry.shape) != 2:
            raise ModelError(f"is {entry.dtype} {list(entry.shape)} and has a scale, {scale.key}")
        if f"{key}_zero_point" in entries:
            raise ModelError(f"has zero points, {key}_zero_point")
        return Scaled(entry, scale, _block_of(entry.shape, scale, block))
    if entry.dtype in FLOATS or (entry.dtype in FLOAT8 and not scaled):
        return Stored(entry)
    raise ModelError(f"is {entry.dtype} and has no scale")


def _block_of(shape: tuple[int, ...], scale: Entry, block: tuple[int, int] | None) -> tuple[int, int]:
    """Return the rows and columns that share a scale.

    Raises:
        ModelError: the scale does not fit the weight.
    """
    sizes = scale.shape or (1,)
    if len(sizes) == 1:
        sizes = (*sizes, 1)
    found = []
    for length, count, given in zip(shape, sizes, block or (BLOCK, BLOCK), strict=False):
        if count in (1, length):
            found.append(length // count)
        elif math.ceil(length / given) == count:
            found.append(given)
        elif length % count == 0:
            found.append(length // count)
    if len(sizes) != 2 or len(found) != 2:
        raise ModelError(f"is {list(shape)}, which its scale {scale.key} {list(scale.shape)} does not fit")
    return found[0], found[1]
