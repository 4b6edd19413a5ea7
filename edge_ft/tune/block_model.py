"""A bundle's frozen model as it learns: its layers run one after the other, forward and back, by ONNX Runtime.

Layers that compute the same share their graphs. Weights are the bytes of the bundle's own data file, memory-mapped; A
and B of every linear layer are inputs too. Between the layers there is nothing but numpy.
"""

from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime import OrtValue
from safetensors.numpy import load_file

from edge_ft.artifacts import Bundle
from edge_ft.errors import BundleError
from edge_ft.runtime.session import open_session
from edge_ft.utf8 import read_json

__all__ = ["BlockModel", "Pair", "Targets", "Values"]

LOWEST = np.float32(-3.4e38)
"""What is added where a token does not attend."""
HEAD_ROWS = 128
"""Labelled positions whose logits are in memory at a time."""
Pair = tuple[NDArray[np.float32], NDArray[np.float32]]
"""A [rank, inputs] and B [outputs, rank] of a linear layer."""
Values = Mapping[str, OrtValue]
"""Inputs or outputs of a graph by name."""


@dataclass(frozen=True)
class Targets:
    """What a batch is to predict."""

    at: NDArray[np.bool_]
    """Positions whose next token is a target [batch, seq]."""
    labels: NDArray[np.int64]
    """The targets, in the order of `at`."""
    scale: float = 1.0
    """Factor of the summed loss."""


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

    def __init__(self, bundle: Bundle, threads: int) -> None:
        """Map the weights; graphs are opened when they are first run.

        Args:
            bundle: An open bundle whose manifest has `train`.
            threads: CPU threads.
        """
        self._folder, self._threads = bundle.path, threads
        self._sessions: dict[str, tuple[ort.InferenceSession, list[str], list[str]]] = {}
        index = read_json(bundle.path / bundle.manifest["train"]["index"], BundleError)
        weights = _Weights(bundle.path, index["tensors"])
        self._causal = all(block["causal"] for block in index["blocks"])
        self._embed, self._head = (weights.values(index[part]["weights"]) for part in ("embed", "head"))
        self._embed_graph, self._head_graph = index["embed"]["graph"], index["head"]["graph"]
        self._score_graph = index["head"]["score"]
        self.layers: list[_Layer] = []
        for number, entry in enumerate(index["layers"]):
            block, prefix = index["blocks"][entry["block"]], f"{index['layers_name']}.{number}"
            modules = {
                linear["module"]: (f"{prefix}.{linear['module']}", (linear["inputs"], linear["outputs"]))
                for linear in block["linears"]
            }
            self.layers.append(_Layer(block["graphs"], entry["window"], weights.values(entry["weights"]), modules))
        self.linears: dict[str, tuple[int, int]] = dict(
            module for layer in self.layers for module in layer.modules.values()
        )
        """Inputs and outputs of each linear layer that can be adapted, by its name in the model."""

    def adapter_values(self, adapter: Mapping[str, Pair], scaling: float) -> list[Values]:
        """Return A and B of each layer as its graphs take them; what is changed in place in the arrays is seen.

        Args:
            adapter: By the name of a linear layer; the other layers get zeros.
            scaling: Factor of B A x.
        """
        factor = _value(np.array(scaling, np.float32))
        return [
            {"scaling": factor}
            | {
                f"lora_{side}.{inner}": _value(array)
                for inner, (module, sizes) in layer.modules.items()
                for side, array in zip("AB", adapter.get(module) or _zeros(*sizes), strict=True)
            }
            for layer in self.layers
        ]

    def hidden(self, ids: NDArray[np.int64], mask: NDArray[np.int64], adapter: list[Values]) -> NDArray[np.float32]:
        """Return what the last layer computes [batch, seq, hidden].

        Args:
            ids: Tokens [batch, seq], padded on the right.
            mask: 1 on tokens and 0 on padding.
            adapter: `adapter_values`.
        """
        x, shared = self._start(ids, mask)
        for number in range(len(self.layers)):
            x = self._run_layer("forward", number, {"x": x}, shared, adapter)["y"]
        found: NDArray[np.float32] = x.numpy().reshape(*ids.shape, -1)
        return found

    def score(self, hidden: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return nll (nats, float32) and likeliest token of rows [rows, hidden] with these labels."""
        nll, predicted = np.zeros(len(labels), np.float32), np.zeros(len(labels), np.int64)
        for rows, values in _head_rows(hidden, labels):
            found = self._run(self._score_graph, values, self._head)
            nll[rows], predicted[rows] = found["nll"].numpy()[:, 0], found["predicted"].numpy()[:, 0]
        return nll, predicted

    def gradient(
        self,
        tokens: tuple[NDArray[np.int64], NDArray[np.int64]],
        targets: Targets,
        adapter: list[Values],
        gradients: Mapping[str, Pair],
        *,
        recompute: bool,
    ) -> float:
        """Add the gradient of the summed loss * scale to `gradients`.

        Args:
            tokens: Ids and mask as in `hidden`.
            targets: What is to be predicted.
            adapter: `adapter_values`.
            gradients: Of A and B of the layers that are trained.
            recompute: Keep only the inputs of the layers, and compute the rest again on the way back.

        Returns:
            The summed loss * scale.
        """
        first = next(
            number
            for number, layer in enumerate(self.layers)
            if any(module in gradients for module, _ in layer.modules.values())
        )
        x, shared = self._start(*tokens)
        kept: list[Values] = []
        for number in range(len(self.layers)):
            forward = "forward" if recompute or number < first else "forward_saved"
            results = self._run_layer(forward, number, {"x": x}, shared, adapter)
            y = results.pop("y")
            if number >= first:
                kept.append({"x": x, **results})
            x = y
        loss, dx = self._head_gradient(x.numpy(), targets)
        backward = "backward_recompute" if recompute else "backward"
        for number in range(len(self.layers) - 1, first - 1, -1):
            results = self._run_layer(backward, number, {"dy": dx, **kept.pop()}, shared, adapter)
            dx = results["dx"]
            for inner, (module, _) in self.layers[number].modules.items():
                if module in gradients:
                    for side, total in zip("AB", gradients[module], strict=True):
                        total += results[f"grad.lora_{side}.{inner}"].numpy()
        return loss

    def _head_gradient(self, x: NDArray[np.float32], targets: Targets) -> tuple[float, OrtValue]:
        """Return the summed loss * scale, and its gradient by the last layer's output."""
        rows_of = x.reshape(*targets.at.shape, -1)  # some layers flatten batch and sequence
        scale = {"scale": _value(np.array(targets.scale, np.float32))}
        chosen, loss = rows_of[targets.at], 0.0
        for rows, values in _head_rows(chosen, targets.labels):
            found = self._run(self._head_graph, values, self._head, scale)
            loss += float(found["nll"].numpy().sum(dtype=np.float64)) * targets.scale
            chosen[rows] = found["dx"].numpy()
        dx = np.zeros_like(rows_of)
        dx[targets.at] = chosen
        return loss, _value(dx.reshape(x.shape))

    def _start(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> tuple[OrtValue, dict[str, OrtValue]]:
        """Return the first layer's input, and what all layers read."""
        shared = {"input_ids": _value(ids), "attention_mask": _value(mask)}
        x = self._run(self._embed_graph, shared, self._embed)["x"]
        for window in {layer.window for layer in self.layers}:
            shared[_mask_name(window)] = _value(_attention_mask(mask, self._causal, window))
        return x, shared

    def _run_layer(
        self, graph: str, number: int, values: Values, shared: Values, adapter: list[Values]
    ) -> dict[str, OrtValue]:
        layer = self.layers[number]
        mask = {"mask": shared[_mask_name(layer.window)]}
        return self._run(layer.graphs[graph], values, mask, adapter[number], layer.weights, shared)

    def _run(self, graph: str, *values: Values) -> dict[str, OrtValue]:
        """Run a graph over the values that it reads, and return its outputs."""
        if graph not in self._sessions:
            session = open_session(self._folder / graph, self._threads, shares_memory=True)
            names = ([value.name for value in side] for side in (session.get_inputs(), session.get_outputs()))
            self._sessions[graph] = (session, *names)
        session, inputs, outputs = self._sessions[graph]
        given: ChainMap[str, OrtValue] = ChainMap(*map(dict, values))
        results = session.run_with_ort_values(outputs, {name: given[name] for name in inputs})
        return dict(zip(outputs, results, strict=True))


class _Weights:
    """The tensors of a bundle, memory-mapped."""

    def __init__(self, folder: Path, places: dict[str, dict[str, Any]]) -> None:
        self._folder, self._places = folder, places
        self._maps: dict[str, NDArray[np.uint8]] = {}
        self._inline: dict[str, NDArray[Any]] = {}
        self._values: dict[str, OrtValue] = {}

    def values(self, table: Mapping[str, str]) -> Values:
        """Return the tensors that a graph reads, by the names of its inputs."""
        return {name: self._tensor(tensor) for name, tensor in table.items()}

    def _tensor(self, name: str) -> OrtValue:
        if name not in self._values:
            place = self._places[name]
            if "offset" in place:
                kind, count = np.dtype(place["dtype"]), int(np.prod(place["shape"]))
                start = place["offset"]
                raw = self._map(place["file"])[start : start + count * kind.itemsize]
                array = raw.view(kind).reshape(place["shape"])
            else:
                self._inline = self._inline or load_file(self._folder / place["file"])
                array = self._inline[name]
            self._values[name] = _value(array)
        return self._values[name]

    def _map(self, file: str) -> NDArray[np.uint8]:
        if file not in self._maps:
            self._maps[file] = np.memmap(self._folder / file, np.uint8, "r")
        return self._maps[file]


@cache
def _zeros(inputs: int, outputs: int) -> Pair:
    """Return a pair of rank 1 that changes nothing."""
    return np.zeros((1, inputs), np.float32), np.zeros((outputs, 1), np.float32)


def _value(array: NDArray[Any]) -> OrtValue:
    """Return an array as ONNX Runtime takes it, over the same memory."""
    return OrtValue.ortvalue_from_numpy(array)


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


def _head_rows(hidden: NDArray[np.float32], labels: NDArray[np.int64]) -> Iterator[tuple[slice, dict[str, OrtValue]]]:
    """Yield some rows at a time, with the inputs of the head for them."""
    for start in range(0, len(labels), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        yield rows, {"x": _value(hidden[rows]), "labels": _value(labels[rows, None])}
