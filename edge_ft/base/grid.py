"""The grid that is trained over and shipped: codes, scales and integer zero points, in numpy.

Layout and arithmetic are those of ONNX Runtime's `com.microsoft::MatMulNBits` (contrib operator
documentation), so that the bytes here are the bytes in the file: W ≈ scale · (code − zero_point).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bits", "Codes", "dequantize", "pack_nibbles", "quantize", "unpack_nibbles"]

Bits = Literal[4, 8]


@dataclass(frozen=True)
class Codes:
    """A weight [N, K] on the grid, K cut into blocks of `block_size`."""

    qweight: NDArray[np.uint8]
    """[N, K_blocks, block_size * bits / 8]; at 4 bits the low nibble is the earlier column."""
    scales: NDArray[np.float32]
    """[N, K_blocks]"""
    zero_points: NDArray[np.uint8]
    """[N, ceil(K_blocks * bits / 8)]; at 4 bits the low nibble is the earlier block."""
    in_features: int
    """K; the last block is padded when K is not a multiple of block_size."""
    bits: Bits = 4

    @property
    def block_size(self) -> int:
        return 8 // self.bits * int(self.qweight.shape[2])


def pack_nibbles(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[..., n] of 0..15 -> [..., ceil(n / 2)], the earlier value in the low nibble; an odd n is padded with 0."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    packed: NDArray[np.uint8] = values[..., 0::2] | (values[..., 1::2] << np.uint8(4))
    return packed


def unpack_nibbles(packed: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """The inverse of `pack_nibbles`: [..., ceil(count / 2)] -> [..., count]."""
    values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return values[..., :count]


def quantize(weight: NDArray[np.float32], block_size: int, bits: Bits = 4) -> Codes:
    """Round a weight [N, K] to the nearest code, each block's range from its own minimum and maximum.

    Raises:
        ValueError: the weight is not finite.
    """
    rows, columns = weight.shape
    if not np.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity")
    largest = 2**bits - 1
    padding = -columns % block_size
    padded = np.pad(weight, ((0, 0), (0, padding))) if padding else weight
    blocks = padded.astype(np.float32, copy=False).reshape(rows, -1, block_size)  # [N, K_blocks, block_size]
    # The range always holds 0, so that the zero point is a code and padding is exact.
    low = np.minimum(blocks.min(axis=2), 0)
    high = np.maximum(blocks.max(axis=2), 0)
    scales = (high - low) / largest
    scales[scales == 0] = 1
    zero_points = np.clip(np.rint(-low / scales), 0, largest)
    codes = np.clip(np.rint(blocks / scales[..., None] + zero_points[..., None]), 0, largest).astype(np.uint8)
    zero_points = zero_points.astype(np.uint8)
    if bits == 4:
        return Codes(pack_nibbles(codes), scales, pack_nibbles(zero_points), columns)
    return Codes(codes, scales, zero_points, columns, bits)


def dequantize(codes: Codes) -> NDArray[np.float32]:
    """The weight [N, K] that the codes stand for, float32."""
    rows, blocks = codes.scales.shape
    values, zero_points = codes.qweight, codes.zero_points
    if codes.bits == 4:
        values, zero_points = unpack_nibbles(values, codes.block_size), unpack_nibbles(zero_points, blocks)
    differences = values.astype(np.float32) - zero_points.astype(np.float32)[..., None]
    weight = differences * codes.scales[..., None]
    return weight.reshape(rows, -1)[:, : codes.in_features]
