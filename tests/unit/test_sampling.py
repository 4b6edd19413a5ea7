"""Choosing the next token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_ft.config import RunConfig
from edge_ft.runtime.sampling import Sampler, candidates, penalize

LOGITS = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], np.float32))
VOCAB = len(LOGITS)


def draw(count: int, **config: float) -> list[int]:
    sampler = Sampler(RunConfig(**config), [], VOCAB)  # type: ignore[arg-type]
    return [sampler.choose(LOGITS) for _ in range(count)]


def allowed(**options: float) -> dict[int, float]:
    options = {"temperature": 1.0, **options}
    ids, probabilities = candidates(LOGITS, **options)  # type: ignore[arg-type]
    return dict(zip(ids.tolist(), probabilities.tolist(), strict=True))


def test_temperature_zero_is_greedy() -> None:
    assert draw(5, temperature=0) == [0] * 5


def test_the_same_seed_draws_the_same_and_another_seed_does_not() -> None:
    assert draw(50, temperature=1, seed=3) == draw(50, temperature=1, seed=3)
    assert draw(50, temperature=1, seed=3) != draw(50, temperature=1, seed=4)


def test_draws_follow_the_probabilities() -> None:
    counts = np.bincount(draw(4000, temperature=1), minlength=VOCAB) / 4000
    np.testing.assert_allclose(counts, np.exp(LOGITS), atol=0.03)


def test_temperature_flattens_or_sharpens() -> None:
    assert allowed(temperature=0.5)[0] > allowed()[0] > allowed(temperature=2.0)[0]


def test_a_tiny_temperature_is_greedy_without_overflow() -> None:
    assert draw(5, temperature=1e-300) == [0] * 5


def test_top_k_keeps_the_k_likeliest_and_ties() -> None:
    assert allowed(top_k=2) == pytest.approx({0: 2 / 3, 1: 1 / 3})
    assert set(allowed(top_k=4)) == {0, 1, 2, 3, 4}  # the fourth and fifth are equally likely
    assert set(allowed(top_k=99)) == set(range(VOCAB))


def test_top_p_keeps_the_smallest_set_with_that_probability() -> None:
    assert set(allowed(top_p=0.1)) == {0}
    assert set(allowed(top_p=0.7)) == {0, 1}
    assert allowed(top_p=0.8) == pytest.approx({0: 4 / 7, 1: 2 / 7, 2: 1 / 7})


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert set(allowed(min_p=0.4)) == {0, 1}
    assert set(allowed(min_p=1.0)) == {0}


def test_a_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    logits = np.array([2.0, -2.0, 1.0], np.float32)
    penalized = penalize(logits, np.array([True, True, False]), 2.0)
    np.testing.assert_array_equal(penalized, [1.0, -4.0, 1.0])


def test_the_penalty_counts_the_prompt_and_the_answer() -> None:
    logits = np.array([3.0, 2.9, 2.8, 0.0], np.float32)
    sampler = Sampler(RunConfig(repetition_penalty=1.5), [0], 4)
    assert [sampler.choose(logits) for _ in range(3)] == [1, 2, 0]


finite = st.floats(-30, 30, width=32)
logit_rows = st.lists(finite, min_size=1, max_size=40).map(lambda row: np.array(row, np.float32))


@given(
    logits=logit_rows,
    temperature=st.floats(0.01, 10),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_candidates_are_a_distribution_that_contains_the_likeliest_token(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    ids, probabilities = candidates(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert probabilities.sum() == pytest.approx(1)
    assert len(set(ids.tolist())) == len(ids)
    assert logits[ids].max() == logits.max()
    # No dropped token is likelier than a kept one.
    assert np.delete(logits, ids).max(initial=-np.inf) <= logits[ids].min()


@pytest.mark.parametrize(
    "options", [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.8, "min_p": 0.05}]
)
def test_the_options_do_the_same_as_in_transformers(options: dict[str, float]) -> None:
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = np.random.default_rng(0).normal(size=100).astype(np.float32) * 2
    theirs = torch.from_numpy(logits)[None] / 0.7
    for name, warper in (
        ("top_k", warpers.TopKLogitsWarper),
        ("top_p", warpers.TopPLogitsWarper),
        ("min_p", warpers.MinPLogitsWarper),
    ):
        if name in options:
            theirs = warper(options[name])(None, theirs)
    expected = theirs.softmax(-1)[0].numpy()
    ours = np.zeros(100)
    ids, probabilities = candidates(logits, temperature=0.7, **options)  # type: ignore[arg-type]
    ours[ids] = probabilities
    np.testing.assert_allclose(ours, expected, atol=1e-6)
