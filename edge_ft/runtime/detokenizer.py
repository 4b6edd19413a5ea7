"""Tokens to text while it streams: never half a character, never part of a stop string."""

from collections.abc import Callable

from edge_ft.errors import UsageError

__all__ = ["TextPieces"]

_HALF = "\ufffd"
"""What a decoder shows for bytes that are not, or not yet, a character."""


class TextPieces:
    """Takes token ids and hands out the text that is certain by now."""

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...] = ()) -> None:
        """Start an empty text.

        Args:
            decode: Ids to text.
            stop: The text ends before the first of these that is complete.

        Raises:
            UsageError: a stop string is empty.
        """
        if "" in stop:
            raise UsageError("--stop: an empty string would end every answer at once, leave it out")
        self.stopped = False
        self._decode = decode
        self._stop = stop
        self._shown: list[int] = []  # the last ids that became text: some decoders look at what is before
        self._shown_text = ""
        self._open: list[int] = []  # ids that end inside a character
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token: int) -> str:
        """The text that this token makes certain; often empty."""
        self._open.append(token)
        text = self._decode(self._shown + self._open)
        if text.endswith(_HALF):
            return ""
        fresh = text[len(self._shown_text) :]
        self._shown, self._open = (self._open if fresh else self._shown + self._open), []
        self._shown_text = self._decode(self._shown)
        return self._release(fresh)

    def finish(self) -> str:
        """What was held back, at the end of the answer; bytes that never became a character are dropped."""
        if self.stopped:
            return ""
        fresh = self._decode(self._shown + self._open)[len(self._shown_text) :].rstrip(_HALF)
        self._open = []
        text = self._release(fresh)
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _release(self, fresh: str) -> str:
        text = self._held + fresh
        # Completed first wins, so that the result does not depend on how tokens cut the text.
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
