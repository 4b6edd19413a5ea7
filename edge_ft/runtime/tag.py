"""Tags of words from a token-classification bundle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ft.data import Batch, target_mask
from edge_ft.data.tokenizer import Framed
from edge_ft.data.words import encode_words, split_words
from edge_ft.runtime.encoder import Encoder, log_softmax

__all__ = ["TaggedText", "TaggedWord", "TextTagger"]


@dataclass(frozen=True)
class TaggedWord:
    """One word of a text."""

    text: str
    start: int
    """Where it begins in the text (of words alone: in their text with blanks between), in characters."""
    end: int
    label: str | None
    """None for a word beyond what the model reads, and for one of which its tokenizer makes nothing."""
    score: float | None
    """Probability of the label."""


@dataclass(frozen=True)
class TaggedText:
    """The words of one text and their tags."""

    words: list[TaggedWord]
    prompt_tokens: int
    """Tokens read, [CLS] and [SEP] included."""
    cut: int
    """Tokens that were beyond what the model reads."""

    @property
    def tags(self) -> list[str | None]:
        """A tag for each word."""
        return [word.label for word in self.words]


class TextTagger(Encoder):
    """An open token-classification bundle.

    Raises:
        BundleError: its manifest names no tags.
    """

    needs_labels = True

    def tag(self, texts: Sequence[str | Sequence[str]]) -> list[TaggedText]:
        """Tag every text, in order: a text is split into words first, a list is words as they are."""
        split = [_words(text) for text in texts]
        read = [
            encode_words(self.tokenizer, [word for word, *_ in words], self.rendering.max_length) for words in split
        ]
        found: list[list[TaggedWord]] = [[]] * len(split)
        for row, logits in self.of_texts([Framed(one.input_ids, [0] * len(one.input_ids), 0, 0) for one in read]):
            probabilities = np.exp(log_softmax(logits))  # [seq, labels]
            found[row] = []
            for (word, begin, end), start in zip(split[row], read[row].starts, strict=True):
                best = None if start is None else int(probabilities[start].argmax())
                found[row].append(
                    TaggedWord(
                        word,
                        begin,
                        end,
                        None if best is None else self.labels[best],
                        None if best is None else float(probabilities[start, best]),
                    )
                )
        return [TaggedText(words, len(one.input_ids), one.cut) for words, one in zip(found, read, strict=True)]

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Negative log-likelihood (nats) of each word's tag, and the likeliest one, at the words' first tokens."""
        return nll_at_targets(self.of_batch(batch), batch["labels"], "token-classification")


def nll_at_targets(
    logits: NDArray[np.float32], labels: NDArray[np.int64], task: str
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Nll and likeliest class where there is a label [batch, seq], else 0 and -100; logits [batch, seq, classes]."""
    at = target_mask(labels, task)
    nll, likeliest = np.zeros(labels.shape, np.float32), np.full(labels.shape, -100, np.int64)
    chosen = log_softmax(logits[at])
    nll[at] = -chosen[np.arange(len(chosen)), labels[at]]
    likeliest[at] = chosen.argmax(axis=-1)
    return nll, likeliest


def _words(text: str | Sequence[str]) -> list[tuple[str, int, int]]:
    """Words with the characters they take."""
    if isinstance(text, str):
        return [(text[start:end], start, end) for start, end in split_words(text)]
    words, start = [], 0
    for word in text:
        words.append((word, start, start + len(word)))
        start += len(word) + 1
    return words
