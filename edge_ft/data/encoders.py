"""From a record to token ids for encoders: one function per task."""

from collections.abc import Callable

from edge_ft.config import Task
from edge_ft.data.classes import class_targets
from edge_ft.data.example import IGNORED, Example
from edge_ft.data.masking import mask_tokens
from edge_ft.data.records import Record
from edge_ft.data.rendering import Rendering
from edge_ft.data.tokenizer import TextTokenizer
from edge_ft.data.words import encode_words
from edge_ft.errors import DataError, ModelError, did_you_mean

__all__ = ["ENCODERS"]


def encode_text(rendering: Rendering, tokenizer: TextTokenizer, record: Record) -> Example:
    """Return one or two texts with their class, classes or number.

    Raises:
        DataError: the rendering does not have this class; the message names the row.
    """
    problem = rendering.problem_type or "single_label_classification"
    targets = class_targets(record.classes, problem, rendering.labels, f"row {record.row}")
    framed = tokenizer.encode_framed(record.prompt, rendering.max_length, record.pair)
    return Example(
        record.row,
        framed.ids,
        targets,
        len(framed.ids),
        record.label or "",
        framed.cut,
        token_type_ids=framed.type_ids if any(framed.type_ids) else [],
    )


def encode_tags(rendering: Rendering, tokenizer: TextTokenizer, record: Record) -> Example:
    """Return words with their tags, each tag at the first token of its word.

    Raises:
        DataError: the rendering does not have this tag; the message names the row.
    """
    words = encode_words(tokenizer, record.words, rendering.max_length)
    labels = [IGNORED] * len(words.input_ids)
    lost = 0
    for start, tag in zip(words.starts, record.classes, strict=True):
        if tag not in rendering.labels:
            near = did_you_mean(tag, list(rendering.labels))
            raise DataError(
                f"row {record.row}: {tag!r} is none of the tags{near}: they are {', '.join(rendering.labels)}"
            )
        if start is None:
            lost += 1
        else:
            labels[start] = rendering.labels.index(tag)
    size = len(words.input_ids)
    reference = " ".join(tag for start, tag in zip(words.starts, record.classes, strict=True) if start is not None)
    return Example(
        record.row, words.input_ids, labels, size, reference, words.cut, cut_targets=lost if words.cut else 0
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


ENCODERS: dict[Task, Callable[[Rendering, TextTokenizer, Record], Example]] = {
    "text-classification": encode_text,
    "token-classification": encode_tags,
    "fill-mask": encode_masked,
    "feature-extraction": encode_pair_of_texts,
}
