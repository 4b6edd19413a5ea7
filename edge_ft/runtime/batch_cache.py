"""The KV caches of several texts in one memory, so that one run of the graph generates a token of each."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_ft.runtime.cache import STEP, CacheShape, KVCache
from edge_ft.runtime.session import output_size, running

__all__ = ["BatchCache"]


class BatchCache:
    """The keys and values of some texts of different lengths; the graph appends a token to each in one run.

    A prompt is read by a `KVCache` and copied here: with a past, GroupQueryAttention reads several tokens in a run of
    one text only.

    Attributes:
        lengths: Tokens of each text.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        shape: CacheShape,
        slots: int,
        extra_inputs: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:
        """Open an empty cache.

        Args:
            session: The graph.
            shape: What it caches.
            slots: Most texts that it holds.
            extra_inputs: Values of the graph's LoRA inputs.
        """
        self.lengths: list[int] = []
        self._session, self._shape, self._slots = session, shape, slots
        self._binding = session.io_binding()
        self._capacity = 0
        self._bound = 0
        """Texts for which memory is bound to the graph; 0 before the first run and after a change."""
        self._buffers = {name: np.zeros((slots, shape.kv_heads, 0, shape.head_dim), np.float32) for name in self._names}
        self._logits = np.zeros((slots, 1, output_size(session, "logits")), np.float32)
        for name, array in {**(extra_inputs or {}), "num_logits_to_keep": np.array(1, np.int64)}.items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))

    @property
    def _names(self) -> list[str]:
        return self._shape.names()

    def nbytes(self, texts: int, length: int) -> int:
        """Return the memory of so many texts, the longest of which has this length, in bytes."""
        positions = -(-length // STEP) * STEP
        return texts * positions * len(self._names) * self._shape.kv_heads * self._shape.head_dim * 4

    def add(self, cache: KVCache) -> None:
        """Copy a text that was read; it becomes the last one."""
        self._reserve(len(cache.ids) + 1)
        cache.copy_to(self._buffers, len(self.lengths))
        self.lengths.append(len(cache.ids))

    def drop(self, text: int) -> None:
        """Drop a text; the last one takes its place."""
        last = len(self.lengths) - 1
        if text != last:
            for buffer in self._buffers.values():
                buffer[text, :, : self.lengths[last]] = buffer[last, :, : self.lengths[last]]
            self.lengths[text] = self.lengths[last]
        self.lengths.pop()

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Read a further token of each text.

        Args:
            tokens: One for each.

        Returns:
            Logits [texts, vocab] after them, in memory that the next call overwrites.
        """
        self.lengths = [length + 1 for length in self.lengths]
        self._reserve(max(self.lengths))
        if self._bound != len(tokens):
            self._bind(len(tokens))
        lengths = np.array(self.lengths)
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        self._binding.bind_cpu_input("input_ids", np.array(tokens, np.int64)[:, None])
        self._binding.bind_cpu_input("attention_mask", mask)
        with running(self._session):
            self._session.run_with_iobinding(self._binding)
        return self._logits[: len(tokens), 0]

    def _bind(self, texts: int) -> None:
        """Give the graph the memory of the first texts."""
        for name, buffer in self._buffers.items():
            value = ort.OrtValue.ortvalue_from_numpy(buffer[:texts])  # the same memory, not a copy
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            self._binding.bind_ortvalue_output(f"present.{name}", value)
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self._logits[:texts]))
        self._bound = texts

    def _reserve(self, length: int) -> None:
        if length <= self._capacity:
            return
        self._capacity, self._bound = -(-length // STEP) * STEP, 0
        size = (self._slots, self._shape.kv_heads, self._capacity, self._shape.head_dim)
        for name, old in self._buffers.items():
            grown = np.zeros(size, np.float32)  # memory of slots that are never used is never touched
            for text, used in enumerate(self.lengths):
                used = min(used, old.shape[2])
                grown[text, :, :used] = old[text, :, :used]
            self._buffers[name] = grown
