"""Fused operations of a training step: each saves few tensors for its backward pass and recomputes the rest there.

All multiply in the dtype of their input; frozen weights get no gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edge_ft.quant.layers import transposed_weight

__all__ = ["Recomputable", "gated_lora_matmul", "lora_matmul", "rms_norm", "rms_norm_parameters", "swiglu"]

Recomputable = tuple[Tensor, Callable[[Tensor], Tensor]]
"""A tensor that is saved anyway, and a function that recomputes the input of a layer from it."""


def rms_norm_parameters(norm: Any) -> tuple[Tensor, float] | None:
    """Find which form of RMSNorm (arXiv:1910.07467) a module computes, by a probe: the classes of all forms look alike.

    Returns:
        Factor and eps of factor · x / sqrt(mean(x²) + eps), where the factor is the module's weight, or that plus 1
        (Gemma); None if it computes anything else.
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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight · x / sqrt(mean(x²) + eps) over the last dimension; saves x and one number per row.

    See arXiv:1910.07467. It is computed in float32 and returned in x's dtype.
    """
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up (Shazeer, arXiv:2002.05202); saves gate and up."""
    return _SwiGLU.apply(gate, up)


def lora_matmul(
    x: Tensor, a: Tensor, b: Tensor, scaling: float, layer: nn.Linear, recomputable: Recomputable | None = None
) -> Tensor:
    """Compute x Wᵀ + bias + scaling · x Aᵀ Bᵀ over a frozen layer (LoRA, arXiv:2106.09685).

    Args:
        x: [..., in].
        a: [rank, in]; trained, float32.
        b: [out, rank]; trained, float32.
        scaling: Of the low-rank product.
        layer: Float or quantized.
        recomputable: What x can be recomputed from; None: x is saved.

    Returns:
        [..., out].
    """
    return _LoraMatMul.apply(x, a, b, scaling, layer, recomputable)


def gated_lora_matmul(gate: Tensor, up: Tensor, a: Tensor, b: Tensor, scaling: float, layer: nn.Linear) -> Tensor:
    """Return `lora_matmul` of silu(gate) · up [..., in]; saves gate and up."""
    return _GatedLoraMatMul.apply(gate, up, a, b, scaling, layer)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # [..., 1] float32
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        wide = grad.float() * weight
        wide -= normed.mul_((wide * normed).mean(-1, keepdim=True))
        return wide.mul_(scale).to(x.dtype), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        grad_up = nn.functional.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up


class _LoraMatMul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float, layer: nn.Linear, recomputable: Recomputable | None
    ) -> Tensor:
        rows, a, b = x.flatten(0, -2), a.to(x.dtype), b.to(x.dtype)
        y, down = _lora_forward(rows, a, b, scaling, layer)
        saved, ctx.recompute = recomputable or (x, None)
        ctx.save_for_backward(saved, down, a, b)
        ctx.scaling, ctx.layer = scaling, layer
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None, None]:  # type: ignore[override]
        x, down, a, b = ctx.saved_tensors
        if ctx.recompute is not None:
            x = ctx.recompute(x)
        grad = grad.flatten(0, -2)
        grad_down, grad_a, grad_b = _lora_gradients(grad, x.flatten(0, -2), down, b, ctx.scaling)
        grad_x = _input_gradient(grad, grad_down, a, ctx.layer).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, grad_a, grad_b, None, None, None


class _GatedLoraMatMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, a: Tensor, b: Tensor, scaling: float, layer: nn.Linear) -> Tensor:
        rows, a, b = nn.functional.silu(gate).mul_(up).flatten(0, -2), a.to(up.dtype), b.to(up.dtype)
        y, down = _lora_forward(rows, a, b, scaling, layer)
        ctx.save_for_backward(gate, up, down, a, b)
        ctx.scaling, ctx.layer = scaling, layer
        return y.unflatten(0, up.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        gate, up, down, a, b = ctx.saved_tensors
        grad, shape = grad.flatten(0, -2), gate.shape
        gate, up = gate.flatten(0, -2), up.flatten(0, -2)
        silu = nn.functional.silu(gate)
        grad_down, grad_a, grad_b = _lora_gradients(grad, silu * up, down, b, ctx.scaling)
        grad_x = _input_gradient(grad, grad_down, a, ctx.layer)
        grad_up = silu.mul_(grad_x).view(shape)
        return torch.ops.aten.silu_backward(grad_x.mul_(up), gate).view(shape), grad_up, grad_a, grad_b, None, None


def _lora_forward(rows: Tensor, a: Tensor, b: Tensor, scaling: float, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return the layer's output [rows, out], and rows Aᵀ [rows, rank]."""
    weight = transposed_weight(layer, rows.dtype)
    y = rows @ weight if layer.bias is None else torch.addmm(layer.bias.to(rows.dtype), rows, weight)
    down = rows @ a.T
    return y.addmm_(down, b.T, alpha=scaling), down


def _lora_gradients(
    grad: Tensor, rows: Tensor, down: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of rows Aᵀ [rows, rank], of A and of B."""
    # Both are written with the short side first: float32 products are 3 times as fast so.
    grad_down = (b.T @ grad.T).mul_(scaling).T
    return grad_down, (grad_down.T @ rows).float(), (down.T @ grad).T.float().mul_(scaling)


def _input_gradient(grad: Tensor, grad_down: Tensor, a: Tensor, layer: nn.Linear) -> Tensor:
    """Return the gradient of a layer's input [rows, in]."""
    return (grad @ transposed_weight(layer, grad.dtype).T).addmm_(grad_down, a)
