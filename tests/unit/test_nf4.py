"""The nf4 base is the one that bitsandbytes' users know, whatever the shape, and PEFT can wrap it."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit
from tiny_models import write_llama
from torch import nn

from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.quant.nf4 import NF4Linear

SHAPES = [(24, 64), (24, 80), (5, 7)]
"""Whole blocks; blocks over the ends of rows; a last one that is not full, over an odd number of weights."""


def by_hand(weight: torch.Tensor) -> torch.Tensor:
    """What bitsandbytes' codes of a weight stand for, written out."""
    qweight, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    nibbles = torch.stack([qweight.flatten() >> 4, qweight.flatten() & 15], 1).flatten()[: weight.numel()]
    scales = state.absmax.repeat_interleave(64)[: weight.numel()]
    return (get_4bit_type("nf4", "cpu")[nibbles.long()] * scales).view(weight.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_weight_is_the_one_that_bitsandbytes_dequantizes(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    layer = NF4Linear(weight)
    expected = by_hand(weight)
    torch.testing.assert_close(layer.dequantize().T, expected, rtol=0, atol=0)
    torch.testing.assert_close(layer.dequantize(torch.bfloat16).T, expected.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(layer.dequantize(columns=slice(1, 3)).T, expected[1:3], rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_nf4_layer_is_a_linear_layer_over_that_weight(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0])
    x = torch.randn(3, 5, shape[1], requires_grad=True)
    y = NF4Linear(layer.weight.data, layer.bias.data)(x)
    expected = nn.functional.linear(x, by_hand(layer.weight.data), layer.bias)
    torch.testing.assert_close(y, expected)
    gradient = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, gradient)[0], torch.autograd.grad(expected, x, gradient)[0])


def test_embedding_and_output_layer_stay_float(tmp_path: Path) -> None:
    for tie in (True, False):
        base = find_base(str(write_llama(tmp_path / str(tie), tie=tie)))
        model = load_model(ModelSpec(base, "text-generation", "nf4"))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
        assert type(model.lm_head) is nn.Linear
        assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 14


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        NF4Linear(torch.full((2, 64), float("inf")))
