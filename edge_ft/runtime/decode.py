"""The generation loop: tokens from a model that reads its own output, and their text while they are generated."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal, TextIO

import numpy as np
from numpy.typing import NDArray

from edge_ft.config import RunConfig
from edge_ft.errors import UsageError
from edge_ft.runtime.sampling import Sampler

__all__ = [
    "DEFAULT_NEW_TOKENS",
    "GREEDY",
    "Generation",
    "StreamingDetokenizer",
    "Timings",
    "TimingsRecorder",
    "TooLong",
    "decode_tokens",
    "first_token",
    "read_to_end",
    "stream_text",
]

GREEDY = RunConfig()
DEFAULT_NEW_TOKENS = 256
_CLEANED = 8
"""Twice the longest text that cleaning up spaces replaces."""
_INCOMPLETE = "\ufffd"
"""What a tokenizer decodes bytes to that are not, or not yet, a character."""


class TooLong(UsageError):
    """A prompt and its answer are longer than the model can read."""


@dataclass(frozen=True)
class Timings:
    """Durations of one answer in seconds, without the time that the consumer of a stream takes."""

    prefill_s: float
    """Running the graph over the prompt tokens that were not cached."""
    ttft_s: float
    """From the call to the first token, rendering and tokenizing included."""
    decode_s: tuple[float, ...]
    """Each later token: one run of the graph, and choosing the token."""


@dataclass(frozen=True)
class Generation:
    """An answer and how it was generated."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were already in the cache of a conversation."""
    new_tokens: int
    """Generated tokens, a final stop token included."""
    finish_reason: Literal["stop", "length"]
    """stop: a stop token or stop string; length: max_new_tokens."""
    timings: Timings
    dropped_tokens: int = 0
    """Tokens of prompt and answer that --overflow dropped, so that the rest fits the model's limit."""


class TimingsRecorder:
    """Collects the `Timings` of one answer; its clock starts when it is made."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        """Start; `clock` gives seconds."""
        self.clock = clock or perf_counter
        self.started = self.clock()
        self.prefill_s = 0.0
        self.ttft_s = 0.0
        self.decode_s: list[float] = []

    def timings(self) -> Timings:
        """Return what was recorded."""
        return Timings(self.prefill_s, self.ttft_s, tuple(self.decode_s))


class StreamingDetokenizer:
    """Decodes token ids one by one, and returns only text that later tokens cannot change.

    Attributes:
        stopped: Whether a stop string is complete; the text ends before it.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: tuple[str, ...] = (),
        clean: Callable[[str], str] | None = None,
    ) -> None:
        """Start an empty text.

        Args:
            decode: Token ids -> text.
            stop: Stop strings; the text ends before the first one that is complete.
            clean: Changes the decoded text, nowhere by more than `_CLEANED` characters around a place; None: nothing
                does.

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
        self._clean = clean
        self._uncleaned, self._cleaned = "", 0  # the whole text before cleaning, and how much of it after is released

    def push(self, token: int) -> str:
        """Return the text that is final after this token; often empty."""
        self._pending.append(token)
        text = self._decode(self._decoded + self._pending)
        if text.endswith(_INCOMPLETE):
            return ""
        fresh = text[len(self._decoded_text) :]
        self._decoded, self._pending = (self._pending if fresh else self._decoded + self._pending), []
        self._decoded_text = self._decode(self._decoded)
        return self._release(self._cleaned_part(fresh, _CLEANED))

    def finish(self) -> str:
        """Return the text held back until the end of the answer, without bytes that never became a character."""
        if self.stopped:
            return ""
        fresh = self._decode(self._decoded + self._pending)[len(self._decoded_text) :].rstrip(_INCOMPLETE)
        self._pending = []
        text = self._release(self._cleaned_part(fresh, 0))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _cleaned_part(self, fresh: str, held: int) -> str:
        """Return what of the cleaned text is new, except for its last `held` characters."""
        if self._clean is None:
            return fresh
        self._uncleaned += fresh
        text = self._clean(self._uncleaned)
        part = text[self._cleaned : max(len(text) - held, self._cleaned)]
        self._cleaned += len(part)
        return part

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


def first_token(
    extend: Callable[[Sequence[int]], NDArray[np.float32]],
    prompt_ids: Sequence[int],
    sampler: Sampler,
    recorder: TimingsRecorder,
) -> int:
    """Read a prompt and choose the first token of the answer; the arguments are those of `decode_tokens`."""
    started = recorder.clock()
    logits = extend(prompt_ids)
    recorder.prefill_s += recorder.clock() - started
    token = sampler.choose(logits)
    recorder.ttft_s = recorder.clock() - recorder.started
    return token


def decode_tokens(
    extend: Callable[[Sequence[int]], NDArray[np.float32]],
    prompt_ids: Sequence[int],
    sampler: Sampler,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    recorder: TimingsRecorder,
) -> Iterator[int]:
    """Generate tokens until a stop token or `max_new_tokens`.

    Args:
        extend: Makes the model read further tokens; returns the logits [vocab] after them.
        prompt_ids: Tokens that the model has not read yet, at least one.
        sampler: Chooses each token.
        max_new_tokens: At least 1.
        stop_ids: Tokens that end the answer.
        recorder: Receives the timings; `prefill_s` is added to what it has.

    Yields:
        Token ids; a stop token is the last one.
    """
    token = first_token(extend, prompt_ids, sampler, recorder)
    yield token
    for _ in range(max_new_tokens - 1):
        if token in stop_ids:
            return
        started = recorder.clock()
        token = sampler.choose(extend((token,)))
        recorder.decode_s.append(recorder.clock() - started)
        yield token


def stream_text(
    tokens: Iterator[int],
    stop_ids: frozenset[int],
    detokenizer: StreamingDetokenizer,
    recorder: TimingsRecorder,
    prompt_tokens: int,
    cached_tokens: int = 0,
) -> Generator[str, None, Generation]:
    """Turn tokens into text until a stop token, a stop string or the last token.

    Args:
        tokens: Generated token ids.
        stop_ids: Tokens that end the answer and are not part of its text.
        detokenizer: A new one; it knows the stop strings.
        recorder: Timings of `tokens`.
        prompt_tokens: For the result.
        cached_tokens: For the result.

    Yields:
        Pieces of text that later tokens cannot change.

    Returns:
        The `Generation`.
    """
    text: list[str] = []
    count = 0
    finish_reason: Literal["stop", "length"] = "length"
    for token in tokens:
        count += 1
        if token in stop_ids:
            finish_reason = "stop"
            break
        if piece := detokenizer.push(token):
            text.append(piece)
            yield piece
        if detokenizer.stopped:
            break
    if piece := detokenizer.finish():
        text.append(piece)
        yield piece
    return Generation(
        text="".join(text),
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        new_tokens=count,
        finish_reason="stop" if detokenizer.stopped else finish_reason,
        timings=recorder.timings(),
    )


def read_to_end(stream: Generator[str, None, Generation], target: TextIO | None = None) -> Generation:
    """Return the `Generation` of a stream; its pieces are written to `target`, if there is one, as they come."""
    while True:
        try:
            piece = next(stream)
        except StopIteration as end:
            return end.value
        if target is not None:
            print(piece, end="", file=target, flush=True)
