"""What a bundle answers while it is trained: as `edge-ft run` does, by the graphs that keep keys and values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

from edge_ft.artifacts import Bundle
from edge_ft.runtime import Seq2SeqGenerator, TextGenerator, load
from edge_ft.runtime.adapters import Values

__all__ = ["BundleAnswers"]


class BundleAnswers:
    """Opens the graphs of a bundle to answer with an adapter; they hold the weights a second time."""

    def __init__(self, bundle: Bundle, threads: int, stop_ids: frozenset[int]) -> None:
        """Open nothing yet.

        Args:
            bundle: What is trained.
            threads: CPU threads.
            stop_ids: The tokens that end an answer.
        """
        self._bundle, self._threads, self._stop_ids = bundle, threads, stop_ids
        self._kept: dict[bool, TextGenerator | Seq2SeqGenerator] | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep open what answers inside this block, in which the adapter does not change.

        Yields:
            Nothing.
        """
        before, self._kept = self._kept, {} if self._kept is None else self._kept
        try:
            yield
        finally:
            self._kept = before

    @property
    def is_open(self) -> bool:
        """Whether graphs are open, inside `kept`."""
        return bool(self._kept)

    def opened(self, adapter: Values | Literal["none"]) -> TextGenerator | Seq2SeqGenerator:
        """Return what answers with the values of an adapter, or as the base."""
        kept, tuned = {} if self._kept is None else self._kept, adapter != "none"
        if tuned not in kept:
            kept.clear()  # the other one has the weights, too
            generator = cast(
                "TextGenerator | Seq2SeqGenerator",
                load(self._bundle, threads=self._threads, adapter=adapter, engine="exact"),
            )
            generator.stop_ids = self._stop_ids
            kept[tuned] = generator
        return kept[tuned]
