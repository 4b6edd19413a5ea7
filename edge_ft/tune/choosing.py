"""How long choosing the int4 codes of a model will take, where a training over float weights has not done it yet."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from edge_ft.quant.blockwise import quantize
from edge_ft.quant.calibration import MAX_TOKENS, input_curvature
from edge_ft.quant.devices import product_dtype
from edge_ft.quant.gptq import gptq_quantize
from edge_ft.quant.layers import FrozenLinear

__all__ = ["estimate_choosing"]

ROWS = 512
"""Rows of a weight that are rounded for the estimate."""
SHARED_INPUTS = 2
"""Layers that read the same input, on average: query, key and value, or the two that widen."""
FURTHER_BITS = 1.2
"""Time with the choice of weights that get 8 bits, over that without (docs/decisions/041)."""
PASSES = 2
"""Passes through the model: of the calibration, and about as much for the 8 bits."""


def estimate_choosing(model: Any, tokens: int, block_size: int, forward: Callable[[float], float]) -> float:
    """Round a few rows of random weights of each width that the model's layers have, and extrapolate.

    Args:
        model: Its frozen linear layers count.
        tokens: Of the rows that GPTQ is calibrated on.
        block_size: Weights per scale.
        forward: Tokens -> seconds in which they pass through the model.

    Returns:
        Seconds.
    """
    tokens = min(MAX_TOKENS, tokens)
    heights: Counter[int] = Counter()
    layers: Counter[int] = Counter()
    for layer in model.modules():
        if isinstance(layer, FrozenLinear):
            heights[layer.in_features] += layer.out_features
            layers[layer.in_features] += 1
    seconds, generator = 0.0, torch.Generator().manual_seed(0)
    for width, height in heights.items():
        inputs, weight = (torch.randn(rows, width, generator=generator) for rows in (tokens, min(ROWS, height)))
        began = time.perf_counter()
        curvature = input_curvature(inputs, product_dtype(), "")
        factored = time.perf_counter()
        gptq_quantize(weight, curvature, quantize(weight.numpy(), block_size))
        seconds += (time.perf_counter() - factored) * height / len(weight)
        seconds += (factored - began) * layers[width] / SHARED_INPUTS
    return FURTHER_BITS * seconds + PASSES * forward(tokens)
