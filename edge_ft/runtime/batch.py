"""Several prompts answered together: each is read alone, then one run of the graph generates a token of each.

A run of the graph reads the weights once for all texts. Whether that is faster than one text after the other depends
on the kernels (docs/decisions/026), so it is measured while the answers are generated.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from statistics import median

from edge_ft.config import RunConfig
from edge_ft.runtime.batch_cache import BatchCache
from edge_ft.runtime.cache import KVCache
from edge_ft.runtime.decode import StreamingDetokenizer, TimingsRecorder, first_token
from edge_ft.runtime.sampling import Sampler
from edge_ft.runtime.window import Window

__all__ = ["FEWEST", "SLOTS", "Answer", "Pace", "Request", "answer_together"]

SLOTS = 8
"""Most texts in a run."""
FEWEST = 4
"""Prompts that must wait for a batch to be begun: a run for two or three may take as long as one for each."""
_GAIN = 1.05
"""How many times as fast as alone a batch must generate, to be filled up again."""
_TRIED, _RECENT = 4, 16
"""Runs of a batch after which its speed is known, and how many of the last ones count."""
_KNOWN = 8
"""Tokens generated alone after which that speed is known."""


@dataclass(frozen=True)
class Request:
    """A prompt as the model reads it, and how it is answered."""

    prompt_ids: list[int]
    max_new_tokens: int
    stops: frozenset[int]
    config: RunConfig
    window: Window


@dataclass
class Pace:
    """Seconds of a token of answers that are generated alone, and together."""

    alone: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)

    @property
    def is_known(self) -> bool:
        """Whether enough was generated alone."""
        return len(self.alone) >= _KNOWN

    def pays(self) -> bool:
        """Return whether a batch is worth its while, as far as is known."""
        if len(self.together) < _TRIED:
            return True
        return median(self.together) * _GAIN < sum(self.alone) / len(self.alone)


@dataclass
class Answer:
    """An answer that is being generated."""

    request: Request
    recorder: TimingsRecorder
    sampler: Sampler
    detokenizer: StreamingDetokenizer
    """Finds stop strings."""
    cached_tokens: int
    tokens: list[int] = field(default_factory=list)

    def add(self, token: int) -> None:
        """Append a token."""
        self.tokens.append(token)
        if token not in self.request.stops and self.request.config.stop:
            self.detokenizer.push(token)

    @property
    def has_ended(self) -> bool:
        """Whether a stop token or string, or the limit, was reached."""
        request = self.request
        at_limit = len(self.tokens) >= request.max_new_tokens
        return at_limit or self.tokens[-1] in request.stops or self.detokenizer.stopped


def answer_together(
    waiting: deque[tuple[int, Request]],
    cache: KVCache,
    batch: BatchCache,
    decode: Callable[[list[int]], str],
    room: int,
    pace: Pace,
) -> Iterator[tuple[int, Answer]]:
    """Answer requests in batches, for as long as that pays.

    Args:
        waiting: Numbered requests; those that are begun are taken from its left.
        cache: Reads the prompts, one after the other; what one begins with is not read again where the last one began
            so.
        batch: Empty.
        decode: Token ids -> text, to find stop strings.
        room: Bytes that the batch's keys and values may take; a single text always fits.
        pace: Knows how fast answers are generated alone; receives the seconds of a token in a batch.

    Yields:
        Number and answer, as they end. `decode_s` of its timings has the whole time of each run.
    """
    active: list[tuple[int, Answer]] = []
    longest = 0
    while True:
        while waiting and len(active) < SLOTS and pace.pays():
            request = waiting[0][1]
            ends = len(request.prompt_ids) + request.max_new_tokens
            longest = max(longest, ends) if active else ends
            if active and batch.nbytes(len(active) + 1, longest) > room:
                break
            number, request = waiting.popleft()
            answer = _begin(request, cache, decode)
            if answer.has_ended:
                yield number, answer
            else:
                batch.add(cache)
                active.append((number, answer))
        if not active:
            return
        yield from _step(active, batch, pace)


def _begin(request: Request, cache: KVCache, decode: Callable[[list[int]], str]) -> Answer:
    """Read a prompt and choose the first token."""
    recorder = TimingsRecorder()
    cached = cache.rewind(request.prompt_ids)
    sampler = Sampler(request.config, request.prompt_ids, cache.vocabulary)
    answer = Answer(request, recorder, sampler, StreamingDetokenizer(decode, request.config.stop), cached)
    answer.add(first_token(cache.extend, request.prompt_ids[cached:], sampler, recorder))
    return answer


def _step(active: list[tuple[int, Answer]], batch: BatchCache, pace: Pace) -> Generator[tuple[int, Answer], None, None]:
    """Generate a token of each answer; yields and drops those that ended."""
    clock = active[0][1].recorder.clock
    started = clock()
    rows = batch.step([answer.tokens[-1] for _, answer in active])
    tokens = [answer.sampler.choose(row) for row, (_, answer) in zip(rows, active, strict=True)]
    seconds = clock() - started
    pace.together = [*pace.together[-_RECENT:], seconds / len(active)]
    for (_, answer), token in zip(active, tokens, strict=True):
        answer.add(token)
        answer.recorder.decode_s.append(seconds)
    for at in reversed(range(len(active))):
        number, answer = active[at]
        if answer.has_ended:
            batch.drop(at)  # the last one takes its place
            active[at] = active[-1]
            active.pop()
            yield number, answer
