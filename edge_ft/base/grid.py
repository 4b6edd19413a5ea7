"""The 4-bit grid that is trained over and shipped: codes, scales and integer zero points, in numpy.

Layout and arithmetic are those of ONNX Runtime's `com.microsoft::MatMulNBits` (contrib operator
documentation), so that the bytes here are the bytes in the file: W ≈ scale · (code − zero_point).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Codes", "dequantize", "pack_nibbles", "quantize", "unpack_nibbles"]


@dataclass(frozen=True)
class Codes:
    """A weight [N, K] on the grid, K cut into blocks of `block_size`."""

    qweight: NDArray[np.uint8]
    """[N, K_blocks, block_size / 2], the low nibble is the earlier column."""
    scales: NDArray[np.float32]
    """[N, K_blocks]"""
    zero_points: NDArray[np.uint8]
    """[N, ceil(K_blocks / 2)], the low nibble is the earlier block."""
    in_features: int
    """K; the last block is padded when K is not a multiple of block_size."""

    @property
    def block_size(self) -> int:
        return 2 * int(self.qweight.shape[2])


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


def quantize(weight: NDArray[np.float32], block_size: int) -> Codes:
    """Round a weight [N, K] to the nearest code, each block's range from its own minimum and maximum.

    Raises:
        ValueError: the weight is not finite.
    """
    rows, columns = weight.shape
    if not np.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity")
    padding = -columns % block_size
    padded = np.pad(weight, ((0, 0), (0, padding))) if padding else weight
    blocks = padded.astype(np.float32, copy=False).reshape(rows, -1, block_size)  # [N, K_blocks, block_size]
    # The range always holds 0, so that the zero point is a code and padding is exact.
    low = np.minimum(blocks.min(axis=2), 0)
    high = np.maximum(blocks.max(axis=2), 0)
    scales = (high - low) / 15
    scales[scales == 0] = 1
    zero_points = np.clip(np.rint(-low / scales), 0, 15)
    codes = np.clip(np.rint(blocks / scales[..., None] + zero_points[..., None]), 0, 15).astype(np.uint8)
    return Codes(pack_nibbles(codes), scales, pack_nibbles(zero_points.astype(np.uint8)), columns)


def dequantize(codes: Codes) -> NDArray[np.float32]:
    """The weight [N, K] that the codes stand for, float32."""
    rows, blocks = codes.scales.shape
    values = unpack_nibbles(codes.qweight, codes.block_size).astype(np.float32)
    zero_points = unpack_nibbles(codes.zero_points, blocks).astype(np.float32)
    weight = (values - zero_points[..., None]) * codes.scales[..., None]
    return weight.reshape(rows, -1)[:, : codes.in_features]
