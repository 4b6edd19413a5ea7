"""The nf4 base is the one that bitsandbytes' users know, whatever the shape, and PEFT can wrap it."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit
from peft import PeftModel
from tiny_models import write_llama
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from edge_ft.artifacts import RunFolder
from edge_ft.config import TuneConfig
from edge_ft.errors import ModelError
from edge_ft.evaluate.loading import open_run_model
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import load_model
from edge_ft.models.logging import silence_libraries
from edge_ft.quant.layers import codes_sha256
from edge_ft.quant.nf4 import NF4Linear
from edge_ft.tune import tune

SHAPES = [(24, 64), (24, 80), (5, 7)]
"""Whole blocks; blocks over the ends of rows; a last one that is not full, over an odd number of weights."""


def by_hand(weight: torch.Tensor) -> torch.Tensor:
    """What bitsandbytes' codes of a weight stand for, written out."""
    qweight, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    nibbles = torch.stack([qweight.flatten() >> 4, qweight.flatten() & 15], 1).flatten()[: weight.numel()]
    scales = state.absmax.repeat_interleave(64)[: weight.numel()]
    return (get_4bit_type("nf4", "cpu")[nibbles.long()] * scales).view(weight.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_weight_is_what_bitsandbytes_codes_stand_for(shape: tuple[int, int]) -> None:
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
        model = load_model(base, "text-generation", "nf4")
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
        assert type(model.lm_head) is nn.Linear
        assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 14


def test_a_weight_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        NF4Linear(torch.full((2, 64), float("inf")))


@pytest.fixture(scope="module")
def whole_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widths are multiples of 64: others are misread by bitsandbytes' own layer on a CPU."""
    return write_llama(tmp_path_factory.mktemp("wide") / "llama", intermediate_size=128)


@pytest.fixture(scope="module")
def nf4_run(whole_blocks: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("nf4") / "run"
    settings = {"base_format": "nf4", "max_steps": 5, "learning_rate": 1e-2, "split": (0.6, 0.2, 0.2)}
    return tune(TuneConfig(model=str(whole_blocks), data=str(sums), out=out, **settings))  # type: ignore[arg-type]


def test_the_tuned_model_is_plain_pefts_over_bitsandbytes_own(whole_blocks: Path, nf4_run: RunFolder) -> None:
    with silence_libraries():
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
        theirs = AutoModelForCausalLM.from_pretrained(whole_blocks, quantization_config=settings, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(theirs, nf4_run.adapter)
    ours, _ = open_run_model(nf4_run)
    for name, layer in ours.named_modules():
        if isinstance(layer, NF4Linear):
            weight = theirs.get_submodule(name).weight
            assert torch.equal(weight.data, layer.qweight) and torch.equal(weight.quant_state.absmax, layer.absmax)
    theirs.train()  # for scoring alone it repacks the weights and computes in bfloat16 on some CPUs
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_adapter_loads_on_the_plain_base(whole_blocks: Path, nf4_run: RunFolder) -> None:
    plain = AutoModelForCausalLM.from_pretrained(whole_blocks)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = plain(ids).logits
        after = PeftModel.from_pretrained(plain, nf4_run.adapter).eval()(ids).logits
    assert not torch.allclose(before, after)


def test_a_run_knows_the_bytes_that_it_was_trained_over(nf4_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = open_run_model(nf4_run)
    assert nf4_run.base()["codes_sha256"] == codes_sha256(model)
    monkeypatch.setattr("edge_ft.quant.nf4.quantize_4bit", lambda weight, **how: quantize_4bit(weight * 1.01, **how))
    with pytest.raises(ModelError, match=r"the nf4 codes .* tune again"):
        open_run_model(nf4_run)
