"""A chat whose earlier turns stay in the cache."""

from collections.abc import Callable, Generator

from edge_ft.data import Message
from edge_ft.runtime.decode import Generation, read_to_end

__all__ = ["Conversation"]


class Conversation:
    """A chat in which only the tokens that are new since the last turn are read.

    Each turn renders the whole chat and reuses the cached tokens that the rendered chat begins with. Except for
    rounding in the kernels, an answer is the same as without the cache, even where the chat template rewrites earlier
    turns.
    """

    def __init__(self, answer: Callable[[list[Message]], Generator[str, None, Generation]]) -> None:
        """Start an empty conversation.

        Args:
            answer: Streams the answer to a list of messages; it owns the cache.
        """
        self.messages: list[Message] = []
        self._answer = answer

    def send(self, content: str) -> Generation:
        """Return the answer to the user's next message."""
        return read_to_end(self.stream(content))

    def stream(self, content: str) -> Generator[str, None, Generation]:
        """Stream the answer to the user's next message.

        A turn whose stream is not read to its end is not added to the conversation.

        Yields:
            Pieces of text, as soon as later tokens cannot change them.

        Returns:
            The `Generation`.
        """
        messages = [*self.messages, {"role": "user", "content": content}]
        generation = yield from self._answer(messages)
        self.messages = [*messages, {"role": "assistant", "content": generation.text}]
        return generation
