"""Cross-entropy in chunks of the vocabulary is cross-entropy, its gradient too."""

import pytest
import torch
from peft.utils.other import TrainableTokensWrapper
from recorded_operators import RecordedOperators
from torch import nn

from edge_ft.models.chunked_loss import score_targets, target_loss
from edge_ft.quant.blockwise import quantize
from edge_ft.quant.layers import QuantLinear


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("quantized", [True, False])
def test_the_loss_in_chunks_is_cross_entropy(quantized: bool, softcap: float | None) -> None:
    """Of more entries and more logits than are computed at a time."""
    torch.manual_seed(0)
    layer: nn.Linear = nn.Linear(32, 20_000).requires_grad_(False)
    if quantized:
        layer = QuantLinear(quantize(layer.weight.numpy(), 32), layer.bias.data)
    hidden = torch.randn(600, 32, requires_grad=True)
    labels = torch.randint(20_000, (600,))
    logits = layer(hidden) if softcap is None else softcap * torch.tanh(layer(hidden) / softcap)
    expected = nn.functional.cross_entropy(logits, labels, reduction="sum")
    found = target_loss(hidden, layer, labels, torch.float32, softcap)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, hidden)[0], torch.autograd.grad(expected, hidden)[0])
    with RecordedOperators() as operators:
        scores = score_targets(hidden.detach(), layer, labels, softcap=softcap)
    assert max(shape.numel() for name, shape, _ in operators.calls if name == "exp_") < logits.numel() / 2
    torch.testing.assert_close(scores.nll, nn.functional.cross_entropy(logits, labels, reduction="none").detach())
    assert torch.equal(scores.predicted, logits.argmax(1))


def test_the_gradient_of_a_confident_prediction_is_not_lost_in_bfloat16() -> None:
    """It is small beside the weights whose difference it is."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 20_000, bias=False).requires_grad_(False)
    layer.weight.data = layer.weight.bfloat16().float()
    labels = torch.tensor([5, 12_000])
    hidden = layer.weight[labels].div(layer.weight[labels].square().sum(1, keepdim=True)).mul(16).bfloat16().float()
    exact = hidden.double().requires_grad_()
    loss = nn.functional.cross_entropy(exact @ layer.weight.double().T, labels, reduction="sum")
    assert loss < 0.5
    found = score_targets(hidden, layer, labels, torch.bfloat16, with_grad=True).grad
    assert found is not None
    expected = torch.autograd.grad(loss, exact)[0]
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_a_head_with_an_adapter_is_supported() -> None:
    torch.manual_seed(0)
    adapted = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 20))
    adapted.out_features = 20  # type: ignore[assignment]
    hidden, labels = torch.randn(5, 8), torch.randint(20, (5,))
    expected = nn.functional.cross_entropy(adapted(hidden), labels, reduction="none")
    torch.testing.assert_close(score_targets(hidden, adapted, labels).nll, expected)


def test_a_head_with_trained_tokens_is_supported() -> None:
    torch.manual_seed(0)
    head = TrainableTokensWrapper(nn.Linear(8, 20, bias=False), "default", [3, 9])
    head.set_adapter("default")
    head.token_adapter.trainable_tokens_delta["default"].data += 1
    hidden, labels = torch.randn(5, 8), torch.randint(20, (5,))
    expected = nn.functional.cross_entropy(head(hidden), labels, reduction="none")
    torch.testing.assert_close(score_targets(hidden, head, labels).nll, expected)
