"""Train the scales of quantized layers: codes and zero points stay, so that what was trained ships bit for bit.

A scale is its first value times a factor that begins at 1. With W = scale · (code - zero point), the gradient of a
block's factor is the sum over the block of dW · W, divided by the factor.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edge_ft.quant.layers import QuantLinear, are_half, transposed_weight

__all__ = ["TrainedScales"]


class TrainedScales:
    """The scales of a model's quantized linear layers as trainable parameters, but for those of the output layer.

    The output layer shares its codes with the embedding in most models, and its loss is computed without a call.
    """

    def __init__(self, model: Any) -> None:
        """Let the layers of `model`, on its device, compute gradients for the factors of their scales, in place."""
        head = model.get_output_embeddings()
        self.layers = [m for m in model.modules() if isinstance(m, QuantLinear) and m is not head]
        self._first = [layer.scales.clone() for layer in self.layers]
        self._half = [are_half(first) for first in self._first]
        """Whether a layer's scales are float16 numbers."""
        self.factors = [nn.Parameter(torch.ones_like(first)) for first in self._first]
        for layer, factors in zip(self.layers, self.factors, strict=True):
            layer.register_parameter("factors", factors)
            layer.forward = partial(_forward, layer, factors)  # type: ignore[method-assign]

    @torch.no_grad()
    def apply(self) -> None:
        """Set the scales by the factors."""
        for layer, first, half, factors in zip(self.layers, self._first, self._half, self.factors, strict=True):
            torch.mul(first, factors, out=layer.scales)
            if half:  # what is evaluated is what a file holds
                layer.scales.copy_(layer.scales.half())
            layer.cached = {}

    def release(self) -> None:
        """Let the layers compute as before, with the scales that they have now."""
        for layer in self.layers:
            del layer.forward, layer.factors


def _forward(layer: QuantLinear, factors: Tensor, x: Tensor) -> Tensor:
    y = _ScaledMatMul.apply(x, factors, layer)
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


class _ScaledMatMul(torch.autograd.Function):
    """x Wᵀ, with gradients of x and of the factors of W's scales; W is dequantized in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, layer: QuantLinear) -> Tensor:
        ctx.save_for_backward(x, factors)
        ctx.layer = layer
        return x @ transposed_weight(layer, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:  # type: ignore[override]
        x, factors = ctx.saved_tensors
        weight = transposed_weight(ctx.layer, grad.dtype)
        change = x.flatten(0, -2).T @ grad.flatten(0, -2)  # of the weight, [in, out]
        change *= weight
        blocks, padding = len(factors), -len(change) % ctx.layer.block_size
        if padding:  # of the last block
            change = nn.functional.pad(change, (0, 0, 0, padding))
        by_block = change.unflatten(0, (blocks, -1)).sum(1, dtype=torch.float32)
        return (grad @ weight.T if ctx.needs_input_grad[0] else None), by_block.div_(factors), None
