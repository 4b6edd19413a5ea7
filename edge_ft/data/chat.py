"""Chats: from messages through a sandboxed chat template to token ids, and the span of each answer in them."""

import json
import re
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import accumulate, chain
from typing import NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge_ft.data.clock import strftime_now
from edge_ft.data.records import Message
from edge_ft.data.tokenizer import TextTokenizer
from edge_ft.errors import DataError

__all__ = ["encode_chat", "end_of_turn", "exchange", "render_chat"]

MARK = "\ufdd1"
"""Marks the end of a message in a rendered chat; like CUT, it never occurs in a shielded text."""


def render_chat(
    template: str, messages: Sequence[Message], add_generation_prompt: bool, tokenizer: TextTokenizer
) -> str:
    """Return the chat as text, for `TextTokenizer.encode_template`; special tokens inside messages are cut.

    Raises:
        DataError: the template is malformed, forbidden by the sandbox, or refuses these messages.
    """
    return _render(template, _shielded(messages, tokenizer), add_generation_prompt, tokenizer)


def encode_chat(
    template: str, messages: Sequence[Message], tokenizer: TextTokenizer
) -> tuple[list[int], list[tuple[int, int]], int]:
    """Encode a chat through its last assistant turn.

    Returns:
        The ids; the (start, end) of the ids that carry loss, one for each assistant turn from the generation prompt
        through its end-of-turn token; the number of assistant turns without loss.

    Raises:
        DataError: the template fails, or does not write its generation prompt before the last assistant turn.
    """
    messages = _shielded(messages, tokenizer)
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    whole = _render(template, messages[: turns[-1] + 1], False, tokenizer)
    edges: list[int] = []
    for at in turns:
        prompt = _render(template, messages[:at], True, tokenizer) if at else ""
        turn = _through_end_of_turn(template, messages[: at + 1], tokenizer)
        if prompt and turn.startswith(prompt) and whole.startswith(turn):
            edges += [len(prompt), len(turn)]
    if not edges or edges[-1] != len(turn):
        raise DataError(
            "the chat template does not begin the last assistant turn with its own generation prompt: "
            "give another template with --chat-template FILE"
        )
    heads = [tokenizer.encode_template(whole[:edge]) for edge in edges]
    ids, bounds = heads[-1], [len(head) for head in heads]
    if any(ids[: len(head)] != head for head in heads):
        # A token crosses an edge, which cannot happen at run time: tokenize the parts between edges.
        parts = [whole[start:stop] for start, stop in zip([0, *edges], edges, strict=False)]
        pieces = [tokenizer.encode_template(part) for part in parts]
        ids, bounds = list(chain.from_iterable(pieces)), list(accumulate(map(len, pieces)))
    spans = list(zip(bounds[::2], bounds[1::2], strict=True))
    return ids, spans, len(turns) - len(spans)


def end_of_turn(template: str, tokenizer: TextTokenizer) -> int | None:
    """Return the id of the special token with which the template ends an assistant turn; None if it uses none."""
    last = tokenizer.encode_template(_through_end_of_turn(template, exchange("x", "x"), tokenizer))[-1]
    return last if last in tokenizer.control_tokens else None


def exchange(prompt: str, answer: str) -> list[Message]:
    """Return the chat of one prompt and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _through_end_of_turn(template: str, messages: list[Message], tokenizer: TextTokenizer) -> str:
    """Return the chat through the first special token after its last message, or through that message.

    Raises:
        DataError: the template does not write each message exactly once.
    """
    text = _render(template, messages, False, tokenizer)
    last = messages[-1]
    marked = [*messages[:-1], {**last, "content": last["content"] + MARK}]
    _, mark, tail = _render(template, marked, False, tokenizer).partition(MARK)
    if not mark or MARK in tail or not text.endswith(tail):
        raise DataError(
            "the chat template does not write each message exactly once: give another with --chat-template FILE"
        )
    ends = [at + len(token) for token in tokenizer.control_tokens.values() if (at := tail.find(token)) >= 0]
    return text[: len(text) - len(tail) + min(ends, default=0)]


def _shielded(messages: Sequence[Message], tokenizer: TextTokenizer) -> list[Message]:
    return [{**message, "content": tokenizer.shield(message["content"])} for message in messages]


def _render(template: str, messages: list[Message], add_generation_prompt: bool, tokenizer: TextTokenizer) -> str:
    try:
        return _compile(template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **tokenizer.special_tokens,
        )
    # An expression in a template can fail in any way that Python's operators can.
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RecursionError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        raise DataError(
            f"the chat template cannot render this chat ({error}): change the messages, or give another template with "
            "--chat-template FILE"
        ) from error


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # Jinja's own filter escapes HTML; chat templates expect that of transformers.
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
    }
    # {% generation %} marks answers for other trainers; here it becomes a block that is always rendered.
    return environment.from_string(
        re.sub(r"(\{%-?\s*)(end)?generation\b", lambda at: at[1] + ("endif" if at[2] else "if true"), template)
    )
