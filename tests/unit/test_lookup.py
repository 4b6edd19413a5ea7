"""Prompt lookup: the same answers in fewer runs of the graph, and a bound on what wrong guesses cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_bundle import write_decoder

from edge_ft.config import RunConfig
from edge_ft.runtime import TextGenerator, load
from edge_ft.runtime.cache import KVCache
from edge_ft.runtime.decode import TimingsRecorder, decode_tokens
from edge_ft.runtime.lookup import CREDIT, GUESSES, MATCH, SHARE, Pace, PromptLookup, decode_with_lookup
from edge_ft.runtime.sampling import Sampler

STOP = 7


class Recited:
    """A model that recites a text, whatever it reads; a run takes a second, and a tenth more for each further token."""

    def __init__(self, text: Sequence[int], vocabulary: int = 50) -> None:
        self.text, self.vocabulary, self.ids, self.now = list(text), vocabulary, list[int](), 0.0
        self.runs: list[int] = []

    def logits(self) -> Any:
        rows = np.zeros((1, self.vocabulary), np.float32)
        rows[0, self.text[len(self.ids) % len(self.text)]] = 1
        return rows[0]

    def extend(self, ids: Sequence[int]) -> Any:
        self.ids.extend(ids)
        self.runs.append(len(ids))
        self.now += 1 + 0.1 * (len(ids) - 1)
        return self.logits()

    def extend_each(self, ids: Sequence[int]) -> Any:
        rows = []
        for token in ids:
            self.ids.append(token)
            rows.append(self.logits())
        self.runs.append(len(ids))
        self.now += 1 + 0.1 * (len(ids) - 1)
        return np.stack(rows)

    def truncate(self, length: int) -> None:
        del self.ids[length:]


def decoded(model: Recited, prompt: list[int], new: int, **sampling: Any) -> list[int]:
    sampler = Sampler(RunConfig(**sampling), prompt, model.vocabulary)
    stops = frozenset({STOP})
    recorder = TimingsRecorder(lambda: model.now)
    return list(decode_with_lookup(model, prompt, sampler, new, stops, recorder))  # type: ignore[arg-type]


def plain(model: Recited, prompt: list[int], new: int, **sampling: Any) -> list[int]:
    sampler = Sampler(RunConfig(**sampling), prompt, model.vocabulary)
    return list(decode_tokens(model.extend, prompt, sampler, new, frozenset({STOP}), TimingsRecorder()))


def test_what_followed_the_last_tokens_before_is_guessed() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 1, 2])
    assert lookup.guess(4) == []
    lookup.add(3)
    assert lookup.guess(2) == [4, 5]
    assert lookup.guess(50) == [4, 5, 6, 1, 2, 3] and len(lookup.guess(50)) <= GUESSES
    assert MATCH == 3


def test_a_text_that_repeats_itself_takes_fewer_runs() -> None:
    text = list(range(10, 30))
    model = Recited(text)
    assert decoded(model, text, 100) == plain(Recited(text), text, 100)
    assert len(model.runs) < 30 and max(model.runs[1:]) == GUESSES + 1


@given(
    text=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    new=st.integers(1, 60),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_the_tokens_are_those_of_decoding_one_by_one(
    text: list[int], prompt: list[int], new: int, temperature: float
) -> None:
    """Sampled ones too: the same random numbers choose from the same probabilities."""
    guessing, single = Recited(text, 10), Recited(text, 10)
    found = decoded(guessing, prompt, new, temperature=temperature)
    assert found == plain(single, prompt, new, temperature=temperature)
    assert guessing.ids[: len(single.ids)] == single.ids  # what was read agrees


def test_wrong_guesses_cost_a_bounded_share_of_the_time() -> None:
    """The prompt repeats itself and the answer goes on otherwise each time."""
    text = [token for block in range(60) for token in (1, 2, 3, 10 + block % 37, 10 + (block * 7) % 38)]
    model, single = Recited(text), Recited(text)
    assert decoded(model, text[:40], 250) == plain(single, text[:40], 250)
    assert max(model.runs[1:]) > 1
    assert model.now <= single.now * (1 + SHARE) + CREDIT + 1 + 0.1 * GUESSES


def test_guessing_begins_once_the_time_of_a_step_is_known() -> None:
    pace = Pace()
    assert not pace.allows()
    pace.count(2.0, guessed=False, tokens=1)
    assert pace.allows()
    pace.count(6.0, guessed=True, tokens=1)  # 4 seconds lost, of 3 allowed and 2% of 8
    assert not pace.allows()
    pace.count(3.0, guessed=True, tokens=3)
    assert pace.allows()


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}, {"repetition_penalty": 1.3}])
def test_a_bundle_answers_the_same_with_and_without_guesses(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = load(write_decoder(tmp_path / "decoder"), threads=1, engine="exact")
    guessing = load(tmp_path / "decoder", threads=1)
    assert isinstance(exact, TextGenerator) and isinstance(guessing, TextGenerator)
    assert (exact.exact, guessing.exact) == (True, False)
    runs: list[int] = []
    extend_each = KVCache.extend_each
    monkeypatch.setattr(KVCache, "extend_each", lambda self, ids: (runs.append(len(ids)), extend_each(self, ids))[1])
    config = RunConfig(max_new_tokens=120, **settings)
    prompt = "one two three, one two three, one two three, one"
    found, expected = guessing.generate(prompt, config), exact.generate(prompt, config)
    assert (found.text, found.new_tokens, found.finish_reason) == (
        expected.text,
        expected.new_tokens,
        expected.finish_reason,
    )
    assert len(found.timings.decode_s) == found.new_tokens - 1
    assert runs or settings  # a greedy answer of random weights repeats itself
