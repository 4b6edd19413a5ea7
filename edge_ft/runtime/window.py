"""What happens at the model's limit: the beginning of a text is dropped, so that its end and the answer fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_ft.runtime.cache import KVCache

__all__ = ["Window"]


@dataclass
class Window:
    """The part of a text that the model reads: its first token where that is BOS, and its end."""

    limit: int
    """Tokens that the model can read."""
    kept: int
    """Tokens at the beginning that are never dropped."""
    dropped: int = 0
    """Tokens that were dropped so far."""

    def end_of(self, ids: Sequence[int], room: int) -> list[int]:
        """Return at most `room` of the tokens, more than are kept: the kept ones and the end."""
        surplus = max(0, len(ids) - room)
        self.dropped += surplus
        return [*ids[: self.kept], *ids[self.kept + surplus :]]

    def shifting(self, cache: KVCache) -> Callable[[Sequence[int]], NDArray[np.float32]]:
        """Return `cache.extend`, but where the limit would be exceeded, half of the text is dropped first.

        The other half is read again, at its new positions: right for every kind of position encoding, and as slow as
        a prompt of that length.
        """

        def extend(ids: Sequence[int]) -> NDArray[np.float32]:
            whole = [*cache.ids, *ids]
            if len(whole) <= self.limit:
                return cache.extend(ids)
            rest = self.end_of(whole, max(self.limit // 2, self.kept + 1))
            return cache.extend(rest[cache.rewind(rest) :])

        return extend
