"""Attention over short sequences for training: scores made again in backward, by plain matrix products.

PyTorch's fused attention on a CPU is made for long sequences: on rows of 70 tokens, its bfloat16 backward
alone took a quarter of a training step, seven times as long as this.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

__all__ = ["use_short_attention"]

NAME = "edge_ft_short"
_LONGEST = {torch.bfloat16: 256, torch.float32: 128}
"""Tokens up to which it was faster than the fused one, measured; beyond, the fused one saves memory too."""


def use_short_attention(model: PreTrainedModel) -> None:
    """Let `model` attend this way wherever sequences are short enough, and as PyTorch does elsewhere.

    A model that PyTorch's attention does not express (Gemma 2 caps its scores) keeps its own.
    """
    if not model._supports_sdpa:
        return
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """query [batch, heads, seq, dim], key and value [batch, kv_heads, seq, dim] -> [batch, seq, heads, dim]."""
    batch, heads, length, size = query.shape
    kv_heads = key.shape[1]
    short = length == key.shape[2] and length <= _LONGEST.get(query.dtype, 0)
    trained_bias = position_bias is not None and position_bias.requires_grad
    if not short or dropout or trained_bias or query.device.type != "cpu":
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
            **keywords,
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None:
        bias = _causal_bias(length) if causal else torch.zeros(())
    elif attention_mask.dtype == torch.bool:
        bias = torch.zeros(()).masked_fill(~attention_mask, torch.finfo(torch.float32).min)
    else:
        bias = attention_mask.float()
    if position_bias is not None:
        bias = bias + position_bias.float()
    # The heads that share a key lie behind each other along the queries.
    queries = query.reshape(batch, kv_heads, -1, size)
    scale = 1 / math.sqrt(size) if scaling is None else scaling
    output: Tensor = _ShortAttention.apply(queries, key, value, bias, scale)
    return output.view(batch, heads, length, -1).transpose(1, 2).contiguous(), None


@lru_cache(maxsize=64)
def _causal_bias(length: int) -> Tensor:
    """[length, length] float32: 0 where a query may look, the lowest number elsewhere."""
    return torch.full((length, length), torch.finfo(torch.float32).min).triu_(1)


class _ShortAttention(torch.autograd.Function):
    """softmax(scale * q kT + bias) v over q [batch, kv_heads, heads / kv_heads * seq, dim]; keeps q, k and v alone."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        # Not among the saved tensors: it may have been made while scoring, in inference mode.
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
    """float32 [batch, kv_heads, heads / kv_heads * seq, seq]"""
    scores = (query @ key.transpose(-1, -2)).float().mul_(scale)
    groups = query.shape[2] // key.shape[2]
    # A mask is the same for all heads, or has a dimension of 1 for them.
    scores.unflatten(2, (groups, -1)).add_(bias.unsqueeze(-3) if bias.dim() else bias)
    return scores.softmax(-1)
