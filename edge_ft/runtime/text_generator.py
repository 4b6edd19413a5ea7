"""An open text-generation bundle: answers, alone and in batches, and scores of given tokens."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any, overload

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_ft.artifacts import Bundle
from edge_ft.config import RowsConfig, RunConfig
from edge_ft.data import (
    Batch,
    Chat,
    Columns,
    Message,
    Rendering,
    answer_ids,
    encode_prompt,
    make_rendering,
    stop_ids,
    target_mask,
    unread_by,
)
from edge_ft.errors import UsageError
from edge_ft.runtime.batch import FEWEST, SLOTS, Pace, Request, answer_together
from edge_ft.runtime.batch_cache import BatchCache
from edge_ft.runtime.cache import CacheShape, KVCache
from edge_ft.runtime.classify import Classification
from edge_ft.runtime.conversation import Conversation
from edge_ft.runtime.decode import (
    DEFAULT_NEW_TOKENS,
    GREEDY,
    Generation,
    StreamingDetokenizer,
    Timings,
    TimingsRecorder,
    TooLong,
    decode_tokens,
    read_to_end,
    stream_text,
)
from edge_ft.runtime.huge_pages import use_huge_pages
from edge_ft.runtime.lookup import decode_with_lookup
from edge_ft.runtime.open_bundle import GenerativeBundle
from edge_ft.runtime.sampling import Sampler
from edge_ft.runtime.session import running
from edge_ft.runtime.token_scores import answer_nll, score_targets
from edge_ft.runtime.window import Window
from edge_ft.system import free_memory_bytes

__all__ = ["TextGenerator"]

_LONG = 16
"""Tokens of an answer after which the weights are moved to huge pages: moving takes as long as some 20 tokens."""
_MEMORY = 4
"""They are moved where the process has at most this many times the bundle's size in memory."""


class TextGenerator(GenerativeBundle):
    """An open text-generation bundle; answers prompts alone or in batches, scores batches.

    Attributes:
        prefill: A second graph of the bundle, which reads prompts; None where one graph does all.
        exact: Whether each answer is computed token by token from an empty cache; else several tokens are read in a
            run where a text repeats itself (`edge_ft.runtime.lookup`), and beginnings may be shared.
    """

    def __init__(
        self, bundle: Bundle, session: ort.InferenceSession, adapter_inputs: dict[str, NDArray[np.float32]]
    ) -> None:
        super().__init__(bundle)
        self._session = session
        self.prefill: ort.InferenceSession | None = None
        self.exact = True
        self._shared: KVCache | None = None
        self._settled = False
        self._shape = CacheShape.of(bundle)
        self._adapter_inputs = adapter_inputs

    def stream(
        self, prompt: str | list[Message] | Chat, config: RunConfig = GREEDY
    ) -> Generator[str, None, Generation]:
        """See `GenerativeBundle.stream`."""
        return self._stream(self._shared or self.open_cache(), prompt, config)

    def generate_each(
        self, prompts: Sequence[str | list[Message] | Chat], config: RunConfig = GREEDY
    ) -> Iterator[Generation | UsageError]:
        """See `GenerativeBundle.generate_each`: several prompts are answered together, where that is faster.

        The answers are those of one prompt after the other, except for rounding in the kernels, and an exact generator
        answers one after the other. The keys and values of a batch take at most a quarter of the free memory.

        Yields:
            The answer to each prompt, in order; the error of one that cannot be answered.
        """
        if self.exact or config.overflow == "shift" or len(prompts) <= FEWEST:
            yield from super().generate_each(prompts, config)
            return
        ended: dict[int, Generation | UsageError] = {}
        waiting: deque[tuple[int, Request]] = deque()
        for number, prompt in enumerate(prompts):
            try:
                waiting.append((number, self._request(prompt, config)))
            except UsageError as error:
                ended[number] = error
        following = 0
        for number, answer in self._answer_all(waiting):
            ended[number] = answer
            while following in ended:
                yield ended.pop(following)
                following += 1
        yield from (ended[number] for number in sorted(ended))

    def _answer_all(self, waiting: deque[tuple[int, Request]]) -> Iterator[tuple[int, Generation]]:
        """Answer numbered requests, alone until that speed is known, then together while that is faster."""
        cache, pace = self._shared or self.open_cache(), Pace()
        while waiting:
            if pace.is_known and pace.pays() and len(waiting) >= FEWEST:
                batch = BatchCache(self._session, self._shape, SLOTS, self._adapter_inputs)
                room, decode = free_memory_bytes() // 4, self.tokenizer.decode_raw
                for number, answer in answer_together(waiting, cache, batch, decode, room, pace):
                    text = self._text(answer.request, iter(answer.tokens), answer.recorder, answer.cached_tokens)
                    yield number, read_to_end(text)
                continue
            number, request = waiting.popleft()
            generation = read_to_end(self._answer(cache, request, TimingsRecorder()))
            pace.alone += generation.timings.decode_s
            yield number, generation

    def time_batch(self, prompt_ids: list[int], texts: int, new_tokens: int) -> float | None:
        """Generate `new_tokens` greedily for each of some texts with the same prompt, past any stop token.

        Args:
            prompt_ids: Token ids, at least one.
            texts: How many, at least one.
            new_tokens: At least 2.

        Returns:
            Seconds of the tokens after the first; None where a quarter of the free memory is too little.
        """
        batch, cache = BatchCache(self._session, self._shape, texts, self._adapter_inputs), self.open_cache()
        if batch.nbytes(texts, len(prompt_ids) + new_tokens) * 4 > free_memory_bytes():
            return None
        tokens = [int(cache.extend(prompt_ids).argmax())] * texts
        for _ in range(texts):
            batch.add(cache)
        started = perf_counter()
        for _ in range(new_tokens - 1):
            tokens = batch.step(tokens).argmax(axis=-1).tolist()
        return perf_counter() - started

    def time_decode(self, prompt_ids: list[int], new_tokens: int) -> Timings:
        """See `GenerativeBundle.time_decode`."""
        timings = super().time_decode(prompt_ids, new_tokens)
        self._settle(new_tokens)
        return timings

    def _settle(self, tokens: int) -> None:
        """After the first long answer, which others will follow, move the weights to huge pages."""
        if tokens >= _LONG and not self._settled:
            self._settled = True
            use_huge_pages(_MEMORY * self.bundle.size_bytes)

    def unread_by(self, prompt: str | list[Message] | Chat, config: RunConfig = GREEDY) -> tuple[str, ...]:
        """See `GenerativeBundle.unread_by`."""
        return unread_by(self._rendering(config), self.tokenizer, prompt)

    def chat(self, config: RunConfig = GREEDY) -> Conversation:
        """Start a conversation, whose tokens stay in the cache from turn to turn.

        Args:
            config: Options of every answer.

        Returns:
            An empty conversation.

        Raises:
            UsageError: there is no chat template.
        """
        if self._rendering(config).chat_template is None:
            raise UsageError("this bundle has no chat template, so it cannot chat: give --chat-template FILE")
        cache = self.open_cache()
        return Conversation(lambda messages: self._stream(cache, messages, config))

    @overload
    def classify(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too; the first match is meant
        self, prompts: str, labels: Sequence[str] | None = None
    ) -> Classification: ...

    @overload
    def classify(
        self, prompts: Sequence[str | list[Message] | Chat], labels: Sequence[str] | None = None
    ) -> list[Classification]: ...

    def classify(
        self, prompts: str | Sequence[str | list[Message] | Chat], labels: Sequence[str] | None = None
    ) -> Classification | list[Classification]:
        """Choose the likeliest of given answers instead of generating one.

        Args:
            prompts: Texts or chats, as for `generate`; or one text, for one result.
            labels: The allowed answers, without the text that --completion puts around them in training; default
                the answers of the training rows, if they were few.

        Returns:
            The likeliest label of each prompt. Its scores are the softmax of the labels' log-probabilities as whole
            answers, stop token included, so they sum to 1.

        Raises:
            TooLong: a prompt and the longest label together exceed the model's limit.
            UsageError: fewer than two different labels, none given and none in the bundle, or an empty prompt.
        """
        if isinstance(prompts, str):
            return self.classify([prompts], labels)[0]
        names = tuple(labels or self.rendering.answers)
        if not names:
            raise UsageError("this bundle was not trained on a few answers: name the allowed ones, with --labels a,b,c")
        if len(names) < 2 or len(set(names)) < len(names):
            raise UsageError(f"labels {', '.join(names)}: give at least two different ones")
        answers = [answer_ids(self.rendering, self.tokenizer, name) for name in names]
        results = []
        for prompt in prompts:
            prompt_ids = self._encode(self.rendering, prompt)
            nll = self.answer_nll(prompt_ids, answers)
            scores = np.exp(nll.min() - nll)
            scores /= scores.sum()
            best = names[int(scores.argmax())]
            results.append(Classification(best, dict(zip(names, scores.tolist(), strict=True)), len(prompt_ids), 0))
        return results

    def answer_nll(self, prompt_ids: list[int], answers: Sequence[list[int]]) -> NDArray[np.float64]:
        """Score whole answers; see `edge_ft.runtime.token_scores.answer_nll`.

        Args:
            prompt_ids: Token ids, at least one.
            answers: Token ids of each answer, stop token included.

        Returns:
            Negative log-likelihood (nats) of each answer, [answers].

        Raises:
            TooLong: the prompt and the longest answer together exceed the model's limit.
        """
        self._check_length(len(prompt_ids), max(map(len, answers)))
        return answer_nll(self._shared or self.open_cache(), prompt_ids, answers)

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Score the labelled tokens of a batch.

        Args:
            batch: Rows as `edge_ft.data.collate` makes them.

        Returns:
            Negative log-likelihood (nats) float32 and likeliest token int64, both [batch, seq] and aligned with the
            labels: entry t is about the token at t given those before it; 0 and -100 where there is no label.
        """
        labels: NDArray[np.int64] = batch["labels"]
        targets = target_mask(labels, "text-generation")
        nll = np.zeros(labels.shape, np.float32)
        predicted = np.full(labels.shape, -100, np.int64)
        if not targets.any():
            return nll, predicted
        first = int(targets.any(axis=0).argmax())
        keep = labels.shape[1] - first + 1  # the position before the first target, and all after it

        def compute_logits(rows: slice) -> NDArray[np.float32]:
            return self.logits(batch["input_ids"][rows], batch["attention_mask"][rows], keep)[:, :-1]

        nll[:, first:], predicted[:, first:] = score_targets(
            compute_logits, labels[:, first:], targets[:, first:], keep * self.tokenizer.vocab_size
        )
        return nll, predicted

    def logits(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], keep: int = 0
    ) -> NDArray[np.float32]:
        """Compute the logits of every position, or of the last ones.

        Args:
            input_ids: [batch, seq], padded on the right.
            attention_mask: [batch, seq], 1 for tokens and 0 for padding.
            keep: Number of last positions; 0 is all.

        Returns:
            [batch, seq or keep, vocab]; the values at padding are meaningless.

        Raises:
            TooLong: seq exceeds the model's limit.
        """
        batch, length = input_ids.shape
        self._check_length(length, 0)
        empty = np.zeros((batch, self._shape.kv_heads, 0, self._shape.head_dim), np.float32)
        feed = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "num_logits_to_keep": np.array(keep, np.int64),
            **{f"past_key_values.{name}": empty for name in self._shape.names()},
            **self._adapter_inputs,
        }
        with running(self._session):
            return self._session.run(["logits"], feed)[0]

    @contextmanager
    def sharing_beginnings(self) -> Iterator[None]:
        """Read what a prompt begins with only once, where the one before began so too; prompts follow each other.

        The cache keeps the memory of the longest text until the end. An exact generator shares nothing.
        """
        self._shared = None if self.exact else self.open_cache()
        try:
            yield
        finally:
            self._shared = None

    def open_cache(self) -> KVCache:
        """Return an empty cache of this model."""
        return KVCache(self._session, self._shape, self._adapter_inputs, self.prefill)

    def _rendering(self, config: RunConfig) -> Rendering:
        """Return the bundle's rendering, with the chat template of `config` if it names one."""
        if config.chat_template is None:
            return self.rendering
        rows = RowsConfig(chat_template=config.chat_template)
        columns = Columns("prompt_completion")  # works with and without a chat template
        return make_rendering(rows, columns, "text-generation", self.tokenizer, self.max_length)

    def _encode(self, rendering: Rendering, prompt: str | list[Message] | Chat) -> list[int]:
        """Return the prompt's token ids.

        Raises:
            UsageError: there are none.
        """
        prompt_ids = encode_prompt(rendering, self.tokenizer, prompt)
        if not prompt_ids:
            raise UsageError("the prompt is empty: give it at least one character")
        return prompt_ids

    def _check_length(self, tokens: int, new_tokens: int) -> None:
        """Refuse what exceeds the model's limit.

        Raises:
            TooLong: it does.
        """
        limit = self.max_length
        if tokens + new_tokens <= limit:
            return
        what = f"{tokens} tokens and {new_tokens} new ones are" if new_tokens else f"{tokens} tokens are"
        fix = f"request at most {limit - tokens} new tokens" if tokens < limit else "shorten the prompt"
        raise TooLong(f"{what} more than the {limit} tokens that this model can read: {fix}")

    def _longest_answer(self, tokens: int) -> int:
        return self.max_length - tokens

    def _stream(
        self, cache: KVCache, prompt: str | list[Message] | Chat, config: RunConfig
    ) -> Generator[str, None, Generation]:
        """Answer a prompt from a cache that may hold a beginning of it.

        Yields:
            Pieces of text.

        Returns:
            The `Generation`.

        Raises:
            UsageError: options that do not fit the bundle.
        """
        recorder = TimingsRecorder()
        return (yield from self._answer(cache, self._request(prompt, config), recorder))

    def _answer(self, cache: KVCache, request: Request, recorder: TimingsRecorder) -> Generator[str, None, Generation]:
        """Answer a request alone; see `_stream`."""
        config, prompt_ids, stops = request.config, request.prompt_ids, request.stops
        max_new_tokens = request.max_new_tokens
        cached = cache.rewind(prompt_ids)
        sampler, rest = Sampler(config, prompt_ids, cache.vocabulary), prompt_ids[cached:]
        if config.overflow == "shift":
            tokens = decode_tokens(request.window.shifting(cache), rest, sampler, max_new_tokens, stops, recorder)
        elif self.exact:
            tokens = decode_tokens(cache.extend, rest, sampler, max_new_tokens, stops, recorder)
        else:
            tokens = decode_with_lookup(cache, rest, sampler, max_new_tokens, stops, recorder)
        answer = yield from self._text(request, tokens, recorder, cached)
        self._settle(answer.new_tokens)
        return answer

    def _request(self, prompt: str | list[Message] | Chat, config: RunConfig) -> Request:
        """Return a prompt as it is read, and how it is answered.

        Raises:
            TooLong: the prompt and the longest answer together exceed the model's limit, and may not be cut.
            UsageError: options that do not fit the bundle, or an empty prompt.
        """
        if config.num_beams > 1:
            raise UsageError("--num-beams is for text2text-generation: this bundle answers greedily or by sampling")
        if config.system is not None:
            system: Message = {"role": "system", "content": config.system}
            if isinstance(prompt, Chat):
                prompt = replace(prompt, messages=[system, *prompt.messages])
            else:
                prompt = [system, *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)]
        rendering = self._rendering(config)
        prompt_ids = self._encode(rendering, prompt)
        window = Window(self.max_length, int(prompt_ids[0] == self.tokenizer.named_bos_id))
        prompt_ids, max_new_tokens = self._fit(prompt_ids, config, window)
        return Request(prompt_ids, max_new_tokens, stop_ids(rendering, self.tokenizer), config, window)

    def _text(
        self, request: Request, tokens: Iterator[int], recorder: TimingsRecorder, cached: int
    ) -> Generator[str, None, Generation]:
        """Stream the text of an answer's tokens; see `stream_text`."""
        detokenizer = StreamingDetokenizer(self.tokenizer.decode_raw, request.config.stop, self.tokenizer.clean)
        answer = yield from stream_text(tokens, request.stops, detokenizer, recorder, len(request.prompt_ids), cached)
        return replace(answer, dropped_tokens=request.window.dropped)

    def _fit(self, prompt_ids: list[int], config: RunConfig, window: Window) -> tuple[list[int], int]:
        """Return the part of the prompt that is read, as --overflow says, and the longest answer in tokens.

        Raises:
            TooLong: the prompt and the longest answer together exceed the model's limit, and may not be cut.
        """
        limit, tokens = self.max_length, len(prompt_ids)
        if config.overflow == "error":
            default = max(min(DEFAULT_NEW_TOKENS, limit - tokens), 1)
            self._check_length(tokens, config.max_new_tokens or default)
            return prompt_ids, config.max_new_tokens or default
        asked = config.max_new_tokens or min(DEFAULT_NEW_TOKENS, max(limit // 2, 1))
        if config.overflow == "shift":
            return (
                window.end_of(prompt_ids, max(limit // 2, window.kept + 1)) if tokens >= limit else prompt_ids
            ), asked
        if limit - asked <= window.kept:
            raise TooLong(
                f"{asked} new tokens leave no room for a prompt in the {limit} tokens that this model can read: "
                f"request at most {limit - window.kept - 1}, or give --overflow shift"
            )
        return window.end_of(prompt_ids, limit - asked), asked

    def _tokens(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        stops: frozenset[int],
        config: RunConfig,
        recorder: TimingsRecorder,
    ) -> Iterator[int]:
        """See `GenerativeBundle._tokens`."""
        cache = self.open_cache()
        sampler = Sampler(config, prompt_ids, cache.vocabulary)
        return decode_tokens(cache.extend, prompt_ids, sampler, max_new_tokens, stops, recorder)
