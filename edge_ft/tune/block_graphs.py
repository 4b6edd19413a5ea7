"""The graphs of a trainable bundle, opened when they are first run, and its weights, memory-mapped."""

import mmap
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime import OrtValue
from safetensors.numpy import load_file

from edge_ft.runtime.session import open_session

__all__ = ["BlockGraphs", "Values", "as_value"]

Values = Mapping[str, OrtValue]
"""Inputs or outputs of a graph by name."""


class BlockGraphs:
    """The graphs in a bundle's folder.

    Attributes:
        weights: The tensors that they read.
    """

    def __init__(self, folder: Path, places: Mapping[str, dict[str, Any]], threads: int) -> None:
        """Open nothing yet.

        Args:
            folder: The bundle.
            places: By its name, where a tensor lies.
            threads: CPU threads.
        """
        self.weights = Weights(folder, places)
        self._folder, self._threads = folder, threads
        self._sessions: dict[str, tuple[ort.InferenceSession, list[str], list[str]]] = {}

    def run(self, graph: str, *values: Values, options: ort.RunOptions | None = None) -> dict[str, OrtValue]:
        """Run a graph over the values that it reads, and return its outputs."""
        if graph not in self._sessions:
            session = open_session(self._folder / graph, self._threads, shares_memory=True)
            names = ([value.name for value in side] for side in (session.get_inputs(), session.get_outputs()))
            self._sessions[graph] = (session, *names)
        session, inputs, outputs = self._sessions[graph]
        given: ChainMap[str, OrtValue] = ChainMap(*map(dict, values))
        results = session.run_with_ort_values(outputs, {name: given[name] for name in inputs}, options)
        return dict(zip(outputs, results, strict=True))


class Weights:
    """The tensors of a bundle, memory-mapped."""

    def __init__(self, folder: Path, places: Mapping[str, dict[str, Any]]) -> None:
        """Map nothing yet."""
        self._folder, self._places = folder, places
        self._maps: dict[str, NDArray[np.uint8]] = {}
        self._inline: dict[str, NDArray[Any]] = {}
        self._values: dict[str, OrtValue] = {}

    def values(self, table: Mapping[str, str]) -> Values:
        """Return the tensors that a graph reads, by the names of its inputs."""
        return {name: self.tensor(tensor) for name, tensor in table.items()}

    def tensor(self, name: str) -> OrtValue:
        """Return a tensor by its name."""
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
            self._values[name] = as_value(array)
        return self._values[name]

    def forget_pages(self) -> None:
        """Let the pages of the files leave this process's memory; a page comes back when it is read."""
        for mapped in self._maps.values():
            base = mapped.base
            if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                base.madvise(mmap.MADV_DONTNEED)

    def _map(self, file: str) -> NDArray[np.uint8]:
        if file not in self._maps:
            self._maps[file] = np.memmap(self._folder / file, np.uint8, "r")
        return self._maps[file]


def as_value(array: NDArray[Any]) -> OrtValue:
    """Return an array as ONNX Runtime takes it, over the same memory."""
    return OrtValue.ortvalue_from_numpy(array)
