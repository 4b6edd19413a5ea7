"""The arithmetic of a training step in torch, on the GPU or the CPU, in one process or several."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_ft.config import Task, TuneConfig
from edge_ft.data import Batch
from edge_ft.families import Family
from edge_ft.files import replaced_folder
from edge_ft.models.chunked_loss import target_loss
from edge_ft.models.compute import Compute
from edge_ft.models.scorer import HEAD_INPUTS, LOSSES, TorchScorer
from edge_ft.quant.devices import has_bf16
from edge_ft.tune.distributed import Processes

__all__ = ["TorchBackend"]

_AGREEMENT = 0.02
"""Share by which the loss may differ between bfloat16 and float32."""


class TorchBackend(TorchScorer):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) over the trainable parameters of a PEFT model.

    Steps, scores and answers compute in the precision of `config.compute`, or in float32 inside `in_float32`. The
    methods are those of `edge_ft.tune.engine.TrainingBackend`; where several processes train together, all of them
    call `gradient`, `update` and `token_nll` in the same order, and each computes its share of a batch.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        task: Task,
        config: TuneConfig,
        processes: Processes | None = None,
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Prepare the optimizer.

        Args:
            model: A `peft.PeftModel`, on its device.
            family: Of the base.
            task: What is trained.
            config: Its compute, memory and weight decay count.
            processes: Those that train together; None is this one alone.
            stop_ids: The tokens that end an answer.
        """
        super().__init__(model, task, stop_ids)
        self.processes = processes or Processes(self.device)
        self._requested = config.compute
        narrow = config.compute == "bf16" or (config.compute == "auto" and has_bf16(self.device))
        self.dtype = torch.bfloat16 if narrow else torch.float32
        self.compute = Compute(model, family, self.dtype, config.memory or "normal")
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters: list[nn.Parameter] = [parameter for _, parameter in trained]
        # The B matrices last: checkpoints number the moments in this order.
        ordered = [parameter for _, parameter in sorted(trained, key=lambda pair: "lora_B" in pair[0])]
        self.optimizer = torch.optim.AdamW(ordered, lr=0.0, weight_decay=config.weight_decay, fused=True)
        self.best: list[Tensor] = []

    @contextmanager
    def unshared(self) -> Iterator[None]:
        """Work on whole batches in this process alone, inside this block."""
        before, self.processes = self.processes, Processes(self.device)
        try:
            yield
        finally:
            self.processes = before

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Score and answer in float32 inside this block, and with memory `high` over cached weights."""
        before = self.dtype
        self._compute_in(torch.float32)
        try:
            yield
        finally:
            self._compute_in(before)

    def _compute_in(self, dtype: torch.dtype) -> None:
        if dtype != self.dtype:
            self.dtype = self.compute.dtype = dtype
            self.compute.cache_weights(dtype)

    def gradient(self, batch: Batch, targets: int) -> float:
        """Accumulate the gradient of this process's rows; return the loss of all rows (nats), summed / `targets`."""
        own, loss = self.processes.own(batch), torch.zeros(())
        if own["rows"]:
            self.model.train()
            with self.compute:
                if self.task in HEAD_INPUTS:
                    loss = target_loss(*self.head_arguments(own)) / targets
                else:
                    loss = LOSSES[self.task](self.model, own, self.device)[0].sum() / targets
                loss.backward()  # type: ignore[no-untyped-call]
        return self.processes.sum(float(loss.detach()))

    def resolve(self, batch: Batch) -> Literal["fp32", "bf16"]:
        """Return what `compute: auto` becomes: bf16 if the device has it and its loss of `batch` is that of float32."""
        if self._requested == "auto" and self.dtype == torch.bfloat16:
            narrow = float(self.token_nll(batch)[0].sum())
            wide = float(TorchScorer(self.model, self.task).token_nll(batch)[0].sum())
            if not abs(narrow - wide) <= _AGREEMENT * wide:  # NaN too
                self._compute_in(torch.float32)
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Score in the precision of the steps, else as `TorchScorer.token_nll`; each process scores its share."""
        own, share = self.processes.own(batch), self.processes.share
        nll, predicted = np.zeros(batch["labels"].shape, np.float32), np.zeros_like(batch["labels"])
        if own["rows"]:
            with self.compute:
                nll[share], predicted[share] = super().token_nll(own)
        nll, predicted = (self.processes.sum_tensor(torch.from_numpy(a)).cpu().numpy() for a in (nll, predicted))
        return nll, predicted

    def vectors(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Embed in the precision of the steps, else as `TorchScorer.vectors`."""
        with self.compute:
            return super().vectors(batch)

    def answer_batch(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Answer in the precision of the steps, else as `TorchScorer.answer_batch`."""
        with self.compute:
            return super().answer_batch(prompts, max_new_tokens)

    def answer_nll(self, prompt_ids: list[int], answers: Sequence[list[int]]) -> NDArray[np.float64]:
        """Score answers in the precision of the steps, else as `TorchScorer.answer_nll`."""
        with self.compute:
            return super().answer_nll(prompt_ids, answers)

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        """Clip (0: not) and take an AdamW step if the gradient is finite; return its norm before clipping."""
        if self.processes.count > 1:
            # A process whose share was empty has no gradient, and adds nothing.
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            total = self.processes.sum_tensor(torch.cat([gradient.flatten() for gradient in gradients]))
            parts = total.split([parameter.numel() for parameter in self.parameters])
            for parameter, part in zip(self.parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter)
        norm = nn.utils.clip_grad_norm_(self.parameters, max_grad_norm or float("inf"))
        if torch.isfinite(norm):
            self.optimizer.param_groups[0]["lr"] = learning_rate
            self.optimizer.step()
        self.discard()
        return float(norm)

    def discard(self) -> None:
        """Drop the accumulated gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    def keep_best(self) -> None:
        """Store the current weights as the best so far."""
        self.best = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore_best(self) -> None:
        """Set the weights to the best so far."""
        for parameter, best in zip(self.parameters, self.best, strict=True):
            parameter.copy_(best)

    @torch.no_grad()
    def swap_best(self) -> None:
        """Exchange the weights and the best so far."""
        current = [parameter.detach().clone() for parameter in self.parameters]
        self.restore_best()
        self.best = current

    def save(self, folder: Path) -> None:
        """Write the current weights as a PEFT adapter, whole or not at all; only the main process does."""
        if not self.processes.is_main:
            return
        with replaced_folder(folder) as neighbour:
            # The base is frozen and its codes are not PEFT's to save; "auto" would ask a hub for its config.
            self.model.save_pretrained(neighbour, save_embedding_layers=False)  # type: ignore[operator]
            (neighbour / "README.md").unlink(missing_ok=True)  # PEFT's empty model card

    def seed(self, seed: int) -> None:
        """Seed torch's random numbers, which dropout draws, differently in each process: each has other rows."""
        torch.manual_seed(seed + self.processes.rank)

    def repair(self) -> bool:
        """If a weight or a moment is not finite, restore the best weights and clear the moments; return whether."""
        moments = [value for entry in self.optimizer.state.values() for value in entry.values()]
        if all(bool(torch.isfinite(tensor).all()) for tensor in [*self.parameters, *moments]):
            return False
        self.restore_best()
        self.optimizer.state.clear()
        return True

    def state(self) -> dict[str, NDArray[Any]]:
        """Return `parameters.N`, `best.N` and `optimizer.N.NAME`; on a CPU they share memory with the originals."""
        tensors = {f"parameters.{index}": parameter.detach() for index, parameter in enumerate(self.parameters)}
        tensors |= {f"best.{index}": best for index, best in enumerate(self.best)}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in entry.items()}
        return {name: tensor.cpu().contiguous().numpy() for name, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Return to the moment at which `state` was taken."""
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
