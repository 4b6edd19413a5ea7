"""The projection onto the vocabulary and the loss behind it, a part at a time: never all logits at once."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from edge_ft.base.linear import FrozenLinear, transposed_weight

__all__ = ["logit_chunks", "softcap_of", "target_loss"]

_LOGITS = {"cpu": 2**22, "cuda": 2**26}
"""Logits held at a time: 16 MiB in float32; on a GPU 256 MiB, since it waits for small pieces."""
_COLUMNS = {"cpu": 8192, "cuda": 2**16}
"""Entries of the vocabulary whose weights are dequantized at a time."""


def softcap_of(model: Any) -> float | None:
    """What a task model's logits are kept within by cap · tanh(logit / cap), if they are (Gemma 2)."""
    cap: float | None = getattr(model.config, "final_logit_softcapping", None)
    return cap


def logit_chunks(
    hidden: Tensor, head: Any, dtype: torch.dtype = torch.float32, softcap: float | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Logits of some positions after the other.

    Args:
        hidden: [targets, hidden] float32, the inputs of the head.
        head: [hidden] -> [vocab].
        dtype: Of its products.
        softcap: As `softcap_of` gives it.

    Yields:
        Which targets, and their logits [some, vocab] float32, which the caller may overwrite.
    """
    size = max(1, _LOGITS[hidden.device.type] // int(head.out_features))
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        if _is_plain(head):
            narrow = hidden[rows].to(dtype)
            logits = torch.empty(len(narrow), head.out_features, device=hidden.device)
            for part in _parts(head, hidden.device):
                logits[:, part] = narrow @ transposed_weight(head, dtype, part)
            if head.bias is not None:
                logits += head.bias
        else:
            logits = head(hidden[rows]).float()
        yield rows, logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def target_loss(
    hidden: Tensor, head: nn.Linear, labels: Tensor, dtype: torch.dtype, softcap: float | None = None
) -> Tensor:
    """Cross-entropy summed over positions, float32; differentiable in `hidden`.

    The gradient is made together with the loss, so that no logits are kept (as Liger's fused linear
    cross-entropy, arXiv:2410.10989).

    Args:
        hidden: [targets, hidden] float32, the inputs of the head.
        head: Its layer, frozen: [hidden] -> [vocab].
        labels: [targets] int64.
        dtype: Of the head's products; the loss itself is float32.
        softcap: As `softcap_of` gives it.
    """
    loss: Tensor = _TargetLoss.apply(hidden, head, labels, dtype, softcap)
    return loss


class _TargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Linear, labels: Tensor, dtype: torch.dtype, softcap: float | None
    ) -> Tensor:
        loss = torch.zeros((), device=hidden.device)
        grad = torch.zeros_like(hidden)
        for rows, logits in logit_chunks(hidden, head, dtype, softcap):
            right = labels[rows, None]
            normaliser = logits.logsumexp(1, keepdim=True)
            loss += (normaliser - logits.gather(1, right)).sum()
            if not hidden.requires_grad:
                continue
            inner = None if softcap is None else 1 - (logits / softcap).square_()  # of tanh
            slope = logits.sub_(normaliser).exp_()  # softmax - one-hot
            slope.scatter_add_(1, right, -torch.ones_like(normaliser))
            if inner is not None:
                slope *= inner
            for part in _parts(head, hidden.device):
                grad[rows] += slope[:, part].to(dtype) @ transposed_weight(head, dtype, part).T
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        return ctx.saved_tensors[0] * grad, None, None, None, None


def _is_plain(head: Any) -> bool:
    """Whether the layer is its weight and bias alone, without an adapter around it."""
    return isinstance(head, FrozenLinear) or type(head) is nn.Linear


def _parts(head: Any, device: torch.device) -> list[slice]:
    size, columns = int(head.out_features), _COLUMNS[device.type]
    return [slice(start, min(start + columns, size)) for start in range(0, size, columns)]
