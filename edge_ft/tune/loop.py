"""The training loop: batches, evaluation, best weights, guards. Torch-free: a `Backend` does the arithmetic.

A run alternates between optimizer steps and evaluations of the validation rows. Between two of them, everything that
the rest of the run depends on is in a `Fit` and in the backend's state: both can be saved and restored there.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from typing import Any

import numpy as np

from edge_ft.config import TuneConfig
from edge_ft.data import Batch, Example, collate, target_mask, train_batches
from edge_ft.errors import UsageError
from edge_ft.evaluate.scoring import Batching, RowScores, score
from edge_ft.files import disk_full
from edge_ft.progress import Progress
from edge_ft.stopping import StopAtOnce
from edge_ft.tune.backend import Backend
from edge_ft.tune.schedule import EVALUATIONS, learning_rate_at, planned_steps, training_minutes
from edge_ft.tune.stopwatch import Stopwatch, Timings

__all__ = [
    "Callbacks",
    "Fit",
    "TrainingRows",
    "fit",
    "refuse_odd_base",
]

MAX_SKIPPED = 5
MAX_SKIPPED_IN_A_ROW = 3
"""A run ends after this many skipped updates: more would only hide what is wrong."""


@dataclass
class Fit:
    """The state of a training run, and at its end the result."""

    planned: int
    """Steps, fixed before the first one: the schedule ends there."""
    base: RowScores
    """Of all validation rows."""
    best: RowScores
    """Of `TrainingRows.watched` after an evaluation that is not the last, of all validation rows at the end."""
    last_nll: float
    steps: int = 0
    best_step: int = 0
    """0: no evaluation was better than the untuned base."""
    evaluations_without_gain: int = 0
    """Since the best one."""
    evaluation_due: bool = False
    seconds: float = 0.0
    """Training alone, without evaluations and checkpoints."""
    cpu_seconds: float = 0.0
    elapsed: float = 0.0
    """Wall seconds, all of them."""
    tokens: int = 0
    """Tokens read in training, without padding."""
    skipped: int = 0
    """Updates skipped because loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    rate_factor: float = 1.0
    """Halved by each of them."""
    stopped: str = "steps"
    """Why it ends: `steps`, `patience` or `minutes`."""


class Callbacks:
    """What a run does while the loop trains: nothing, but for the methods that a subclass overrides."""

    stage = "train"
    """Name of the steps for `Progress`."""
    untuned = "untuned"
    """What the model is before the first step, for messages."""

    def on_plan(self, steps: int) -> None:
        """Receive the number of steps, before the first one of a new run."""

    def on_metrics(self, line: dict[str, Any]) -> None:
        """Receive a line of metrics: one per step, and one per evaluation."""

    def on_best(self) -> None:
        """Act on an evaluation that was the best so far; the backend holds its weights."""

    def save(self, state: Fit) -> None:
        """Write a checkpoint of the backend and `state`: when due, when interrupted, and at the end."""

    def poll(self) -> None:
        """Run between two batches; may raise KeyboardInterrupt."""

    def agree(self, value: float) -> float:
        """Return the same value in all processes of a run, for decisions that depend on a clock."""
        return value


@dataclass(frozen=True)
class TrainingRows:
    """The encoded rows of a loop, and how they become batches."""

    train: Sequence[Example]
    validation: Sequence[Example]
    batching: Batching
    watched: Sequence[int] = ()
    """Indices of the validation rows of an evaluation, except the last one; (): all."""

    def part(self, scores: RowScores) -> RowScores:
        """Return the scores of the watched rows, out of theirs or those of all validation rows."""
        return scores if len(scores.nll) < len(self.validation) or not self.watched else scores.at(self.watched)


def refuse_odd_base(base: RowScores, examples: Sequence[Example]) -> None:
    """Refuse a base whose loss of some rows is not a number.

    Args:
        base: Its scores.
        examples: The rows.

    Raises:
        UsageError: it is not.
    """
    if not math.isfinite(base.mean_nll):
        row = next(e.row for e, nll in zip(examples, base.nll, strict=True) if not math.isfinite(nll))
        raise UsageError(
            f"the untuned model's validation loss is not a number, first at row {row}: its weights are damaged, "
            "or --compute is too coarse for it"
        )


def fit(
    backend: Backend,
    rows: TrainingRows,
    config: TuneConfig,
    progress: Progress,
    callbacks: Callbacks,
    state: Fit | None = None,
    timings: Timings | None = None,
) -> Fit:
    """Train, evaluate the validation rows in between, and end with the best weights in `backend`.

    Args:
        backend: Holds the weights; with a `state`, it was restored to the same moment.
        rows: Train and validation rows.
        config: Resolved settings.
        progress: Gets a message per evaluation and a tick per step.
        callbacks: What the run does meanwhile.
        state: Where an interrupted run continues; None starts a new one.
        timings: Gets the seconds of `validation` and of `checkpoints`; its clock is that of the loop.

    Returns:
        The state after the last step.

    Raises:
        UsageError: loss or gradient was too often not finite, or --max-minutes leaves no step.
        KeyboardInterrupt: from `callbacks.poll` or `progress`; a checkpoint of the last whole step was saved.
        StopAtOnce: from `callbacks.poll`; nothing was saved.
    """
    before = (state.elapsed, state.seconds, state.cpu_seconds) if state is not None else ()
    timings = timings or Timings()
    loop = _Loop(backend, rows, config, progress, callbacks, Stopwatch(timings.clock, *before), timings)
    if state is None:
        state = loop.start()
        callbacks.on_plan(state.planned)
    else:
        state = replace(state)
    every = config.eval_steps or max(1, math.ceil(state.planned / EVALUATIONS))
    some = f" on {len(rows.watched)} of {len(rows.validation)} rows" if rows.watched else ""
    progress.say(
        f"{state.planned} steps, validation every {every}{some}; "
        f"{callbacks.untuned} validation loss {state.base.mean_nll:.4f}"
        + (f"; resuming from step {state.steps}" if state.steps else "")
    )
    batches = _endless_batches(rows, config, skip=state.steps * config.passes)
    loop.saved_at, loop.saved_step = loop.watch.elapsed, state.steps
    try:
        while state.evaluation_due or (state.steps < state.planned and state.stopped == "steps"):
            if loop.checkpoint_is_due(state):
                loop.save(state)
            callbacks.poll()
            if state.evaluation_due:
                loop.evaluate(state)
            else:
                loop.step(state, batches, every)
    except StopAtOnce:
        raise
    except KeyboardInterrupt:
        backend.discard()
        loop.save(state)
        raise
    loop.save(state)  # the report is still to come: if that is stopped, nothing is trained again
    state.seconds = loop.watch.seconds
    loop.choose(state)
    backend.restore_best()
    return state


@dataclass
class _Loop:
    """The parts of a run: its start, a step, an evaluation, a checkpoint."""

    backend: Backend
    rows: TrainingRows
    config: TuneConfig
    progress: Progress
    callbacks: Callbacks
    watch: Stopwatch
    timings: Timings
    last: RowScores | None = None
    """Of all validation rows, where the last evaluation was of all of them."""
    saved_at: float = 0.0
    """Elapsed seconds at the last checkpoint, or at the start of this process."""
    saved_step: int = 0
    reported_full_disk: bool = False

    def start(self) -> Fit:
        """Evaluate the untuned base, and fix the number of steps: the watched rows now, the report needs the others."""
        base = self._scores(0, every_row=False)
        self._log(0, base)
        validation = self.rows.validation
        refuse_odd_base(base, [validation[row] for row in self.rows.watched] or validation)
        self.backend.keep_best()
        steps = planned_steps(len(self.rows.train), self.config)
        if (minutes := training_minutes(self.config, steps)) is not None:
            steps = int(self.callbacks.agree(self._steps_in_time(steps, minutes)))
        return Fit(steps, base, base, base.mean_nll)

    def step(self, state: Fit, batches: Iterator[Batch], every: int) -> None:
        """Take one optimizer step; nothing of `state` changes before its update."""
        config, step, started = self.config, state.steps + 1, self.watch.seconds
        micro_batches = list(islice(batches, config.passes))
        targets = sum(int(target_mask(batch["labels"], self.rows.batching.task).sum()) for batch in micro_batches)
        rate = learning_rate_at(step, state.planned, config) * state.rate_factor
        self.backend.seed(int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0]))
        loss, norm, rows = 0.0, math.nan, [row for batch in micro_batches for row in batch["rows"]]
        for batch in micro_batches:
            self.callbacks.poll()
            loss += self.backend.gradient(batch, targets)
            if not math.isfinite(loss):
                rows = batch["rows"]
                break
        if math.isfinite(loss):
            norm = self.backend.update(rate, config.max_grad_norm)
        else:
            self.backend.discard()
        read = sum(int(batch["attention_mask"].sum()) for batch in micro_batches)
        state.steps, state.tokens = step, state.tokens + read
        minutes = training_minutes(config, planned_steps(len(self.rows.train), config))
        out_of_time = minutes is not None and bool(self.callbacks.agree(self.watch.elapsed > minutes * 60))
        state.evaluation_due = step % every == 0 or step == state.planned or out_of_time
        if out_of_time:
            state.stopped = "minutes"
        if not math.isfinite(norm):
            self._skip(state, "gradient" if math.isfinite(loss) else "loss", rows, rate)
            return
        state.skipped_in_a_row = 0
        seconds = round(self.watch.seconds - started, 4)
        self.callbacks.on_metrics(
            {"step": step, "loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens": read, "seconds": seconds}
        )
        speed = state.tokens / self.watch.seconds if self.watch.seconds > 0 else 0.0
        self.progress.advance(self.callbacks.stage, step, state.planned, f"loss {loss:.3f}, {speed:.0f} tok/s")

    def _skip(self, state: Fit, what: str, rows: list[int], rate: float) -> None:
        """Count a skipped update and halve the rate from then on; too many end the run."""
        state.skipped += 1
        state.skipped_in_a_row += 1
        state.rate_factor /= 2
        repaired = self.backend.repair()
        self.callbacks.on_metrics({"step": state.steps, "skipped": what, "rows": rows, "learning_rate": rate})
        where = f"step {state.steps} (rows {', '.join(map(str, rows[:8]))}{', …' if rows[8:] else ''})"
        if state.skipped >= MAX_SKIPPED or state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UsageError(
                f"the {what} is not a number at {where} at rate {rate:.2g}, after {state.skipped - 1} skipped "
                "update(s) that each halved the rate: lower --learning-rate, or check these rows"
            )
        self.progress.say(
            f"{where}: the {what} is not a number; this update is skipped and the learning rate halved"
            + (", and the best weights are restored" if repaired else "")
        )

    def evaluate(self, state: Fit) -> None:
        """Score the validation rows, and keep the weights if they are the best so far on the watched ones."""
        is_last = state.steps == state.planned or state.stopped != "steps"
        scores, part = self._scores(state.steps, is_last), self.rows.part
        self._log(state.steps, part(scores))
        state.evaluation_due, state.last_nll = False, scores.mean_nll
        if is_last:
            self.last = scores
        if part(scores).mean_nll < part(state.best).mean_nll:
            state.best, state.best_step, state.evaluations_without_gain = scores, state.steps, 0
            self.backend.keep_best()
            self.callbacks.on_best()
        else:
            state.evaluations_without_gain += 1
            if state.evaluations_without_gain == self.config.patience:
                state.stopped = "patience"
        self.progress.say(
            f"step {state.steps}: validation loss {state.last_nll:.4f}, best {state.best.mean_nll:.4f} "
            f"at step {state.best_step}"
        )

    def choose(self, state: Fit) -> None:
        """Score the best weights on all validation rows; the last ones replace them if they are better there."""
        if len(state.best.nll) == len(self.rows.validation):
            return
        last = self.last or self._scores(state.steps, every_row=True)
        self.backend.swap_best()
        state.best = self._scores(state.best_step, every_row=True)
        self.backend.swap_best()
        state.last_nll = last.mean_nll
        if last.mean_nll < state.best.mean_nll:
            state.best, state.best_step = last, state.steps
            self.backend.keep_best()
            self.callbacks.on_best()

    def _scores(self, step: int, every_row: bool) -> RowScores:
        """Score all validation rows, or the watched ones."""
        rows, poll = self.rows, self.callbacks.poll
        examples = rows.validation if every_row or not rows.watched else [rows.validation[row] for row in rows.watched]
        with self.watch.paused(), self.timings.stage("validation"):
            stage = f"validation at step {step}" if step else "validation, base"
            return score(self.backend, examples, rows.batching, self.progress, stage, poll)

    def _log(self, step: int, scores: RowScores) -> None:
        """Report the loss of the watched rows."""
        self.callbacks.on_metrics(
            {
                "step": step,
                "validation_nll": scores.mean_nll if math.isfinite(scores.mean_nll) else None,
                "rows": len(scores.nll),
                "seconds": round(self.watch.seconds, 4),
                "cpu_seconds": round(self.watch.cpu_seconds, 4),
            }
        )

    def _steps_in_time(self, steps: int, minutes: float) -> int:
        """Return how many of `steps` fit into --max-minutes, from one measured step.

        The number is fixed before the first step, so that the schedule ends there.

        Raises:
            UsageError: none fits.
        """
        share = len(self.rows.watched or self.rows.validation) / len(self.rows.validation)
        evaluation_seconds = self.watch.elapsed / share  # all that was done so far is one evaluation
        batch = next(_endless_batches(self.rows, self.config))
        self.backend.gradient(batch, 1)  # the first pass pays for allocations
        started = self.watch.elapsed
        self.backend.gradient(batch, 1)
        step_seconds = (self.watch.elapsed - started) * self.config.passes
        self.backend.discard()
        evaluations = ((EVALUATIONS - 1) * share + 1) * evaluation_seconds
        left = minutes * 60 - self.watch.elapsed - evaluations
        if left < step_seconds:
            raise UsageError(
                f"--max-minutes {self.config.max_minutes:g} leaves no time to train: {1 + EVALUATIONS} evaluations of "
                f"the validation rows take {evaluation_seconds + evaluations:.0f} s and a step {step_seconds:.1f} s"
            )
        return max(1, min(steps, int(left / step_seconds)))

    def checkpoint_is_due(self, state: Fit) -> bool:
        seconds, steps = self.config.checkpoint_minutes * 60, self.config.checkpoint_steps
        done = state.steps - self.saved_step
        late = seconds > 0 and self.watch.elapsed - self.saved_at >= seconds
        return done > 0 and (late or (steps is not None and done >= steps))

    def save(self, state: Fit) -> None:
        """Save a checkpoint; if the disk is full, say so once and continue."""
        watch = self.watch
        state.seconds, state.cpu_seconds, state.elapsed = watch.seconds, watch.cpu_seconds, watch.elapsed
        try:
            with watch.paused(), self.timings.stage("checkpoints"):
                self.callbacks.save(state)
        except Exception as error:
            if not disk_full(error):
                raise
            if not self.reported_full_disk:
                self.progress.say(
                    f"the disk is full: no checkpoint of step {state.steps} was written, the previous one is kept; "
                    "training continues"
                )
                self.reported_full_disk = True
        self.saved_at, self.saved_step = watch.elapsed, state.steps


def _endless_batches(rows: TrainingRows, config: TuneConfig, skip: int = 0) -> Iterator[Batch]:
    """Batches of epoch after epoch, without the first `skip` of them."""
    lengths, batching = [len(example.input_ids) for example in rows.train], rows.batching
    epochs = (train_batches(lengths, config.rows_at_once, config.seed, epoch) for epoch in count())
    for indices in islice(chain.from_iterable(epochs), skip, None):
        yield collate([rows.train[index] for index in indices], batching.pad_id, batching.task)
