"""Tokens to text while they are generated: never half a character, never part of a stop string."""

from collections.abc import Callable

from edge_ft.errors import UsageError

__all__ = ["StreamingDetokenizer"]

_INCOMPLETE = "\ufffd"
"""What a tokenizer decodes bytes to that are not, or not yet, a character."""


class StreamingDetokenizer:
    """Decodes token ids one by one, and returns only text that later tokens cannot change.

    Attributes:
        stopped: Whether a stop string is complete; the text ends before it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...] = ()) -> None:
        """Start an empty text.

        Args:
            decode: Token ids -> text.
            stop: Stop strings; the text ends before the first one that is complete.

        Raises:
            UsageError: a stop string is empty.
        """
        if "" in stop:
            raise UsageError("--stop: an empty string would end every answer at its start; leave it out")
        self.stopped = False
        self._decode = decode
        self._stop = stop
        self._decoded: list[int] = []  # the last ids that became text: some tokenizers decode by what precedes
        self._decoded_text = ""
        self._pending: list[int] = []  # ids that end inside a character
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Return the text that is final after this token; often empty."""
        self._pending.append(token)
        text = self._decode(self._decoded + self._pending)
        if text.endswith(_INCOMPLETE):
            return ""
        fresh = text[len(self._decoded_text) :]
        self._decoded, self._pending = (self._pending if fresh else self._decoded + self._pending), []
        self._decoded_text = self._decode(self._decoded)
        return self._release(fresh)

    def finish(self) -> str:
        """Return the text held back until the end of the answer, without bytes that never became a character."""
        if self.stopped:
            return ""
        fresh = self._decode(self._decoded + self._pending)[len(self._decoded_text) :].rstrip(_INCOMPLETE)
        self._pending = []
        text = self._release(fresh)
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _release(self, fresh: str) -> str:
        """Return the held and the new text as far as no stop string can begin in it."""
        text = self._held + fresh
        # The stop string that is complete first wins, so that the result does not depend on where tokens end.
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                self._held = text[-length:]
                return text[:-length]
        self._held = ""
        return text
