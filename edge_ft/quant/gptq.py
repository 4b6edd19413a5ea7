"""Codes that keep what a layer gives rather than what its weight is: GPTQ (Frantar et al., arXiv:2210.17323)."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from edge_ft.quant.blockwise import Codes, pack_nibbles, unpack_nibbles

__all__ = ["error_factor", "round_over"]

DAMPING = (0.01, 0.09, 0.9)
"""Share of the mean diagonal that is added to all of it, the paper's: of some directions the rows say nothing. More is
added where float32 is too coarse for that."""
_LARGEST = 15


def error_factor(products: Tensor) -> Tensor:
    """How the columns of a weight make up for each other's errors, from the products of its inputs.

    Args:
        products: float32 [K, K], the sum (or mean) of x xᵀ over the inputs x of a layer; overwritten.

    Returns:
        float32 [K, K], upper triangular: the Cholesky factor of the inverse of what was given.

    Raises:
        ValueError: it has entries that are not numbers.
    """
    diagonal = products.diagonal()
    diagonal[diagonal == 0] = 1  # an input that is always 0
    mean = float(diagonal.mean())
    for share in DAMPING:
        diagonal += share * mean
        # With both orders turned round, products = R Rᵀ of an upper triangular R, and R⁻¹ is the factor.
        lower, failed = torch.linalg.cholesky_ex(products.flip(0, 1))
        if failed:
            continue
        inverse = torch.eye(len(lower)).T  # its columns lie together: solved in place
        torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
        del lower  # of a wide layer each of them is hundreds of MB
        factor = inverse.flip(0, 1)
        if torch.isfinite(factor).all() and (factor.diagonal() > 0).all():  # 0 where the products were infinite
            return factor
    raise ValueError("the inputs are not numbers")


def round_over(weight: Tensor, factor: Tensor, nearest: Codes) -> Codes:
    """4-bit codes of a weight that change what it makes of its inputs as little as they can.

    Columns are rounded one after the other, and the error of each is made up for by those still to come. Scales and
    zero points are kept: to choose them anew as the weight changes took half of the time and gave nothing
    (docs/decisions/015).

    Args:
        weight: float32 [N, K].
        factor: [K, K], of `error_factor`.
        nearest: The weight on the grid, as `quantize` puts it there.
    """
    rows, columns = weight.shape
    block_size, blocks = nearest.block_size, nearest.scales.shape[1]
    scales = np.ascontiguousarray(nearest.scales.T)
    zero_points = np.ascontiguousarray(unpack_nibbles(nearest.zero_points, blocks).T).astype(np.float32)
    # [K, N]: each step below runs along the rows of the weight, in full vectors
    rest = weight.T.clone(memory_format=torch.contiguous_format)  # of one row the transpose is contiguous itself
    left, share = rest.numpy(), factor.numpy()
    codes = np.repeat(zero_points, block_size, axis=0)  # what stands for 0, in the last block's padding
    errors = torch.empty(block_size, rows)
    for block, (scale, zero_point) in enumerate(zip(scales, zero_points, strict=True)):
        start, end = block * block_size, min((block + 1) * block_size, columns)
        for column, error in zip(range(start, end), errors.numpy(), strict=False):
            code = np.rint(left[column] / scale + zero_point, out=codes[column]).clip(0, _LARGEST, out=codes[column])
            np.divide(left[column] - (code - zero_point) * scale, share[column, column], out=error)
            left[column + 1 : end] -= share[column, column + 1 : end, None] * error
        rest[end:].addmm_(factor[start:end, end:].T, errors[: end - start], alpha=-1)
    qweight = np.ascontiguousarray(codes.T, np.uint8).reshape(rows, blocks, block_size)
    return replace(nearest, qweight=pack_nibbles(qweight))
