"""From a record to token ids for encoders: one function per task."""

import hashlib
import re
from collections.abc import Callable, Sequence
from itertools import accumulate, chain

import numpy as np

from edge_ft.config import Task
from edge_ft.data.batches import IGNORED, Example
from edge_ft.data.classes import class_targets, known_class
from edge_ft.data.records import Record
from edge_ft.data.rendering import Rendering
from edge_ft.data.tokenizer import Framed, TextTokenizer
from edge_ft.errors import ModelError

__all__ = ["ENCODERS", "encode_words", "mask_tokens", "split_words"]

MASKED_SHARE = 0.15
"""Share of a text's tokens that are masked, as in BERT (arXiv:1810.04805)."""


def encode_text(rendering: Rendering, tokenizer: TextTokenizer, record: Record) -> Example:
    """Return one or two texts with their class, classes or number.

    Raises:
        DataError: the rendering does not have this class; the message names the row.
    """
    problem, labels = rendering.problem_type, rendering.labels
    targets = class_targets(record.classes, problem, labels, f"row {record.row}", rendering.columns.places)
    names = [record.label or ""]
    if problem == "multi_label_classification":
        names = [label for label, holds in zip(labels, targets, strict=True) if holds]
    elif problem != "regression" and record.classes:
        names = [labels[int(targets[0])]]  # the row may give its number
    framed = tokenizer.encode_framed(record.prompt, rendering.max_length, record.pair)
    return Example(
        record.row,
        framed.ids,
        targets,
        len(framed.ids),
        ", ".join(names),
        framed.cut,
        token_type_ids=framed.type_ids if any(framed.type_ids) else [],
    )


def encode_tags(rendering: Rendering, tokenizer: TextTokenizer, record: Record) -> Example:
    """Return words with their tags, each tag at the first token of its word.

    Raises:
        DataError: the rendering does not have this tag; the message names the row.
    """
    names = rendering.labels
    tags = {tag: known_class(tag, names, f"row {record.row}", "tags") for tag in set(record.classes)}
    framed, starts = encode_words(tokenizer, record.words, rendering.max_length)
    placed = {start: tags[tag] for start, tag in zip(starts, record.classes, strict=True) if start is not None}
    labels = [IGNORED] * len(framed.ids)
    for start, index in placed.items():
        labels[start] = index
    return Example(
        record.row,
        framed.ids,
        labels,
        len(framed.ids),
        " ".join(names[index] for index in placed.values()),
        framed.cut,
        cut_targets=len(starts) - len(placed) if framed.cut else 0,
    )


def encode_masked(rendering: Rendering, tokenizer: TextTokenizer, record: Record) -> Example:
    """Return a text of which some tokens are masked and learned.

    Raises:
        ModelError: the tokenizer has no mask token.
    """
    if tokenizer.mask_id is None:
        raise ModelError("the tokenizer names no mask_token, which fill-mask needs: choose a model that has one")
    framed = tokenizer.encode_framed(record.prompt, rendering.max_length)
    stop = len(framed.ids) - (len(tokenizer.encode_framed("", rendering.max_length).ids) - framed.start)
    ids, labels = mask_tokens(framed.ids, framed.start, stop, tokenizer.mask_id)
    return Example(record.row, ids, labels, len(ids), record.prompt, framed.cut)


def encode_pair_of_texts(rendering: Rendering, tokenizer: TextTokenizer, record: Record) -> Example:
    """Return a text and the text that should be retrieved for it."""
    first, second = (
        tokenizer.encode_framed(text, rendering.max_length) for text in (record.prompt, record.completion or "")
    )
    return Example(
        record.row,
        first.ids,
        [0],
        len(first.ids),
        record.completion or "",
        first.cut + second.cut,
        pair_ids=second.ids,
    )


def encode_words(tokenizer: TextTokenizer, words: Sequence[str], max_length: int) -> tuple[Framed, list[int | None]]:
    """Return the words joined by spaces, between the tokenizer's own special tokens ([CLS] ... [SEP]).

    Returns:
        The token ids; the position of each word's first token, None for a word that was cut off or has no token.
    """
    # A byte-level tokenizer puts the space before a word into the word's first token.
    pieces = [tokenizer.encode(f" {word}" if at else word) for at, word in enumerate(words)]
    ids = list(chain.from_iterable(pieces))
    framed = tokenizer.frame(ids, max_length)
    places = zip(accumulate(map(len, pieces), initial=0), pieces, strict=False)
    kept = len(ids) - framed.cut
    return framed, [framed.start + place if piece and place < kept else None for place, piece in places]


def split_words(text: str) -> list[tuple[int, int]]:
    """Return the start and the end of each word of a text.

    A word is a run of letters and digits with the signs that join them (3.5, co-op, o'clock), or any other single
    sign, as in annotated corpora.
    """
    return [match.span() for match in re.finditer(r"\w+(?:[.,:'’\-/]\w+)*|[^\w\s]", text)]


def mask_tokens(input_ids: list[int], start: int, stop: int, mask_id: int) -> tuple[list[int], list[int]]:
    """Mask 15% of the tokens from `start` to `stop`, at least one.

    The choice depends only on the token ids, so that tune, export, verify and eval mask a row alike in every epoch.
    Every chosen token becomes the mask token, which learns no worse than BERT's 80/10/10 scheme (Wettig et al.,
    arXiv:2202.08005).

    Args:
        input_ids: Token ids of the text.
        start: First position that may be masked.
        stop: Position after the last one that may be masked.
        mask_id: Id of the mask token.

    Returns:
        The ids with masks, and the labels: the original ids where masked, -100 elsewhere.
    """
    labels = [IGNORED] * len(input_ids)
    if stop <= start:
        return list(input_ids), labels
    digest = hashlib.sha256(np.array(input_ids, np.int64).tobytes()).digest()
    random = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    count = max(1, round(MASKED_SHARE * (stop - start)))
    masked = list(input_ids)
    for place in (start + random.permutation(stop - start)[:count]).tolist():
        labels[place], masked[place] = input_ids[place], mask_id
    return masked, labels


ENCODERS: dict[Task, Callable[[Rendering, TextTokenizer, Record], Example]] = {
    "text-classification": encode_text,
    "token-classification": encode_tags,
    "fill-mask": encode_masked,
    "feature-extraction": encode_pair_of_texts,
}
