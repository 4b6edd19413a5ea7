"""Prompts that are answered together: the answers of one after the other, whatever their lengths and number."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import write_decoder

from edge_ft.config import RunConfig
from edge_ft.errors import UsageError
from edge_ft.runtime import Generation, TextGenerator, batch, load, text_generator
from edge_ft.runtime.batch import FEWEST, SLOTS, Pace
from edge_ft.runtime.batch_cache import BatchCache
from edge_ft.runtime.cache import STEP
from edge_ft.runtime.decode import TooLong

PROMPTS = [f"{'tell me more, ' * (number % 4)}{number * 7}:" for number in range(20)]
"""Of many lengths, in no order."""
CONFIG = RunConfig(max_new_tokens=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Texts in each run of a batch; batches pay always."""
    seen: list[int] = []
    step = BatchCache.step

    def counted(self: BatchCache, tokens: list[int]) -> Any:
        seen.append(len(tokens))
        return step(self, tokens)

    monkeypatch.setattr(BatchCache, "step", counted)
    monkeypatch.setattr(Pace, "pays", lambda self: True)
    return seen


def opened(folder: Path, **options: Any) -> TextGenerator:
    generator = load(folder, threads=1, **options)
    assert isinstance(generator, TextGenerator)
    return generator


def plain(answer: Generation) -> tuple[Any, ...]:
    return answer.text, answer.prompt_tokens, answer.new_tokens, answer.finish_reason


def one_by_one(folder: Path, config: RunConfig = CONFIG) -> list[tuple[Any, ...]]:
    generator = opened(folder, engine="exact")
    return [plain(generator.generate(prompt, config)) for prompt in PROMPTS]


def test_the_answers_are_those_of_one_prompt_after_the_other(folder: Path, steps: list[int]) -> None:
    answers = opened(folder).generate(PROMPTS, CONFIG)
    assert [plain(answer) for answer in answers] == one_by_one(folder)
    assert max(steps) == SLOTS and all(len(answer.timings.decode_s) == answer.new_tokens - 1 for answer in answers)


@pytest.mark.parametrize(
    "config",
    [RunConfig(max_new_tokens=24, stop=("a", "e", "#")), RunConfig(max_new_tokens=9, temperature=1.0, seed=3)],
    ids=["stop strings", "sampling"],
)
def test_options_of_the_answers_hold_in_batches(folder: Path, steps: list[int], config: RunConfig) -> None:
    answers = opened(folder).generate(PROMPTS, config)
    assert [plain(answer) for answer in answers] == one_by_one(folder, config)
    assert steps


def test_an_answer_that_ends_early_makes_room_for_the_next_prompt(
    folder: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = one_by_one(folder)
    fit = TextGenerator._fit

    def ragged(self: TextGenerator, ids: list[int], config: RunConfig, window: Any) -> tuple[list[int], int]:
        ids, _ = fit(self, ids, config, window)
        return ids, 2 + sum(ids) % 22

    monkeypatch.setattr(TextGenerator, "_fit", ragged)
    answers = opened(folder).generate(PROMPTS, CONFIG)
    assert len({answer.new_tokens for answer in answers}) > 5
    for answer, (text, *_), prompt in zip(answers, alone, PROMPTS, strict=True):
        assert text.startswith(answer.text) and answer.prompt_tokens == len(prompt)
    assert SLOTS in steps and steps.index(SLOTS) < len(steps) - 1 - steps[::-1].index(SLOTS)  # it was filled up again


def test_an_error_has_its_place_and_stops_nothing(folder: Path, steps: list[int]) -> None:
    prompts = [*PROMPTS[:3], "", *PROMPTS[3:], "long " * 3000]
    answers = list(opened(folder).generate_each(prompts, CONFIG))
    assert isinstance(answers[3], UsageError) and isinstance(answers[-1], TooLong)
    good = [plain(answer) for answer in answers if isinstance(answer, Generation)]
    assert good == one_by_one(folder)
    with pytest.raises(UsageError, match="prompt is empty"):
        opened(folder).generate(prompts, CONFIG)


def test_the_memory_of_a_batch_is_bounded(folder: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BatchCache(opened(folder)._session, opened(folder)._shape, SLOTS)
    monkeypatch.setattr(text_generator, "free_memory_bytes", lambda: 4 * cache.nbytes(3, 128))
    answers = opened(folder).generate(PROMPTS, CONFIG)
    assert [plain(answer) for answer in answers] == one_by_one(folder)
    assert max(steps) == 3


def test_a_batch_that_is_slower_is_not_filled_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    begin = batch._begin

    def counted(*arguments: Any) -> Any:
        begun.append(1)
        return begin(*arguments)

    monkeypatch.setattr(batch, "_begin", counted)
    monkeypatch.setattr(batch, "_GAIN", 1e9)
    answers = opened(folder).generate(PROMPTS, CONFIG)
    assert [plain(answer) for answer in answers] == one_by_one(folder)
    assert len(begun) == SLOTS  # one batch was tried, and its answers were kept


def test_few_prompts_and_the_exact_engine_are_answered_alone(folder: Path, steps: list[int]) -> None:
    assert len(opened(folder).generate(PROMPTS[:FEWEST], CONFIG)) == FEWEST
    exact = opened(folder, engine="exact").generate(PROMPTS, CONFIG)
    assert not steps and [plain(answer) for answer in exact] == one_by_one(folder)


def test_texts_that_outgrow_the_memory_or_move_keep_what_was_read(folder: Path) -> None:
    generator = opened(folder)
    texts = [generator.tokenizer.encode(prompt * 3) for prompt in PROMPTS[:3]]
    together = BatchCache(generator._session, generator._shape, 3)
    for ids in texts:
        cache = generator.open_cache()
        cache.extend(ids)
        together.add(cache)
    read = [token % 50 for token in range(STEP + 44)]
    for token in read:
        together.step([token, token + 1, token + 2])
    together.drop(0)  # the last text takes its place
    rows = together.step([7, 7])
    for row, ids, shift in ((rows[0], texts[2], 2), (rows[1], texts[1], 1)):
        alone = generator.open_cache().extend([*ids, *(token + shift for token in read), 7])
        np.testing.assert_allclose(row, alone, atol=1e-4)
