"""The KV cache gives the logits of a run without it, in memory that follows the text's length."""

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_bundle import HEAD_DIM, KV_HEADS, LAYERS, write_decoder

from edge_ft.runtime import TextGenerator, load


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> TextGenerator:
    opened = load(write_decoder(tmp_path_factory.mktemp("bundles") / "random"), threads=1)
    assert isinstance(opened, TextGenerator)
    return opened


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return np.random.default_rng(0).integers(0, 256, 600).tolist()


@pytest.fixture(scope="module")
def at_once(generator: TextGenerator, ids: list[int]) -> NDArray[np.float32]:
    """Logits [seq, vocab] of all positions without a cache."""
    whole = np.array([ids])
    return generator.logits(whole, np.ones_like(whole))[0]


def test_the_logits_depend_on_the_first_token(generator: TextGenerator, ids: list[int]) -> None:
    """Otherwise the other tests here would prove nothing."""
    other = [ids[0] ^ 1, *ids[1:40]]
    assert np.abs(generator.open_cache().extend(ids[:40]) - generator.open_cache().extend(other)).max() > 0.01


def test_token_by_token_equals_one_run_even_where_the_buffers_grow(
    generator: TextGenerator, ids: list[int], at_once: NDArray[np.float32]
) -> None:
    cache = generator.open_cache()
    assert_close(cache.extend(ids[:250]), at_once[249])
    capacities = {cache.capacity}
    for position in range(250, 520):
        assert_close(cache.extend(ids[position : position + 1]), at_once[position])
        capacities.add(cache.capacity)
    assert capacities == {256, 512, 768}


def test_runs_of_any_size_equal_one_run(generator: TextGenerator, ids: list[int], at_once: NDArray[np.float32]) -> None:
    cache = generator.open_cache()
    start = 0
    for size in (1, 3, 252, 1, 300, 43):  # fills 256 exactly, crosses it, then 512
        start += size
        assert_close(cache.extend(ids[start - size : start]), at_once[start - 1])


def test_a_long_prompt_is_read_in_several_runs(
    generator: TextGenerator, ids: list[int], at_once: NDArray[np.float32]
) -> None:
    assert_close(generator.open_cache().extend(ids), at_once[-1])


def test_memory_follows_the_text_and_not_the_models_limit(generator: TextGenerator, ids: list[int]) -> None:
    position = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4  # bytes
    cache = generator.open_cache()
    assert cache.nbytes == 0
    cache.extend(ids[:10])
    assert cache.nbytes == 256 * position
    cache.extend(ids[10:300])
    assert cache.nbytes == 512 * position
    assert generator.max_length == 2048


def test_rewinding_keeps_the_common_prefix(
    generator: TextGenerator, ids: list[int], at_once: NDArray[np.float32]
) -> None:
    cache = generator.open_cache()
    cache.extend([*ids[:20], 7, 7, 7, 7])
    assert cache.rewind(ids[:30]) == 20
    assert_close(cache.extend(ids[20:30]), at_once[29])


def test_rewinding_never_keeps_the_last_token(
    generator: TextGenerator, ids: list[int], at_once: NDArray[np.float32]
) -> None:
    cache = generator.open_cache()
    cache.extend(ids[:30])
    assert cache.rewind(ids[:30]) == 29
    assert_close(cache.extend(ids[29:30]), at_once[29])


def test_caches_of_one_model_are_independent(
    generator: TextGenerator, ids: list[int], at_once: NDArray[np.float32]
) -> None:
    one, other = generator.open_cache(), generator.open_cache()
    one.extend(ids[:20])
    other.extend(ids[100:150])
    assert_close(one.extend(ids[20:40]), at_once[39])
