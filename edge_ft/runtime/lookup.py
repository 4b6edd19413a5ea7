"""Prompt lookup: guess the next tokens where the text repeats itself, and check the guesses in one run of the graph.

The answer is that of decoding token by token, greedy or sampled: each token is still chosen from the logits after all
tokens before it, and the first one that is not as guessed ends the run (Saxena, "Prompt Lookup Decoding", 2023).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from edge_ft.runtime.cache import KVCache
from edge_ft.runtime.decode import TimingsRecorder, first_token
from edge_ft.runtime.sampling import Sampler

__all__ = ["PromptLookup", "decode_with_lookup"]

MATCH = 3
"""Tokens that must have occurred together before, for those that followed them to be guessed."""
GUESSES = 15
"""Most tokens that are guessed; a run for 16 tokens took 1.2 times as long as one for 8 (docs/decisions/030)."""
CREDIT = 1.5
"""Steps of decoding that wrong guesses may cost at the start of an answer."""
SHARE = 0.02
"""Share of the decoding time that wrong guesses may cost beyond that."""


class PromptLookup:
    """The places where groups of `MATCH` tokens occurred last in a text that grows."""

    def __init__(self, ids: Sequence[int]) -> None:
        """Read the text so far."""
        self.ids: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}
        self._after: int | None = None
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Append a token to the text."""
        self.ids.append(token)
        if len(self.ids) >= MATCH:
            last = tuple(self.ids[-MATCH:])
            self._after = self._places.get(last)
            self._places[last] = len(self.ids)

    def guess(self, most: int) -> list[int]:
        """Return at most so many tokens: those that followed when the last `MATCH` tokens occurred before."""
        return [] if self._after is None else self.ids[self._after : self._after + min(most, GUESSES)]


@dataclass
class Pace:
    """Whether guessing pays, in seconds of this answer."""

    steps: list[float] = field(default_factory=list)
    """Of runs for one token, the last few."""
    spent: float = 0.0
    saved: float = 0.0
    """By all guesses so far, against a run for each of the tokens that they gave; below 0 they cost time."""

    @property
    def step(self) -> float:
        """Seconds of a run for one token; 0 before the first."""
        return sorted(self.steps)[len(self.steps) // 2] if self.steps else 0.0

    def allows(self) -> bool:
        """Return whether another wrong guess is affordable."""
        return bool(self.steps) and self.saved > -(CREDIT * self.step + SHARE * self.spent)

    def count(self, seconds: float, guessed: bool, tokens: int) -> None:
        """Count a run of the graph, with the tokens that it gave."""
        self.spent += seconds
        if guessed:
            self.saved += tokens * self.step - seconds
        else:
            self.steps = [*self.steps[-8:], seconds]


def decode_with_lookup(
    cache: KVCache,
    prompt_ids: Sequence[int],
    sampler: Sampler,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    recorder: TimingsRecorder,
) -> Iterator[int]:
    """Generate tokens as `decode_tokens` does, several in a run where the text repeats itself.

    Args:
        cache: Holds the beginning of the text.
        prompt_ids: Tokens that it has not read yet, at least one.
        sampler: Chooses each token.
        max_new_tokens: At least 1.
        stop_ids: Tokens that end the answer.
        recorder: Receives the timings; a run's time is that of its first token.

    Yields:
        Token ids; a stop token is the last one.
    """
    token, clock = first_token(cache.extend, prompt_ids, sampler, recorder), recorder.clock
    yield token
    count, pace, lookup = 1, Pace(), PromptLookup([*cache.ids, token])
    while count < max_new_tokens and token not in stop_ids:
        guessed = lookup.guess(max_new_tokens - count - 1) if pace.allows() else []
        started, read = clock(), len(cache.ids)
        rows = cache.extend_each((token, *guessed)) if guessed else [cache.extend((token,))]
        seconds, right = clock() - started, 0
        for row, guess in zip(rows, [*guessed, None], strict=True):
            token, count = sampler.choose(row), count + 1
            recorder.decode_s.append(seconds if right == 0 else 0.0)
            lookup.add(token)
            yield token
            if token != guess or token in stop_ids:
                break
            right += 1
        cache.truncate(read + 1 + right)
        pace.count(seconds, bool(guessed), right + 1)
