"""Which graphs and threads a bundle runs with: the fastest here of those that verification passed."""

import json
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_bundle import write_decoder

from edge_ft.artifacts import Bundle
from edge_ft.config import EvalConfig, RunConfig
from edge_ft.errors import BundleError, UsageError
from edge_ft.evaluate import evaluate
from edge_ft.runtime import engine, load
from edge_ft.runtime import trials as trials_module
from edge_ft.runtime.decode import Timings
from edge_ft.runtime.engine import candidates, choose, fastest
from edge_ft.runtime.open_bundle import GenerativeBundle
from edge_ft.runtime.probes import probe_examples, score_probes
from edge_ft.runtime.run import run_text
from edge_ft.runtime.trials import Trial, measure_ways
from edge_ft.runtime.ways import Engine, Way

EXACT, FAST = Way(1, 4), Way(4, 4)
EXACT_HALF, FAST_HALF = Way(1, 2), Way(4, 2)
WAYS = [EXACT, FAST, EXACT_HALF, FAST_HALF]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def two_graphs(folder: Path, nll: float = 1.0, passed: bool = True) -> Bundle:
    """A bundle with graphs of level 1 and 4, which compute the same; level 1 has a validation loss of 1."""
    path = write_decoder(folder)
    manifest = json.loads((path / "manifest.json").read_text())
    opened = load(path, engine="exact")
    examples = probe_examples(opened.tokenizer, opened.rendering)
    probes = score_probes(opened, examples, opened.tokenizer.pad_id, "text-generation")[0].tolist()
    (path / "onnx" / "model_a4.onnx").write_bytes((path / "onnx" / "model.onnx").read_bytes())
    scores = {"1": {"probe_nll": probes, "nll": 1.0, "passed": True}}
    scores["4"] = {"probe_nll": probes, "nll": nll, "passed": passed}
    manifest["graphs"]["4"] = "onnx/model_a4.onnx"
    manifest["verification"] = {"limits": {"max_tax": 0.02}, "by_accuracy_level": scores}
    Bundle.seal(path, manifest)
    return Bundle.open(path)


def slowed(ways: list[Way], phase: str = "", factor: float = 1.0) -> Any:
    """A `measure` in which all ways are equally fast, but those of `ways` slower in one phase."""

    def measure(asked: Any, _: bool) -> list[Trial]:
        even = [Trial(way, 400.0, 50.0) for way in asked]
        return [
            replace(trial, **{phase: getattr(trial, phase) / factor}) if trial.way in ways else trial for trial in even
        ]

    return measure


@pytest.mark.parametrize("slow", WAYS)
@pytest.mark.parametrize(("phase", "of"), [("prefill_tps", "prefill"), ("decode_tps", "decode")])
def test_whatever_is_slow_in_a_phase_does_not_run_it(
    slow: Way, phase: str, of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "thread_choices", lambda: [4, 2])
    chosen = choose(two_graphs(tmp_path / "bundle"), None, slowed([slow], phase, 3.0))
    assert getattr(chosen, of) != slow


def test_each_phase_gets_the_graph_that_is_fastest_in_it() -> None:
    trials = [Trial(EXACT, 459, 33), Trial(FAST, 405, 82)]
    assert fastest(trials, roomy=True) == (EXACT, FAST)


def test_one_graph_does_both_where_memory_does_not_hold_the_weights_twice() -> None:
    trials = [Trial(EXACT, 459, 33), Trial(FAST, 405, 82)]
    assert fastest(trials, roomy=False) == (FAST, FAST)


def test_a_second_graph_that_gains_little_is_not_worth_its_memory() -> None:
    assert fastest([Trial(EXACT, 420, 33), Trial(FAST, 405, 82)], roomy=True) == (FAST, FAST)


def test_the_exact_graph_stays_where_another_is_hardly_faster() -> None:
    assert fastest([Trial(EXACT, 400, 50), Trial(FAST, 410, 51)], roomy=True) == (EXACT, EXACT)


@pytest.mark.parametrize(("nll", "passed", "levels"), [(1.009, True, {1, 4}), (1.02, True, {1}), (1.0, False, {1})])
def test_only_graphs_that_passed_with_nearly_the_exact_loss_are_measured(
    nll: float, passed: bool, levels: set[int], tmp_path: Path
) -> None:
    assert {way.accuracy_level for way in candidates(two_graphs(tmp_path / "b", nll, passed), 1)} == levels


def test_the_loss_of_the_chosen_graph_is_said(tmp_path: Path) -> None:
    chosen = choose(two_graphs(tmp_path / "bundle", nll=1.005), 4, slowed([EXACT], "decode_tps", 2))
    assert chosen == Engine(FAST, FAST, pytest.approx(0.005))


def test_a_choice_is_remembered_until_the_bundle_or_the_threads_change(tmp_path: Path) -> None:
    bundle = two_graphs(tmp_path / "bundle")
    choose(bundle, 4, slowed([EXACT], "decode_tps", 2))
    assert choose(bundle, 4, slowed([FAST], "decode_tps", 2)).decode == FAST  # not measured again
    assert choose(bundle, 2, slowed([FAST_HALF], "decode_tps", 2)).decode == EXACT_HALF
    other = two_graphs(tmp_path / "other", nll=1.001)
    (other.path / "onnx" / "model_a4.onnx").write_bytes(b"")
    Bundle.seal(other.path, other.manifest)
    assert choose(Bundle.open(other.path), 4, slowed([FAST], "decode_tps", 2)).decode == EXACT


def test_a_damaged_memory_is_measured_again(tmp_path: Path) -> None:
    bundle = two_graphs(tmp_path / "bundle")
    choose(bundle, 4, slowed([EXACT], "decode_tps", 2))
    (file,) = (tmp_path / "cache" / "speeds").iterdir()
    for damaged in ("", "[]", '{"trials": [{"way": {"accuracy_level": 8, "threads": 4}}]}', '{"trials": [1]}'):
        file.write_text(damaged)
        assert choose(bundle, 4, slowed([FAST], "decode_tps", 2)).decode == EXACT


def test_a_cache_that_cannot_be_written_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert choose(two_graphs(tmp_path / "bundle"), 4, slowed([EXACT], "decode_tps", 2)).decode == FAST


def test_no_measurement_leaves_the_exact_graph(tmp_path: Path) -> None:
    assert choose(two_graphs(tmp_path / "bundle"), 4, lambda *_: []).decode == EXACT


class Fake(GenerativeBundle):
    """A bundle that takes a given time for a prompt and for a token, on a clock of its own."""

    def __init__(self, like: Any, clock: "Clock", prefill_s: float, decode_s: float) -> None:
        vars(self).update(vars(like))
        self.like, self.clock, self.seconds = like, clock, (prefill_s, decode_s)

    def time_decode(self, prompt_ids: list[int], new_tokens: int) -> Timings:
        prefill_s, decode_s = self.seconds[0] * len(prompt_ids), self.seconds[1]
        self.clock.now += prefill_s + decode_s * (new_tokens - 1)
        return Timings(prefill_s, prefill_s, (decode_s,) * (new_tokens - 1))

    def token_nll(self, batch: Any) -> Any:
        return self.like.token_nll(batch)

    stream = _check_length = _longest_answer = _tokens = None  # type: ignore[assignment]


class Clock:
    """A clock that stands still unless something takes time."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("slow", [EXACT, FAST])
def test_a_slow_phase_is_measured_as_slow_within_two_seconds(slow: Way, together: bool, tmp_path: Path) -> None:
    exact, clock = load(two_graphs(tmp_path / "bundle"), engine="exact"), Clock()

    def open_way(way: Way) -> Fake:
        clock.now += 1  # opening does not count
        return Fake(exact, clock, 0.002, 0.030 if way == slow else 0.010)

    found = measure_ways([EXACT, FAST], together, open_way, clock)
    assert {trial.way: round(trial.decode_tps) for trial in found} == {EXACT: 100, FAST: 100} | {slow: 33}
    assert [round(trial.prefill_tps) for trial in found] == [500, 500]
    assert clock.now < 2 + 2 + 1


def test_a_machine_that_is_very_slow_measures_less(tmp_path: Path) -> None:
    exact, clock = load(two_graphs(tmp_path / "bundle"), engine="exact"), Clock()
    found = measure_ways([EXACT, FAST], False, lambda _: Fake(exact, clock, 0.5, 3.0), clock)
    assert [trial.way for trial in found] == [EXACT]


def test_a_graph_that_scores_the_probe_texts_otherwise_here_is_out(tmp_path: Path) -> None:
    exact, clock = load(two_graphs(tmp_path / "bundle"), engine="exact"), Clock()

    class Wrong(Fake):
        def token_nll(self, batch: Any) -> Any:
            nll, predicted = self.like.token_nll(batch)
            return nll + np.float32(0.1), predicted

    def open_way(way: Way) -> Fake:
        return (Wrong if way == FAST else Fake)(exact, clock, 0.002, 0.001 if way == FAST else 0.01)

    assert [trial.way for trial in measure_ways([EXACT, FAST], True, open_way, clock)] == [EXACT]


def test_a_graph_that_cannot_be_opened_is_out(tmp_path: Path) -> None:
    exact, clock = load(two_graphs(tmp_path / "bundle"), engine="exact"), Clock()

    def open_way(way: Way) -> Fake:
        if way == FAST:
            raise BundleError("not here")
        return Fake(exact, clock, 0.002, 0.01)

    assert [trial.way for trial in measure_ways([EXACT, FAST], True, open_way, clock)] == [EXACT]


def test_real_sessions_are_measured_at_the_first_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials_module, "_BUDGET", 0.01)
    assert load(two_graphs(tmp_path / "bundle"), threads=1).engine is not None
    (file,) = (tmp_path / "cache" / "speeds").iterdir()
    assert [trial["way"]["accuracy_level"] for trial in json.loads(file.read_text())["trials"]] == [1, 4]


def test_exact_measures_nothing_and_is_what_json_says(tmp_path: Path) -> None:
    bundle = two_graphs(tmp_path / "bundle")
    result = run_text(bundle.path, "Is it:", RunConfig(engine="exact", threads=1, max_new_tokens=2), None)
    way = {"accuracy_level": 1, "threads": 1}
    assert result["engine"] == {"prefill": way, "decode": way, "nll_above_exact": 0.0}
    assert not (tmp_path / "cache" / "speeds").exists()


def test_a_given_accuracy_level_is_that_of_both_phases(tmp_path: Path) -> None:
    opened = load(two_graphs(tmp_path / "bundle"), threads=1, accuracy_level=4)
    assert opened.engine == Engine(Way(4, 1), Way(4, 1), 0.0)


def test_exact_with_an_accuracy_level_is_refused() -> None:
    with pytest.raises(UsageError, match="leave --accuracy-level out"):
        RunConfig(engine="exact", accuracy_level=4)


def test_two_graphs_read_and_write_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = two_graphs(tmp_path / "bundle")
    exact = load(bundle, engine="exact", threads=1)
    monkeypatch.setattr("edge_ft.runtime.choose", lambda *_: Engine(Way(4, 1), Way(1, 1)))
    both = load(bundle, threads=1)
    runs: list[int] = []
    assert both.prefill is not None
    watched = SimpleNamespace(
        io_binding=both.prefill.io_binding,
        run_with_iobinding=lambda binding: (runs.append(1), load_run(binding))[1],
    )
    load_run, both.prefill = both.prefill.run_with_iobinding, watched
    ids = list(b"a question that is longer than eight tokens")
    assert both.answer(ids, 12) == exact.answer(ids, 12)
    assert runs == [1]  # the prompt alone


def test_an_evaluation_is_of_the_exact_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_ft.runtime.choose", lambda *_: pytest.fail("eval chose by speed"))
    bundle, rows = two_graphs(tmp_path / "bundle"), tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Is it:", "completion": "yes"}\n')
    settings = EvalConfig(data=str(rows), prompt="{prompt}", completion="{completion}", generate=False)
    assert evaluate(str(bundle.path), settings)["rows"] == 1


def test_where_memory_is_short_a_graph_is_closed_before_the_next_one_opens(tmp_path: Path) -> None:
    exact, clock = load(two_graphs(tmp_path / "bundle"), engine="exact"), Clock()
    before: list[weakref.ref[Fake]] = []

    def open_way(_: Way) -> Fake:
        assert all(fake() is None for fake in before)
        before.append(weakref.ref(fake := Fake(exact, clock, 0.002, 0.01)))
        return fake

    assert len(measure_ways([EXACT, FAST], False, open_way, clock)) == len(before) == 2
