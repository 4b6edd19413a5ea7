"""The arithmetic of a training step in torch, on a GPU when there is one, else on the CPU."""

import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_ft.config import Task, TuneConfig
from edge_ft.data import Batch
from edge_ft.families import Family
from edge_ft.models.chunked_loss import softcap_of, target_loss
from edge_ft.models.compute import Compute
from edge_ft.models.scorer import HIDDEN, LOSSES, TorchScorer, task_model_of
from edge_ft.quant.bf16 import has_bf16

__all__ = ["TorchBackend"]

_AGREEMENT = 0.02
"""Share by which the loss may differ between bfloat16 and float32."""


class TorchBackend(TorchScorer):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) over the trainable parameters of a PEFT model.

    Steps, and scores of `token_nll`, are computed as `config.compute` says; a `TorchScorer` of the same model
    scores in float32.
    """

    def __init__(self, model: Any, family: Family, task: Task, config: TuneConfig) -> None:
        super().__init__(model, task)
        self._asked = config.compute
        narrow = config.compute == "bf16" or (config.compute == "auto" and has_bf16(self.device))
        self.dtype = torch.bfloat16 if narrow else torch.float32
        self.compute = Compute(model, family, self.dtype, config.memory or "normal")
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.parameters: list[nn.Parameter] = list(trained.values())
        groups = [
            {"params": [p for name, p in trained.items() if ("lora_B" in name) == second], "ratio": ratio}
            for second, ratio in ((False, 1.0), (True, config.loraplus_lr_ratio))
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=config.weight_decay, fused=True)
        self.best: list[Tensor] = []

    def gradient(self, batch: Batch, targets: int) -> float:
        self.model.train()
        with self.compute:
            if self.task in HIDDEN:
                hidden, labels = HIDDEN[self.task](self.model, batch, self.device)
                task_model = task_model_of(self.model)
                head = task_model.get_output_embeddings()
                loss = target_loss(hidden, head, labels, self.dtype, softcap_of(task_model))
            else:
                loss = LOSSES[self.task](self.model, batch, self.device)[0].sum()
            loss = loss / targets
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def resolve(self, batch: Batch) -> Literal["fp32", "bf16"]:
        """What `compute: auto` comes to: bf16 where the device has it and the loss of `batch` is float32's."""
        if self._asked == "auto" and self.dtype == torch.bfloat16:
            narrow = float(self.token_nll(batch)[0].sum())
            wide = float(TorchScorer(self.model, self.task).token_nll(batch)[0].sum())
            if not abs(narrow - wide) <= _AGREEMENT * wide:  # NaN too
                self.dtype = self.compute.dtype = torch.float32
                self.compute.keep(torch.float32)
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[Any]]:
        with self.compute:
            return super().token_nll(batch)

    def vectors(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        with self.compute:
            return super().vectors(batch)

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        norm = nn.utils.clip_grad_norm_(self.parameters, max_grad_norm or float("inf"))
        if torch.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate * group["ratio"]
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

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def mend(self) -> bool:
        moments = [value for entry in self.optimizer.state.values() for value in entry.values()]
        if all(bool(torch.isfinite(tensor).all()) for tensor in [*self.parameters, *moments]):
            return False
        self.recall()
        self.optimizer.state.clear()
        return True

    def state(self) -> dict[str, NDArray[Any]]:
        tensors = {f"parameters.{index}": parameter.detach() for index, parameter in enumerate(self.parameters)}
        tensors |= {f"best.{index}": best for index, best in enumerate(self.best)}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in entry.items()}
        return {name: tensor.cpu().contiguous().numpy() for name, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        # Copies: a view of what was read would share its memory with whoever holds it.
        tensors = {name: torch.from_numpy(array.copy()) for name, array in state.items()}
        for index, parameter in enumerate(self.parameters):
            parameter.copy_(tensors[f"parameters.{index}"])
        self.best = [tensors[f"best.{index}"].to(self.device) for index in range(len(self.parameters))]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                moments.setdefault(int(number), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
