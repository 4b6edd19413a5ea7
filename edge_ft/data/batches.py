"""Rows in token ids, and batches of rows of similar length, so that little of a batch is padding."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "IGNORED",
    "Batch",
    "Example",
    "batch_tokens",
    "collate",
    "eval_batches",
    "evenly_spaced",
    "pack",
    "pad",
    "target_mask",
    "train_batches",
]

T = TypeVar("T")

IGNORED = -100
"""Label of a token that carries no loss (PyTorch's ignore_index)."""
LARGEST_WINDOW = 50
"""Largest number of batches whose rows are sorted by length together."""
WINDOWS = 4
"""Smallest number of windows of an epoch: if one held all rows, every epoch would have the same batches."""


@dataclass(slots=True)
class Example:
    """One row in token ids."""

    row: int
    """Number of the row in the user's file."""
    input_ids: list[int]
    labels: list[int] | list[float]
    """By task. Tokens or tags: as long as `input_ids`, -100 where there is no loss.
    Text2text-generation: the target sequence, of its own length.
    Text-classification: [class index]; 0.0 or 1.0 for every class (multi-label); [number] (regression).
    Feature-extraction: [0], the rank that the row's own second text should have."""
    prompt_length: int
    """Tokens before the last completion."""
    reference: str
    """The right answer: the text of the last completion, or the name of the class."""
    cut: int
    """Tokens beyond max_length, which were cut off."""
    unlearned_turns: int = 0
    """Assistant turns without loss, because the chat template would write them differently at run time."""
    cut_targets: int = 0
    """Tokens with loss among the tokens that were cut off."""
    token_type_ids: list[int] = field(default_factory=list)
    """As long as `input_ids`, or empty where they are all 0."""
    separate_target: bool = False
    """The answer is a sequence of its own (text2text-generation)."""
    pair_ids: list[int] = field(default_factory=list)
    """Tokens of the second text (feature-extraction)."""
    unread: tuple[str, ...] = ()
    """What the row says and the model does not read: keys of messages, tools, messages of a role."""

    @property
    def shared_positions(self) -> int:
        """Positions that the prompt takes from those that the answer could use."""
        return 0 if self.separate_target else self.prompt_length

    @property
    def targets(self) -> int:
        """Number of labels that carry loss."""
        return sum(isinstance(label, float) or label != IGNORED for label in self.labels)

    @property
    def content(self) -> bytes:
        """What the scores of the row depend on, for a hash: its ids and labels, each after their number, as float64."""
        parts = (self.input_ids, self.labels, self.token_type_ids, self.pair_ids)
        return b"".join(np.array([len(numbers), *numbers], np.float64).tobytes() for numbers in parts)


class Batch(TypedDict):
    """Examples of one forward pass, padded on the right."""

    input_ids: NDArray[np.int64]
    """[batch, seq]"""
    attention_mask: NDArray[np.int64]
    """[batch, seq], 1 on tokens and 0 on padding."""
    labels: NDArray[Any]
    """int64, -100 where there is no loss: [batch, seq] for tokens and tags, [batch, target] for the answers of an
    encoder-decoder, [batch, 1] for a class or a rank; float32: [batch, classes] for several classes, [batch, 1] for a
    number."""
    rows: list[int]
    """Numbers of the rows in the user's file."""
    token_type_ids: NotRequired[NDArray[np.int64]]
    """[batch, seq]; absent where all are 0."""
    pair_input_ids: NotRequired[NDArray[np.int64]]
    """[batch, seq of the second texts] (feature-extraction)."""
    pair_attention_mask: NotRequired[NDArray[np.int64]]
    position_ids: NotRequired[NDArray[np.int64]]
    """[batch, seq], 0 where a row begins: several share a sequence, and none attends to another (of decoders)."""


def collate(examples: Sequence[Example], pad_id: int, task: str) -> Batch:
    """Return the examples of one task as a batch, padded to the longest of them."""
    input_ids, attention_mask = pad([example.input_ids for example in examples], pad_id)
    if task in ("text-classification", "feature-extraction"):  # labels of a whole text, not of its tokens
        labels = np.array([example.labels for example in examples])
        labels = labels.astype(np.float32 if np.issubdtype(labels.dtype, np.floating) else np.int64)
    else:
        labels, _ = pad([example.labels for example in examples], IGNORED)
    batch = Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        rows=[example.row for example in examples],
    )
    if any(any(example.token_type_ids) for example in examples):
        kinds = [example.token_type_ids or [0] * len(example.input_ids) for example in examples]
        batch["token_type_ids"], _ = pad(kinds, 0)
    if task == "feature-extraction":
        batch["pair_input_ids"], batch["pair_attention_mask"] = pad([example.pair_ids for example in examples], pad_id)
    return batch


def pack(examples: Sequence[Example], pad_id: int, length: int) -> Batch:
    """Return examples as few sequences of a decoder, all of their tokens labelled.

    Each example, one after the other, goes into the first sequence that has room for it.

    Args:
        examples: One that is longer than `length` gets a sequence of its own.
        pad_id: Token id of the padding.
        length: Tokens of a sequence.

    Returns:
        The batch.
    """
    sequences: list[list[Example]] = []
    for example in examples:
        taken = (sum(len(one.input_ids) for one in sequence) for sequence in sequences)
        roomy = (s for s, used in zip(sequences, taken, strict=True) if used + len(example.input_ids) <= length)
        sequence = next(roomy, None)
        if sequence is None:
            sequences.append(sequence := [])
        sequence.append(example)
    input_ids, attention_mask = pad([[token for one in few for token in one.input_ids] for few in sequences], pad_id)
    position_ids, _ = pad([[at for one in few for at in range(len(one.input_ids))] for few in sequences], 0)
    batch = Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=np.where(position_ids > 0, input_ids, IGNORED),  # the first token of a row is given, not predicted
        rows=[one.row for few in sequences for one in few],
    )
    if len(sequences) < len(examples):  # else a causal mask is enough
        batch["position_ids"] = position_ids
    return batch


def batch_tokens(batch: Sequence[int], examples: Sequence[Example], task: str) -> int:
    """Tokens of a batch with its padding, those of a second text or of an encoder-decoder's answer included."""
    rows = [examples[index] for index in batch]
    longest = max(len(row.input_ids) for row in rows) + max(len(row.pair_ids) for row in rows)
    if task == "text2text-generation":
        longest += max(len(row.labels) for row in rows)
    return len(batch) * longest


def pad(rows: Sequence[Sequence[float]], value: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows as one array [rows, longest] with `value` as padding, and its mask: 1 on ids, 0 on padding."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    padded = np.full(mask.shape, value, np.int64)
    padded[mask] = [item for row in rows for item in row]
    return padded, mask.astype(np.int64)


def target_mask(labels: NDArray[Any], task: str) -> NDArray[np.bool_]:
    """Return where `labels` [batch, targets] carry loss, in the same shape; only there `token_nll` counts."""
    if np.issubdtype(labels.dtype, np.floating):
        return np.ones(labels.shape, np.bool_)
    at: NDArray[np.bool_] = labels != IGNORED
    if task == "text-generation":
        at[:, 0] = False  # the first token is given, not predicted
    return at


def train_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the indices of one epoch in batches of similar `lengths`, in random order; each index occurs once.

    Source: the size of a window is that of transformers' `LengthGroupedSampler`.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    size = batch_size * max(1, min(LARGEST_WINDOW, len(lengths) // (WINDOWS * batch_size)))
    batches = []
    for start in range(0, len(order), size):
        window = sorted(order[start : start + size].tolist(), key=lengths.__getitem__)
        batches += _chunks(window, batch_size)
    return [batches[index] for index in random.permutation(len(batches))]


def eval_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return all indices in batches, from the shortest to the longest row."""
    return _chunks(sorted(range(len(lengths)), key=lengths.__getitem__), batch_size)


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` of the items at even distances, the first of them included."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _chunks(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
