"""The arithmetic of a training step in torch, on a GPU when there is one, else on the CPU."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edge_ft.base.scorer import TorchScorer, target_logits
from edge_ft.data import Batch
from edge_ft.families import Family

__all__ = ["TorchBackend"]


class TorchBackend(TorchScorer):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) over the trainable parameters of a PEFT model."""

    def __init__(self, model: Any, family: Family, weight_decay: float) -> None:
        super().__init__(model, family)
        self.parameters: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=weight_decay)
        self.best: list[Tensor] = []

    def gradient(self, batch: Batch, targets: int) -> float:
        self.model.train()
        logits, labels = target_logits(self.model, self.family, batch, self.device)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / targets
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        norm = nn.utils.clip_grad_norm_(self.parameters, max_grad_norm or float("inf"))
        if torch.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.discard()
        return float(norm)

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def remember(self) -> None:
        self.best = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def recall(self) -> None:
        for parameter, best in zip(self.parameters, self.best, strict=True):
            parameter.copy_(best)

    def save(self, folder: Path) -> None:
        """The weights as they are now, whole or not at all: written beside `folder`, which it then replaces."""
        neighbour = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(neighbour, ignore_errors=True)
        # The base is frozen and its codes are not PEFT's to save; "auto" would ask a hub for its config.
        self.model.save_pretrained(neighbour, save_embedding_layers=False)  # type: ignore[operator]
        (neighbour / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        shutil.rmtree(folder, ignore_errors=True)
        neighbour.rename(folder)
