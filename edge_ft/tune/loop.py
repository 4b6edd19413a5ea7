"""The training loop: batches, schedule, evaluation, keep-best, guards. It knows no arithmetic and no torch.

A run is a row of pieces of work, a step or a look at the validation rows. Between two of them everything
that the rest depends on is in a `Fit` and in the backend's state: there it can be saved, and gone on from.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_ft.artifacts import disk_full
from edge_ft.config import TuneConfig
from edge_ft.data import Batch, Example, collate, target_mask, train_batches
from edge_ft.errors import UsageError
from edge_ft.evaluate.scoring import Embedder, RowScores, Scorer, score
from edge_ft.progress import Progress
from edge_ft.tune.stopwatch import Stopwatch

__all__ = ["Backend", "Fit", "StopAtOnce", "fit", "learning_rate_at", "planned_steps"]

LOOKS = 5
"""Looks at the validation rows in a run, unless told otherwise."""
MAX_SKIPPED = 5
MAX_SKIPPED_IN_A_ROW = 3
"""So many updates without a number end a run: more would only hide what is wrong."""


class Backend(Scorer, Protocol):
    """What does the arithmetic of a step."""

    def seed(self, seed: int) -> None:
        """Start the random numbers of dropout anew."""

    def gradient(self, batch: Batch, targets: int) -> float:
        """Add the gradient of the batch's summed loss / `targets`; return that loss (nats)."""

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        """One optimizer step over the gathered gradient; return its norm before clipping."""

    def discard(self) -> None:
        """Forget the gathered gradient."""

    def remember(self) -> None:
        """Keep the weights as they are now as the best so far."""

    def recall(self) -> None:
        """Take the best weights back."""

    def mend(self) -> bool:
        """Where weights or moments are not numbers: recall, with fresh moments, and return True."""

    def save(self, folder: Path) -> None:
        """Write the weights as they are now as a PEFT adapter."""

    def state(self) -> dict[str, NDArray[Any]]:
        """Weights, moments and best weights by flat names; may share memory with them."""

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Be as when `state` was taken."""


class StopAtOnce(KeyboardInterrupt):
    """Stop without saving."""


@dataclass
class Fit:
    """Where a training run stands, and in the end what it came to."""

    planned: int
    """Steps, fixed before the first one: the schedule ends there."""
    base: RowScores
    best: RowScores
    last_nll: float
    steps: int = 0
    best_step: int = 0
    """0: no look was better than the untuned base."""
    bad_looks: int = 0
    look_due: bool = False
    seconds: float = 0.0
    """Training alone, without looks and checkpoints."""
    cpu_seconds: float = 0.0
    elapsed: float = 0.0
    """Wall seconds, all of them."""
    tokens: int = 0
    """Tokens read in training, without padding."""
    skipped: int = 0
    """Updates left out because loss or gradient was not a number."""
    skipped_in_a_row: int = 0
    rate_factor: float = 1.0
    """Halved by each of them."""
    stopped: str = "steps"
    """Why it ends: `steps`, `patience` or `minutes`."""


def learning_rate_at(step: int, steps: int, config: TuneConfig) -> float:
    """Rate of step 1 … `steps`: linear warm-up, then constant or half a cosine to 0 after the last step."""
    peak = config.learning_rate
    assert peak is not None
    warmup = math.ceil(config.warmup * steps)
    if step <= warmup:
        return peak * step / warmup
    if config.schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup - 1) / max(1, steps - warmup)))


def planned_steps(rows: int, config: TuneConfig) -> int:
    """Optimizer steps that `config` asks for, before any limit of time."""
    if config.max_steps is not None:
        return config.max_steps
    assert config.epochs is not None  # settled
    return max(1, round(config.epochs * rows / (config.rows_at_once * config.gradient_accumulation)))


def fit(
    backend: Backend,
    train: Sequence[Example],
    validation: Sequence[Example],
    config: TuneConfig,
    *,
    task: str,
    pad_id: int,
    progress: Progress,
    log: Callable[[dict[str, Any]], None],
    on_best: Callable[[], None],
    on_plan: Callable[[int], None] = lambda steps: None,
    save: Callable[[Fit], None] = lambda state: None,
    poll: Callable[[], None] = lambda: None,
    agree: Callable[[float], float] = float,
    state: Fit | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Fit:
    """Train, look at the validation rows in between, and end with the best weights in `backend`.

    Args:
        log: Takes one line of metrics per step, and one per look.
        on_best: Called after a look that was the best so far.
        on_plan: Called with the number of steps before the first one.
        save: Writes a checkpoint of the backend and what it is given; called when one is due, when the run
            is interrupted, and at the end. A full disk is said, and the run goes on.
        poll: Called between two pieces of work; may raise KeyboardInterrupt.
        agree: Gives what depends on a clock the same value in all of several processes.
        state: Goes on from here; the backend was restored to the same moment.

    Raises:
        UsageError: loss or gradient was too often not a number, or --max-minutes leaves no step.
        KeyboardInterrupt: from `poll` or `progress`; a checkpoint of the last whole step was saved.
    """
    loop = _Loop(backend, train, validation, config, task, pad_id, progress, log, poll, agree, Stopwatch(clock))
    if state is None:
        state = loop.begin()
        on_plan(state.planned)
    else:
        loop.watch.go_on(state.elapsed, state.seconds, state.cpu_seconds)
    every = config.eval_steps or max(1, math.ceil(state.planned / LOOKS))
    progress.say(
        f"{state.planned} steps, validation every {every}; untuned validation loss {state.base.mean_nll:.4f}"
        + (f"; going on from step {state.steps}" if state.steps else "")
    )
    batches = _endless_batches(train, config, pad_id, task, skip=state.steps * config.gradient_accumulation)
    saved_at, saved_step, told = clock(), state.steps, False

    def checkpoint() -> None:
        nonlocal saved_at, saved_step, told
        state.seconds, state.cpu_seconds, state.elapsed = (
            loop.watch.seconds,
            loop.watch.cpu_seconds,
            loop.watch.elapsed,
        )
        try:
            with loop.watch.paused():
                save(state)
        except Exception as error:
            if not disk_full(error):
                raise
            if not told:
                progress.say(
                    f"the disk is full: no checkpoint of step {state.steps}, an older one stays; training goes on"
                )
                told = True
        saved_at, saved_step = clock(), state.steps

    def due() -> bool:
        since = clock() - saved_at
        return state.steps > saved_step and (
            bool(config.checkpoint_minutes and since >= config.checkpoint_minutes * 60)
            or (config.checkpoint_steps is not None and state.steps - saved_step >= config.checkpoint_steps)
        )

    try:
        while state.look_due or (state.steps < state.planned and state.stopped == "steps"):
            if due():
                checkpoint()
            poll()
            if state.look_due:
                loop.look(state, on_best)
            else:
                loop.step(state, batches, every)
    except StopAtOnce:
        raise
    except KeyboardInterrupt:
        backend.discard()
        checkpoint()
        raise
    if config.checkpoint_minutes or config.checkpoint_steps:
        checkpoint()  # the test rows are still to be read
    state.seconds = loop.watch.seconds
    backend.recall()
    return state


@dataclass
class _Loop:
    """The pieces of work."""

    backend: Backend
    train: Sequence[Example]
    validation: Sequence[Example]
    config: TuneConfig
    task: str
    pad_id: int
    progress: Progress
    log: Callable[[dict[str, Any]], None]
    poll: Callable[[], None]
    agree: Callable[[float], float]
    watch: Stopwatch

    def begin(self) -> Fit:
        """The look at the untuned base, and the number of steps."""
        base = self._scores(0)
        if not math.isfinite(base.mean_nll):
            row = next(e.row for e, nll in zip(self.validation, base.nll, strict=True) if not math.isfinite(nll))
            raise UsageError(
                f"the untuned model's validation loss is not a number, at row {row} first: its weights are damaged, "
                "or --compute is too coarse for it"
            )
        self.backend.remember()
        steps = planned_steps(len(self.train), self.config)
        if self.config.max_minutes is not None:
            steps = int(self.agree(self._steps_in_time(steps)))
        return Fit(steps, base, base, base.mean_nll)

    def step(self, state: Fit, batches: Iterator[Batch], every: int) -> None:
        """One optimizer step; nothing of `state` changes before its update."""
        config, step, started = self.config, state.steps + 1, self.watch.seconds
        micro_batches = list(islice(batches, config.gradient_accumulation))
        targets = sum(int(target_mask(batch["labels"], self.task).sum()) for batch in micro_batches)
        rate = learning_rate_at(step, state.planned, config) * state.rate_factor
        self.backend.seed(int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0]))
        loss, rows = 0.0, [row for batch in micro_batches for row in batch["rows"]]
        for batch in micro_batches:
            self.poll()
            loss += self.backend.gradient(batch, targets)
            if not math.isfinite(loss):
                rows = batch["rows"]
                break
        if math.isfinite(loss):
            norm = self.backend.update(rate, config.max_grad_norm)
        else:
            norm = math.nan
            self.backend.discard()
        read = sum(int(batch["attention_mask"].sum()) for batch in micro_batches)
        state.steps, state.tokens = step, state.tokens + read
        out_of_time = config.max_minutes is not None and bool(self.agree(self.watch.elapsed > config.max_minutes * 60))
        state.look_due = step % every == 0 or step == state.planned or out_of_time
        if out_of_time:
            state.stopped = "minutes"
        if not math.isfinite(norm):
            self._skip(state, "gradient" if math.isfinite(loss) else "loss", rows, rate)
            return
        state.skipped_in_a_row = 0
        self.log(
            {
                "step": step,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": read,
                "seconds": round(self.watch.seconds - started, 4),
            }
        )
        speed = state.tokens / self.watch.seconds if self.watch.seconds > 0 else 0.0
        self.progress.advance("train", step, state.planned, f"loss {loss:.3f}, {speed:.0f} tok/s")

    def _skip(self, state: Fit, what: str, rows: list[int], rate: float) -> None:
        """Leave an update out and halve the rate from then on; too often is the end."""
        state.skipped += 1
        state.skipped_in_a_row += 1
        state.rate_factor /= 2
        mended = self.backend.mend()
        self.log({"step": state.steps, "skipped": what, "rows": rows, "learning_rate": rate})
        where = f"step {state.steps} (rows {', '.join(map(str, rows[:8]))}{', …' if rows[8:] else ''})"
        if state.skipped >= MAX_SKIPPED or state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UsageError(
                f"the {what} is not a number at {where} at rate {rate:.2g}, nor was it {state.skipped - 1} time(s) "
                "before, the rate halved each time: lower --learning-rate, or look at these rows"
            )
        self.progress.say(
            f"{where}: the {what} is not a number; this update is left out and the rate halved"
            + (", back to the best weights" if mended else "")
        )

    def look(self, state: Fit, on_best: Callable[[], None]) -> None:
        """Score the validation rows, keep the best."""
        scores = self._scores(state.steps)
        state.look_due, state.last_nll = False, scores.mean_nll
        better = state.last_nll < state.best.mean_nll
        if better:
            state.best, state.best_step, state.bad_looks = scores, state.steps, 0
            self.backend.remember()
        else:
            state.bad_looks += 1
        if self.config.patience is not None and state.bad_looks >= self.config.patience:
            state.stopped = "patience"
        if better:
            on_best()
        self.progress.say(
            f"step {state.steps}: validation loss {state.last_nll:.4f}, best {state.best.mean_nll:.4f} "
            f"at step {state.best_step}"
        )

    def _scores(self, step: int) -> RowScores:
        stage = f"validation at step {step}" if step else "validation, base"
        with self.watch.paused():
            scores = score(
                _Polled(self.backend, self.poll),
                self.validation,
                task=self.task,
                pad_id=self.pad_id,
                batch_size=self.config.rows_at_once,
                progress=self.progress,
                stage=stage,
            )
        self.log(
            {
                "step": step,
                "validation_nll": scores.mean_nll if math.isfinite(scores.mean_nll) else None,
                "seconds": round(self.watch.seconds, 4),
                "cpu_seconds": round(self.watch.cpu_seconds, 4),
            }
        )
        return scores

    def _steps_in_time(self, steps: int) -> int:
        """How many of `steps` fit into --max-minutes, from one measured step: fixed before the first, so that
        the schedule ends there."""
        limit = self.config.max_minutes
        assert limit is not None
        look_seconds = self.watch.elapsed  # all that was done so far is one look
        batch = next(_endless_batches(self.train, self.config, self.pad_id, self.task))
        self.backend.gradient(batch, 1)  # the first pass pays for allocations
        started = self.watch.elapsed
        self.backend.gradient(batch, 1)
        step_seconds = (self.watch.elapsed - started) * self.config.gradient_accumulation
        self.backend.discard()
        left = limit * 60 - self.watch.elapsed - LOOKS * look_seconds
        if left < step_seconds:
            raise UsageError(
                f"--max-minutes {limit:g} leaves no time to train: {1 + LOOKS} looks at the validation rows "
                f"take {(1 + LOOKS) * look_seconds:.0f} s and a step {step_seconds:.1f} s"
            )
        return max(1, min(steps, int(left / step_seconds)))


@dataclass
class _Polled:
    """A scorer that can be interrupted between two batches."""

    scorer: Scorer
    poll: Callable[[], None]

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[Any]]:
        self.poll()
        return self.scorer.token_nll(batch)

    def vectors(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.poll()
        assert isinstance(self.scorer, Embedder)
        return self.scorer.vectors(batch)


def _endless_batches(
    train: Sequence[Example], config: TuneConfig, pad_id: int, task: str, skip: int = 0
) -> Iterator[Batch]:
    """Batches of epoch after epoch, without the first `skip` of them."""
    lengths = [len(example.input_ids) for example in train]
    epoch = 0
    while True:
        for indices in train_batches(lengths, config.rows_at_once, config.seed, epoch):
            if skip:
                skip -= 1
                continue
            yield collate([train[index] for index in indices], pad_id, task)
        epoch += 1
