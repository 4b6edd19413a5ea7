"""Tags of words from a token-classification bundle."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from edge_ft.data import Framed, encode_words, split_words
from edge_ft.runtime.encoder import Encoder
from edge_ft.runtime.token_scores import log_softmax

__all__ = ["TaggedText", "TaggedWord", "TextTagger"]


@dataclass(frozen=True)
class TaggedWord:
    """One word of a text."""

    text: str
    start: int
    """First character in the text; for a list of words, in the text of the words joined by spaces."""
    end: int
    label: str | None
    """None for a word that exceeds `max_length`, and for one that has no tokens."""
    score: float | None
    """Probability of the label."""


@dataclass(frozen=True)
class TaggedText:
    """The words of one text and their tags."""

    words: list[TaggedWord]
    prompt_tokens: int
    """Tokens read, [CLS] and [SEP] included."""
    cut: int
    """Tokens that exceeded `max_length` and were not read."""

    @property
    def tags(self) -> list[str | None]:
        """The tag of each word."""
        return [word.label for word in self.words]


class TextTagger(Encoder):
    """An open token-classification bundle."""

    def tag(self, texts: Sequence[str | Sequence[str]]) -> list[TaggedText]:
        """Tag the words of texts.

        Args:
            texts: Texts, which are split into words, or lists of words.

        Returns:
            The tagged words of each, in order.
        """
        split = [_words(text) for text in texts]
        encoded = [
            encode_words(self.tokenizer, [word for word, *_ in words], self.rendering.max_length) for words in split
        ]

        def read(row: int, logits: NDArray[np.float32]) -> TaggedText:
            framed, starts = encoded[row]
            probabilities, tagged = np.exp(log_softmax(logits)), []  # [seq, labels]
            for (word, begin, end), start in zip(split[row], starts, strict=True):
                best = None if start is None else int(probabilities[start].argmax())
                tagged.append(
                    TaggedWord(
                        word,
                        begin,
                        end,
                        None if best is None else self.labels[best],
                        None if best is None else float(probabilities[start, best]),
                    )
                )
            return TaggedText(tagged, len(framed.ids), framed.cut)

        return self.map_outputs(read, [Framed(one.ids, [0] * len(one.ids), 0, 0) for one, _ in encoded])


def _words(text: str | Sequence[str]) -> list[tuple[str, int, int]]:
    """Return each word with its first character and the one after its last."""
    if isinstance(text, str):
        return [(text[start:end], start, end) for start, end in split_words(text)]
    starts = accumulate((len(word) + 1 for word in text), initial=0)
    return [(word, start, start + len(word)) for word, start in zip(text, starts, strict=False)]
