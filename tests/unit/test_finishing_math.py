"""The gradients of the finishing phase are those of plain torch."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edge_ft.data import Batch
from edge_ft.models import chunked_loss
from edge_ft.models.distillation import distillation_loss
from edge_ft.quant.blockwise import quantize
from edge_ft.quant.layers import QuantLinear
from edge_ft.quant.scales import TrainedScales
from edge_ft.tune.finish_backend import _parts


class Two(nn.Module):
    """A hidden layer and an output layer, both quantized."""

    def __init__(self, inside: int = 48) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        self.hidden, self.head = (
            QuantLinear(quantize(rng.normal(0, 0.1, shape).astype(np.float32), 32))
            for shape in ((24, inside), (80, 24))
        )

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize("inside", [64, 48], ids=["whole blocks", "a padded last block"])
def test_the_gradient_of_a_factor_is_that_of_the_weight_it_multiplies(inside: int) -> None:
    torch.manual_seed(0)
    model, x, wanted = Two(inside), torch.randn(2, 5, inside, requires_grad=True), torch.randn(2, 5, 24)
    scales = TrainedScales(model)
    with torch.no_grad():
        for factors in scales.factors:
            factors.uniform_(0.5, 1.5)
    scales.apply()
    (model.hidden(x) * wanted).sum().backward()
    layer = model.hidden
    assert layer.factors.grad is not None
    assert x.grad is not None
    found, of_x = layer.factors.grad.clone(), x.grad.clone()

    factors = layer.factors.detach().clone().requires_grad_()
    first = layer.scales / factors.detach()
    centred = layer.dequantize() / layer.scales.repeat_interleave(32, 0)[:inside]
    plain_x = x.detach().clone().requires_grad_()
    weight = centred * (first * factors).repeat_interleave(32, 0)[:inside]
    ((plain_x @ weight) * wanted).sum().backward()
    assert factors.grad is not None
    torch.testing.assert_close(found, factors.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_x, plain_x.grad, rtol=1e-4, atol=1e-5)


def test_only_scales_change_and_those_of_the_output_layer_stay() -> None:
    model = Two()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    scales = TrainedScales(model)
    assert len(scales.factors) == 1
    with torch.no_grad():
        scales.factors[0].fill_(2)
    scales.apply()
    scales.release()
    after = dict(model.named_buffers())
    assert not list(model.parameters())
    assert torch.equal(after["hidden.scales"], 2 * before["hidden.scales"])
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != "hidden.scales")
    x = torch.randn(3, 48)
    torch.testing.assert_close(model.hidden(x), x @ model.hidden.dequantize())


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_distillation_in_tiles_is_the_divergence_and_its_gradient(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunked_loss.VOCABULARY_CHUNK, "cpu", 32)
    monkeypatch.setitem(chunked_loss.MAX_LOGITS, "cpu", 64)
    torch.manual_seed(1)
    own, other = Two().head, Two().head
    hidden, wanted = torch.randn(7, 24, requires_grad=True), torch.randn(7, 24)
    loss = distillation_loss((hidden, own), (wanted, other), torch.float32, softcap)
    loss.backward()

    def log_probabilities(inputs: torch.Tensor, head: Any) -> torch.Tensor:
        logits = 1.0 * (inputs @ head.dequantize())
        return (logits if softcap is None else softcap * (logits / softcap).tanh()).log_softmax(-1)

    plain = hidden.detach().clone().requires_grad_()
    expected = nn.functional.kl_div(
        log_probabilities(plain, own), log_probabilities(wanted, other), reduction="sum", log_target=True
    )
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, plain.grad)


def test_a_model_is_at_no_distance_from_itself() -> None:
    head, hidden = Two().head, torch.randn(5, 24, requires_grad=True)
    loss = distillation_loss((hidden, head), (hidden.detach(), head), torch.float32)
    loss.backward()
    assert hidden.grad is not None
    assert abs(float(loss.detach())) < 1e-5
    assert float(hidden.grad.abs().max()) < 1e-6


@pytest.mark.parametrize(("tokens", "sizes"), [(1000, [7]), (40, [4, 3]), (25, [2, 2, 2, 1]), (3, [1] * 7)])
def test_a_batch_is_passed_in_parts_of_few_tokens(tokens: int, sizes: list[int]) -> None:
    ids = np.arange(70).reshape(7, 10)
    batch = Batch(input_ids=ids, attention_mask=np.ones_like(ids), labels=ids, rows=[*range(7)])
    parts = [*_parts(batch, tokens)]
    assert [len(part["rows"]) for part in parts] == sizes
    for name in batch:
        assert np.array_equal(np.concatenate([part[name] for part in parts]), batch[name])  # type: ignore[literal-required]
