"""What the baseline of the races is measured with: its clocks, and its loss on the held-out rows along the way."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback

from edge_ft.evaluate.scoring import Batching, score
from edge_ft.models.scorer import TorchScorer
from edge_ft.progress import Silent
from edge_ft.tune.prepare import Job
from edge_ft.tune.stopwatch import Stopwatch

__all__ = ["Clocks", "HeldOutCurve", "held_out_nll"]

BATCH_SIZE = 8


def held_out_nll(model: nn.Module, job: Job, split: str = "validation") -> float:
    """Mean loss of a split's rows in float32, nats per target."""
    scores = score(
        TorchScorer(model, job.prepared.task),
        job.prepared.examples[split],
        Batching(job.prepared.task, job.tokenizer.pad_id, BATCH_SIZE),
        Silent(),
        "",
    )
    return scores.mean_nll


class Clocks:
    """Seconds of the whole process, of its steps, and of Trainer's evaluations; our own scoring is on none of them."""

    def __init__(self, started: float) -> None:
        elapsed = time.monotonic() - started
        self.whole = Stopwatch(time.monotonic, elapsed, elapsed, time.process_time())
        self.steps = Stopwatch(time.monotonic)
        self.evaluations = 0.0
        self.last_step = 0.0
        """Seconds of steps when the last one was done."""

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Exclude what the study does and a user would not."""
        with self.whole.paused(), self.steps.paused():
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Count what Trainer does for an evaluation apart from the steps."""
        began = self.whole.seconds
        with self.steps.paused():
            yield
        self.evaluations += self.whole.seconds - began

    def figures(self) -> dict[str, float]:
        """Seconds of the whole process with the evaluations of its users and without, and of its parts."""
        whole, steps = self.whole.seconds, self.last_step
        return {
            "seconds_whole": whole,
            "seconds_whole_without_evaluation": whole - self.evaluations,
            "cpu_seconds_whole": self.whole.cpu_seconds,
            "seconds_steps": steps,
            "seconds_scoring": self.evaluations,
            "seconds_other": whole - steps - self.evaluations,
        }


class HeldOutCurve(TrainerCallback):
    """Our score of the held-out rows before the first step, every `eval_steps`, and after the last."""

    def __init__(
        self, model: nn.Module, job: Job, clocks: Clocks, split: str, max_minutes: float | None = None
    ) -> None:
        self.model, self.job, self.clocks, self.split, self.max_minutes = model, job, clocks, split, max_minutes
        self.points: list[dict[str, Any]] = []
        self.stopped: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock of the steps, and score the untuned base."""
        self.clocks.steps = Stopwatch(time.monotonic)
        self._evaluate(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Score where it is due; end the training when its minutes are over."""
        self.clocks.last_step = self.clocks.steps.seconds
        if self.max_minutes is not None and self.clocks.last_step > self.max_minutes * 60:
            self.stopped, control.should_training_stop = "minutes", True
        every = self.job.config.eval_steps or state.max_steps
        if state.global_step % every == 0 or state.global_step == state.max_steps or self.stopped:
            self._evaluate(state.global_step)

    def _evaluate(self, step: int) -> None:
        with self.clocks.excluded():
            nll = held_out_nll(self.model, self.job, self.split)
        self.points.append(
            {
                "step": step,
                "seconds": self.clocks.steps.seconds,
                "cpu_seconds": self.clocks.steps.cpu_seconds,
                "whole_seconds": self.clocks.whole.seconds,
                "whole_seconds_without_evaluation": self.clocks.whole.seconds - self.clocks.evaluations,
                "nll": nll if math.isfinite(nll) else None,
            }
        )
