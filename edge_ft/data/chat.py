"""Chats: from messages through a chat template to token ids, and the span of each answer in them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any

from edge_ft.data.conversations import Chat, Message, exchange
from edge_ft.data.sandbox import render
from edge_ft.data.tokenizer import TextTokenizer
from edge_ft.data.values import parse_json
from edge_ft.errors import DataError

__all__ = ["EncodedChat", "encode_chat", "end_of_turn", "render_chat", "unread_parts"]

MARK = "\ufdd1"
"""Marks the end of a message in a rendered chat; like CUT, it never occurs in a shielded text."""
CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """A chat in token ids, through its last answer that is learned."""

    ids: list[int]
    spans: list[tuple[int, int]]
    """The (start, end) of the ids that carry loss, one for each answer from the generation prompt through its
    end-of-turn token; none where the template writes none of the answers."""
    unlearned: int
    """Answers without loss, because the template writes them differently at run time."""
    unread: tuple[str, ...]
    """What the row says and the template does not write."""
    reference: str | None
    """The last answer that is learned, where it is a text alone."""


class Arguments(dict[str, Any]):
    """The arguments of a call, for templates that write an object and for those that write its JSON text."""

    def __init__(self, values: dict[str, Any], text: str) -> None:
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


@dataclass(frozen=True)
class _Writer:
    """A chat template, with all that it gets beside the messages."""

    template: str
    tokenizer: TextTokenizer
    tools: list[dict[str, Any]] | None = field(default=None)

    def write(self, messages: Sequence[Message], answer_next: bool = False) -> str:
        """Return the chat as text, with the generation prompt at its end if `answer_next`."""
        variables = {"messages": list(messages), "add_generation_prompt": answer_next, "tools": self.tools}
        return render(self.template, {**variables, "documents": None, **self.tokenizer.special_tokens})

    def through_end_of_turn(self, messages: Sequence[Message]) -> str:
        """Return the chat through the end-of-turn token of its last message, or through that message.

        Raises:
            DataError: the template does not write each message exactly once.
        """
        text, last, controls = self.write(messages), messages[-1], self.tokenizer.control_tokens.values()
        # A turn with calls ends as one with a text does: a call may hold control tokens of its own.
        plain = {"role": last["role"], "content": last["content"] or "x"} if last.get(CALLS) else last
        marked = [*messages[:-1], {**plain, "content": plain["content"] + MARK}]
        _, mark, tail = self.write(marked).partition(MARK)
        if mark and last.get(CALLS) and not text.endswith(tail):
            ends = [text.rfind(token) + len(token) for token in controls if token in text]
            return text[: max(ends, default=len(text))]
        if not mark or MARK in tail or not text.endswith(tail):
            raise DataError(
                "the chat template does not write each message exactly once: give another with --chat-template FILE"
            )
        ends = [at + len(token) for token in controls if (at := tail.find(token)) >= 0]
        return text[: len(text) - len(tail) + min(ends, default=0)]

    def unread(self, messages: Sequence[Message], answer_next: bool = False) -> tuple[str, ...]:
        """Return what could be left out of the chat and the template would write the same text."""
        whole = self.write(messages, answer_next)

        def same(writer: _Writer, others: list[Message]) -> bool:
            try:
                return writer.write(others, answer_next) == whole
            except DataError:
                return False

        keys = [key for key in dict.fromkeys(chain.from_iterable(messages)) if key not in ("role", "content")]
        without = {key: [{k: v for k, v in turn.items() if k != key} for turn in messages] for key in keys}
        found = [key for key in keys if same(self, without[key])]
        if CALLS in keys and CALLS not in found and not _writes_calls(self, messages):
            found.append(CALLS)  # it marks that there is a call, and does not say which
        if self.tools and same(replace(self, tools=None), list(messages)):
            found.append("tools")
        return (*found, *self._unwritten_roles(messages, answer_next))

    def _unwritten_roles(self, messages: Sequence[Message], answer_next: bool) -> list[str]:
        """Return the roles of messages whose content the template leaves out."""
        spoken = [at for at, turn in enumerate(messages) if turn["content"].strip()]

        def marks(places: Sequence[int]) -> int:
            turns = [{**turn, "content": turn["content"] + MARK * (at in places)} for at, turn in enumerate(messages)]
            return self.write(turns, answer_next).count(MARK)

        if marks(spoken) >= len(spoken):
            return []
        roles = dict.fromkeys(messages[at]["role"] for at in spoken if not marks([at]))
        return [f"messages of the role {role}" for role in roles]


def render_chat(
    template: str, chat: Chat | Sequence[Message], add_generation_prompt: bool, tokenizer: TextTokenizer
) -> str:
    """Return the chat as text, for `TextTokenizer.encode_template`; special tokens inside messages are cut.

    Raises:
        DataError: the template is malformed, forbidden by the sandbox, or refuses these messages.
    """
    whole = chat if isinstance(chat, Chat) else Chat(list(chat))
    writer, messages = _shielded(template, whole, tokenizer)
    return writer.write(messages, add_generation_prompt)


def unread_parts(template: str, chat: Chat, tokenizer: TextTokenizer) -> tuple[str, ...]:
    """Return what a chat to answer says and the template does not write."""
    writer, messages = _shielded(template, chat, tokenizer)
    return (*chat.unread, *writer.unread(messages, answer_next=True))


def encode_chat(template: str, chat: Chat, tokenizer: TextTokenizer) -> EncodedChat:
    """Encode a chat through its last answer.

    Args:
        template: Text of the jinja template.
        chat: With at least one answer.
        tokenizer: Tokenizer of the model.

    Returns:
        The ids, and where the loss is. A turn with calls that the template does not write carries none: it would only
        teach the model to end its turn.

    Raises:
        DataError: the template fails, or does not write its generation prompt before the last assistant turn.
    """
    writer, messages = _shielded(template, chat, tokenizer)
    answers, last = chat.answers, chat.answers[-1]
    messages = messages[: last + 1]
    whole, unread = writer.write(messages), writer.unread(messages)
    turns = [at for at in answers if _is_written(messages[at], unread)]
    edges, turn = [], ""
    for at in turns:
        prompt = writer.write(messages[:at], True) if at else ""
        turn = writer.through_end_of_turn(messages[: at + 1])
        if prompt and turn.startswith(prompt) and whole.startswith(turn):
            edges += [len(prompt), len(turn)]
    if turns and (not edges or edges[-1] != len(turn)):
        raise DataError(
            "the chat template does not begin the last assistant turn with its own generation prompt: "
            "give another template with --chat-template FILE"
        )
    ids, bounds = _split(whole, edges, tokenizer)
    spans = list(zip(bounds[::2], bounds[1::2], strict=True))
    after = ("messages after the last answer",) if last + 1 < len(chat.messages) else ()
    final = chat.messages[turns[-1] if turns else last]
    reference = final["content"] if final.keys() <= {"role", "content"} else None
    return EncodedChat(ids, spans, len(turns) - len(spans), (*chat.unread, *unread, *after), reference)


def end_of_turn(template: str, tokenizer: TextTokenizer) -> int | None:
    """Return the id of the special token with which the template ends an assistant turn; None if it uses none."""
    last = tokenizer.encode_template(_Writer(template, tokenizer).through_end_of_turn(exchange("x", "x")))[-1]
    return last if last in tokenizer.control_tokens else None


def _is_written(answer: Message, unread: Sequence[str]) -> bool:
    """Return whether a template writes the calls of an answer, and anything of an answer that has more than a text."""
    further = answer.keys() - {"role", "content"}
    if CALLS in further and CALLS in unread:
        return False
    return not further or bool(answer["content"].strip()) or not further <= set(unread)


def _split(whole: str, edges: list[int], tokenizer: TextTokenizer) -> tuple[list[int], list[int]]:
    """Return the ids of a text through its last edge, and the number of ids before each edge."""
    if not edges:
        return tokenizer.encode_template(whole), []
    heads = [tokenizer.encode_template(whole[:edge]) for edge in edges]
    ids, bounds = heads[-1], [len(head) for head in heads]
    if any(ids[: len(head)] != head for head in heads):
        # A token crosses an edge, which cannot happen at run time: tokenize the parts between edges.
        parts = [whole[start:stop] for start, stop in zip([0, *edges], edges, strict=False)]
        pieces = [tokenizer.encode_template(part) for part in parts]
        ids, bounds = list(chain.from_iterable(pieces)), list(accumulate(map(len, pieces)))
    return ids, bounds


def _shielded(template: str, chat: Chat, tokenizer: TextTokenizer) -> tuple[_Writer, list[Message]]:
    """Return the template and the messages of a chat; no text of theirs holds a special token.

    Templates read the calls of messages in one form or another: they get the first that they write.
    """

    def shield(value: Any) -> Any:
        if isinstance(value, str):
            return tokenizer.shield(value)
        if isinstance(value, dict):
            return {shield(key): shield(inner) for key, inner in value.items()}
        return list(map(shield, value)) if isinstance(value, list | tuple) else value

    writer, messages = _Writer(template, tokenizer, shield(chat.tools)), [shield(turn) for turn in chat.messages]
    if not any(CALLS in turn for turn in messages):
        return writer, messages

    def calls_as(form: Callable[[Message], Message]) -> list[Message]:
        return [{**turn, CALLS: list(map(form, turn[CALLS]))} if CALLS in turn else turn for turn in messages]

    forms = [calls_as(form) for form in (_as_given, _nested, _flat)]
    return writer, next((turns for turns in forms if _writes_calls(writer, turns)), forms[0])


def _writes_calls(writer: _Writer, messages: Sequence[Message]) -> bool:
    """Return whether a template writes the name of every call, each marked, since tools may hold the same names."""

    def marked(call: Message) -> Message:
        function = {**_function(call), "name": _function(call)["name"] + MARK}
        return {**call, "function": function} if "function" in call else function

    turns = [{**turn, CALLS: list(map(marked, turn[CALLS]))} if CALLS in turn else turn for turn in messages]
    try:
        text = writer.write(turns)
    except DataError:
        return False
    escaped = text.count("\\ufdd1")  # in JSON that is ASCII
    return text.count(MARK) + escaped >= sum(len(turn.get(CALLS, ())) for turn in messages)


def _function(call: Message) -> Message:
    function: Message = call.get("function", call)
    return function


def _as_given(call: Message) -> Message:
    """Return a call with its arguments in both of their forms."""
    function = {**_function(call), "arguments": _arguments(_function(call)["arguments"])}
    return {**call, "function": function} if "function" in call else function


def _nested(call: Message) -> Message:
    return {"type": "function", "function": _function(_as_given(call))}


def _flat(call: Message) -> Message:
    return _function(_as_given(call))


def _arguments(value: Any) -> Any:
    """Return the arguments of a call in both of their forms; a text that is no JSON object stays as it is."""
    values = (parse_json(value) if value.strip() else {}) if isinstance(value, str) else value
    if not isinstance(values, dict):
        return value
    return Arguments(values, value if isinstance(value, str) else json.dumps(values, ensure_ascii=False))
