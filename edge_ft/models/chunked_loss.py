"""Cross-entropy over the vocabulary in chunks, so that the logits are never in memory as a whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edge_ft.quant.layers import FrozenLinear, transposed_weight

__all__ = ["TargetScores", "logit_softcap", "logit_tiles", "score_targets", "target_loss"]

MAX_LOGITS = {"cpu": 2**22, "cuda": 2**26}
"""Logits in memory at a time, by device: 16 MiB in float32; on a GPU 256 MiB, since small pieces cost launches."""
VOCABULARY_CHUNK = {"cpu": 8192, "cuda": 2**16}
"""Entries of the vocabulary whose weights are dequantized at a time."""


def logit_softcap(model: Any) -> float | None:
    """Return the cap of a task model whose logits are cap · tanh(logit / cap) (Gemma 2); None without one."""
    return getattr(model.config, "final_logit_softcapping", None)


@dataclass(frozen=True)
class TargetScores:
    """Scores of a head over the vocabulary at some positions."""

    nll: Tensor
    """[targets] float32, nats of the labels."""
    predicted: Tensor
    """[targets] int64, the likeliest tokens."""
    grad: Tensor | None
    """[targets, hidden] float32: gradient of the sum of `nll` with respect to the head's input."""


def score_targets(
    hidden: Tensor,
    head: Any,
    labels: Tensor,
    dtype: torch.dtype = torch.float32,
    softcap: float | None = None,
    with_grad: bool = False,
) -> TargetScores:
    """Compute the cross-entropy of some positions in one pass over the vocabulary: each weight is dequantized once.

    Sums over the entries seen so far are rescaled when a greater logit comes (online softmax, arXiv:1805.02867; the
    gradient is accumulated on the way, as FlashAttention's output is, arXiv:2205.14135).

    Args:
        hidden: [targets, hidden] float32, the inputs of the head.
        head: [hidden] -> [vocab].
        labels: [targets] int64.
        dtype: Of the head's products; the rest is float32.
        softcap: As `logit_softcap` returns it.
        with_grad: Also compute the gradient; the head must be one frozen linear layer.

    Returns:
        The scores; nll is NaN for a label outside the vocabulary.
    """
    largest = hidden.new_full((len(hidden), 1), -torch.inf)
    target = torch.full_like(largest, torch.nan)
    others = torch.zeros_like(largest)  # sum of exp(logit - largest) over all entries but the target
    grad = torch.zeros_like(hidden) if with_grad else None
    predicted = torch.zeros_like(labels)
    for rows, start, logits, weight in logit_tiles(hidden, head, dtype):
        tanh_slope: Tensor | None = None
        if softcap is not None:
            logits = logits.div_(softcap).tanh_()
            tanh_slope = 1 - logits.square()
            logits *= softcap
        index = labels[rows, None] - start
        inside = (index >= 0) & (index < logits.shape[1])
        index = index.clamp(0, logits.shape[1] - 1)
        own = logits.gather(1, index)
        target[rows] = torch.where(inside, own, target[rows])
        tile_max, tile_argmax = logits.max(1, keepdim=True)
        before = largest[rows].clone()
        predicted[rows] = torch.where(tile_max > before, tile_argmax + start, predicted[rows, None])[:, 0]
        largest[rows] = torch.maximum(before, tile_max)
        # The target's share is left out: what is small beside 1 would be lost in the rounding of products.
        shares = logits.scatter_(1, index, own.masked_fill(inside, -torch.inf)).sub_(largest[rows]).exp_()
        rescale = (before - largest[rows]).exp_()
        others[rows] = others[rows] * rescale + shares.sum(1, keepdim=True)
        if grad is not None:
            if tanh_slope is not None:
                shares *= tanh_slope
            grad[rows] = grad[rows] * rescale + shares.to(dtype) @ weight.T
    total = others + (target - largest).exp()
    if grad is not None:
        slope = others if softcap is None else others * (1 - (target / softcap).square())
        grad = (grad - slope * transposed_weight(head, dtype, labels).T) / total
    return TargetScores((largest + total.log() - target)[:, 0], predicted, grad)


def logit_tiles(hidden: Tensor, head: Any, dtype: torch.dtype) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """Compute the logits in tiles.

    A head that is not one linear layer computes the whole vocabulary at once; no weights are yielded then.

    Yields:
        Positions, first entry of the vocabulary, logits float32 [positions, entries] and weights [hidden, entries].
    """
    plain = isinstance(head, FrozenLinear) or type(head) is nn.Linear
    # PEFT's layer around a head of which some tokens are trained has no sizes, but the head inside has.
    device, size = hidden.device.type, int(getattr(head, "original_module", head).out_features)
    columns = min(VOCABULARY_CHUNK[device], size) if plain else size
    height = max(1, MAX_LOGITS[device] // columns)
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
    """Return the cross-entropy summed over positions, float32 scalar, differentiable in `hidden`.

    The gradient is computed together with the loss, so that no logits are saved (as Liger's fused linear
    cross-entropy, arXiv:2410.10989). Arguments are those of `score_targets`; the head is frozen.
    """
    return _TargetLoss.apply(hidden, head, labels, dtype, softcap)


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
