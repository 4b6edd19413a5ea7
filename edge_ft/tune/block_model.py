"""A bundle's frozen model as it learns: its layers run one after the other, forward and back, by ONNX Runtime.

Layers that compute the same share their graphs. Weights are the bytes of the bundle's own data file, memory-mapped; A
and B of every linear layer are inputs too. Between the layers there is nothing but numpy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime import OrtValue

from edge_ft.artifacts import Bundle
from edge_ft.config import ProblemType, Task
from edge_ft.data import Batch
from edge_ft.tune.block_graphs import BlockGraphs, Values, as_value
from edge_ft.tune.bundle_heads import ClassHead, Loss, VocabularyHead

__all__ = ["BlockModel", "Pair", "Tokens"]

LOWEST = np.float32(-3.4e38)
"""What is added where a token does not attend."""
Pair = tuple[NDArray[np.float32], NDArray[np.float32]]
"""A [rank, inputs] and B [outputs, rank] of a linear layer."""


class Tokens(NamedTuple):
    """Texts that a model reads."""

    ids: NDArray[np.int64]
    """[batch, seq], padded on the right."""
    mask: NDArray[np.int64]
    """1 on tokens and 0 on padding."""
    types: NDArray[np.int64] | None = None
    """Which of two texts a token belongs to; None: all the first."""
    answer: NDArray[np.int64] | None = None
    """What the decoder of an encoder-decoder reads [batch, target]."""


@dataclass(frozen=True)
class _Stack:
    """The layers that a text passes through; an encoder-decoder has two stacks."""

    embed: str
    """Path of the graph before the layers."""
    weights: Values
    """Of that graph."""
    numbers: range
    """Of its layers."""
    causal: bool


@dataclass(frozen=True)
class _Layer:
    """A transformer layer."""

    graphs: dict[str, str]
    """Paths of its graphs by what they compute."""
    window: int | None
    """Tokens that attend to each other at most; None: all."""
    weights: Values
    modules: dict[str, tuple[str, tuple[int, int]]]
    """By the name of a linear layer inside it, the name in the model, and how many numbers it reads and computes."""


class BlockModel:
    """The graphs and weights of a trainable bundle."""

    def __init__(self, bundle: Bundle, threads: int, problem: ProblemType | None = None) -> None:
        """Map the weights; graphs are opened when they are first run.

        Args:
            bundle: An open bundle whose manifest has `train`.
            threads: CPU threads.
            problem: What the logits of a text classifier are; None: one class.
        """
        index = bundle.train_index()
        self._graphs = graphs = BlockGraphs(bundle.path, index["tensors"], threads)
        self.task: Task = bundle.task  # type: ignore[assignment]
        self.head: VocabularyHead | ClassHead
        if "parameters" in index["head"]:
            self.head = ClassHead(graphs, index["head"], self.task, problem)
        else:
            self.head = VocabularyHead(graphs, index["head"], self.task)
        self.answer_start: int | None = bundle.manifest["tokenization"].get("decoder_start")
        """The token with which the decoder of an encoder-decoder begins."""
        self.layers: list[_Layer] = []
        self._stacks = [self._stack(part, index["blocks"]) for part in (index.get("encoder"), index) if part]
        self.linears: dict[str, tuple[int, int]] = dict(
            module for layer in self.layers for module in layer.modules.values()
        )
        """Inputs and outputs of each linear layer that can be adapted, by its name in the model."""

    def _stack(self, index: Mapping[str, Any], blocks: list[dict[str, Any]]) -> _Stack:
        """Add the layers of a stack to `layers`, and return it."""
        weights, first, causal = self._graphs.weights, len(self.layers), True
        for number, entry in enumerate(index["layers"]):
            block, prefix = blocks[entry["block"]], f"{index['layers_name']}.{number}"
            causal = causal and block["causal"]
            modules = {
                linear["module"]: (f"{prefix}.{linear['module']}", (linear["inputs"], linear["outputs"]))
                for linear in block["linears"]
            }
            self.layers.append(_Layer(block["graphs"], entry["window"], weights.values(entry["weights"]), modules))
        embed = index["embed"]
        return _Stack(embed["graph"], weights.values(embed["weights"]), range(first, len(self.layers)), causal)

    def tokens(self, batch: Batch) -> Tokens:
        """Return the texts of a batch; the decoder of an encoder-decoder reads its labels, one position later."""
        answer = None
        if self.answer_start is not None:
            labels = batch["labels"]
            answer = np.full_like(labels, self.answer_start)
            answer[:, 1:] = np.maximum(labels[:, :-1], 0)
        return Tokens(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"), answer)

    def adapter_values(self, adapter: Mapping[str, Pair], scaling: float) -> list[Values]:
        """Return A and B of each layer as its graphs take them; what is changed in place in the arrays is seen.

        Args:
            adapter: By the name of a linear layer; the other layers get zeros.
            scaling: Factor of B A x.
        """
        factor = as_value(np.array(scaling, np.float32))
        return [
            {"scaling": factor}
            | {
                f"lora_{side}.{inner}": as_value(array)
                for inner, (module, sizes) in layer.modules.items()
                for side, array in zip("AB", adapter.get(module) or _zeros(*sizes), strict=True)
            }
            for layer in self.layers
        ]

    def forward(self, tokens: Tokens, adapter: list[Values]) -> tuple[OrtValue, dict[str, OrtValue]]:
        """Return what the last layer computes, and what all graphs read.

        Args:
            tokens: The texts.
            adapter: `adapter_values`.
        """
        x: OrtValue | None = None
        for stack in self._stacks:
            x, shared = self._start(stack, tokens, x)
            for number in stack.numbers:
                x = self._run_layer("forward", number, {"x": x}, shared, adapter)["y"]
        assert x is not None
        return x, shared

    def hidden(self, tokens: Tokens, adapter: list[Values]) -> NDArray[np.float32]:
        """Return what the last layer computes [batch, seq, hidden]."""
        read = tokens.ids if tokens.answer is None else tokens.answer
        found: NDArray[np.float32] = self.forward(tokens, adapter)[0].numpy().reshape(*read.shape, -1)
        return found

    def gradient(
        self,
        tokens: Tokens,
        head: Loss,
        adapter: list[Values],
        gradients: Mapping[str, Pair],
        *,
        recompute: bool,
    ) -> float:
        """Compute a loss, and add its gradient to `gradients`.

        Args:
            tokens: The texts.
            head: Computes the loss, and its gradient by what the last layer computes.
            adapter: `adapter_values`.
            gradients: Of A and B of the layers that are trained.
            recompute: Keep only the inputs of the layers, and compute the rest again on the way back.

        Returns:
            The loss.
        """
        first = next(
            number
            for number, layer in enumerate(self.layers)
            if any(module in gradients for module, _ in layer.modules.values())
        )
        x: OrtValue | None = None
        kept: list[Values] = []
        read: list[dict[str, OrtValue]] = []
        for stack in self._stacks:
            x, shared = self._start(stack, tokens, x)
            read.append(shared)
            for number in stack.numbers:
                forward = "forward" if recompute or number < first else "forward_saved"
                results = self._run_layer(forward, number, {"x": x}, shared, adapter)
                y = results.pop("y")
                if number >= first:
                    kept.append({"x": x, **results})
                x = y
        assert x is not None
        loss, dx = head(x, shared)
        backward = "backward_recompute" if recompute else "backward"
        for stack, shared in zip(reversed(self._stacks), reversed(read), strict=True):
            source: NDArray[np.float32] | None = None
            for number in reversed(stack.numbers):
                if number < first:
                    return loss
                results = self._run_layer(backward, number, {"dy": dx, **kept.pop()}, shared, adapter)
                dx = results["dx"]
                if "dsource" in results:
                    part = results["dsource"].numpy()
                    source = part if source is None else source + part
                self._add(number, results, gradients)
            if source is not None:
                dx = as_value(source)
        return loss

    def _add(self, number: int, results: Values, gradients: Mapping[str, Pair]) -> None:
        """Add the gradients of a layer's A and B to those that are wanted."""
        for inner, (module, _) in self.layers[number].modules.items():
            if module in gradients:
                for side, total in zip("AB", gradients[module], strict=True):
                    total += results[f"grad.lora_{side}.{inner}"].numpy()

    def rest(self) -> None:
        """Give back what the next pass takes again: memory that the graphs' allocator keeps, and pages of the files."""
        options = ort.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        tokens = Tokens(np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64))
        self._start(self._stacks[0], tokens, None, options)
        self._graphs.weights.forget_pages()

    def _start(
        self, stack: _Stack, tokens: Tokens, source: OrtValue | None, options: ort.RunOptions | None = None
    ) -> tuple[OrtValue, dict[str, OrtValue]]:
        """Return the first layer's input, and what all graphs of a stack read.

        Args:
            stack: The stack.
            tokens: The texts.
            source: What the stack before has computed; None: it is the first.
            options: Of the run of its first graph.

        Returns:
            Both.
        """
        ids, mask = tokens.ids, tokens.mask
        shared: dict[str, OrtValue] = {}
        if source is not None:
            assert tokens.answer is not None
            shared["encoder_hidden_states"] = source
            shared["source_mask"] = as_value(_attention_mask(mask, False, None))
            ids, mask = tokens.answer, np.ones_like(tokens.answer)
        types = np.zeros_like(ids) if tokens.types is None else tokens.types
        shared |= {"input_ids": as_value(ids), "attention_mask": as_value(mask), "token_type_ids": as_value(types)}
        for window in {self.layers[number].window for number in stack.numbers}:
            shared[_mask_name(window)] = as_value(_attention_mask(mask, stack.causal, window))
        return self._graphs.run(stack.embed, shared, stack.weights, options=options)["x"], shared

    def _run_layer(
        self, graph: str, number: int, values: Values, shared: Values, adapter: list[Values]
    ) -> dict[str, OrtValue]:
        layer = self.layers[number]
        mask = {"mask": shared[_mask_name(layer.window)]}
        return self._graphs.run(layer.graphs[graph], values, mask, adapter[number], layer.weights, shared)


@cache
def _zeros(inputs: int, outputs: int) -> Pair:
    """Return a pair of rank 1 that changes nothing."""
    return np.zeros((1, inputs), np.float32), np.zeros((outputs, 1), np.float32)


def _mask_name(window: int | None) -> str:
    return f"mask of {window}"


def _attention_mask(mask: NDArray[np.int64], causal: bool, window: int | None) -> NDArray[np.float32]:
    """Return 0 where a token attends, else the lowest number: [1 or batch, 1, 1, seq or 1, seq].

    Padding is on the right: where tokens see only earlier ones, none of them sees it.
    """
    if not causal:
        return np.where(mask > 0, np.float32(0), LOWEST)[:, None, None, None]
    at = np.arange(mask.shape[1])
    apart = at[:, None] - at[None, :]
    seen = (apart >= 0) if window is None else (apart >= 0) & (apart < window)
    return np.where(seen, np.float32(0), LOWEST)[None, None, None]
