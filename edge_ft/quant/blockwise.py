"""The blockwise grid on which weights are trained and shipped: codes, scales and integer zero points, in numpy.

Layout and arithmetic are those of ONNX Runtime's `com.microsoft::MatMulNBits` (contrib operator
documentation), so that the bytes here are the bytes in the file: W ≈ scale · (code − zero_point).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FINE_STEPS",
    "FINE_ZERO",
    "Bits",
    "Codes",
    "Grid",
    "as_half",
    "code_steps",
    "dequantize",
    "pack_nibbles",
    "quantize",
    "quantize_finely",
    "unpack_nibbles",
]

Bits = Literal[4, 8]

_RANGE_FACTORS = (1.0, 1.05, 1.1, 0.95, 0.9, 0.85, 0.8)
"""Multiples of a block's range that are tried; of two with the same error the earlier is taken."""
_CHUNK = 8192
"""Blocks that are rounded together: with fewer, threads wait for each other more often than the cache saves."""
FINE_STEPS, FINE_ZERO = 16, 8
"""Fine codes divide a step into 16, around their code 8: a 4-bit product without zero points takes 8 for them."""
_HALF_RANGE = float(np.finfo(np.float16).smallest_subnormal), float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Grid:
    """How the weights of a model are rounded: a run records it, so that its export rounds in the same way."""

    block_size: int = 32
    """Weights per scale."""
    half_scales: bool = True
    """Scales are float16 numbers, and files store them so, but for weights whose scales it cannot hold; runs of earlier
    releases have scales in all of float32."""

    @classmethod
    def recorded(cls, identity: Mapping[str, Any]) -> "Grid":
        """Return what the base.json of a run says."""
        return cls(int(identity["block_size"]), identity.get("scales") == "float16")

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of base.json."""
        return {"block_size": self.block_size, "scales": "float16" if self.half_scales else "float32"}


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
    fine: NDArray[np.uint8] | None = None
    """[rows, K_blocks, block_size / 2]: of 4-bit codes, four further bits of the first rows, packed as qweight; such a
    row is scale · (code − zero_point + (fine − 8) / 16). Two 4-bit products make one of 8 bits, in any runtime."""

    @classmethod
    def concatenate(cls, parts: "Sequence[Codes]") -> "Codes":
        """Return the codes of a weight of which `parts` are consecutive rows."""
        qweight, scales, zero_points = (
            np.concatenate([getattr(part, field) for part in parts]) for field in ("qweight", "scales", "zero_points")
        )
        fine = [part.fine for part in parts if part.fine is not None]
        return cls(
            *(qweight, scales, zero_points, parts[0].in_features, parts[0].bits), np.concatenate(fine) if fine else None
        )

    def rows(self, rows: slice) -> "Codes":
        """Return the codes of some rows of the weight."""
        fine = None if self.fine is None or not len(self.fine[rows]) else self.fine[rows]
        return replace(
            self,
            qweight=self.qweight[rows],
            scales=self.scales[rows],
            zero_points=self.zero_points[rows],
            fine=fine,
        )

    @property
    def block_size(self) -> int:
        """Weights per scale."""
        return 8 // self.bits * int(self.qweight.shape[2])


def pack_nibbles(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return values 0..15 [..., n] as bytes [..., ceil(n / 2)], the earlier one in the low nibble, 0 after an odd n."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return values[..., 0::2] | (values[..., 1::2] << np.uint8(4))


def unpack_nibbles(packed: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Return what `pack_nibbles` packed: [..., ceil(count / 2)] -> [..., count]."""
    values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return values[..., :count]


def quantize(weight: NDArray[np.float32], block_size: int, bits: Bits = 4, half_scales: bool = True) -> Codes:
    """Round a weight to the grid: each block gets the scale and zero point of the smallest squared error.

    At 4 bits several multiples of the range from minimum to maximum are tried, each with the zero points below and
    above, and the scale is fitted to the codes by least squares. This search was chosen by held-out loss
    (docs/decisions/009).

    Args:
        weight: [N, K].
        block_size: Weights per scale.
        bits: Of a code.
        half_scales: Scales are numbers that float16 represents, unless it would round them to a few bits.

    Returns:
        The codes.

    Raises:
        ValueError: the weight is not finite.
    """
    rows, columns = weight.shape
    blocks = _blocks(weight, block_size).reshape(-1, block_size)
    half_scales = half_scales and _fits_half(weight)
    scales, zero_points = np.empty(len(blocks), np.float32), np.empty(len(blocks), np.uint8)
    codes = np.empty(blocks.shape, np.uint8)

    for start in range(0, len(blocks), _CHUNK):
        part = slice(start, start + _CHUNK)
        scales[part], zero_points[part], codes[part] = _round_blocks(blocks[part], bits, half_scales)
    qweight: NDArray[np.uint8] = codes.reshape(rows, -1, block_size)
    zeros: NDArray[np.uint8] = zero_points.reshape(rows, -1)
    if bits == 4:
        qweight, zeros = pack_nibbles(qweight), pack_nibbles(zeros)
    return Codes(qweight, scales.reshape(rows, -1), zeros, columns, bits)


def quantize_finely(weight: NDArray[np.float32], block_size: int) -> Codes:
    """Round a weight [N, K] to 4-bit codes with four further bits for each row, over the whole range of each block.

    Returns:
        The codes.

    Raises:
        ValueError: the weight is not finite.
    """
    blocks = _blocks(weight, block_size)
    low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    scales = (high - low) / np.float32(15)
    if _fits_half(weight):
        scales = as_half(scales)
    scales[high == low] = 1
    zero_points = np.clip(np.rint(-low / scales), 0, 15)
    steps = np.rint((blocks / scales[..., None] + zero_points[..., None]) * FINE_STEPS) + FINE_ZERO
    codes = np.clip(steps, 0, 255).astype(np.uint8)
    coarse, fine = pack_nibbles(codes >> np.uint8(4)), pack_nibbles(codes & np.uint8(15))
    return Codes(coarse, scales, pack_nibbles(zero_points.astype(np.uint8)), weight.shape[1], 4, fine)


def _blocks(weight: NDArray[np.float32], block_size: int) -> NDArray[np.float32]:
    """Cut the rows of a weight [N, K] into blocks.

    Returns:
        [N, K_blocks, block_size], float32; the last block of a row is filled up with zeros.

    Raises:
        ValueError: the weight is not finite.
    """
    if not np.isfinite(weight).all():
        raise ValueError("the weight contains NaN or infinity")
    padding = -weight.shape[1] % block_size
    padded = np.pad(weight, ((0, 0), (0, padding))) if padding else weight
    return padded.astype(np.float32, copy=False).reshape(len(weight), -1, block_size)


def _fits_half(weight: NDArray[np.float32]) -> bool:
    """Tell whether blocks with a sixteenth of the weight's range still have a scale of all of float16's bits."""
    largest = float(np.abs(weight).max(initial=0))
    return largest == 0 or 15 * 16 * float(np.finfo(np.float16).smallest_normal) < largest < _HALF_RANGE[1]


def as_half(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the nearest positive numbers of float16."""
    return np.clip(scales, *_HALF_RANGE).astype(np.float16).astype(np.float32)


def _round_blocks(
    blocks: NDArray[np.float32], bits: Bits, half_scales: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return scale [blocks], zero point [blocks] and codes [blocks, block_size] of blocks, all of them floats."""
    largest = 2**bits - 1
    # [block_size, blocks]: every step below runs along the blocks, in full vectors
    values = np.ascontiguousarray(blocks.T)
    # The range always includes 0, so that the zero point is a code and padding is exact.
    low, high = np.minimum(values.min(axis=0), 0), np.maximum(values.max(axis=0), 0)
    scales, zero_points = np.ones_like(low), np.zeros_like(low)
    least_error = np.full(low.shape, np.inf, np.float32)
    code, difference = np.empty_like(values), np.empty_like(values)

    def round_to(scale: NDArray[np.float32], zero_point: NDArray[np.float32]) -> None:
        np.divide(values, scale, out=code)
        np.add(code, zero_point, out=code)
        np.rint(code, out=code)
        np.clip(code, 0, largest, out=code)

    def compare(scale: NDArray[np.float32], zero_point: NDArray[np.float32]) -> NDArray[np.float32]:
        """Take these where their error is smaller; return codes - zero point."""
        nonlocal scales, zero_points, least_error
        if half_scales:
            scale = as_half(scale)
        round_to(scale, zero_point)
        step = np.subtract(code, zero_point, out=code)
        np.multiply(step, scale, out=difference)
        np.subtract(difference, values, out=difference)
        error = np.einsum("kb,kb->b", difference, difference)
        better = error < least_error
        least_error = np.where(better, error, least_error)
        scales, zero_points = np.where(better, scale, scales), np.where(better, zero_point, zero_points)
        return step

    for factor in _RANGE_FACTORS if bits == 4 else _RANGE_FACTORS[:1]:
        scale = (high - low) * np.float32(factor / largest)
        scale[scale == 0] = 1
        exact = -low * np.float32(factor) / scale
        for zero_point in (np.floor(exact), np.ceil(exact)) if bits == 4 else (np.rint(exact),):
            bounded = np.clip(zero_point, 0, largest)
            step = compare(scale, bounded)
            if bits == 4:  # and with the least-squares scale for these codes
                fitted = np.einsum("kb,kb->b", step, values) / np.maximum(np.einsum("kb,kb->b", step, step), 1)
                compare(np.where(fitted > 0, fitted, scale).astype(np.float32), bounded)
    round_to(scales, zero_points)
    return scales, zero_points, code.T


def code_steps(codes: Codes) -> NDArray[np.float32]:
    """Return code - zero point of each weight, [N, K_blocks, block_size], with what further bits add."""
    values, zero_points = codes.qweight, codes.zero_points
    if codes.bits == 4:
        values = unpack_nibbles(values, codes.block_size)
        zero_points = unpack_nibbles(zero_points, codes.scales.shape[1])
    steps: NDArray[np.float32] = values.astype(np.float32) - zero_points.astype(np.float32)[..., None]
    if codes.fine is not None:
        fine = unpack_nibbles(codes.fine, codes.block_size).astype(np.float32)
        steps[: len(fine)] += (fine - FINE_ZERO) / FINE_STEPS
    return steps


def dequantize(codes: Codes) -> NDArray[np.float32]:
    """Return the weight [N, K] of the codes: scale · (code - zero_point)."""
    weight = code_steps(codes) * codes.scales[..., None]
    return weight.reshape(len(weight), -1)[:, : codes.in_features]
