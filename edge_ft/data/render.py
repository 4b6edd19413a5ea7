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
from pathlib import Path

from edge_ft.config import RowsConfig, Task
from edge_ft.data.chat import encode_chat, end_of_turn, exchange, render_chat
from edge_ft.data.columns import Columns, Message, Record, record
from edge_ft.data.encoders import ENCODERS
from edge_ft.data.example import IGNORED, Example
from edge_ft.data.read import Row
from edge_ft.data.rendering import Rendering
from edge_ft.data.seq2seq import check_pairs, encode_pair, encode_source
from edge_ft.data.tokenizer import TextTokenizer
from edge_ft.errors import DataError, ModelError

__all__ = [
    "encode_example",
    "encode_prompt",
    "encode_rows",
    "make_rendering",
    "stop_ids",
]


def make_rendering(
    config: RowsConfig,
    columns: Columns,
    task: Task,
    tokenizer: TextTokenizer,
    max_length: int,
    labels: tuple[str, ...] = (),
) -> Rendering:
    """Choose template, BOS and EOS for rows of these columns.

    Without --chat-template, chats, instructions and prompt/completion columns get the model's own template if
    it has one; texts and what --prompt writes stay as written.

    Raises:
        DataError: chats without a template, a template for rows that are no chat, or a broken one.
        ModelError: the tokenizer names no end-of-sequence token.
    """
    if task in ENCODERS:
        return Rendering(task, None, columns, labels, max_length, None, None)
    if task == "text2text-generation":
        check_pairs(columns, config.chat_template)
        if tokenizer.eos_id is None:
            raise ModelError("the tokenizer names no eos_token, so a model could not learn to stop")
        return Rendering(task, None, columns, labels, max_length, None, tokenizer.eos_id)
    chosen = config.chat_template
    if chosen is None:
        chosen = "auto" if columns.kind in ("messages", "prompt_completion", "instruction") else "none"
    elif chosen != "none" and columns.kind == "text":
        raise DataError("rows with only a text column have no turns for a chat template: leave --chat-template out")
    if chosen == "auto":
        template = tokenizer.chat_template
    elif chosen == "none":
        template = None
    elif Path(chosen).is_file():
        template = Path(chosen).read_text(encoding="utf-8")
    else:
        raise DataError(f"--chat-template {chosen} is neither auto, none nor a file")
    if template is not None and end_of_turn(template, tokenizer) is not None:
        return Rendering(task, template, columns, labels, max_length, None, None)
    if template is None and columns.kind == "messages":
        raise DataError("rows of messages need a chat template, and none applies: give one with --chat-template FILE")
    if tokenizer.eos_id is None:
        raise ModelError("the tokenizer names no eos_token, so a model could not learn to stop")
    return Rendering(
        task,
        template,
        columns,
        labels,
        max_length,
        tokenizer.bos_id if template is None else None,
        tokenizer.eos_id,
    )


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
