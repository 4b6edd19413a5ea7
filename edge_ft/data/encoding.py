"""From a record to token ids: the one place that decides what the model reads, in training and at run time.

Plain rows are [BOS if the tokenizer adds one] + prompt + completion + EOS, prompt and completion tokenized
apart, loss on completion and EOS; control tokens are read where --prompt and --completion write them, never
in a column's value. Chats are what the chat template writes and nothing else (it writes its own
BOS), loss on each assistant turn through its end-of-turn token. A template that changes earlier turns when
the chat goes on (as those that drop earlier thinking do) gives loss only on the turns that it leaves as the
model will see them at run time; `Example.unlearned_turns` counts the others. An encoder-decoder has prompt and
completion as two sequences (`edge_ft.data.seq2seq`).
"""

from collections.abc import Sequence

from edge_ft.data.chat import encode_chat, end_of_turn, exchange, render_chat
from edge_ft.data.columns import Message, Record, record
from edge_ft.data.encoders import ENCODERS
from edge_ft.data.example import IGNORED, Example
from edge_ft.data.readers import Row
from edge_ft.data.rendering import Rendering
from edge_ft.data.seq2seq import encode_pair, encode_source
from edge_ft.data.tokenizer import TextTokenizer
from edge_ft.errors import DataError

__all__ = [
    "encode_example",
    "encode_prompt",
    "encode_rows",
    "stop_ids",
]


def stop_ids(rendering: Rendering, tokenizer: TextTokenizer) -> frozenset[int]:
    """Ids that end an answer: the model's own, and what this rendering puts behind one."""
    ends = {rendering.appended_eos}
    if rendering.chat_template is not None:
        ends.add(end_of_turn(rendering.chat_template, tokenizer))
    return tokenizer.stop_ids | {end for end in ends if end is not None}


def encode_prompt(rendering: Rendering, tokenizer: TextTokenizer, prompt: str | Sequence[Message]) -> list[int]:
    """Ids up to where the answer begins: [BOS] + prompt, or the chat and the template's generation prompt.

    A text becomes the user's message where the rendering has a chat template.

    Raises:
        DataError: messages without a chat template, or a template that refuses them.
    """
    if rendering.chat_template is not None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.encode_template(render_chat(rendering.chat_template, messages, True, tokenizer))
    if not isinstance(prompt, str):
        raise DataError("this model was not trained with a chat template: give text instead of messages")
    if rendering.task == "text2text-generation":
        return encode_source(tokenizer, prompt)[0]
    return [*([] if rendering.bos is None else [rendering.bos]), *tokenizer.encode(prompt)]


def encode_example(rendering: Rendering, tokenizer: TextTokenizer, record: Record) -> Example:
    """One record in token ids, with its loss mask.

    Raises:
        DataError: an unknown class, or a chat that this template cannot render; the message names the row.
    """
    if rendering.task in ENCODERS:
        return ENCODERS[rendering.task](rendering, tokenizer, record)
    answers = [message["content"] for message in record.messages or () if message["role"] == "assistant"]
    completion = answers[-1] if answers else record.completion
    if completion is None:
        raise DataError(f"row {record.row} has no answer to learn: give --completion, or a chat with an assistant turn")
    if rendering.task == "text2text-generation":
        assert rendering.appended_eos is not None
        pair = encode_pair(tokenizer, record.prompt, completion, rendering.appended_eos, rendering.max_length)
        reference = tokenizer.without_controls(completion)
        return Example(
            record.row,
            pair.source,
            pair.target,
            len(pair.source),
            reference,
            pair.cut,
            cut_targets=pair.cut_targets,
            apart=True,
        )
    skipped = 0
    try:
        if rendering.chat_template is None:
            ids = encode_prompt(rendering, tokenizer, record.prompt)
            start = len(ids)
            ids = ids + tokenizer.encode(completion)
            spans = [(start, len(ids))]
        else:
            messages = record.messages or exchange(record.prompt, completion)
            ids, spans, skipped = encode_chat(rendering.chat_template, messages, tokenizer)
    except DataError as error:
        raise DataError(f"row {record.row}: {error}") from error
    if rendering.appended_eos is not None:
        ids = [*ids, rendering.appended_eos]
        spans[-1] = (spans[-1][0], len(ids))
    labels = [IGNORED] * len(ids)
    for begin, end in spans:
        labels[begin:end] = ids[begin:end]
    labels[0] = IGNORED  # nothing predicts the first token
    limit = rendering.max_length
    return Example(
        record.row,
        ids[:limit],
        labels[:limit],
        min(spans[-1][0], limit),
        tokenizer.without_controls(completion) if rendering.chat_template is None else completion,
        max(len(ids) - limit, 0),
        skipped,
        sum(label != IGNORED for label in labels[limit:]),
    )


def encode_rows(rendering: Rendering, tokenizer: TextTokenizer, rows: Sequence[Row]) -> list[Example]:
    """`encode_example` of each row.

    Raises:
        DataError: the first row that cannot be used; the message names it.
    """
    return [encode_example(rendering, tokenizer, record(row, rendering.columns)) for row in rows]
