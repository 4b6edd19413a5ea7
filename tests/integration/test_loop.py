"""The loop over a tiny model: accumulated and non-finite gradients, best weights, and the ways to end early."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_ft.config import RowsConfig, TuneConfig
from edge_ft.data import Batch, Example, TextTokenizer, collate, encode_rows, find_columns, make_rendering, read_rows
from edge_ft.errors import UsageError
from edge_ft.evaluate.scoring import Batching
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.lora import add_lora
from edge_ft.progress import Silent
from edge_ft.tune.loop import Callbacks, Fit, TrainingRows, fit
from edge_ft.tune.stopwatch import Timings
from edge_ft.tune.torch_backend import TorchBackend

TASK = "text-generation"


def config(**settings: Any) -> TuneConfig:
    return TuneConfig(
        model="",
        data="",
        out=Path("unused"),
        **{"learning_rate": 1e-2, "batch_size": 4, "epochs": 3.0, "compute": "fp32", **settings},
    )


@pytest.fixture
def backend(llama: Path) -> TorchBackend:
    base = find_base(str(llama))
    model = load_model(ModelSpec(base, TASK, "int4"))
    return TorchBackend(add_lora(model, base.family, TASK, config()), base.family, TASK, config())


@pytest.fixture(scope="module")
def examples(llama: Path, sums: Path) -> list[Example]:
    tokenizer, rows = TextTokenizer.load(llama), read_rows(str(sums))
    columns = find_columns(["prompt", "completion"], RowsConfig(), TASK)
    return encode_rows(make_rendering(RowsConfig(), columns, TASK, tokenizer, 128), tokenizer, rows)


def train(
    backend: TorchBackend,
    examples: list[Example],
    settings: TuneConfig,
    clock: Callable[[], float] | None = None,
    watched: Sequence[int] = (),
) -> tuple[Fit, list[dict[str, Any]]]:
    class Recorded(Callbacks):
        def on_metrics(self, line: dict[str, Any]) -> None:
            lines.append(line)

    lines: list[dict[str, Any]] = []
    timings = Timings() if clock is None else Timings(clock)
    rows = TrainingRows(examples[:32], examples[32:], Batching(TASK, 2, settings.rows_at_once), watched)
    result = fit(backend, rows, settings, Silent(), Recorded(), timings=timings)
    return result, lines


def test_accumulated_gradients_are_those_of_the_whole_batch(backend: TorchBackend, examples: list[Example]) -> None:
    def gradient(sizes: list[int]) -> list[torch.Tensor]:
        start, targets = 0, sum(sum(label != -100 for label in example.labels) for example in examples[:8])
        for size in sizes:
            backend.gradient(collate(examples[start : start + size], 2, TASK), targets)
            start += size
        accumulated = [parameter.grad.clone() for parameter in backend.parameters if parameter.grad is not None]
        backend.discard()
        return accumulated

    for whole, parts in zip(gradient([8]), gradient([3, 5]), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def test_training_lowers_the_loss_and_ends_with_the_best_weights(
    backend: TorchBackend, examples: list[Example]
) -> None:
    result, lines = train(backend, examples, config(max_steps=30, eval_steps=5))
    evaluations = {line["step"]: line["validation_nll"] for line in lines if "validation_nll" in line}
    assert result.best.mean_nll == min(evaluations.values()) < result.base.mean_nll - 1
    assert evaluations[result.best_step] == result.best.mean_nll
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 31))
    again = backend.token_nll(collate(examples[32:], 2, TASK))[0].sum() / result.best.tokens.sum()
    assert again == pytest.approx(result.best.mean_nll, rel=1e-4)


def test_the_last_weights_are_not_kept_when_they_are_worse(
    backend: TorchBackend, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every evaluation is worse than the one before it."""
    before = [parameter.clone() for parameter in backend.parameters]
    score, calls = backend.token_nll, 0

    def worse(batch: Batch) -> Any:
        nonlocal calls
        calls += 1
        nll, predicted = score(batch)
        return nll * 2.0**calls, predicted

    monkeypatch.setattr(backend, "token_nll", worse)
    result, lines = train(backend, examples, config(max_steps=4, eval_steps=2))
    evaluations = [line["validation_nll"] for line in lines if "validation_nll" in line]
    assert result.last_nll == evaluations[-1] > result.best.mean_nll == min(evaluations)
    assert result.best_step == 0
    assert all(torch.equal(one, other) for one, other in zip(before, backend.parameters, strict=True))


class ScriptedBackend:
    """Its weights are the number of updates, and a function of these and of a row gives the loss of that row."""

    def __init__(self, nll: Callable[[int, int], float]) -> None:
        self.nll, self.weights, self.best = nll, 0, 0
        self.scored: list[tuple[int, int]] = []
        """Weights and number of rows of each batch that was scored."""

    def token_nll(self, batch: Batch) -> Any:
        self.scored.append((self.weights, len(batch["rows"])))
        losses = np.array([self.nll(self.weights, row) for row in batch["rows"]])
        return np.where(batch["labels"] == -100, 0.0, losses[:, None]), batch["labels"]

    def gradient(self, batch: Batch, targets: int) -> float:
        return 1.0

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        self.weights += 1
        return 1.0

    def keep_best(self) -> None:
        self.best = self.weights

    def restore_best(self) -> None:
        self.weights = self.best

    def swap_best(self) -> None:
        self.weights, self.best = self.best, self.weights

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def test_evaluations_score_the_watched_rows_and_the_last_one_all_of_them(examples: list[Example]) -> None:
    backend: Any = ScriptedBackend(lambda steps, row: 5.0 - steps)
    result, lines = train(backend, examples, config(max_steps=4, eval_steps=2, batch_size=8), watched=[0, 3, 6])
    assert backend.scored == [(0, 3), (2, 3), (4, 8)]
    assert [line["rows"] for line in lines if "validation_nll" in line] == [3, 3, 3]
    assert (result.best_step, result.best.mean_nll, len(result.best.nll)) == (4, 1.0, 8)


@pytest.mark.parametrize(("others", "best_step"), [(1.0, 4), (3.0, 2)])
def test_the_better_of_best_and_last_weights_on_all_rows_is_kept(
    examples: list[Example], others: float, best_step: int
) -> None:
    """On the watched rows step 2 is the best; on the others the last step has this loss and step 2 has 2.0."""
    watched = [0, 3, 6]
    rows = [examples[32 + index].row for index in watched]
    losses = {0: (5.0, 5.0), 2: (1.0, 2.0), 4: (1.5, others)}
    backend: Any = ScriptedBackend(lambda steps, row: losses[steps][row not in rows])
    result, _ = train(backend, examples, config(max_steps=4, eval_steps=2, batch_size=8), watched=watched)
    assert backend.scored == [(0, 3), (2, 3), (4, 8), (2, 8)]
    assert (result.best_step, backend.weights) == (best_step, best_step)
    assert (len(result.best.nll), result.best.mean_nll < result.last_nll) == (8, best_step == 2)


def test_patience_ends_a_run_that_no_longer_improves(backend: TorchBackend, examples: list[Example]) -> None:
    settings = config(max_steps=200, eval_steps=2, patience=2, learning_rate=0.5, schedule="constant")
    result, _ = train(backend, examples, settings)
    assert result.stopped == "patience"
    assert result.steps < 200


def timed(backend: TorchBackend, monkeypatch: pytest.MonkeyPatch, step_seconds: float) -> Callable[[], float]:
    """A clock on which only gradients take time."""
    now = [0.0]
    gradient = backend.gradient

    def slow_gradient(batch: Batch, targets: int) -> float:
        now[0] += step_seconds
        return gradient(batch, targets)

    monkeypatch.setattr(backend, "gradient", slow_gradient)
    return lambda: now[0]


def test_max_minutes_fixes_the_steps_before_the_first(
    backend: TorchBackend, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = timed(backend, monkeypatch, 2.0)
    result, lines = train(backend, examples, config(max_steps=1000, max_minutes=1.0), clock)
    assert (result.steps, result.stopped) == (28, "steps")  # two steps' time went into measuring one
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates[-1] < 1e-2 * 0.02  # the schedule ended with the run
    assert clock() <= 60


def test_a_run_that_became_slower_than_planned_ends_in_time(
    backend: TorchBackend, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.1, 0.1, *[10.0] * 100])
    now, gradient = [0.0], backend.gradient

    def slower(batch: Batch, targets: int) -> float:
        now[0] += next(times)
        return gradient(batch, targets)

    monkeypatch.setattr(backend, "gradient", slower)
    result, _ = train(backend, examples, config(max_steps=1000, max_minutes=1.0), lambda: now[0])
    assert (result.steps, result.stopped) == (6, "minutes")


def test_max_minutes_that_leave_no_step_are_refused(
    backend: TorchBackend, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="--max-minutes"):
        train(backend, examples, config(max_minutes=0.1), timed(backend, monkeypatch, 100.0))


def poisoned(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch, at: set[int], how: str, accumulation: int = 1
) -> None:
    """Steps `at` give a loss, or only a gradient, that is no number."""
    gradient, calls = backend.gradient, [0]

    def poison(batch: Batch, targets: int) -> float:
        calls[0] += 1
        loss = gradient(batch, targets)
        if math.ceil(calls[0] / accumulation) not in at:
            return loss
        for parameter in backend.parameters:
            if parameter.grad is not None:
                parameter.grad[0] = math.inf
        return math.nan if how == "loss" else loss

    monkeypatch.setattr(backend, "gradient", poison)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_an_update_that_is_no_number_is_left_out_and_the_rate_halved(
    backend: TorchBackend, examples: list[Example], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    poisoned(backend, monkeypatch, {2, 3, 6}, how)
    before: list[list[torch.Tensor]] = []
    update = backend.update

    def watched(*arguments: float) -> float:
        before.append([parameter.detach().clone() for parameter in backend.parameters])
        return update(*arguments)

    monkeypatch.setattr(backend, "update", watched)
    result, lines = train(backend, examples, config(max_steps=8, schedule="constant", warmup=0.0))
    assert (result.steps, result.skipped) == (8, 3)
    steps = {line["step"]: line for line in lines if "validation_nll" not in line}
    assert list(steps) == list(range(1, 9))
    rates = [steps[step]["learning_rate"] for step in range(1, 9)]
    assert rates == [1e-2, 1e-2, 5e-3, 2.5e-3, 2.5e-3, 2.5e-3, 1.25e-3, 1.25e-3]
    skipped = [line for line in lines if "skipped" in line]
    assert [(line["step"], line["skipped"]) for line in skipped] == [(2, how), (3, how), (6, how)]
    assert all(len(line["rows"]) == 4 and set(line["rows"]) <= {e.row for e in examples} for line in skipped)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in backend.parameters)
    if how == "gradient":
        assert all(torch.equal(a, b) for a, b in zip(before[1], before[2], strict=True))


@pytest.mark.parametrize(
    ("at", "stops"),
    [({4, 5, 6}, 6), ({2, 4, 6, 8, 10}, 10), ({2, 4, 6, 8}, None)],
    ids=["three-in-a-row", "five-in-all", "four-in-all"],
)
def test_too_many_of_them_end_the_run_and_say_where(
    backend: TorchBackend,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
    at: set[int],
    stops: int | None,
) -> None:
    poisoned(backend, monkeypatch, at, "loss")
    if stops is None:
        assert train(backend, examples, config(max_steps=12))[0].steps == 12
        return
    with pytest.raises(UsageError, match=rf"the loss is not a number at step {stops} \(rows \d+, .*--learning-rate"):
        train(backend, examples, config(max_steps=12))


def test_only_the_rows_of_the_bad_pass_are_named(
    backend: TorchBackend, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient, calls = backend.gradient, list[list[int]]()

    def poison(batch: Batch, targets: int) -> float:
        calls.append(batch["rows"])
        return math.inf if len(calls) == 5 else gradient(batch, targets)

    monkeypatch.setattr(backend, "gradient", poison)
    _, lines = train(backend, examples, config(max_steps=4, gradient_accumulation=3))
    assert [line["rows"] for line in lines if "skipped" in line] == [calls[4]]


def test_damaged_weights_are_replaced_by_the_best(
    backend: TorchBackend, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    update, calls = backend.update, [0]

    def damaging(*arguments: float) -> float:
        norm = update(*arguments)
        calls[0] += 1
        if calls[0] == 7:
            with torch.no_grad():
                backend.parameters[0].fill_(math.nan)
        return norm

    monkeypatch.setattr(backend, "update", damaging)
    result, lines = train(backend, examples, config(max_steps=20, eval_steps=5))
    assert [line["step"] for line in lines if "skipped" in line] == [8]
    evaluations = [line["validation_nll"] for line in lines if "validation_nll" in line]
    assert result.best.mean_nll == min(evaluations) < result.base.mean_nll - 0.5
    assert all(bool(torch.isfinite(parameter).all()) for parameter in backend.parameters)


def test_an_evaluation_that_is_no_number_is_not_the_best(
    backend: TorchBackend, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    update, calls = backend.update, [0]

    def damaging(*arguments: float) -> float:
        calls[0] += 1
        norm = update(*arguments)
        if calls[0] == 6:
            with torch.no_grad():
                backend.parameters[0].fill_(math.nan)
        return norm

    monkeypatch.setattr(backend, "update", damaging)
    result, lines = train(backend, examples, config(max_steps=6, eval_steps=3))
    assert [line["validation_nll"] for line in lines if line.get("step") == 6 and "validation_nll" in line] == [None]
    assert result.best_step == 3
    assert math.isnan(result.last_nll)


def test_a_base_whose_loss_is_no_number_is_refused(backend: TorchBackend, examples: list[Example]) -> None:
    with torch.no_grad():
        backend.parameters[1].fill_(math.nan)
    with pytest.raises(UsageError, match="untuned model's validation loss is not a number, first at row 33"):
        train(backend, examples, config(max_steps=3))


def test_evaluations_report_the_seconds_of_the_training_alone(
    backend: TorchBackend, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = timed(backend, monkeypatch, 2.0)
    scored, ticks = backend.token_nll, [0.0]

    def slow(batch: Batch) -> Any:
        ticks[0] += 100.0
        return scored(batch)

    monkeypatch.setattr(backend, "token_nll", slow)
    _, lines = train(backend, examples, config(max_steps=6, eval_steps=2), lambda: clock() + ticks[0])
    evaluations = [line for line in lines if "validation_nll" in line]
    assert [line["seconds"] for line in evaluations] == [0.0, 4.0, 8.0, 12.0]
    assert [line["cpu_seconds"] for line in evaluations] == sorted(line["cpu_seconds"] for line in evaluations)
    assert evaluations[0]["cpu_seconds"] < evaluations[-1]["cpu_seconds"]


def test_clipping_bounds_the_step(backend: TorchBackend, examples: list[Example]) -> None:
    batch = collate(examples[:8], 2, TASK)
    backend.gradient(batch, 1)
    free = backend.update(0.0, 0.0)
    backend.gradient(batch, 1)
    backend.update(0.0, free / 2)
    backend.gradient(batch, 1)
    torch.nn.utils.clip_grad_norm_(backend.parameters, free / 2)
    clipped = np.sqrt(sum(float((p.grad**2).sum()) for p in backend.parameters if p.grad is not None))
    assert clipped == pytest.approx(free / 2, rel=1e-3)
