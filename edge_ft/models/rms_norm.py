"""Which RMSNorm a module computes: they all look alike, and some add 1 to their weight."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["plain_rms_norm"]


def plain_rms_norm(norm: Any) -> tuple[Tensor, float] | None:
    """weight and eps of weight · x / sqrt(mean(x²) + eps) (arXiv:1910.07467), if that is what `norm` computes.

    Asked by a probe: the weight is the module's own, or that plus 1 (Gemma). None where it is something else.
    """
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if weight is None or not isinstance(eps, float):
        return None
    probe = torch.linspace(-3, 2, weight.numel(), device=weight.device, dtype=torch.float32)[None]
    with torch.no_grad():
        normed, expected = probe * (probe.square().mean(-1, keepdim=True) + eps).rsqrt(), norm(probe)
        for factor in (weight.detach(), weight.detach() + 1):
            if torch.allclose(normed * factor, expected, rtol=1e-5, atol=1e-6):
                return factor, eps
    return None
