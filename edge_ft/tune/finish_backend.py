"""The arithmetic of a finishing step: a quantized model's scales are trained towards what another model computes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from edge_ft.config import Task, TuneConfig
from edge_ft.data import Batch
from edge_ft.families import Family
from edge_ft.models.compute import Compute
from edge_ft.models.distillation import distillation_loss
from edge_ft.models.scorer import TorchScorer
from edge_ft.quant.scales import TrainedScales
from edge_ft.quant.serialization import write_codes
from edge_ft.tune.torch_backend import TorchBackend

__all__ = ["FinishBackend", "Teacher"]


AT_ONCE = 512
"""Tokens with padding of a forward and backward pass, unless one row has more."""


class Teacher(TorchScorer):
    """A model with its adapter beside it, which computes as a training does and is not trained."""

    def __init__(self, model: Any, family: Family, task: Task, dtype: torch.dtype) -> None:
        """Wrap the layers of `model`, in place."""
        super().__init__(model, task)
        self.dtype, self.compute = dtype, Compute(model, family, dtype, "normal")


class FinishBackend(TorchBackend):
    """AdamW over the factors of a model's scales; the loss is the distance from the probabilities as trained.

    Whatever the loop does, the scales of the model are those of the factors.
    """

    def __init__(
        self, model: Any, family: Family, task: Task, config: TuneConfig, teacher: TorchBackend | Teacher
    ) -> None:
        """Prepare the model.

        Args:
            model: A quantized task model, on its device.
            family: Of the base.
            task: One with an output layer over the vocabulary.
            config: Its compute counts, and whether its memory is `low`.
            teacher: The model as trained.
        """
        self.scales = TrainedScales(model)
        # Cached weights would be those of a step only: its update changes the scales.
        super().__init__(model, family, task, replace(config, memory="low" if config.memory == "low" else "normal"))
        self.teacher = teacher

    def gradient(self, batch: Batch, targets: int) -> float:
        """Accumulate the gradient of the distance of the batch's rows / `targets`, and return it (nats)."""
        # Two models are in memory: the activations of a whole batch would be the peak of the run.
        return sum(self._gradient(few, targets) for few in _parts(batch, AT_ONCE))

    def _gradient(self, batch: Batch, targets: int) -> float:
        self.model.eval()  # no dropout: the other model computes without
        with torch.no_grad(), self.teacher.compute:
            self.teacher.model.eval()
            wanted, head, *_ = self.teacher.head_arguments(batch)
        with self.compute:
            hidden, own_head, _, dtype, softcap = self.head_arguments(batch)
            loss = distillation_loss((hidden, own_head), (wanted, head), dtype, softcap) / targets
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        """Take a step as `TorchBackend.update`."""
        norm = super().update(learning_rate, max_grad_norm)
        self.scales.apply()
        return norm

    def restore_best(self) -> None:
        """Set the factors, and with them the scales, to the best so far."""
        super().restore_best()
        self.scales.apply()

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Return to the moment at which `state` was taken."""
        super().restore(state)
        self.scales.apply()

    def release(self) -> None:
        """Leave the model as it was, but for its scales."""
        self.compute.release()
        self.scales.release()

    def save(self, folder: Path) -> None:
        """Write codes and scales to `codes.safetensors` in `folder`."""
        write_codes(folder / "codes.safetensors", self.model)


def _parts(batch: Batch, tokens: int) -> Iterator[Batch]:
    """Yield a batch in parts of as even numbers of rows as `tokens` each allow."""
    arrays: Any = batch
    rows, length = batch["input_ids"].shape
    size = -(-rows // -(-rows // max(1, tokens // length)))
    for start in range(0, rows, size):
        part: Any = {name: values[start : start + size] for name, values in arrays.items()}
        yield part
