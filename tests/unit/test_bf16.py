"""A base in bfloat16 is the float base rounded to it, in half of the memory, and stays tied wherever it is moved."""

from pathlib import Path

import pytest
import torch
from tiny_models import write_llama

from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.quant.devices import has_bf16, to_device
from edge_ft.quant.layers import BF16Linear

IDS = torch.arange(3, 27)[None]


@pytest.mark.parametrize("tie", [True, False])
def test_the_model_is_the_float_model_with_rounded_matrices(tie: bool, tmp_path: Path) -> None:
    base = find_base(str(write_llama(tmp_path / "model", tie=tie)))
    model, plain = (load_model(ModelSpec(base, "text-generation", base_format)) for base_format in ("bf16", "fp32"))
    for parameter in plain.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
    assert model(IDS).logits.dtype == torch.float32


def test_a_layer_dequantizes_to_any_dtype() -> None:
    weight = torch.randn(6, 5)
    layer = BF16Linear(weight, torch.ones(6))
    assert torch.equal(layer.dequantize(torch.bfloat16, slice(1, 3)), weight.bfloat16()[1:3].T)
    x = torch.randn(2, 5, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x @ weight.bfloat16().float().T + 1)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, weight.bfloat16().float().sum(0).expand(2, 5))


@pytest.mark.parametrize("base_format", ["int4", "bf16"])
def test_tied_codes_stay_tied_on_another_device(base_format: str, tmp_path: Path) -> None:
    """The meta device stands for one that has memory of its own."""
    base = find_base(str(write_llama(tmp_path / "model")))
    model = to_device(load_model(ModelSpec(base, "text-generation", base_format)), "meta")  # type: ignore[arg-type]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.qweight.is_meta
    assert head.qweight is embedding.qweight


def test_bfloat16_needs_hardware_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for known in ({"avx512_bf16": True}, {"amx_bf16": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        assert has_bf16(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert not has_bf16(torch.device("cpu"))
