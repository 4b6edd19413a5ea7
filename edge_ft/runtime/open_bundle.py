"""What all open bundles have in common, and what those have that generate text."""

from abc import abstractmethod
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NoReturn, overload

from edge_ft.artifacts import Bundle
from edge_ft.config import RunConfig
from edge_ft.data import Chat, Message, Rendering, TextTokenizer, stop_ids
from edge_ft.errors import BundleError, UsageError
from edge_ft.runtime.decode import GREEDY, Generation, Timings, TimingsRecorder, read_to_end
from edge_ft.runtime.ways import Engine

__all__ = ["GenerativeBundle", "OpenBundle"]

METHOD_TASKS = {
    "generate": ("text-generation", "text2text-generation"),
    "stream": ("text-generation", "text2text-generation"),
    "chat": ("text-generation",),
    "classify": ("text-classification", "text-generation"),
    "tag": ("token-classification",),
    "fill": ("fill-mask",),
    "embed": ("feature-extraction",),
}
"""The tasks whose bundles have each method."""


class OpenBundle:
    """A bundle, its tokenizer and its rendering; a method of another task raises UsageError.

    Attributes:
        engine: How it runs, which `edge_ft.runtime.load` sets.

    Raises:
        BundleError: the manifest contradicts itself.
    """

    engine: Engine | None = None

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.tokenizer = TextTokenizer.of_bundle(bundle.path)
        self.rendering = Rendering.from_dict(bundle.manifest["rendering"])
        if self.rendering.task != bundle.task:
            raise BundleError(
                f"{bundle.path / 'manifest.json'} is of a {bundle.task} bundle and renders rows for "
                f"{self.rendering.task}: export it again"
            )

    def __getattr__(self, name: str) -> NoReturn:
        if name in METHOD_TASKS:
            raise UsageError(
                f"{self.bundle.path} is a {self.bundle.task} bundle: {name} needs a bundle for "
                f"{' or '.join(METHOD_TASKS[name])}"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class GenerativeBundle(OpenBundle):
    """An open bundle that generates text.

    Attributes:
        max_length: The model's limit in tokens.
        stop_ids: Tokens that end an answer.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.max_length = bundle.max_length
        self.stop_ids = stop_ids(self.rendering, self.tokenizer)

    @overload
    def generate(self, prompt: str | list[Message] | Chat, config: RunConfig = GREEDY) -> Generation: ...

    @overload
    def generate(
        self, prompt: list[str] | list[list[Message]] | list[Chat], config: RunConfig = GREEDY
    ) -> list[Generation]: ...

    def generate(self, prompt: Any, config: RunConfig = GREEDY) -> Generation | list[Generation]:
        """Answer a prompt, or several.

        Args:
            prompt: Text; or a chat or its messages, for a decoder. Or a list of these, for as many results.
            config: Options of the answer; `engine`, `threads`, `accuracy_level` and `adapter` belong to `load`.

        Returns:
            The text and how it was generated.

        Raises:
            TooLong: prompt or answer exceed the model's limit; for a decoder, both together.
            UsageError: an empty prompt or stop string, or options that do not fit the bundle.
        """
        if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], dict):  # a list of messages is a chat
            return read_to_end(self.stream(prompt, config))
        answers = []
        for answer in self.generate_each(prompt, config):
            if isinstance(answer, UsageError):
                raise answer
            answers.append(answer)
        return answers

    def generate_each(
        self, prompts: Sequence[str | list[Message] | Chat], config: RunConfig = GREEDY
    ) -> Iterator[Generation | UsageError]:
        """Answer prompts, where one that cannot be answered does not stop the others.

        Args:
            prompts: As for `generate`.
            config: As for `generate`.

        Yields:
            The answer to each prompt, in order; the error of one that cannot be answered.
        """
        for prompt in prompts:
            try:
                yield read_to_end(self.stream(prompt, config))
            except UsageError as error:
                yield error

    def unread_by(self, prompt: str | list[Message] | Chat, config: RunConfig = GREEDY) -> tuple[str, ...]:
        """Return what a prompt says and the model does not read; an encoder-decoder reads all of a text."""
        return ()

    @abstractmethod
    def stream(
        self, prompt: str | list[Message] | Chat, config: RunConfig = GREEDY
    ) -> Generator[str, None, Generation]:
        """Answer a prompt piece by piece, as `generate` does.

        Args:
            prompt: As for `generate`.
            config: As for `generate`.

        Returns:
            A generator of pieces of text that later tokens cannot change; its return value is the `Generation`.
        """

    def answer(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """Answer a tokenized prompt greedily.

        Args:
            prompt_ids: Token ids.
            max_new_tokens: Fewer are generated where the model's limit is nearer.

        Returns:
            Token ids before the first stop token; none for an empty prompt or one that fills the model's limit.
        """
        max_new_tokens = min(max_new_tokens, self._longest_answer(len(prompt_ids)))
        if max_new_tokens < 1 or not prompt_ids:
            return []
        tokens = list(self._tokens(prompt_ids, max_new_tokens, self.stop_ids, GREEDY, TimingsRecorder()))
        return tokens[:-1] if tokens[-1] in self.stop_ids else tokens

    def time_decode(self, prompt_ids: list[int], new_tokens: int) -> Timings:
        """Generate exactly `new_tokens` greedily with an empty cache, past any stop token, and time each.

        Args:
            prompt_ids: Token ids, at least one.
            new_tokens: At least 1.

        Returns:
            Seconds of the prompt (`prefill_s`; for an encoder-decoder, of the encoder and the first token) and of each
            token after the first (`decode_s`).

        Raises:
            TooLong: prompt or answer exceed the model's limit; for a decoder, both together.
        """
        self._check_length(len(prompt_ids), new_tokens)
        recorder = TimingsRecorder()
        list(self._tokens(prompt_ids, new_tokens, frozenset(), GREEDY, recorder))
        return recorder.timings()

    @abstractmethod
    def _check_length(self, tokens: int, new_tokens: int) -> None:
        """Raise TooLong if a prompt and an answer of these lengths exceed the model's limit."""

    @abstractmethod
    def _longest_answer(self, tokens: int) -> int:
        """Return how many tokens an answer to a prompt of `tokens` may have; below 1 is none."""

    @abstractmethod
    def _tokens(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        stops: frozenset[int],
        config: RunConfig,
        recorder: TimingsRecorder,
    ) -> Iterator[int]:
        """Return the generated tokens, a stop token included."""
