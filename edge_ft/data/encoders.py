"""From a record to token ids for models that read a whole text at once: one function a task."""

from collections.abc import Callable

from edge_ft.config import Task
from edge_ft.data.classes import class_targets
from edge_ft.data.columns import Record
from edge_ft.data.example import IGNORED, Example
from edge_ft.data.masking import mask_tokens
from edge_ft.data.rendering import Rendering
from edge_ft.data.tokenizer import TextTokenizer
from edge_ft.data.words import encode_words
from edge_ft.errors import DataError, ModelError, did_you_mean

__all__ = ["ENCODERS"]


def encode_text(rendering: Rendering, tokenizer: TextTokenizer, record: Record) -> Example:
    """A text, or two, and its class, classes or number.

    Raises:
        DataError: a class that is none of the rendering's; the message names the row.
    """
    problem = rendering.problem_type or "single_label_classification"
    targets = class_targets(record.classes, problem, rendering.labels, f"row {record.row}")
    framed = tokenizer.encode_classifier(record.prompt, rendering.max_length, record.pair)
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
    """Words and their tags, each at its word's first token.

    Raises:
        DataError: a tag that is none of the rendering's; the message names the row.
    """
    words = encode_words(tokenizer, record.words, rendering.max_length)
    labels = [IGNORED] * len(words.input_ids)
    lost = 0
    for start, tag in zip(words.starts, record.classes, strict=True):
        if tag not in rendering.labels:
            near = did_you_mean(tag, list(rendering.labels))
            raise DataError(f"row {record.row}: {tag!r} is none of the tags{near}: {', '.join(rendering.labels)}")
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
    """A text of which some tokens are hidden and learned.

    Raises:
        ModelError: the tokenizer has no mask.
    """
    if tokenizer.mask_id is None:
        raise ModelError("the tokenizer names no mask_token, so there is nothing to hide tokens with")
    framed = tokenizer.encode_classifier(record.prompt, rendering.max_length)
    stop = len(framed.ids) - (len(tokenizer.encode_classifier("", rendering.max_length).ids) - framed.start)
    ids, labels = mask_tokens(framed.ids, framed.start, stop, tokenizer.mask_id)
    return Example(record.row, ids, labels, len(ids), record.prompt, framed.cut)


def encode_related(rendering: Rendering, tokenizer: TextTokenizer, record: Record) -> Example:
    """A text, and the one that should be found with it."""
    first, second = (
        tokenizer.encode_classifier(text, rendering.max_length) for text in (record.prompt, record.completion or "")
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
    "feature-extraction": encode_related,
}
