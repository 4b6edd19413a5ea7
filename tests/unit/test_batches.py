"""Padding is on the right and carries no loss; an epoch has each example once, in batches of similar length."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_ft.data import Example, collate, eval_batches, train_batches

lengths = st.lists(st.integers(1, 500), max_size=200)


def test_padding_has_no_mask_and_no_loss_even_where_pad_is_eos() -> None:
    eos = 2
    examples = [Example(4, [5, 6, eos], [-100, 6, eos], 1, "", 0), Example(9, [7], [-100], 1, "", 0)]
    batch = collate(examples, eos, "text-generation")
    assert batch["input_ids"].tolist() == [[5, 6, eos], [7, eos, eos]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, eos], [-100, -100, -100]]
    assert batch["rows"] == [4, 9]
    assert {batch["input_ids"].dtype, batch["attention_mask"].dtype, batch["labels"].dtype} == {np.dtype(np.int64)}


def test_a_class_is_one_label_per_row() -> None:
    batch = collate([Example(1, [5, 6], [3], 2, "d", 0), Example(2, [5], [0], 1, "a", 0)], 0, "text-classification")
    assert batch["labels"].tolist() == [[3], [0]]
    assert batch["input_ids"].tolist() == [[5, 6], [5, 0]]


@given(lengths, st.integers(1, 9), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_holds_every_index_once(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    batches = train_batches(lengths, batch_size, seed, epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert max(map(len, batches), default=1) <= batch_size
    assert train_batches(lengths, batch_size, seed, epoch) == batches


def test_batches_pad_little_and_epochs_differ() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 2000).tolist()
    batches = train_batches(lengths, 8, seed=0, epoch=0)
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert padded < 1.05 * sum(lengths)
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts != sorted(firsts)
    assert batches != train_batches(lengths, 8, seed=0, epoch=1)
    assert batches != train_batches(lengths, 8, seed=1, epoch=0)


def test_epochs_of_few_rows_have_other_batches() -> None:
    """Sorted as a whole, 240 rows would be the same 30 batches in every epoch."""
    lengths = list(range(240))
    epochs = [{tuple(sorted(batch)) for batch in train_batches(lengths, 8, 0, epoch)} for epoch in range(2)]
    assert not epochs[0] & epochs[1]


@given(lengths, st.integers(1, 9))
def test_evaluation_goes_from_short_to_long(lengths: list[int], batch_size: int) -> None:
    batches = eval_batches(lengths, batch_size)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths)
