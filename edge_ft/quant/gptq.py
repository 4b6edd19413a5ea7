"""Round a weight to int4 so that the outputs of its layer change as little as possible, given the layer's inputs.

Codes are chosen by GPTQ (Frantar et al., arXiv:2210.17323), and scales are fitted to the codes by least squares.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from edge_ft.quant.blockwise import Codes, as_half, code_steps, pack_nibbles, unpack_nibbles
from edge_ft.quant.layers import are_half

__all__ = ["Curvature", "fit_scales", "gptq_quantize", "hessian_factor"]

DAMPING = (0.01, 0.09, 0.9)
"""Multiples of the mean diagonal that are added to the diagonal, one after the other until the factorisation succeeds:
the first is the paper's; more is needed where float32 is too coarse for it."""
ROUNDS = 2
"""How often codes are chosen, and scales fitted to them (docs/decisions/048)."""
RIDGE = 0.01
"""How strongly a fitted scale is held to what it was, as a share of the mean curvature of the row's scales."""
_LARGEST = 15
_TOGETHER = 32
"""Columns that are rounded before their errors pass on to all others in one product."""
_PAIRS = 2**24
"""Pairs of blocks whose curvature is in memory at a time."""


@dataclass(frozen=True)
class Curvature:
    """How a layer's output error depends on the errors of a row of its weight: the sum of x xᵀ over its inputs x."""

    hessian: Tensor
    """float32 [K, K], damped."""
    order: Tensor
    """[K], the columns in the order in which they are rounded: those of the largest inputs first, while there are many
    others that can make up for their errors."""
    factor: Tensor
    """float32 [K, K], `hessian_factor` of the columns in that order."""

    @classmethod
    def of(cls, hessian: Tensor) -> "Curvature":
        """Order and factorise a Hessian.

        Args:
            hessian: float32 [K, K], the sum (or mean) of x xᵀ over the inputs x of a layer; it is damped in place.

        Returns:
            The curvature, which holds the same Hessian.

        Raises:
            ValueError: it has entries that are not finite.
        """
        diagonal = hessian.diagonal()
        order = diagonal.argsort(descending=True, stable=True)
        ordered = hessian[order][:, order]
        factor = hessian_factor(ordered)
        diagonal[order] = ordered.diagonal()
        return cls(hessian, order, factor)


def hessian_factor(hessian: Tensor) -> Tensor:
    """Factorise the Hessian of a layer's output error, damped as in the paper.

    Args:
        hessian: float32 [K, K], the sum (or mean) of x xᵀ over the inputs x of a layer; its diagonal is overwritten.

    Returns:
        float32 [K, K], upper triangular: R with R Rᵀ = H + damping.

    Raises:
        ValueError: the Hessian has entries that are not finite.
    """
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1  # an input that is always 0
    mean = float(diagonal.mean())
    for share in DAMPING:
        diagonal += share * mean
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))  # in reversed order R is lower triangular
        if failed:
            continue
        roots = lower.diagonal()
        if torch.isfinite(roots).all() and (roots > 0).all():  # what is not finite reaches the diagonal
            return lower.flip(0, 1)
    raise ValueError("the inputs of the layer are not finite")


def gptq_quantize(weight: Tensor, curvature: Curvature, nearest: Codes) -> Codes:
    """Quantize a weight to 4 bits so that the layer's output changes as little as possible.

    Columns are rounded one after the other, and each column's error is compensated for in the columns that follow.
    With H = R Rᵀ and d = weight - rounded, the output error is |Rᵀd|²; its part i is Rᵢᵢdᵢ + Σⱼ Rⱼᵢdⱼ over the columns
    j before i, so column i is rounded from wᵢ + Σⱼ dⱼRⱼᵢ/Rᵢᵢ. That is GPTQ (Chen et al., arXiv:2507.18553) without the
    inverse of the Hessian. Then scales are fitted to these codes, and both once more.

    Args:
        weight: float32 [N, K].
        curvature: Of the layer's inputs.
        nearest: The weight as `quantize` rounds it; its zero points stay.

    Returns:
        The codes.
    """
    codes = nearest
    for _ in range(ROUNDS):
        codes = fit_scales(weight, curvature.hessian, _choose_codes(weight, curvature, codes))
    return codes


def _choose_codes(weight: Tensor, curvature: Curvature, nearest: Codes) -> Codes:
    """Return other codes for the scales and zero points of `nearest`."""
    rows, columns = weight.shape
    block_size, blocks = nearest.block_size, nearest.scales.shape[1]
    zero_points = np.ascontiguousarray(unpack_nibbles(nearest.zero_points, blocks).T)
    codes = np.repeat(zero_points, block_size, axis=0)  # the code of 0, in the last block's padding
    order = curvature.order.numpy()
    # [K, N], in the order of the rounding: each step below runs along the rows of the weight, in full vectors
    scales = np.ascontiguousarray(nearest.scales.T)[order // block_size]
    zeros = zero_points[order // block_size].astype(np.float32)
    compensated = weight.T[curvature.order].contiguous()
    lost = compensated.clone()  # of columns that are not rounded yet, the weight
    relative = curvature.factor / curvature.factor.diagonal()
    wanted, errors, found = compensated.numpy(), lost.numpy(), np.empty(rows, np.float32)
    lowest, highest = np.float32(0), np.float32(_LARGEST)

    def round_columns(start: int, end: int) -> None:
        shares = relative[start:end, start:end].T.contiguous().numpy()
        for column in range(start, end):
            scale, zero_point, code = scales[column], zeros[column], wanted[column]
            code += np.dot(shares[column - start, : column - start], errors[start:column], out=found)
            code /= scale
            code += zero_point
            np.minimum(np.maximum(np.rint(code, out=code), lowest, out=code), highest, out=code)
            np.multiply(np.subtract(code, zero_point, out=found), scale, out=found)
            errors[column] -= found

    for part in range(-(-columns // _TOGETHER)):
        round_columns(part * _TOGETHER, min((part + 1) * _TOGETHER, columns))
        # Each pair of columns meets in one product, of as many parts before it as after it: few and large products.
        done, together = part + 1, (part + 1) & -(part + 1)
        before = slice((done - together) * _TOGETHER, done * _TOGETHER)
        after = slice(done * _TOGETHER, (done + together) * _TOGETHER)
        if done * _TOGETHER < columns:
            compensated[after].addmm_(relative[before, after].T, lost[before])
    codes[order] = wanted
    qweight = np.ascontiguousarray(codes.T).reshape(rows, blocks, block_size)
    return replace(nearest, qweight=pack_nibbles(qweight))


def fit_scales(weight: Tensor, hessian: Tensor, codes: Codes) -> Codes:
    """Fit the scales of a weight to its codes, so that the layer's output changes as little as possible.

    With the steps D (code - zero point, each block of a row a column) a row w of the weight is rounded to D s. Its
    output error (w - D s)ᵀ H (w - D s) is least where Dᵀ H D s = Dᵀ H w, least squares with as many unknowns as blocks.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K], damped.
        codes: Of 4 bits. A row whose solution is not all positive keeps its scales; where all are numbers of float16,
            they become such numbers again.

    Returns:
        The codes with other scales.
    """
    rows, columns = weight.shape
    block_size, blocks = codes.block_size, codes.scales.shape[1]
    padding = blocks * block_size - columns
    curvature = nn.functional.pad(hessian, (0, padding, 0, padding)) if padding else hessian
    scales = torch.from_numpy(codes.scales)
    found = torch.empty_like(scales)
    together = max(1, _PAIRS // (blocks * max(blocks, block_size)))
    for start in range(0, rows, together):
        part = slice(start, start + together)
        whole = nn.functional.pad(weight[part], (0, padding)) if padding else weight[part]
        steps = torch.from_numpy(code_steps(codes.rows(part)))
        found[part] = _solve(whole, curvature, steps, scales[part])
    if are_half(scales):
        return replace(codes, scales=as_half(found.numpy()))
    return replace(codes, scales=found.numpy())


def _solve(weight: Tensor, hessian: Tensor, steps: Tensor, scales: Tensor) -> Tensor:
    """Solve the least squares of `fit_scales` for some rows, [N, blocks] each."""
    rows, blocks, block_size = steps.shape
    wanted = ((weight @ hessian).view_as(steps) * steps).sum(2)
    pairs = torch.zeros(rows, blocks, blocks)  # below the diagonal and on it: they are symmetric
    for block in range(blocks):
        start, others = block * block_size, steps[:, block:]
        outputs = steps[:, block] @ hessian[start : start + block_size, start:]
        pairs[:, block:, block] = outputs.view_as(others).mul_(others).sum(2)
    diagonal = pairs.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny  # of a row of zeros, too
    wanted += ridge * scales
    diagonal += ridge
    lower, failed = torch.linalg.cholesky_ex(pairs)
    solved = torch.cholesky_solve(wanted[..., None], lower)[..., 0]
    # One that is not positive cannot be kept, and the others of its row are the best ones only beside it.
    usable = (failed == 0) & (solved.isfinite() & (solved > 0)).all(1)
    return solved.where(usable[:, None], scales)
