"""Quantized layers compute with what their codes stand for, and PEFT can wrap them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from edge_ft.quant.blockwise import FINE_STEPS, Bits, Codes, Grid, dequantize, quantize, quantize_finely
from edge_ft.quant.conversion import quantize_model
from edge_ft.quant.layers import QuantEmbedding, QuantLinear
from edge_ft.quant.serialization import codes_sha256


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 80])
def test_a_quantized_layer_is_a_linear_layer_over_the_dequantized_weight(columns: int, bits: Bits) -> None:
    layer = nn.Linear(columns, 24)
    codes = quantize(layer.weight.detach().numpy(), 32, bits)
    x = torch.randn(3, 5, columns, requires_grad=True)
    y = QuantLinear(codes, layer.bias.data)(x)
    expected = nn.functional.linear(x, torch.from_numpy(dequantize(codes)), layer.bias)
    torch.testing.assert_close(y, expected)
    gradient = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, gradient)[0], torch.autograd.grad(expected, x, gradient)[0])


def test_the_last_positions_of_rows_alone_give_what_all_positions_give() -> None:
    layer = QuantLinear(quantize(np.random.default_rng(0).standard_normal((24, 40), np.float32), 32))
    x = torch.randn(3, 5, 40)
    assert torch.allclose(layer(x[:, -1:]), layer(x)[:, -1:], atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 80])
def test_a_layer_returns_the_codes_it_was_created_from(columns: int, bits: Bits) -> None:
    codes = quantize(np.random.default_rng(0).normal(size=(24, columns)).astype(np.float32), 32, bits)
    back = QuantLinear(codes).codes()
    for name in ("qweight", "scales", "zero_points"):
        np.testing.assert_array_equal(getattr(back, name), getattr(codes, name), strict=True)
    assert (back.bits, back.block_size, back.in_features) == (bits, 32, columns)


@pytest.mark.parametrize("columns", [64, 80])
def test_rows_with_further_bits_are_dequantized_and_kept(columns: int) -> None:
    weight = np.random.default_rng(0).normal(size=(24, columns)).astype(np.float32)
    codes = Codes.concatenate([quantize_finely(weight[:10], 32), quantize(weight[10:], 32)])
    layer, expected = QuantLinear(codes), torch.from_numpy(dequantize(codes)).T
    torch.testing.assert_close(layer.dequantize(), expected, rtol=0, atol=0)
    torch.testing.assert_close(layer.dequantize(torch.bfloat16), expected.bfloat16(), rtol=0, atol=0)
    for part in (slice(4, 16), slice(10, 24), slice(2, 9), torch.tensor([1, 23, 9, 10])):
        torch.testing.assert_close(layer.dequantize(columns=part), expected[:, part], rtol=0, atol=0)
    np.testing.assert_array_equal(layer.codes().fine, codes.fine)
    assert codes.rows(slice(8, 12)).fine.shape[0] == 2  # type: ignore[union-attr]
    assert codes.rows(slice(10, 12)).fine is None


def test_a_quantized_embedding_looks_up_the_dequantized_rows() -> None:
    table = np.random.default_rng(0).normal(size=(10, 64)).astype(np.float32)
    codes = quantize(table, 32, half_scales=False)
    ids = torch.tensor([[1, 9], [0, 1]])
    expected = torch.from_numpy(dequantize(codes))[ids]
    torch.testing.assert_close(QuantEmbedding(codes)(ids), expected, rtol=0, atol=0)


def test_an_embedding_with_float16_scales_looks_up_rows_rounded_to_float16_as_onnxruntime_does() -> None:
    table = np.random.default_rng(0).normal(size=(10, 64)).astype(np.float32)
    ids = torch.tensor([[1, 9], [0, 1]])
    expected = torch.from_numpy(dequantize(codes := quantize(table, 32)))[ids]
    found = QuantEmbedding(codes)(ids)
    torch.testing.assert_close(found, expected.half().float(), rtol=0, atol=0)
    assert not torch.equal(found, expected)
    finer = Codes.concatenate([quantize_finely(table[:5], 32), quantize(table[5:], 32)])
    coarse = torch.from_numpy(dequantize(replace(finer, fine=None)))
    further = torch.from_numpy(dequantize(finer)) - coarse
    rounded = coarse.half().float() + (further * FINE_STEPS).half().float() / FINE_STEPS
    torch.testing.assert_close(QuantEmbedding(finer)(ids), rounded[ids], rtol=0, atol=1e-6)


def test_quantizing_a_model_replaces_every_linear_layer_and_shares_a_tied_head(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    quantize_model(model, Grid(32))
    assert not [name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Embedding)]
    assert model.lm_head.qweight.data_ptr() == model.model.embed_tokens.qweight.data_ptr()
    assert sum(parameter.numel() for parameter in model.parameters()) == 5 * 64  # the norms


def test_the_hash_changes_with_the_codes(llama: Path) -> None:
    hashes = []
    for block_size in (32, 32, 16):
        model = AutoModelForCausalLM.from_pretrained(llama)
        quantize_model(model, Grid(block_size))
        hashes.append(codes_sha256(model))
    assert hashes[0] == hashes[1] != hashes[2]
