"""The words of a text, and the position of each word's first token."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from edge_ft.data.tokenizer import TextTokenizer

__all__ = ["Words", "encode_words", "split_words"]

_WORD = re.compile(r"\w+(?:[.,:'’\-/]\w+)*|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a row in token ids."""

    input_ids: list[int]
    starts: list[int | None]
    """Position of each word's first token in `input_ids`; None for a word that was cut off or has no token."""
    cut: int
    """Tokens that were cut off."""


def encode_words(tokenizer: TextTokenizer, words: Sequence[str], max_length: int) -> Words:
    """Return the words joined by spaces, between the tokenizer's own special tokens ([CLS] ... [SEP])."""
    ids: list[int] = []
    starts: list[int | None] = []
    for at, word in enumerate(words):
        # A byte-level tokenizer puts the space before a word into the word's first token.
        found = tokenizer.encode(f" {word}" if at else word)
        starts.append(len(ids) if found else None)
        ids += found
    framed = tokenizer.frame(ids, max_length)
    first, kept = framed.start, len(ids) - framed.cut
    placed = [None if start is None or start >= kept else first + start for start in starts]
    return Words(framed.ids, placed, framed.cut)


def split_words(text: str) -> list[tuple[int, int]]:
    """Return the start and the end of each word of a text.

    A word is a run of letters and digits with the signs that join them (3.5, co-op, o'clock), or any other single
    sign, as in annotated corpora.
    """
    return [match.span() for match in _WORD.finditer(text)]
