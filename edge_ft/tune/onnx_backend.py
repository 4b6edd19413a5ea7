"""The arithmetic of a training step in ONNX Runtime and numpy, over a bundle that can learn. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edge_ft.config import TuneConfig
from edge_ft.data import Batch, target_mask
from edge_ft.files import replaced_folder, write_json
from edge_ft.runtime import Seq2SeqGenerator, TextGenerator
from edge_ft.tune.block_graphs import Values
from edge_ft.tune.block_model import BlockModel, Pair
from edge_ft.tune.bundle_answers import BundleAnswers
from edge_ft.tune.processes import Cpu

__all__ = ["OnnxBackend", "fresh_adapter"]

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of AdamW, as in torch."""


@dataclass(frozen=True)
class _Given:
    """What the graphs read of an adapter."""

    adapter: list[Values]
    """A and B, by layer."""
    head: Values
    """Weights and biases of a classifier's head."""


class OnnxBackend:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) over A and B of a bundle's linear layers, and a classifier's head.

    The methods are those of `edge_ft.tune.engine.TrainingBackend`.
    """

    def __init__(
        self,
        model: BlockModel,
        adapter: Mapping[str, Pair],
        config: TuneConfig,
        adapter_config: Mapping[str, Any],
        answers: BundleAnswers | None = None,
    ) -> None:
        """Prepare the optimizer.

        Args:
            model: The frozen base.
            adapter: A and B by the name of a linear layer; trained in place.
            config: Its rank, alpha, memory and weight decay count.
            adapter_config: The content of adapter_config.json.
            answers: What answers, of a model that writes text.
        """
        self.model, self.adapter, self._answers = model, dict(adapter), answers
        self.device = Cpu()
        self._config, self._adapter_config = config, adapter_config
        self._recompute, self._decay = config.memory == "low", config.weight_decay
        head = model.head
        pairs = {
            f"{module}.lora_{side}.weight": part
            for module, pair in self.adapter.items()
            for side, part in zip("AB", pair, strict=True)
        }
        self.named: dict[str, NDArray[np.float32]] = {**pairs, **head.parameters}
        """The parameters by their names in the adapter's file."""
        self.parameters = list(self.named.values())
        self._moments = [(np.zeros_like(array), np.zeros_like(array)) for array in self.parameters]
        self._updates = 0
        self._best: list[NDArray[np.float32]] = []
        self._gradients: tuple[dict[str, Pair], dict[str, NDArray[np.float32]]] | None = None
        start = {name: array.copy() for name, array in head.parameters.items()}
        scaling = config.alpha / config.rank
        self._tuned = _Given(model.adapter_values(self.adapter, scaling), head.values(head.parameters))
        self._untuned = _Given(model.adapter_values({}, 0.0), head.values(start))
        self._values = self._tuned

    @contextmanager
    def unshared(self) -> Iterator[None]:
        """Work as ever: there is one process.

        Yields:
            Nothing.
        """
        yield

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Score as ever, in float32, and keep open what answers.

        Yields:
            Nothing.
        """
        with self._answers.kept() if self._answers is not None else nullcontext():
            yield

    @contextmanager
    def untuned(self) -> Iterator[None]:
        """Score and answer without the adapter inside this block.

        Yields:
            Nothing.
        """
        before, self._values = self._values, self._untuned
        try:
            yield
        finally:
            self._values = before

    def seed(self, seed: int) -> None:
        """Do nothing: no step draws random numbers."""

    def gradient(self, batch: Batch, targets: int) -> float:
        """Accumulate the gradient of the batch's summed loss / `targets`; return that loss (nats)."""
        if not target_mask(batch["labels"], self.model.task).any():
            return 0.0
        if self._gradients is None:
            pairs = {name: (np.zeros_like(a), np.zeros_like(b)) for name, (a, b) in self.adapter.items()}
            self._gradients = pairs, {name: np.zeros_like(array) for name, array in self.model.head.parameters.items()}
        pairs, head = self._gradients
        loss = self.model.head.loss(batch, 1.0 / targets, self._values.head, head)
        return self.model.gradient(
            self.model.tokens(batch), loss, self._values.adapter, pairs, recompute=self._recompute
        )

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        """Clip (0: not) and take an AdamW step if the gradient is finite; return its norm before clipping."""
        assert self._gradients is not None
        pairs, head = self._gradients
        gradients = [*(array for pair in pairs.values() for array in pair), *head.values()]
        norm = float(np.sqrt(sum(float(np.vdot(gradient, gradient)) for gradient in gradients)))
        if np.isfinite(norm):
            factor = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm else 1.0
            self._updates += 1
            corrections = [1 - beta**self._updates for beta in BETAS]
            for parameter, (mean, square), gradient in zip(self.parameters, self._moments, gradients, strict=True):
                gradient *= np.float32(factor)
                parameter *= np.float32(1 - learning_rate * self._decay)
                mean += (gradient - mean) * np.float32(1 - BETAS[0])
                square *= np.float32(BETAS[1])
                square += gradient * gradient * np.float32(1 - BETAS[1])
                divisor = np.sqrt(square) / np.float32(corrections[1] ** 0.5) + np.float32(EPSILON)
                parameter -= np.float32(learning_rate / corrections[0]) * (mean / divisor)
        self.discard()
        return norm

    def discard(self) -> None:
        """Drop the accumulated gradient."""
        self._gradients = None

    def keep_best(self) -> None:
        """Store the current weights as the best so far."""
        self._best = [parameter.copy() for parameter in self.parameters]

    def restore_best(self) -> None:
        """Set the weights to the best so far."""
        for parameter, best in zip(self.parameters, self._best, strict=True):
            parameter[...] = best

    def swap_best(self) -> None:
        """Exchange the weights and the best so far."""
        current = [parameter.copy() for parameter in self.parameters]
        self.restore_best()
        self._best = current

    def repair(self) -> bool:
        """If a weight or a moment is not finite, restore the best weights and clear the moments; return whether."""
        moments = [array for pair in self._moments for array in pair]
        if all(bool(np.isfinite(array).all()) for array in (*self.parameters, *moments)):
            return False
        self.restore_best()
        for array in moments:
            array[...] = 0
        self._updates = 0
        return True

    def save(self, folder: Path) -> None:
        """Write the current weights as a PEFT adapter, whole or not at all."""
        arrays = {f"base_model.model.{name}": array for name, array in self.named.items()}
        with replaced_folder(folder) as neighbour:
            save_file(arrays, neighbour / "adapter_model.safetensors", {"format": "pt"})
            write_json(neighbour / "adapter_config.json", dict(self._adapter_config))

    def state(self) -> dict[str, NDArray[Any]]:
        """Return `parameters.N`, `best.N`, `optimizer.N.NAME` and `updates`; the arrays share memory."""
        arrays: dict[str, NDArray[Any]] = {"updates": np.array(self._updates, np.int64)}
        for index, (parameter, (mean, square)) in enumerate(zip(self.parameters, self._moments, strict=True)):
            arrays[f"parameters.{index}"] = parameter
            arrays[f"optimizer.{index}.exp_avg"], arrays[f"optimizer.{index}.exp_avg_sq"] = mean, square
        return arrays | {f"best.{index}": best for index, best in enumerate(self._best)}

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Return to the moment at which `state` was taken."""
        for index, (parameter, (mean, square)) in enumerate(zip(self.parameters, self._moments, strict=True)):
            parameter[...] = state[f"parameters.{index}"]
            mean[...] = state[f"optimizer.{index}.exp_avg"]
            square[...] = state[f"optimizer.{index}.exp_avg_sq"]
        self._best = [state[f"best.{index}"].copy() for index in range(len(self.parameters))]
        self._updates = int(state["updates"])

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Score the labels of a batch.

        Returns:
            Negative log-likelihood (nats) and likeliest token or class, shaped as the labels; 0 and -100 where there
            is no target.
        """
        x, shared = self.model.forward(self.model.tokens(batch), self._values.adapter)
        return self.model.head.token_nll(x, shared, batch, self._values.head)

    def answer(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """Return the greedy answer to one prompt, without the stop token that ends it; an empty one to no prompt."""
        return self._generator().answer(prompt_ids, max_new_tokens)

    def answer_nll(self, prompt_ids: list[int], answers: Sequence[list[int]]) -> NDArray[np.float64]:
        """Return the negative log-likelihood (nats) of each answer to one prompt."""
        return self._generator().answer_nll(prompt_ids, answers)

    def _generator(self) -> TextGenerator | Seq2SeqGenerator:
        """Return what answers with the present weights, or as the base."""
        assert self._answers is not None  # of a model that writes text
        if not self._answers.is_open:
            self.model.rest()
        if self._values is self._untuned:
            return self._answers.opened("none")
        scaling = np.float32(self._config.alpha / self._config.rank)
        values = {f"lora_A.{name}": a for name, (a, _) in self.adapter.items()}
        return self._answers.opened(values | {f"lora_B.{name}": scaling * b for name, (_, b) in self.adapter.items()})


def fresh_adapter(linears: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, Pair]:
    """Return A as PEFT initialises it (uniform, Kaiming's bound with a = √5) and B of zeros, for each linear layer."""
    random = np.random.default_rng(seed)
    adapter = {}
    for module, (inputs, outputs) in linears.items():
        bound = 1 / np.sqrt(inputs)
        a = random.uniform(-bound, bound, (rank, inputs)).astype(np.float32)
        adapter[module] = a, np.zeros((outputs, rank), np.float32)
    return adapter
