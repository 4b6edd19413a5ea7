"""An open text2text-generation bundle: the source is read once, its answer is generated token by token."""

from collections.abc import Generator, Iterator, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_ft.artifacts import Bundle
from edge_ft.config import RunConfig
from edge_ft.data import Batch, Chat, Message, encode_prompt, target_mask
from edge_ft.errors import BundleError, UsageError
from edge_ft.runtime.beam_search import beam_search
from edge_ft.runtime.cache import CacheShape
from edge_ft.runtime.decode import (
    DEFAULT_NEW_TOKENS,
    GREEDY,
    Generation,
    StreamingDetokenizer,
    TimingsRecorder,
    TooLong,
    decode_tokens,
    stream_text,
)
from edge_ft.runtime.open_bundle import GenerativeBundle
from edge_ft.runtime.sampling import Sampler
from edge_ft.runtime.session import output_size, running
from edge_ft.runtime.token_scores import score_targets

__all__ = ["Seq2SeqGenerator"]

Graph = tuple[ort.InferenceSession, dict[str, NDArray[np.float32]]]
"""A session, and the values of its LoRA inputs."""


class Seq2SeqGenerator(GenerativeBundle):
    """An open text2text-generation bundle; answers one text at a time, scores batches.

    Raises:
        BundleError: its manifest has no start token for answers.
    """

    def __init__(self, bundle: Bundle, encoder: Graph, decoder: Graph) -> None:
        super().__init__(bundle)
        start = bundle.manifest.get("tokenization", {}).get("decoder_start")
        if start is None:
            raise BundleError(f"{bundle.path}: its manifest has no decoder_start token; export it again")
        self._start = int(start)
        self._encoder, self._decoder = encoder, decoder
        self._shape = CacheShape.of(bundle)

    def stream(
        self, prompt: str | list[Message] | Chat, config: RunConfig = GREEDY
    ) -> Generator[str, None, Generation]:
        """Answer a text piece by piece, as `generate` does; with beams, all at the end.

        Args:
            prompt: As for `generate`.
            config: As for `generate`.

        Yields:
            Pieces of text that later tokens cannot change.

        Returns:
            The `Generation`.

        Raises:
            UsageError: an empty prompt, or options of a chat.
        """
        recorder = TimingsRecorder()
        if config.system is not None or config.chat_template not in (None, "none"):
            raise UsageError("--system and --chat-template are for chats, which an encoder-decoder cannot hold")
        source = encode_prompt(self.rendering, self.tokenizer, prompt)
        if not self.tokenizer.decode(source):
            raise UsageError("the prompt is empty: give it at least one character")
        max_new_tokens = config.max_new_tokens or min(DEFAULT_NEW_TOKENS, self.max_length)
        self._check_length(len(source), max_new_tokens)
        tokens = self._tokens(source, max_new_tokens, self.stop_ids, config, recorder)
        detokenizer = StreamingDetokenizer(self.tokenizer.decode_raw, config.stop, self.tokenizer.clean)
        return (yield from stream_text(tokens, self.stop_ids, detokenizer, recorder, len(source)))

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Score the target tokens of a batch.

        Args:
            batch: Rows as `edge_ft.data.collate` makes them.

        Returns:
            Negative log-likelihood (nats) float32 and likeliest token int64, both [batch, target]; 0 and -100 where
            there is no label.
        """
        labels: NDArray[np.int64] = batch["labels"]

        def compute_logits(rows: slice) -> NDArray[np.float32]:
            return self.logits(batch["input_ids"][rows], batch["attention_mask"][rows], labels[rows])

        targets = target_mask(labels, "text2text-generation")
        return score_targets(compute_logits, labels, targets, labels.shape[1] * self.tokenizer.vocab_size)

    def logits(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Compute the logits of every target, given the targets before it.

        Args:
            input_ids: [batch, source], padded on the right.
            attention_mask: [batch, source], 1 for tokens and 0 for padding.
            labels: [batch, target], -100 after the end of each row.

        Returns:
            [batch, target, vocab]; the values at padding are meaningless.

        Raises:
            TooLong: source or target exceeds the model's limit.
        """
        self._check_length(input_ids.shape[1], labels.shape[1])
        before = np.concatenate([np.full((len(labels), 1), self._start), labels[:, :-1]], axis=1)
        return self._encode(input_ids, attention_mask).extend(np.maximum(before, 0))

    def _longest_answer(self, tokens: int) -> int:
        return self.max_length if tokens <= self.max_length else 0

    def _tokens(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        stops: frozenset[int],
        config: RunConfig,
        recorder: TimingsRecorder,
    ) -> Iterator[int]:
        """See `GenerativeBundle._tokens`; the first token of a beam search is known only at its end."""
        ids = np.array([prompt_ids] * config.num_beams)
        started = perf_counter()
        state = self._encode(ids, np.ones_like(ids))
        recorder.prefill_s = perf_counter() - started

        def extend(tokens: Sequence[int]) -> NDArray[np.float32]:
            return state.extend(np.array([tokens]))[0, -1]

        def step(order: NDArray[np.int64], tokens: NDArray[np.int64] | None) -> NDArray[np.float32]:
            if tokens is None:
                tokens = np.full(len(order), self._start)
            else:
                state.reorder(order)
            return state.extend(tokens[:, None])[:, -1]

        if config.num_beams == 1:
            sampler = Sampler(config, [self._start], output_size(self._decoder[0], "logits"))
            yield from decode_tokens(extend, [self._start], sampler, max_new_tokens, stops, recorder)
        else:
            answer = beam_search(step, config.num_beams, max_new_tokens, stops, config.length_penalty)
            recorder.ttft_s = recorder.prefill_s = perf_counter() - recorder.started
            yield from answer

    def _encode(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> "_DecoderState":
        """Return a decoder that has read nothing yet, after running the encoder on sources [batch, source]."""
        session, extra = self._encoder
        names = [node.name for node in session.get_outputs() if node.name.startswith("present.")]
        feed: dict[str, NDArray[Any]] = {"input_ids": input_ids, "attention_mask": attention_mask, **extra}
        with running(session):
            values = session.run_with_ort_values(names, {name: _value(array) for name, array in feed.items()})
        fixed = {name.replace("present", "past_key_values"): value for name, value in zip(names, values, strict=True)}
        fixed |= {"encoder_attention_mask": _value(attention_mask)}
        session, extra = self._decoder
        return _DecoderState(session, fixed | {name: _value(array) for name, array in extra.items()}, self._shape)

    def _check_length(self, tokens: int, new_tokens: int) -> None:
        """Refuse what exceeds the model's limit.

        Raises:
            TooLong: source or answer does.
        """
        for what, length in (("the text has", tokens), ("the answer may have", new_tokens)):
            if length > self.max_length:
                raise TooLong(f"{what} {length} tokens, but this model reads at most {self.max_length}: shorten it")


class _DecoderState:
    """The decoder on a batch of answers, with the keys and values of their tokens so far."""

    def __init__(self, session: ort.InferenceSession, fixed: dict[str, ort.OrtValue], shape: CacheShape) -> None:
        """Start empty answers; `fixed` are the inputs that stay the same from token to token."""
        self._session = session
        self._fixed = fixed
        rows = fixed["encoder_attention_mask"].shape()[0]
        empty = np.zeros((rows, shape.kv_heads, 0, shape.head_dim), np.float32)
        self._past = {
            f"past_key_values.{layer}.decoder.{kind}": _value(empty)
            for layer in range(shape.layers)
            for kind in ("key", "value")
        }

    def extend(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the logits [rows, n, vocab] of further tokens [rows, n]."""
        names = [name.replace("past_key_values", "present") for name in self._past]
        feed = {"input_ids": _value(ids), **self._fixed, **self._past}
        with running(self._session):
            logits, *present = self._session.run_with_ort_values(["logits", *names], feed)
        self._past = dict(zip(self._past, present, strict=True))
        return logits.numpy()

    def reorder(self, order: NDArray[np.int64]) -> None:
        """Continue row i from the tokens of row order[i], which has the same source."""
        self._past = {name: _value(value.numpy()[order]) for name, value in self._past.items()}


def _value(array: NDArray[Any]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
