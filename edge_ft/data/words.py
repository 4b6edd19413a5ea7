"""Tags of words: where a word begins in the tokens of its text, and which words a text has."""

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
    """Where each word's first token lies in `input_ids`; None for a word that is cut off, or has no token at all."""
    cut: int
    """Tokens lost to the longest sequence."""


def encode_words(tokenizer: TextTokenizer, words: Sequence[str], max_length: int) -> Words:
    """Words one behind the other with a blank between, in the tokenizer's own frame ([CLS] ... [SEP])."""
    ids: list[int] = []
    starts: list[int | None] = []
    for at, word in enumerate(words):
        # A byte-level tokenizer writes the blank before a word into its first token.
        found = tokenizer.encode(f" {word}" if at else word)
        starts.append(len(ids) if found else None)
        ids += found
    framed = tokenizer.frame(ids, max_length)
    first, kept = framed.start, len(ids) - framed.cut
    placed = [None if start is None or start >= kept else first + start for start in starts]
    return Words(framed.ids, placed, framed.cut)


def split_words(text: str) -> list[tuple[int, int]]:
    """Where the words of a text lie: runs of letters and digits with what joins them (3.5, co-op, o'clock), and each
    other sign by itself, as annotated corpora write them."""
    return [match.span() for match in _WORD.finditer(text)]
