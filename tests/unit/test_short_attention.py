"""Attention over short sequences is PyTorch's attention, its gradients too."""

import pytest
import torch
from torch import nn

from edge_ft.models.short_attention import short_attention


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mask", ["causal", "padding", "none"])
def test_short_attention_is_attention(groups: int, mask: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 7, 16, generator=generator, requires_grad=True) for heads in (2 * groups, 2, 2)
    )
    allowed = None
    if mask == "padding":
        allowed = torch.ones(2, 1, 7, 7, dtype=torch.bool)
        allowed[1, :, :, 4:] = False
    module = nn.Module()
    module.is_causal = mask == "causal"  # type: ignore[assignment]
    found, _ = short_attention(module, query, key, value, allowed)
    expected = nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), allowed, is_causal=mask == "causal"
    ).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    slope = torch.randn(expected.shape, generator=generator)
    for one, other in zip(
        torch.autograd.grad(found, (query, key, value), slope, retain_graph=True),
        torch.autograd.grad(expected, (query, key, value), slope),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
