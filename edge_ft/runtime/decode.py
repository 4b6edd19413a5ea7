"""Text from a decoder bundle: generation, streaming, conversations, and scores of given tokens."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal, overload

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_ft.artifacts import Bundle
from edge_ft.config import RowsConfig, RunConfig
from edge_ft.data import (
    Batch,
    Columns,
    Message,
    Rendering,
    TextTokenizer,
    answer_ids,
    encode_prompt,
    make_rendering,
    stop_ids,
    target_mask,
)
from edge_ft.errors import UsageError
from edge_ft.runtime.answer_scoring import answer_nll
from edge_ft.runtime.cache import CacheShape, KVCache
from edge_ft.runtime.classify import Classification
from edge_ft.runtime.detokenizer import TextPieces
from edge_ft.runtime.sampling import Sampler
from edge_ft.runtime.task import OneTask

__all__ = [
    "DEFAULT_NEW_TOKENS",
    "GREEDY",
    "Clock",
    "Conversation",
    "Generation",
    "TextGenerator",
    "Timings",
    "TooLong",
    "last",
    "nll_of",
    "speak",
]

GREEDY = RunConfig()
DEFAULT_NEW_TOKENS = 256
_LOGITS_AT_ONCE = 1 << 24
"""Logits held while scoring: 64 MB; larger batches are scored in parts."""


class TooLong(UsageError):
    """A prompt and its answer are longer together than the model can read."""


@dataclass(frozen=True)
class Timings:
    """Seconds of one answer; time that the reader of a stream takes is not counted."""

    prefill_s: float
    """The graph over the prompt tokens that were not cached."""
    ttft_s: float
    """From the call to the first token, rendering and tokenizing included."""
    decode_s: tuple[float, ...]
    """Each later token: one run of the graph and the choice."""


@dataclass(frozen=True)
class Generation:
    """An answer and what it took."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that the cache of a conversation held already."""
    new_tokens: int
    """Decoded tokens, the one that ended the answer included."""
    finish_reason: Literal["stop", "length"]
    """stop: a stop token or stop string; length: max_new_tokens."""
    timings: Timings


class TextGenerator(OneTask):
    """An open text-generation bundle; answers one text at a time, scores batches."""

    def __init__(
        self, bundle: Bundle, session: ort.InferenceSession, adapter_inputs: dict[str, NDArray[np.float32]]
    ) -> None:
        self.bundle = bundle
        self.tokenizer = TextTokenizer.load(bundle.path)
        self.rendering = Rendering.from_dict(bundle.manifest["rendering"])
        self.max_length = int(bundle.manifest["max_length"])
        self.stop_ids = stop_ids(self.rendering, self.tokenizer)
        self._session = session
        self._shape = CacheShape(**bundle.manifest["cache"])
        self._adapter_inputs = adapter_inputs

    def generate(self, prompt: str | list[Message], config: RunConfig = GREEDY) -> Generation:
        """Answer a prompt.

        Args:
            prompt: Text, or the messages of a chat.
            config: How to answer; `threads`, `accuracy_level` and `adapter` are `load`'s.

        Raises:
            TooLong: prompt and answer are longer together than the model can read.
            UsageError: a stop string is empty, or the chat template cannot render the messages.
        """
        return last(self.stream(prompt, config))

    def stream(self, prompt: str | list[Message], config: RunConfig = GREEDY) -> Generator[str, None, Generation]:
        """As `generate`, in pieces of text as they become certain; the generator returns the `Generation`."""
        return self._stream(self.open_cache(), prompt, config)

    def chat(self, config: RunConfig = GREEDY) -> "Conversation":
        """A conversation whose tokens stay in the cache from turn to turn.

        Raises:
            UsageError: there is no chat template.
        """
        if self._rendering(config).chat_template is None:
            raise UsageError("this bundle has no chat template, so it cannot chat: give --chat-template FILE")
        return Conversation(self, config)

    @overload
    def classify(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too; the first match is meant
        self, prompts: str, labels: Sequence[str] | None = None
    ) -> Classification: ...

    @overload
    def classify(
        self, prompts: Sequence[str | list[Message]], labels: Sequence[str] | None = None
    ) -> list[Classification]: ...

    def classify(
        self, prompts: str | Sequence[str | list[Message]], labels: Sequence[str] | None = None
    ) -> Classification | list[Classification]:
        """Choose among answers instead of writing one.

        Args:
            prompts: Texts or chats, as for `generate`; or one text, for one result.
            labels: The answers allowed, without what --completion put around them in training; default those that
                the training rows had, where they were few.

        Returns:
            For each prompt the likeliest label; its scores are the softmax of the labels' log-probabilities as whole
            answers, end included, so that they sum to 1.

        Raises:
            TooLong: a prompt and the longest label are longer together than the model can read.
            UsageError: fewer than two different labels, or none given and none learned; or an empty prompt.
        """
        if isinstance(prompts, str):
            return self.classify([prompts], labels)[0]
        names = tuple(labels or self.rendering.answers)
        if not names:
            raise UsageError("this bundle was not trained on a few answers: say which are allowed, with --labels a,b,c")
        if len(names) < 2 or len(set(names)) < len(names):
            raise UsageError(f"labels {', '.join(names)}: give at least two different ones")
        answers = [answer_ids(self.rendering, self.tokenizer, name) for name in names]
        found = []
        for prompt in prompts:
            prompt_ids = encode_prompt(self.rendering, self.tokenizer, prompt)
            if not prompt_ids:
                raise UsageError("the prompt is empty: give it at least one character")
            nll = self.answer_nll(prompt_ids, answers)
            scores = np.exp(nll.min() - nll)
            scores /= scores.sum()
            best = names[int(scores.argmax())]
            found.append(Classification(best, dict(zip(names, scores.tolist(), strict=True)), len(prompt_ids), 0))
        return found

    def answer_nll(self, prompt_ids: list[int], answers: Sequence[list[int]]) -> NDArray[np.float64]:
        """See `edge_ft.runtime.answer_scoring.answer_nll`; the prompt is read once.

        Raises:
            TooLong: prompt and longest answer are longer together than the model can read.
        """
        longest = max(map(len, answers))
        if len(prompt_ids) + longest > self.max_length:
            raise _too_long(len(prompt_ids), longest, self.max_length)
        return answer_nll(self.open_cache(), prompt_ids, answers)

    def answer(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """Greedy continuation of a tokenized prompt, up to and without the first stop token.

        Fewer than `max_new_tokens` where the model's limit is nearer, none to an empty prompt or to one
        that fills the limit.
        """
        room = min(max_new_tokens, self.max_length - len(prompt_ids))
        if room < 1 or not prompt_ids:
            return []
        tokens = list(_decode(self.open_cache(), prompt_ids, room, GREEDY, self.stop_ids, Clock()))
        return tokens[:-1] if tokens[-1] in self.stop_ids else tokens

    def time_decode(self, prompt_ids: list[int], new_tokens: int) -> Timings:
        """Decode exactly `new_tokens` greedily, past any stop token, and say how long each took.

        Raises:
            TooLong: prompt and answer are longer together than the model can read.
        """
        if len(prompt_ids) + new_tokens > self.max_length:
            raise _too_long(len(prompt_ids), new_tokens, self.max_length)
        clock = Clock()
        for _ in _decode(self.open_cache(), prompt_ids, new_tokens, GREEDY, frozenset(), clock):
            pass
        return clock.timings()

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Negative log-likelihood (nats) and likeliest token, where there is a label.

        Returns:
            nll float32 and predicted int64, both [batch, seq], aligned with the labels: entry t is about
            the token at t given those before it; 0 and -100 where there is no label.
        """
        labels: NDArray[np.int64] = batch["labels"]
        targets = target_mask(labels, "text-generation")
        nll = np.zeros(labels.shape, np.float32)
        predicted = np.full(labels.shape, -100, np.int64)
        if not targets.any():
            return nll, predicted
        first = int(targets.any(axis=0).argmax())
        keep = labels.shape[1] - first + 1  # the position before the first target, and all after it
        rows_at_once = max(1, _LOGITS_AT_ONCE // (keep * self.tokenizer.vocab_size))
        for start in range(0, labels.shape[0], rows_at_once):
            rows = slice(start, start + rows_at_once)
            logits = self._logits(batch["input_ids"][rows], batch["attention_mask"][rows], keep)
            for row, row_logits in enumerate(logits, start):
                at = targets[row, first:]
                nll[row, first:][at], predicted[row, first:][at] = nll_of(row_logits[:-1][at], labels[row, first:][at])
        return nll, predicted

    def logits(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of every position.

        Args:
            input_ids: [batch, seq], padded on the right.
            attention_mask: [batch, seq], 1 for tokens and 0 for padding.

        Returns:
            [batch, seq, vocab]; what stands at padding means nothing.

        Raises:
            TooLong: seq is more than the model can read.
        """
        return self._logits(input_ids, attention_mask, 0)

    def open_cache(self) -> KVCache:
        """An empty cache of this model."""
        return KVCache(self._session, self._shape, self._adapter_inputs)

    def _logits(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], keep: int
    ) -> NDArray[np.float32]:
        batch, length = input_ids.shape
        if length > self.max_length:
            raise _too_long(length, 0, self.max_length)
        empty = np.zeros((batch, self._shape.kv_heads, 0, self._shape.head_dim), np.float32)
        feed = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "num_logits_to_keep": np.array(keep, np.int64),
            **{
                f"past_key_values.{layer}.{kind}": empty
                for layer in range(self._shape.layers)
                for kind in ("key", "value")
            },
            **self._adapter_inputs,
        }
        logits: NDArray[np.float32] = self._session.run(["logits"], feed)[0]
        return logits

    def _rendering(self, config: RunConfig) -> Rendering:
        if config.chat_template is None:
            return self.rendering
        asked = RowsConfig(chat_template=config.chat_template)
        columns = Columns("prompt_completion")  # what may have a chat template and may do without
        return make_rendering(asked, columns, "text-generation", self.tokenizer, self.max_length)

    def _stream(
        self, cache: KVCache, prompt: str | list[Message], config: RunConfig
    ) -> Generator[str, None, Generation]:
        clock = Clock()
        rendering = self._rendering(config)
        if config.num_beams > 1:
            raise UsageError("--num-beams is for text2text-generation: this bundle answers greedily or by sampling")
        if config.system is not None:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            prompt = [{"role": "system", "content": config.system}, *turns]
        prompt_ids = encode_prompt(rendering, self.tokenizer, prompt)
        if not prompt_ids:
            raise UsageError("the prompt is empty: give it at least one character")
        ends = stop_ids(rendering, self.tokenizer)
        room = self.max_length - len(prompt_ids)
        longest = config.max_new_tokens or min(DEFAULT_NEW_TOKENS, room)
        if room < max(longest, 1):
            raise _too_long(len(prompt_ids), max(longest, 1), self.max_length)
        cached = cache.rewind(prompt_ids)
        tokens = _decode(cache, prompt_ids, longest, config, ends, clock)
        spoken = yield from speak(tokens, ends, TextPieces(self.tokenizer.decode, config.stop))
        return Generation(
            text=spoken.text,
            prompt_tokens=len(prompt_ids),
            cached_tokens=cached,
            new_tokens=spoken.tokens,
            finish_reason=spoken.finish_reason,
            timings=clock.timings(),
        )


class Conversation:
    """A chat in which only what is new since the last turn is read.

    Each turn renders the whole chat and keeps the cached tokens that it begins with: but for the rounding
    of kernels, an answer is what starting over would give, also where the template rewrites earlier turns.
    """

    def __init__(self, generator: TextGenerator, config: RunConfig) -> None:
        self.messages: list[Message] = []
        self._generator = generator
        self._config = config
        self._cache = generator.open_cache()

    def say(self, content: str) -> Generation:
        """The answer to the user's next message."""
        return last(self.stream(content))

    def stream(self, content: str) -> Generator[str, None, Generation]:
        """As `say`, in pieces; a turn that is not read to its end is not part of the conversation."""
        asked = [*self.messages, {"role": "user", "content": content}]
        generation = yield from self._generator._stream(self._cache, asked, self._config)
        self.messages = [*asked, {"role": "assistant", "content": generation.text}]
        return generation


@dataclass(frozen=True)
class Spoken:
    """An answer, and how it came to its end."""

    text: str
    tokens: int
    """The one that ended it included."""
    finish_reason: Literal["stop", "length"]


def speak(tokens: Iterator[int], ends: frozenset[int], pieces: TextPieces) -> Generator[str, None, Spoken]:
    """The text of `tokens` as it becomes certain, until one of `ends`, a stop string or their own end."""
    text: list[str] = []
    count = 0
    finish_reason: Literal["stop", "length"] = "length"
    for token in tokens:
        count += 1
        if token in ends:
            finish_reason = "stop"
            break
        if piece := pieces.push(token):
            text.append(piece)
            yield piece
        if pieces.stopped:
            break
    if piece := pieces.finish():
        text.append(piece)
        yield piece
    return Spoken("".join(text), count, "stop" if pieces.stopped else finish_reason)


def nll_of(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Loss (nats) and likeliest token of each row of logits [targets, vocab], overwritten, and its label [targets]."""
    predicted = logits.argmax(axis=-1)
    logits -= logits.max(axis=-1, keepdims=True)
    chosen = logits[np.arange(len(logits)), labels]
    nll: NDArray[np.float32] = np.log(np.exp(logits, out=logits).sum(axis=-1)) - chosen
    return nll, predicted


class Clock:
    """Marks of one answer, which become its `Timings`."""

    def __init__(self) -> None:
        self.started = perf_counter()
        self.prefill_s = 0.0
        self.ttft_s = 0.0
        self.decode_s: list[float] = []

    def timings(self) -> Timings:
        return Timings(self.prefill_s, self.ttft_s, tuple(self.decode_s))


def _decode(
    cache: KVCache,
    prompt_ids: Sequence[int],
    longest: int,
    config: RunConfig,
    stop_ids: frozenset[int],
    clock: Clock,
) -> Iterator[int]:
    """Tokens until a stop token, which is the last one, or `longest` of them."""
    started = perf_counter()
    logits = cache.extend(prompt_ids[len(cache.ids) :])
    clock.prefill_s = perf_counter() - started
    sampler = Sampler(config, prompt_ids, logits.size)
    token = sampler.choose(logits)
    clock.ttft_s = perf_counter() - clock.started
    yield token
    for _ in range(longest - 1):
        if token in stop_ids:
            return
        started = perf_counter()
        token = sampler.choose(cache.extend((token,)))
        clock.decode_s.append(perf_counter() - started)
        yield token


def last(stream: Generator[str, None, Generation]) -> Generation:
    """Read a stream to its end, for what it returns."""
    while True:
        try:
            next(stream)
        except StopIteration as end:
            generation: Generation = end.value
            return generation


def _too_long(tokens: int, new_tokens: int, limit: int) -> TooLong:
    asked = f"{tokens} tokens and {new_tokens} new ones are" if new_tokens else f"{tokens} tokens are"
    way_out = f"ask for at most {limit - tokens} new tokens" if tokens < limit else "shorten the prompt"
    return TooLong(f"{asked} more than the {limit} tokens that this model can read: {way_out}")
