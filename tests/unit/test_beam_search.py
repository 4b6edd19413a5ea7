"""Beam search finds the best answer of a small model."""

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_ft.runtime.beam_search import beam_search
from edge_ft.runtime.token_scores import log_softmax

VOCAB, STOP, LONGEST = 4, 3, 3


class Bigrams:
    """A model whose logits depend on the last token alone."""

    def __init__(self, seed: int) -> None:
        self.logits = np.random.default_rng(seed).normal(0, 2, (VOCAB + 1, VOCAB)).astype(np.float32)

    def step(self, order: NDArray[np.int64], tokens: NDArray[np.int64] | None) -> NDArray[np.float32]:
        return self.logits[np.full(len(order), VOCAB) if tokens is None else tokens]

    def score(self, answer: tuple[int, ...], length_penalty: float) -> float:
        log_probabilities = log_softmax(self.logits)
        total = sum(log_probabilities[before, after] for before, after in zip((VOCAB, *answer), answer, strict=False))
        return float(total) / len(answer) ** length_penalty


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_enough_beams_find_the_best_of_all_answers(seed: int, length_penalty: float) -> None:
    model = Bigrams(seed)
    answers = [
        answer
        for length in range(1, LONGEST + 1)
        for answer in product(range(VOCAB), repeat=length)
        if STOP not in answer[:-1] and (answer[-1] == STOP or length == LONGEST)
    ]
    best = max(answers, key=lambda answer: model.score(answer, length_penalty))
    found = beam_search(model.step, VOCAB**LONGEST, LONGEST, frozenset({STOP}), length_penalty)
    assert tuple(found) == best


def test_an_answer_ends_at_the_longest_length() -> None:
    logits = np.array([[2.0, 1.0, 0.0, -9.0]], np.float32)
    found = beam_search(lambda order, _: np.repeat(logits, len(order), 0), 2, 5, frozenset({STOP}))
    assert found == [0] * 5
