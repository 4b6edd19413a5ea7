"""The projection onto the vocabulary and the loss behind it, a part at a time: never all logits at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edge_ft.quant.layers import FrozenLinear, transposed_weight

__all__ = ["TargetScores", "score_targets", "softcap_of", "target_loss"]

_LOGITS = {"cpu": 2**22, "cuda": 2**26}
"""Logits held at a time: 16 MiB in float32; on a GPU 256 MiB, since it waits for small pieces."""
_COLUMNS = {"cpu": 8192, "cuda": 2**16}
"""Entries of the vocabulary whose weights are dequantized at a time."""


def softcap_of(model: Any) -> float | None:
    """What a task model's logits are kept within by cap · tanh(logit / cap), if they are (Gemma 2)."""
    cap: float | None = getattr(model.config, "final_logit_softcapping", None)
    return cap


@dataclass(frozen=True)
class TargetScores:
    """What a head says at some positions."""

    nll: Tensor
    """[targets] float32, nats of the right tokens."""
    predicted: Tensor
    """[targets] int64, the likeliest tokens."""
    grad: Tensor | None
    """[targets, hidden] float32: of the sum of `nll`, in what the head reads."""


def score_targets(
    hidden: Tensor,
    head: Any,
    labels: Tensor,
    dtype: torch.dtype = torch.float32,
    softcap: float | None = None,
    with_grad: bool = False,
) -> TargetScores:
    """Cross-entropy of some positions, in one pass over the vocabulary: every weight is dequantized once.

    Sums over the entries seen so far are scaled anew when a greater logit comes (online softmax, arXiv:1805.02867; with
    the gradient made on the way, as FlashAttention's output is, arXiv:2205.14135).

    Args:
        hidden: [targets, hidden] float32, the inputs of the head.
        head: [hidden] -> [vocab].
        labels: [targets] int64.
        dtype: Of the head's products; the rest is float32.
        softcap: As `softcap_of` gives it.
        with_grad: Also make the gradient; the head is then a frozen layer.
    """
    most = hidden.new_full((len(hidden), 1), -torch.inf)
    right = torch.full_like(most, torch.nan)  # stays so for a label outside the vocabulary
    others = torch.zeros_like(most)
    grad = torch.zeros_like(hidden) if with_grad else None
    predicted = torch.zeros_like(labels)
    for rows, start, logits, weight in _tiles(hidden, head, dtype):
        inner: Tensor | None = None
        if softcap is not None:
            logits = logits.div_(softcap).tanh_()
            inner = 1 - logits.square()  # tanh's slope
            logits *= softcap
        at = labels[rows, None] - start
        here = (at >= 0) & (at < logits.shape[1])
        at = at.clamp(0, logits.shape[1] - 1)
        own = logits.gather(1, at)
        right[rows] = torch.where(here, own, right[rows])
        top, place = logits.max(1, keepdim=True)
        before = most[rows].clone()
        predicted[rows] = torch.where(top > before, place + start, predicted[rows, None])[:, 0]
        most[rows] = torch.maximum(before, top)
        # The right token's share is left out: what is small beside 1 would be lost in the rounding of products.
        shares = logits.scatter_(1, at, own.masked_fill(here, -torch.inf)).sub_(most[rows]).exp_()
        fade = (before - most[rows]).exp_()
        others[rows] = others[rows] * fade + shares.sum(1, keepdim=True)
        if grad is not None:
            if inner is not None:
                shares *= inner
            grad[rows] = grad[rows] * fade + shares.to(dtype) @ weight.T
    total = others + (right - most).exp()
    if grad is not None:
        slope = others if softcap is None else others * (1 - (right / softcap).square())
        grad = (grad - slope * transposed_weight(head, dtype, labels).T) / total
    return TargetScores((most + total.log() - right)[:, 0], predicted, grad)


def _tiles(hidden: Tensor, head: Any, dtype: torch.dtype) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """Which positions, the first entry of the vocabulary, their logits float32 and the weights [hidden, entries].

    A head that is more than its weight and bias gives all entries at once, and no weights.
    """
    plain = isinstance(head, FrozenLinear) or type(head) is nn.Linear
    kind, size = hidden.device.type, int(head.out_features)
    columns = min(_COLUMNS[kind], size) if plain else size
    height = max(1, _LOGITS[kind] // columns)
    for start in range(0, size, columns):
        part = slice(start, min(start + columns, size))
        weight = transposed_weight(head, dtype, part) if plain else hidden.new_empty(0)
        for first in range(0, len(hidden), height):
            rows = slice(first, first + height)
            logits = (hidden[rows].to(dtype) @ weight if plain else head(hidden[rows])).float()
            if plain and head.bias is not None:
                logits += head.bias[part]
            yield rows, start, logits, weight


def target_loss(
    hidden: Tensor, head: nn.Linear, labels: Tensor, dtype: torch.dtype, softcap: float | None = None
) -> Tensor:
    """Cross-entropy summed over positions, float32; differentiable in `hidden`.

    The gradient is made together with the loss, so that no logits are kept (as Liger's fused linear
    cross-entropy, arXiv:2410.10989). Arguments are those of `score_targets`; the head is frozen.
    """
    loss: Tensor = _TargetLoss.apply(hidden, head, labels, dtype, softcap)
    return loss


class _TargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Linear, labels: Tensor, dtype: torch.dtype, softcap: float | None
    ) -> Tensor:
        scores = score_targets(hidden, head, labels, dtype, softcap, with_grad=True)
        ctx.save_for_backward(scores.grad)
        return scores.nll.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        return ctx.saved_tensors[0] * grad, None, None, None, None
