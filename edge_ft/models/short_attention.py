"""Attention over short sequences for training: plain matrix products, with the scores recomputed in backward.

PyTorch's fused attention on a CPU is optimised for long sequences: on rows of 70 tokens, its bfloat16 backward pass
took a quarter of a training step, seven times as long as this.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

__all__ = ["short_attention", "use_short_attention"]

NAME = "edge_ft_short"
MAX_LENGTH = {torch.bfloat16: 256, torch.float32: 128}
"""Sequence length up to which it is faster than PyTorch's attention, measured; beyond, that saves memory too."""


def use_short_attention(model: PreTrainedModel) -> None:
    """Let `model` use `short_attention`, in place.

    A model that PyTorch's attention cannot compute is left as it is (Gemma 2 caps its scores).
    """
    if not model._supports_sdpa:
        return
    AttentionInterface.register(NAME, short_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def short_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Compute attention, with the interface of transformers; PyTorch's computes long sequences and those on a GPU.

    Args:
        module: The attention layer; its `is_causal` decides where there is no mask.
        query: [batch, heads, seq, dim].
        key: [batch, kv_heads, seq, dim].
        value: [batch, kv_heads, seq, dim].
        attention_mask: [batch, 1, seq, seq], True or 0 where a query attends; None: all, or causal.
        scaling: Of the scores; None: 1 / sqrt(dim).
        keywords: `dropout`, above 0 only for PyTorch's attention; `is_causal`, instead of the module's;
            `position_bias` [batch or 1, heads, seq, seq], added to the scores; others are passed to PyTorch's.

    Returns:
        [batch, seq, heads, dim], and None for the weights.
    """
    batch, heads, length, size = query.shape
    kv_heads = key.shape[1]
    position_bias: Tensor | None = keywords.get("position_bias")
    short = length == key.shape[2] and length <= MAX_LENGTH.get(query.dtype, 0)
    trained_bias = position_bias is not None and position_bias.requires_grad
    if not short or keywords.get("dropout") or trained_bias or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **keywords)
    is_causal = keywords.get("is_causal")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None:
        bias = _causal_bias(length) if causal else torch.zeros(())
    elif attention_mask.dtype == torch.bool:
        bias = torch.zeros(()).masked_fill(~attention_mask, torch.finfo(torch.float32).min)
    else:
        bias = attention_mask.float()
    if position_bias is not None:
        bias = bias + position_bias.float()
    # Heads that share a key follow each other along the queries.
    queries = query.reshape(batch, kv_heads, -1, size)
    scale = 1 / math.sqrt(size) if scaling is None else scaling
    output: Tensor = _ShortAttention.apply(queries, key, value, bias, scale)
    return output.view(batch, heads, length, -1).transpose(1, 2).contiguous(), None


@lru_cache(maxsize=64)
def _causal_bias(length: int) -> Tensor:
    """Return [length, length] float32: 0 where a query attends, the lowest number elsewhere."""
    return torch.full((length, length), torch.finfo(torch.float32).min).triu_(1)


class _ShortAttention(torch.autograd.Function):
    """softmax(scale * q kT + bias) v over q [batch, kv_heads, heads / kv_heads * seq, dim]; saves q, k and v."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        # Not among the saved tensors: it may have been created during an evaluation, in inference mode.
        ctx.bias, ctx.scale = bias, scale
        return _probabilities(query, key, bias, scale).to(value.dtype) @ value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        probabilities = _probabilities(query, key, ctx.bias, ctx.scale)
        grad_value = probabilities.to(grad.dtype).transpose(-1, -2) @ grad
        slope = (grad @ value.transpose(-1, -2)).float()
        slope -= (slope * probabilities).sum(-1, keepdim=True)
        scores = slope.mul_(probabilities).mul_(ctx.scale).to(grad.dtype)
        return scores @ key, scores.transpose(-1, -2) @ query, grad_value, None, None


def _probabilities(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Return float32 [batch, kv_heads, heads / kv_heads * seq, seq]."""
    scores = (query @ key.transpose(-1, -2)).float().mul_(scale)
    groups = query.shape[2] // key.shape[2]
    # A mask is the same for all heads, or has a dimension of 1 for them.
    scores.unflatten(2, (groups, -1)).add_(bias.unsqueeze(-3) if bias.dim() else bias)
    return scores.softmax(-1)
