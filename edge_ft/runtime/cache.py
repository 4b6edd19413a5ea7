"""The KV cache of one text, in buffers that the graph appends to in place.

Past and present are bound to the same memory, so GroupQueryAttention writes the new positions into it and copies
nothing. The buffers start empty and grow in steps: memory use follows the length of the text, not the model's limit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_ft.artifacts import Bundle
from edge_ft.config import Minimum, from_plain
from edge_ft.errors import BundleError
from edge_ft.runtime.session import output_size, running

__all__ = ["STEP", "CacheShape", "KVCache"]

STEP = 256
"""Positions that the buffers grow by."""
_SHORT = 8
"""Most tokens in one run of the graph for decoding."""
_PREFILL = 512
"""Most tokens in one run, so that attention scores take memory of prompt x run, not of prompt x prompt."""


@dataclass(frozen=True)
class CacheShape:
    """What a decoder caches for a token: a key and a value [kv_heads, head_dim] in each of `layers`."""

    layers: Annotated[int, Minimum(1)]
    kv_heads: Annotated[int, Minimum(1)]
    head_dim: Annotated[int, Minimum(1)]

    @classmethod
    def of(cls, bundle: Bundle) -> "CacheShape":
        """Return the shape that a bundle's manifest names.

        Raises:
            BundleError: it names none.
        """
        try:
            return from_plain(cls, bundle.manifest.get("cache"), "cache")
        except ValueError as error:
            raise BundleError(f"{bundle.path / 'manifest.json'}: {error}; export it again") from error

    def names(self) -> list[str]:
        """Return `LAYER.key` and `LAYER.value` of every layer."""
        return [f"{layer}.{kind}" for layer in range(self.layers) for kind in ("key", "value")]


class KVCache:
    """The keys and values of the tokens read so far; runs the graph on further tokens.

    Attributes:
        ids: The tokens read so far.
        capacity: Positions for which the buffers have memory.
        vocabulary: Size of the logits.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        shape: CacheShape,
        extra_inputs: Mapping[str, NDArray[np.float32]] | None = None,
        prefill: ort.InferenceSession | None = None,
    ) -> None:
        """Open an empty cache.

        Args:
            session: The graph.
            shape: What it caches.
            extra_inputs: Values of its LoRA inputs.
            prefill: A graph of the same model, with the same inputs and outputs, for runs of many tokens; None is
                `session`.
        """
        self.ids: list[int] = []
        self.capacity = 0
        self._shape = shape
        self._short = (session, session.io_binding())
        self._long = self._short if prefill is None else (prefill, prefill.io_binding())
        self._buffers = {name: np.zeros((1, shape.kv_heads, 0, shape.head_dim), np.float32) for name in shape.names()}
        self.vocabulary = output_size(session, "logits")
        self._logits = np.zeros((1, 1, self.vocabulary), np.float32)
        for _, binding in self._graphs():
            binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self._logits))
            for name, array in (extra_inputs or {}).items():
                # `bind_cpu_input` knows no overridable initializers.
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))

    @property
    def nbytes(self) -> int:
        """Memory of the key and value buffers in bytes."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def extend(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Read further tokens.

        Args:
            ids: At least one token.

        Returns:
            Logits [vocab] after the last token, in memory that the next call overwrites.
        """
        self._reserve(len(self.ids) + len(ids))
        for start in range(0, len(ids), _PREFILL):
            self._run(ids[start : start + _PREFILL])
        return self._logits[0, 0]

    def extend_each(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Read a few further tokens and keep the logits of each.

        Args:
            ids: At least one token.

        Returns:
            Logits [ids, vocab] after each token, in memory of their own.
        """
        self._reserve(len(self.ids) + len(ids))
        every = np.zeros((1, len(ids), self.vocabulary), np.float32)
        self._bind_logits(every, 0)
        try:
            self._run(ids)
        finally:
            self._bind_logits(self._logits, 1)
        return every[0]

    def rewind(self, ids: Sequence[int]) -> int:
        """Keep the cached tokens that `ids` begins with, and drop the rest.

        The last token of `ids` is never kept: it must be read again for its logits.

        Args:
            ids: The tokens to be read next, from the start of the text.

        Returns:
            How many tokens of `ids` are in the cache.
        """
        pairs = enumerate(zip(self.ids, ids[:-1], strict=False))
        same = next((at for at, (old, new) in pairs if old != new), min(len(self.ids), len(ids) - 1))
        del self.ids[same:]
        return same

    def truncate(self, length: int) -> None:
        """Keep the first so many of the cached tokens."""
        del self.ids[length:]

    def copy_to(self, buffers: Mapping[str, NDArray[np.float32]], text: int) -> None:
        """Copy the keys and values to a text of other buffers [texts, kv_heads, positions, head_dim]."""
        for name, buffer in self._buffers.items():
            buffers[name][text, :, : len(self.ids)] = buffer[0, :, : len(self.ids)]

    def _graphs(self) -> list[tuple[ort.InferenceSession, ort.IOBinding]]:
        """The graphs in use and what is bound to their inputs and outputs."""
        return [self._short] if self._long is self._short else [self._short, self._long]

    def _run(self, ids: Sequence[int]) -> None:
        session, binding = self._short if len(ids) <= _SHORT else self._long
        binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
        binding.bind_cpu_input("attention_mask", self._mask[:, : len(self.ids) + len(ids)])
        with running(session):
            session.run_with_iobinding(binding)
        self.ids.extend(ids)

    def _bind_logits(self, logits: NDArray[np.float32], keep: int) -> None:
        """Make the graph write the logits of the last `keep` tokens of a run into `logits`; 0 is all tokens."""
        number = ort.OrtValue.ortvalue_from_numpy(np.array(keep, np.int64))
        for _, binding in self._graphs():
            binding.bind_ortvalue_input("num_logits_to_keep", number)
            binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))

    def _reserve(self, length: int) -> None:
        if length <= self.capacity:
            return
        self.capacity = -(-length // STEP) * STEP
        self._mask = np.ones((1, self.capacity), np.int64)
        used = len(self.ids)
        size = (1, self._shape.kv_heads, self.capacity, self._shape.head_dim)
        for name, old in self._buffers.items():
            grown = np.zeros(size, np.float32)
            grown[:, :, :used] = old[:, :, :used]
            value = ort.OrtValue.ortvalue_from_numpy(grown)  # the same memory, not a copy
            for session, binding in self._graphs():
                with running(session):  # a graph without such an input refuses it
                    binding.bind_ortvalue_input(f"past_key_values.{name}", value)
                    binding.bind_ortvalue_output(f"present.{name}", value)
            self._buffers[name] = grown
