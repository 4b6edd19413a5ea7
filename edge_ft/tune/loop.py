"""The training loop: batches, schedule, evaluation, keep-best. It knows no arithmetic and no torch."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from edge_ft.config import TuneConfig
from edge_ft.data import Batch, Example, collate, train_batches
from edge_ft.errors import UsageError
from edge_ft.evaluate.score import RowScores, Scorer, score
from edge_ft.progress import Progress

__all__ = ["Backend", "Fit", "fit", "learning_rate_at", "planned_steps"]


class Backend(Scorer, Protocol):
    """What does the arithmetic of a step."""

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

    def save(self, folder: Path) -> None:
        """Write the weights as they are now as a PEFT adapter."""


@dataclass
class Fit:
    """What a training run came to."""

    steps: int
    best_step: int
    """0: no look was better than the untuned base."""
    base: RowScores
    best: RowScores
    last_nll: float
    seconds: float
    """Training steps alone, without validation."""
    tokens: int
    """Tokens read in training, without padding."""
    stopped: str
    """Why it ended: `steps`, `patience` or `minutes`."""


def learning_rate_at(step: int, steps: int, config: TuneConfig) -> float:
    """Rate of step 1 … `steps`: linear warm-up, then constant or half a cosine to 0 after the last step."""
    warmup = math.ceil(config.warmup * steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup - 1) / max(1, steps - warmup)))


def planned_steps(rows: int, config: TuneConfig) -> int:
    """Optimizer steps that `config` asks for, before any limit of time."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, round(config.epochs * rows / (config.batch_size * config.gradient_accumulation)))


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
    clock: Callable[[], float] = time.monotonic,
) -> Fit:
    """Train, look at the validation rows in between, and end with the best weights in `backend`.

    Args:
        log: Takes one line of metrics per step, and one per look.
        on_best: Called after a look that was the best so far.

    Raises:
        UsageError: the loss or gradient stopped being a number, or --max-minutes leaves no step.
    """
    started = clock()

    def look(stage: str) -> RowScores:
        return score(
            backend, validation, task=task, pad_id=pad_id, batch_size=config.batch_size, progress=progress, stage=stage
        )

    base = best = look("validation, base")
    last_nll = base.mean_nll
    log({"step": 0, "validation_nll": base.mean_nll})
    batches = _endless_batches(train, config, pad_id, task)
    steps = planned_steps(len(train), config)
    looks = 5
    if config.max_minutes is not None:
        first = next(batches)
        batches = chain([first], batches)
        steps = _steps_in_time(backend, first, steps, looks, started, config, clock)
    every = config.eval_steps or max(1, math.ceil(steps / looks))
    progress.say(f"{steps} steps, validation every {every}; untuned validation loss {base.mean_nll:.4f}")

    best_step, bad_looks, tokens, training_seconds, step, stopped = 0, 0, 0, 0.0, 0, "steps"
    backend.remember()
    while step < steps:
        step += 1
        step_started = clock()
        micro_batches = [next(batches) for _ in range(config.gradient_accumulation)]
        targets = sum(_targets(batch, task) for batch in micro_batches)
        loss = sum(backend.gradient(batch, targets) for batch in micro_batches)
        rate = learning_rate_at(step, steps, config)
        norm = backend.update(rate, config.max_grad_norm) if math.isfinite(loss) else math.nan
        if not math.isfinite(norm):
            raise UsageError(
                f"loss {loss} or its gradient is not a number at step {step}: lower --learning-rate {rate:.2g}"
            )
        seconds = clock() - step_started
        training_seconds += seconds
        read = sum(int(batch["attention_mask"].sum()) for batch in micro_batches)
        tokens += read
        log(
            {
                "step": step,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": read,
                "seconds": round(seconds, 4),
            }
        )
        progress.advance("train", step, steps, f"loss {loss:.3f}, {tokens / training_seconds:.0f} tok/s")
        out_of_time = config.max_minutes is not None and clock() - started > config.max_minutes * 60
        if step % every == 0 or step == steps or out_of_time:
            scores = look(f"validation at step {step}")
            last_nll = scores.mean_nll
            log({"step": step, "validation_nll": last_nll})
            if last_nll < best.mean_nll:
                best, best_step, bad_looks = scores, step, 0
                backend.remember()
                on_best()
            else:
                bad_looks += 1
            progress.say(f"step {step}: validation loss {last_nll:.4f}, best {best.mean_nll:.4f} at step {best_step}")
            if config.patience is not None and bad_looks >= config.patience:
                stopped = "patience"
                break
        if out_of_time:
            stopped = "minutes"
            break
    backend.recall()
    return Fit(step, best_step, base, best, last_nll, training_seconds, tokens, stopped)


def _endless_batches(train: Sequence[Example], config: TuneConfig, pad_id: int, task: str) -> Iterator[Batch]:
    lengths = [len(example.input_ids) for example in train]
    epoch = 0
    while True:
        for indices in train_batches(lengths, config.batch_size, config.seed, epoch):
            yield collate([train[index] for index in indices], pad_id, task)
        epoch += 1


def _targets(batch: Batch, task: str) -> int:
    labels = batch["labels"]
    return int((labels[:, 1:] != -100).sum()) if task == "text-generation" else len(labels)


def _steps_in_time(
    backend: Backend,
    batch: Batch,
    steps: int,
    looks: int,
    started: float,
    config: TuneConfig,
    clock: Callable[[], float],
) -> int:
    """How many of `steps` fit into --max-minutes, from one measured step: fixed before the first, so that
    the schedule ends there."""
    assert config.max_minutes is not None
    look_seconds = clock() - started  # all that was done so far is one look
    backend.gradient(batch, 1)  # the first pass pays for allocations
    step_started = clock()
    backend.gradient(batch, 1)
    step_seconds = (clock() - step_started) * config.gradient_accumulation
    backend.discard()
    left = config.max_minutes * 60 - (clock() - started) - looks * look_seconds
    if left < step_seconds:
        raise UsageError(
            f"--max-minutes {config.max_minutes:g} leaves no time to train: {1 + looks} looks at the validation rows "
            f"take {(1 + looks) * look_seconds:.0f} s and a step {step_seconds:.1f} s"
        )
    return max(1, min(steps, int(left / step_seconds)))
