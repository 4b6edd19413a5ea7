"""How far a model's next-token probabilities are from another's, in tiles: logits are never in memory as a whole."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from edge_ft.models.chunked_loss import logit_tiles
from edge_ft.quant.layers import FrozenLinear

__all__ = ["distillation_loss"]

Head = tuple[Tensor, Any]
"""Inputs of an output layer [targets, hidden] float32, and the layer; the student's is one frozen linear layer."""


def distillation_loss(student: Head, teacher: Head, dtype: torch.dtype, softcap: float | None = None) -> Tensor:
    """Return KL(teacher ‖ student) over the vocabulary, summed over targets, differentiable in the student's inputs.

    Args:
        student: What is trained.
        teacher: What it shall compute.
        dtype: Of the products; the rest is float32.
        softcap: As `edge_ft.models.chunked_loss.logit_softcap` returns it.

    Returns:
        A float32 scalar, nats.
    """
    return _Distillation.apply(student[0], student[1], teacher, dtype, softcap)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Any, teacher: Head, dtype: torch.dtype, softcap: float | None
    ) -> Tensor:
        own, other = (hidden.new_full((len(hidden), 1), -torch.inf) for _ in range(2))  # log of the sum of exp(logit)
        for rows, logits, wanted, _, _ in _tiles((hidden, head), teacher, dtype, softcap):
            for total, tile in ((own, logits), (other, wanted)):
                total[rows] = torch.logaddexp(total[rows], tile.logsumexp(1, keepdim=True))
        loss, grad = hidden.new_zeros(()), torch.zeros_like(hidden)
        for rows, logits, wanted, weight, slope in _tiles((hidden, head), teacher, dtype, softcap):
            logits -= own[rows]
            wanted -= other[rows]
            probabilities = wanted.exp()
            loss += (probabilities * (wanted - logits)).sum()
            difference = logits.exp_().sub_(probabilities)
            if slope is not None:
                difference *= slope
            grad[rows] += difference.to(dtype) @ weight.T
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        return ctx.saved_tensors[0] * grad, None, None, None, None


def _tiles(
    student: Head, teacher: Head, dtype: torch.dtype, softcap: float | None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor | None]]:
    """Compute the logits of both, tile by tile.

    Yields:
        Rows; logits of the student and of the teacher [rows, entries]; the student's weights [hidden, entries]; with a
        softcap the derivative of the student's logits by those before it.
    """
    pairs = zip(logit_tiles(*student, dtype), _teacher_tiles(student, teacher, dtype), strict=True)
    for (rows, _, logits, weight), wanted in pairs:
        slope: Tensor | None = None
        if softcap is not None:
            logits, wanted = (tile.div_(softcap).tanh_() for tile in (logits, wanted))
            slope = 1 - logits.square()
            logits, wanted = logits * softcap, wanted * softcap
        yield rows, logits, wanted, weight, slope


def _teacher_tiles(student: Head, teacher: Head, dtype: torch.dtype) -> Iterator[Tensor]:
    """Compute the teacher's logits in the student's tiles; at once where its layer is more than one product (LoRA).

    Yields:
        Logits float32 [rows, entries].
    """
    hidden, head = teacher
    if isinstance(head, FrozenLinear) or type(head) is nn.Linear:
        for _, _, logits, _ in logit_tiles(hidden, head, dtype):
            yield logits
        return
    whole = head(hidden).float()
    for rows, start, own, _ in logit_tiles(*student, dtype):
        yield whole[rows, start : start + own.shape[1]].clone()
