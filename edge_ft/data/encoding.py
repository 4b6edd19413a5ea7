"""From a record to token ids: the only code that decides what the model reads, in training and at run time.

- Plain rows are [BOS if the tokenizer adds one] + prompt + completion + EOS. Prompt and completion are tokenized
  separately; completion and EOS carry the loss. Control tokens are recognised in the literal text of --prompt and
  --completion, never in a column's value.
- Chats are exactly what the chat template writes, including its own BOS. A template that prints the date prints in
  every row the one when the rows were first rendered, and at run time today's. Each assistant turn carries the loss
  through its end-of-turn token. Some templates rewrite earlier turns as the chat continues, e.g. to remove earlier
  thinking: then only the turns that read as they will at run time carry the loss, and `Example.unlearned_turns`
  counts the others.
- An encoder-decoder reads prompt and completion as two sequences, each with its own end.
- Decoder rows with few different answers: the model can choose among these instead of generating one.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from edge_ft.data.batches import IGNORED, Example
from edge_ft.data.chat import encode_chat, render_chat, unread_parts
from edge_ft.data.clock import clock_at, now
from edge_ft.data.conversations import Chat, Message, exchange
from edge_ft.data.encoders import ENCODERS
from edge_ft.data.readers import Row
from edge_ft.data.records import Record, answer_of, fill_answer, record
from edge_ft.data.rendering import Rendering
from edge_ft.data.tokenizer import TextTokenizer
from edge_ft.errors import DataError

__all__ = [
    "answer_ids",
    "encode_example",
    "encode_pair",
    "encode_prompt",
    "encode_rows",
    "find_answers",
    "show_example",
    "unread_by",
]

MAX_ANSWERS, MAX_TOKENS, MIN_ROWS = 64, 16, 4
"""Most different answers, longest answer in tokens, and fewest rows per answer on average."""


def encode_prompt(rendering: Rendering, tokenizer: TextTokenizer, prompt: str | Sequence[Message] | Chat) -> list[int]:
    """Return the ids before the answer: [BOS] + prompt, or the chat and the template's generation prompt.

    With a chat template a text becomes the user's message. Messages are as `read_turns` returns them.

    Raises:
        DataError: messages were given and there is no chat template, or the template refuses them.
    """
    if rendering.chat_template is not None:
        chat = _readable(rendering, _as_chat(prompt))
        return tokenizer.encode_template(render_chat(rendering.chat_template, chat, True, tokenizer))
    if not isinstance(prompt, str):
        raise DataError("this model was not trained with a chat template: give a text instead of messages")
    if rendering.task == "text2text-generation":
        return tokenizer.encode_framed(prompt, sys.maxsize).ids
    return [*([] if rendering.bos is None else [rendering.bos]), *tokenizer.encode(prompt)]


def unread_by(
    rendering: Rendering, tokenizer: TextTokenizer, prompt: str | Sequence[Message] | Chat
) -> tuple[str, ...]:
    """Return what a prompt says and `encode_prompt` leaves out; nothing of a text."""
    if isinstance(prompt, str) or rendering.chat_template is None:
        return ()
    with clock_at(now().isoformat()):  # texts of two moments would differ
        return unread_parts(rendering.chat_template, _readable(rendering, _as_chat(prompt)), tokenizer)


def encode_example(rendering: Rendering, tokenizer: TextTokenizer, record: Record) -> Example:
    """Return one record in token ids with its labels.

    Raises:
        DataError: an unknown class, no answer, or a chat that the template cannot render; the message names the row.
    """
    if rendering.task in ENCODERS:
        example = ENCODERS[rendering.task](rendering, tokenizer, record)
        if not example.input_ids or (rendering.task == "feature-extraction" and not example.pair_ids):
            raise DataError(f"row {record.row} has a text without a token: the tokenizer makes nothing of it")
        return example
    completion = record.completion
    if completion is None:
        raise DataError(f"row {record.row} has no answer to learn: give --completion, or a chat with an assistant turn")
    try:
        if rendering.task == "text2text-generation" and record.messages is not None:
            raise DataError("a chat is for decoders, and an encoder-decoder reads a prompt: write it as one text")
        if rendering.appended_eos is not None and rendering.task == "text2text-generation":
            limit, eos = rendering.max_length, rendering.appended_eos
            return encode_pair(tokenizer, record.row, record.prompt, completion, eos, limit)
        with clock_at(rendering.rendered_at):
            return _encode_text(rendering, tokenizer, record, completion)
    except DataError as error:
        raise DataError(f"row {record.row}: {error}") from error


def encode_rows(rendering: Rendering, tokenizer: TextTokenizer, rows: Sequence[Row]) -> list[Example]:
    """Return `encode_example` of each row.

    Raises:
        DataError: a row cannot be used; the message names the first one.
    """
    return [encode_example(rendering, tokenizer, record(row, rendering.columns)) for row in rows]


def encode_pair(tokenizer: TextTokenizer, row: int, prompt: str, completion: str, eos: int, limit: int) -> Example:
    """Return a row of an encoder-decoder.

    Args:
        tokenizer: Tokenizer of the model; it puts its own special tokens around the prompt (T5: `</s>` at its end).
        row: Number of the row in the user's file.
        prompt: What the encoder reads.
        completion: What the decoder learns; it starts from the model's decoder_start_token_id.
        eos: Id that ends the completion; a completion that was cut has none.
        limit: Tokens of the longest prompt, and of the longest completion.
    """
    source, target = tokenizer.encode_framed(prompt, limit), [*tokenizer.encode(completion), eos]
    lost = max(len(target) - limit, 0)
    return Example(
        row,
        source.ids,
        target[:limit],
        len(source.ids),
        tokenizer.without_controls(completion),
        source.cut + lost,
        cut_targets=lost,
        separate_target=True,
    )


def find_answers(rows: Sequence[Row], rendering: Rendering, tokenizer: TextTokenizer) -> tuple[str, ...]:
    """Return the different answers of `rows` in alphabetical order, as `answer_of` returns them.

    Empty unless there are 2 to `MAX_ANSWERS`, each of at most `MAX_TOKENS` tokens and with `MIN_ROWS` rows on average.
    """
    answers = (answer_of(row, rendering.columns) for row in rows)
    found = sorted({answer for answer in answers if answer is not None})
    if not 2 <= len(found) <= min(MAX_ANSWERS, len(rows) // MIN_ROWS):
        return ()
    longest = max(len(answer_ids(rendering, tokenizer, answer)) for answer in found)
    return tuple(found) if longest <= MAX_TOKENS else ()


def answer_ids(rendering: Rendering, tokenizer: TextTokenizer, answer: str) -> list[int]:
    """Return the token ids that carry the loss of a row with this answer, including the one that ends it."""
    record = Record(0, None, "x", fill_answer(rendering.columns, answer), None)
    example = encode_example(replace(rendering, max_length=sys.maxsize), tokenizer, record)
    return [int(label) for label in example.labels[example.prompt_length :] if label != IGNORED]


def show_example(example: Example, rendering: Rendering, tokenizer: TextTokenizer) -> str:
    """Return a heading with the numbers of tokens, and below it the text with the trained parts marked.

    Args:
        example: A row in token ids.
        rendering: How it was encoded.
        tokenizer: With which it was.
    """
    ids = example.input_ids
    if rendering.task == "text2text-generation":
        labels = [int(label) for label in example.labels]
        source, target = (tokenizer.decode(part, skip_special_tokens=False) for part in (ids, labels))
        return f"row {example.row}: {len(ids)} tokens read, {example.targets} trained\n{source} → ⟦{target}⟧"
    if rendering.task in ("text-classification", "feature-extraction"):
        text, paired = (tokenizer.decode(part, skip_special_tokens=False) for part in (ids, example.pair_ids))
        what = f"{example.targets} label{'s' if example.targets > 1 else ''}" if not paired else "the second text"
        return (
            f"row {example.row}: {len(ids) + len(example.pair_ids)} tokens read, {what} trained\n"
            f"{text} → ⟦{paired or example.reference}⟧"
        )
    if rendering.task == "token-classification":
        parts = [
            tokenizer.decode([token], skip_special_tokens=False)
            + ("" if label == IGNORED else f"⟦{rendering.labels[int(label)]}⟧")
            for token, label in zip(ids, example.labels, strict=True)
        ]
        return f"row {example.row}: {len(ids)} tokens read, {example.targets} tags trained\n{' '.join(parts)}"
    if rendering.task == "fill-mask":
        # Show the trained tokens instead of the masks that the model reads.
        ids = [token if label == IGNORED else int(label) for token, label in zip(ids, example.labels, strict=True)]
    edges = [at for at in range(1, len(ids)) if (example.labels[at] == IGNORED) != (example.labels[at - 1] == IGNORED)]
    text, before = "", ""
    for start, stop in zip([0, *edges], [*edges, len(ids)], strict=True):
        # Parts are cut from the whole text: at the start of a text a tokenizer may decode a token differently.
        whole = tokenizer.decode(ids[:stop], skip_special_tokens=False)
        part, before = whole[len(before) :], whole
        text += part if example.labels[start] == IGNORED else f"⟦{part}⟧"
    return f"row {example.row}: {len(ids)} tokens read, {example.targets} of them trained\n{text}"


def _encode_text(rendering: Rendering, tokenizer: TextTokenizer, record: Record, completion: str) -> Example:
    """Return a row of a decoder: a prompt with its completion, or a chat."""
    unlearned_turns, unread = 0, tuple[str, ...]()
    if rendering.chat_template is None and record.messages is not None:
        raise DataError(
            "a chat, a system message or a history needs a chat template and there is none: give one with "
            "--chat-template FILE, or name columns of texts with --prompt and --completion"
        )
    if rendering.chat_template is None:
        prompt = encode_prompt(rendering, tokenizer, record.prompt)
        ids = prompt + tokenizer.encode(completion)
        spans = [(len(prompt), len(ids))]
        reference = tokenizer.without_controls(completion)
    else:
        chat = record.chat or Chat(record.messages or exchange(record.prompt, completion))
        encoded = encode_chat(rendering.chat_template, _readable(rendering, chat), tokenizer)
        ids, spans, unlearned_turns, unread = encoded.ids, encoded.spans, encoded.unlearned, encoded.unread
        # An answer with calls or reasoning is what the template writes of it.
        if encoded.reference is None and spans:
            reference = tokenizer.decode(ids[slice(*spans[-1])])
        else:
            reference = completion if encoded.reference is None else encoded.reference
    if rendering.appended_eos is not None and spans:
        ids = [*ids, rendering.appended_eos]
        spans[-1] = (spans[-1][0], len(ids))
    labels = [IGNORED] * len(ids)
    for begin, end in spans:
        labels[begin:end] = ids[begin:end]
    labels[0] = IGNORED  # the first token is given, not predicted
    limit = rendering.max_length
    return Example(
        record.row,
        ids[:limit],
        labels[:limit],
        min(spans[-1][0] if spans else len(ids), limit),
        reference,
        max(len(ids) - limit, 0),
        unlearned_turns,
        sum(label != IGNORED for label in labels[limit:]),
        unread=unread,
    )


def _as_chat(prompt: str | Sequence[Message] | Chat) -> Chat:
    if isinstance(prompt, Chat):
        return prompt
    return Chat([{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt))


def _readable(rendering: Rendering, chat: Chat) -> Chat:
    """Return what a rendering reads of a chat: for one of an earlier version, the texts alone."""
    if rendering.reads_tools:
        return chat
    further = dict.fromkeys(key for turn in chat.messages for key in turn if key not in ("role", "content"))
    unread = (*chat.unread, *further, *(() if chat.tools is None else ("tools",)))
    texts = [{"role": turn["role"], "content": turn["content"]} for turn in chat.messages]
    return Chat(texts, None, chat.context, unread)
