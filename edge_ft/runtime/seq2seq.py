"""Text from an encoder-decoder bundle: a source is read once, its answer is written token by token."""

from collections.abc import Generator, Iterator
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_ft.artifacts import Bundle
from edge_ft.config import RunConfig
from edge_ft.data import Batch, Message, Rendering, TextTokenizer, encode_prompt, stop_ids, target_mask
from edge_ft.errors import BundleError, UsageError
from edge_ft.runtime.beam_search import beam_search
from edge_ft.runtime.cache import CacheShape
from edge_ft.runtime.decode import DEFAULT_NEW_TOKENS, GREEDY, Clock, Generation, Timings, TooLong, last, nll_of, speak
from edge_ft.runtime.detokenizer import TextPieces
from edge_ft.runtime.sampling import Sampler

__all__ = ["Seq2SeqGenerator"]

_LOGITS_AT_ONCE = 1 << 24
"""Logits held while scoring: 64 MB; larger batches are scored in parts."""

Graph = tuple[ort.InferenceSession, dict[str, NDArray[np.float32]]]
"""A session, and what is bound to its LoRA inputs."""


class Seq2SeqGenerator:
    """An open text2text-generation bundle; answers one text at a time, scores batches.

    Raises:
        BundleError: its manifest does not say what an answer begins with.
    """

    def __init__(self, bundle: Bundle, encoder: Graph, decoder: Graph) -> None:
        self.bundle = bundle
        self.tokenizer = TextTokenizer.load(bundle.path)
        self.rendering = Rendering.from_dict(bundle.manifest["rendering"])
        self.max_length = int(bundle.manifest["max_length"])
        self.stop_ids = stop_ids(self.rendering, self.tokenizer)
        start = bundle.manifest["tokenization"].get("decoder_start")
        if start is None:
            raise BundleError(f"{bundle.path} does not say what an answer begins with: export it again")
        self._start = int(start)
        self._encoder, self._decoder = encoder, decoder
        self._shape = CacheShape(**bundle.manifest["cache"])

    def generate(self, prompt: str | list[Message], config: RunConfig = GREEDY) -> Generation:
        """Answer a text.

        Args:
            prompt: The text; messages are refused.
            config: How to answer; `threads`, `accuracy_level` and `adapter` are `load`'s.

        Raises:
            TooLong: text or answer are longer than the model can read.
            UsageError: a stop string is empty, or a chat was asked for.
        """
        return last(self.stream(prompt, config))

    def stream(self, prompt: str | list[Message], config: RunConfig = GREEDY) -> Generator[str, None, Generation]:
        """As `generate`, in pieces of text as they become certain (with beams, at the end)."""
        clock = Clock()
        if config.system is not None or config.chat_template not in (None, "none"):
            raise UsageError("--system and --chat-template are for chats, which an encoder-decoder cannot hold")
        source = encode_prompt(self.rendering, self.tokenizer, prompt)
        if not self.tokenizer.decode(source):
            raise UsageError("the prompt is empty: give it at least one character")
        longest = config.max_new_tokens or min(DEFAULT_NEW_TOKENS, self.max_length)
        self._check(len(source), longest)
        tokens = self._tokens(source, longest, config, self.stop_ids, clock)
        spoken = yield from speak(tokens, self.stop_ids, TextPieces(self.tokenizer.decode, config.stop))
        return Generation(
            text=spoken.text,
            prompt_tokens=len(source),
            cached_tokens=0,
            new_tokens=spoken.tokens,
            finish_reason=spoken.finish_reason,
            timings=clock.timings(),
        )

    def answer(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """Greedy answer to a tokenized source, without its stop token; none to an empty or too long one."""
        if not 0 < len(prompt_ids) <= self.max_length:
            return []
        longest = min(max_new_tokens, self.max_length)
        tokens = list(self._tokens(prompt_ids, longest, GREEDY, self.stop_ids, Clock()))
        return tokens[:-1] if tokens[-1] in self.stop_ids else tokens

    def time_decode(self, prompt_ids: list[int], new_tokens: int) -> Timings:
        """Write exactly `new_tokens` greedily, past any stop token, and say how long each took.

        `prefill_s` is the encoder over the source and the decoder's first token.

        Raises:
            TooLong: source or answer are longer than the model can read.
        """
        self._check(len(prompt_ids), new_tokens)
        clock = Clock()
        for _ in self._tokens(prompt_ids, new_tokens, GREEDY, frozenset(), clock):
            pass
        return clock.timings()

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Negative log-likelihood (nats) and likeliest token of each target.

        Returns:
            nll float32 and predicted int64, both [batch, target], 0 and -100 where there is no label.
        """
        labels: NDArray[np.int64] = batch["labels"]
        targets = target_mask(labels, "text2text-generation")
        nll = np.zeros(labels.shape, np.float32)
        predicted = np.full(labels.shape, -100, np.int64)
        rows_at_once = max(1, _LOGITS_AT_ONCE // (labels.shape[1] * self.tokenizer.vocab_size))
        for start in range(0, len(labels), rows_at_once):
            rows = slice(start, start + rows_at_once)
            logits = self.logits(batch["input_ids"][rows], batch["attention_mask"][rows], labels[rows])
            for row, row_logits in enumerate(logits, start):
                at = targets[row]
                nll[row, at], predicted[row, at] = nll_of(row_logits[at], labels[row, at])
        return nll, predicted

    def logits(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Logits of every target, given those before it.

        Args:
            input_ids: [batch, source], padded on the right.
            attention_mask: [batch, source], 1 for tokens and 0 for padding.
            labels: [batch, target], -100 behind the end of each.

        Returns:
            [batch, target, vocab]; what stands at padding means nothing.

        Raises:
            TooLong: source or target are more than the model can read.
        """
        self._check(input_ids.shape[1], labels.shape[1])
        before = np.concatenate([np.full((len(labels), 1), self._start), labels[:, :-1]], axis=1)
        return self._open(input_ids, attention_mask).read(np.maximum(before, 0))

    def _tokens(
        self, source: list[int], longest: int, config: RunConfig, ends: frozenset[int], clock: Clock
    ) -> Iterator[int]:
        """Tokens until one of `ends`, which is the last one, or `longest` of them."""
        started = perf_counter()
        ids = np.array([source] * config.num_beams)
        state = self._open(ids, np.ones_like(ids))
        if config.num_beams > 1:
            yield from self._beams(state, longest, config, ends, clock)
            return
        logits = state.read(np.array([[self._start]]))[0, -1]
        clock.prefill_s = perf_counter() - started
        sampler = Sampler(config, [self._start], logits.size)
        token = sampler.choose(logits)
        clock.ttft_s = perf_counter() - clock.started
        yield token
        for _ in range(longest - 1):
            if token in ends:
                return
            started = perf_counter()
            token = sampler.choose(state.read(np.array([[token]]))[0, -1])
            clock.decode_s.append(perf_counter() - started)
            yield token

    def _beams(self, state: "_State", longest: int, config: RunConfig, ends: frozenset[int], clock: Clock) -> list[int]:
        """The best answer of a beam search; all of it takes until its first token is known."""

        def step(order: NDArray[np.int64], tokens: NDArray[np.int64] | None) -> NDArray[np.float32]:
            if tokens is None:
                tokens = np.full(len(order), self._start)
            else:
                state.reorder(order)
            return state.read(tokens[:, None])[:, -1]

        answer = beam_search(step, config.num_beams, longest, ends, config.length_penalty)
        clock.ttft_s = clock.prefill_s = perf_counter() - clock.started
        return answer

    def _open(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> "_State":
        """Read sources: the encoder runs, and nothing else."""
        session, extra = self._encoder
        names = [node.name for node in session.get_outputs() if node.name.startswith("present.")]
        feed: dict[str, NDArray[Any]] = {"input_ids": input_ids, "attention_mask": attention_mask, **extra}
        values = session.run_with_ort_values(names, {name: _value(array) for name, array in feed.items()})
        given = {name.replace("present", "past_key_values"): value for name, value in zip(names, values, strict=True)}
        given |= {"encoder_attention_mask": _value(attention_mask)}
        session, extra = self._decoder
        return _State(session, given | {name: _value(array) for name, array in extra.items()}, self._shape)

    def _check(self, source: int, target: int) -> None:
        """Raise TooLong where either is beyond the model's limit."""
        for what, length in (("the text has", source), ("the answer may have", target)):
            if length > self.max_length:
                raise TooLong(f"{what} {length} tokens, and this model can read {self.max_length}: shorten it")


class _State:
    """Answers that are being written side by side: the decoder's keys and values of their tokens so far."""

    def __init__(self, session: ort.InferenceSession, given: dict[str, ort.OrtValue], shape: CacheShape) -> None:
        self._session = session
        self._given = given
        rows = given["encoder_attention_mask"].shape()[0]
        empty = np.zeros((rows, shape.kv_heads, 0, shape.head_dim), np.float32)
        self._past = {
            f"past_key_values.{layer}.decoder.{kind}": _value(empty)
            for layer in range(shape.layers)
            for kind in ("key", "value")
        }

    def read(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read tokens [rows, n] on top of what was read: logits [rows, n, vocab]."""
        names = [name.replace("past_key_values", "present") for name in self._past]
        feed = {"input_ids": _value(ids), **self._given, **self._past}
        logits, *present = self._session.run_with_ort_values(["logits", *names], feed)
        self._past = dict(zip(self._past, present, strict=True))
        found: NDArray[np.float32] = logits.numpy()
        return found

    def reorder(self, order: NDArray[np.int64]) -> None:
        """Let row i go on from what row order[i] has read, of the same source."""
        self._past = {name: _value(value.numpy()[order]) for name, value in self._past.items()}


def _value(array: NDArray[Any]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
