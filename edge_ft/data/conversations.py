"""Conversations as people write them: messages of OpenAI and TRL, ShareGPT, and alpaca with system and history."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from edge_ft.data.values import as_text, is_blank, is_chat, is_missing, parse_json, shown
from edge_ft.errors import DataError

__all__ = ["Chat", "Message", "exchange", "find_turns", "has_answer_turn", "read_history", "read_tools", "read_turns"]

Message = dict[str, Any]
"""`{"role": "system" | "user" | "assistant" | "tool", "content": text}`, and further keys as the row has them, such as
`tool_calls` (a list of `{"name", "arguments"}`, or of these under `function`) and `reasoning_content`."""

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai"),
    "tool": ("tool", "function", "observation", "tool_response", "tool_result", "function_response", "ipython"),
}
"""The standard roles, each with the names that people give it, in any case."""
CALL_ROLES = ("function_call", "tool_call")
"""Roles of ShareGPT turns that hold the JSON of a call."""
ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value")
"""Keys of a turn: those of OpenAI and of ShareGPT."""
LOSS_KEYS = ("weight", "train")
"""Keys with which OpenAI and axolotl exclude an assistant message from the loss."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of the parts of a content that are texts."""
_STANDARD = {name: role for role, names in ROLES.items() for name in names}


@dataclass(frozen=True)
class Chat:
    """A conversation with all that its row says about it."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """The functions that the assistant may call, as JSON schemas."""
    context: tuple[int, ...] = ()
    """Indices of assistant messages that carry no loss: those of a prompt, and those that the row excludes."""
    unread: tuple[str, ...] = ()
    """What the row says and the model does not read."""

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant messages that are learned."""
        turns = enumerate(self.messages)
        return [at for at, turn in turns if turn["role"] == "assistant" and at not in self.context]

    @property
    def before_answer(self) -> "Chat":
        """The chat without the answer at its end."""
        last = len(self.messages) - 1
        return replace(self, messages=self.messages[:-1]) if last in self.answers else self


def exchange(prompt: str, answer: str) -> list[Message]:
    """Return the messages of one prompt and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def find_turns(value: Any) -> list[Any] | None:
    """Return the turns that a prompt or completion holds as a list, or as its JSON text; None for a plain text."""
    if isinstance(value, list):
        return value if not value or any(isinstance(turn, dict) for turn in value) else None
    turns: list[Any] = parse_json(value)
    return turns if is_chat(turns) else None


def has_answer_turn(value: Any) -> bool:
    """Return whether a list of turns has one to learn; True for what is no conversation, which `read_turns` refuses."""
    turns = parse_json(value)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return True
    return any(_role(_first(turn, ROLE_KEYS)) in ("assistant", None) for turn in turns)


def read_turns(value: Any, where: str) -> tuple[list[Message], list[int]]:
    """Read a list of turns, in which each has a role and a text.

    Args:
        value: Turns as `{"role", "content"}` or `{"from", "value"}`, or their JSON text.
        where: Row and column, for error messages.

    Returns:
        The messages; the indices of those that the row excludes from the loss, with `"weight": 0` or `"train": false`.

    Raises:
        DataError: no list, an unknown role, or a content that is not text.
    """
    turns = parse_json(value)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where} must be a list of at least one {{role, content}} object, and it is {shown(value)}")
    messages, excluded = [], list[int]()
    for at, turn in enumerate(turns):
        message = _message(turn, where)
        weights = [float(message.pop(key)) for key in LOSS_KEYS if isinstance(message.get(key), int | float)]
        if any(weight not in (0.0, 1.0) for weight in weights):
            raise DataError(f"{where} has a turn with the weight {max(weights):g}: only 0 and 1 can be trained")
        excluded += [at] if 0.0 in weights else []
        messages.append(message)
    return messages, excluded


def read_history(value: Any, where: str) -> list[Message]:
    """Return the earlier exchanges of an alpaca row, which are a list of pairs of a prompt and its answer.

    Raises:
        DataError: the value is of another form.
    """
    pairs = parse_json(value)
    if is_blank(pairs):
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise DataError(f"{where} is {shown(value)}: it must be a list of [prompt, answer] pairs")
    texts = [[as_text(text, where) for text in pair] for pair in pairs]
    return [message for prompt, answer in texts for message in exchange(prompt, answer)]


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the functions that the assistant may call: a list of JSON schemas, or its JSON text; None for none.

    Raises:
        DataError: the value is of another form.
    """
    tools = parse_json(value)
    if is_blank(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where} is {shown(value)}: it must be a list of objects, a JSON schema for each function")
    return tools


def _role(name: Any) -> str | None:
    """Return the standard role that a name stands for; None for a name that is not known."""
    if not isinstance(name, str):
        return None
    name = name.strip().lower()
    return "assistant" if name in CALL_ROLES else _STANDARD.get(name)


def _first(turn: dict[str, Any], keys: Sequence[str]) -> Any:
    """Return the first value under `keys` that is not null."""
    return next((turn[key] for key in keys if not is_missing(turn.get(key))), None)


def _message(turn: Any, where: str) -> Message:
    held = f"{where} holds {shown(turn)}"
    if not isinstance(turn, dict) or not isinstance(name := _first(turn, ROLE_KEYS), str):
        raise DataError(f"{held}: a turn needs a role and its content, and both must be text")
    role, content = _role(name), _first(turn, TEXT_KEYS)
    if role is None:
        names = "; ".join(f"{role} ({', '.join(names[1:])})" for role, names in ROLES.items())
        raise DataError(f"{where} has the role {name!r}: it must be one of {names}")
    used = [next((key for key in keys if not is_missing(turn.get(key))), None) for keys in (ROLE_KEYS, TEXT_KEYS)]
    # Tables store a key that other turns have as null.
    others = {key: value for key, value in turn.items() if key not in used and not is_missing(value)}
    calls = _calls(others, held)
    if name.strip().lower() in CALL_ROLES:
        calls = [*calls, *_spoken_calls(content, held)]
        content = ""
    if content is None and not calls and not any(key in others for key in ("reasoning_content", "thinking")):
        raise DataError(f"{held}: its content is null, and must be text")
    message: Message = {"role": role, "content": "" if content is None else _content(content, held), **others}
    return {**message, "tool_calls": calls} if calls else message


def _content(value: Any, held: str) -> str:
    """Return the text of a message, which may come in parts; nothing is put between these.

    Raises:
        DataError: a part that is not a text, such as an image.
    """
    if not isinstance(value, list):
        return as_text(value, f"{held}: its content")
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in TEXT_PARTS:
            raise DataError(f"{held}, with a part of the type {kind!r}: only texts are read, leave the row out")
        if not isinstance(text, str):
            raise DataError(f"{held}: role and content must both be text")
        texts.append(text)
    return "".join(texts)


def _calls(others: Message, held: str) -> list[Message]:
    """Take the calls out of a message's further keys, and return them in one form."""
    calls = parse_json(others.pop("tool_calls", None))
    old = parse_json(others.pop("function_call", None))  # OpenAI's form before tool_calls
    if calls is not None and not isinstance(calls, list):
        raise DataError(f"{held}: tool_calls must be a list of {{name, arguments}} objects")
    return [_call(call, held) for call in [*(calls or []), *([] if is_blank(old) else [old])]]


def _spoken_calls(content: Any, held: str) -> list[Message]:
    """Return the calls that the turn of a ShareGPT role such as function_call holds as JSON."""
    calls = parse_json(content)
    return [_call(call, held) for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: Any, held: str) -> Message:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{held}: a call must be an object with a name and arguments")
    function = function if "arguments" in function else {**function, "arguments": {}}
    return {**call, "function": function} if "function" in call else function
