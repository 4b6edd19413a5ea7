"""GPTQ (Frantar et al., arXiv:2210.17323): codes that minimise the error of a layer's output, not of its weight."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from edge_ft.quant.blockwise import Codes, pack_nibbles, unpack_nibbles

__all__ = ["gptq_quantize", "inverse_hessian_factor"]

DAMPING = (0.01, 0.09, 0.9)
"""Multiples of the mean diagonal that are added to the diagonal, one after the other until the factorisation succeeds:
the first is the paper's; more is needed where float32 is too coarse for it."""
_LARGEST = 15


def inverse_hessian_factor(hessian: Tensor) -> Tensor:
    """Factorise the inverse Hessian of a layer's output error, damped as in the paper.

    Args:
        hessian: float32 [K, K], the sum (or mean) of x xᵀ over the inputs x of a layer; overwritten.

    Returns:
        float32 [K, K], upper triangular: the Cholesky factor U of the inverse, UᵀU = (H + damping)⁻¹.

    Raises:
        ValueError: the Hessian has entries that are not finite.
    """
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1  # an input that is always 0
    mean = float(diagonal.mean())
    for share in DAMPING:
        diagonal += share * mean
        # With both orders reversed, H = R Rᵀ of an upper triangular R, and R⁻¹ is the factor.
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if failed:
            continue
        inverse = torch.eye(len(lower)).T  # column-major: solved in place
        torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
        del lower  # of a wide layer each of them is hundreds of MB
        factor = inverse.flip(0, 1)
        if torch.isfinite(factor).all() and (factor.diagonal() > 0).all():  # 0 where the Hessian was infinite
            return factor
    raise ValueError("the inputs of the layer are not finite")


def gptq_quantize(weight: Tensor, factor: Tensor, nearest: Codes) -> Codes:
    """Quantize a weight to 4 bits so that the layer's output changes as little as possible.

    Columns are rounded one after the other, and each column's error is compensated for in the columns that follow.
    Scales and zero points stay those of `nearest`: choosing them again as the weight changes took half of the time
    and gained nothing (docs/decisions/015).

    Args:
        weight: float32 [N, K].
        factor: [K, K], of `inverse_hessian_factor`.
        nearest: The weight as `quantize` rounds it.

    Returns:
        The codes.
    """
    rows, columns = weight.shape
    block_size, blocks = nearest.block_size, nearest.scales.shape[1]
    scales = np.ascontiguousarray(nearest.scales.T)
    zero_points = np.ascontiguousarray(unpack_nibbles(nearest.zero_points, blocks).T).astype(np.float32)
    # [K, N]: each step below runs along the rows of the weight, in full vectors
    rest = weight.T.clone(memory_format=torch.contiguous_format)  # of one row the transpose is contiguous itself
    remaining, upper = rest.numpy(), factor.numpy()
    codes = np.repeat(zero_points, block_size, axis=0)  # the code of 0, in the last block's padding
    errors = torch.empty(block_size, rows)
    for block, (scale, zero_point) in enumerate(zip(scales, zero_points, strict=True)):
        start, end = block * block_size, min((block + 1) * block_size, columns)
        for column, error in zip(range(start, end), errors.numpy(), strict=False):
            code = codes[column]
            np.rint(remaining[column] / scale + zero_point, out=code).clip(0, _LARGEST, out=code)
            np.divide(remaining[column] - (code - zero_point) * scale, upper[column, column], out=error)
            remaining[column + 1 : end] -= upper[column, column + 1 : end, None] * error
        rest[end:].addmm_(factor[start:end, end:].T, errors[: end - start], alpha=-1)
    qweight = np.ascontiguousarray(codes.T, np.uint8).reshape(rows, blocks, block_size)
    return replace(nearest, qweight=pack_nibbles(qweight))
