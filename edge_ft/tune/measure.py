"""Measure training on a few batches: seconds and bytes, by the tokens of a batch with its padding.

A few rows and a typical batch of the run are trained on, and the gradients discarded; the longest batch too where it
is much longer, or memory is scarce. Time and memory grow about linearly with the tokens of a batch (attention is
computed in tiles, logits only where there is a label), so these points give both for every batch of the run. If the
longest batch would not fit, its needs are extrapolated.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_ft.config import TEXT_TASKS
from edge_ft.data import Batch, Example, batch_tokens, collate
from edge_ft.evaluate.generation import BatchAnswerer
from edge_ft.system import Available, DevicePeak, PeakMemory, release_memory, resident_bytes
from edge_ft.tune.backend import count_trained
from edge_ft.tune.engine import TrainableModel
from edge_ft.tune.prepare import Job
from edge_ft.tune.report import ANSWERS, BATCH_COST, answer_limit, answered_rows
from edge_ft.tune.schedule import finishing_steps

__all__ = ["Curve", "Measured", "measure"]


PLENTY = 1 / 2
"""Share of the available memory up to which the longest batch's need is extrapolated from a typical one's."""

SHORT = 3.0
"""Seconds of a step up to which it is timed once more: the first of its size also waits for memory, and is watched."""


@dataclass(frozen=True)
class Curve:
    """A quantity that grows with the tokens of a batch: linear between the measured points, and beyond the last."""

    tokens: list[int]
    """Sizes that were measured, ascending."""
    values: list[float]

    def at(self, tokens: float) -> float:
        """The quantity at a number of tokens."""
        sizes, values = self.tokens, self.values
        if tokens <= sizes[-1]:
            return float(np.interp(tokens, sizes, values))
        slope = max((values[-1] - values[-2]) / (sizes[-1] - sizes[-2]), 0.0) if len(sizes) > 1 else 0.0
        return max(values) + slope * (tokens - sizes[-1])


@dataclass(frozen=True)
class Measured:
    """What one setting takes on this machine."""

    step: Curve
    """Seconds of the forward and backward pass of a batch."""
    evaluation: Curve
    """Seconds to score a batch, as during the training."""
    report: float
    """Seconds to score a batch for the report, in float32, over those during the training."""
    token: float
    """Seconds of a generated token: `BATCH_COST` times these is what a token of each of `ANSWERS` answers takes."""
    memory: Curve
    """Resident bytes at the peak of a step; at 0 tokens, those before it."""
    loading: int
    """Peak of the resident bytes before the first step."""
    answering: int
    """Bytes that scoring and generating for the report need besides those before a step."""
    trainable: int
    """Number of trainable parameters."""
    choosing: float | None = None
    """Seconds to load the merged model and choose its codes; None: as long as loading the base."""
    device: Curve | None = None
    """Bytes of the GPU at the peak of a step, as `memory` has those of the host; None on a CPU."""


@dataclass(frozen=True)
class _Point:
    """A batch that was measured."""

    rows: list[int]
    tokens: int
    step_seconds: float
    evaluation_seconds: float
    peak_bytes: int
    device_bytes: int | None = None


def measure(job: Job, model: TrainableModel, available: Available, loading: int) -> Measured:
    """Train and score a few batches of the run; the weights and the optimizer stay as they were.

    Args:
        job: The settings and the rows.
        model: What they train.
        available: A batch that would need more memory is cut to fewer rows.
        loading: Peak of the resident bytes so far.

    Returns:
        The measurements.
    """
    train, task = job.prepared.examples["train"], job.prepared.task
    batches = sorted(job.batches, key=lambda batch: batch_tokens(batch, train, task))
    few, typical, longest = batches[0][: max(1, len(batches[0]) // 4)], batches[len(batches) // 2], batches[-1]
    far = batch_tokens(longest, train, task) > 2 * batch_tokens(typical, train, task)
    # The report first: its float32 weights, where they are cached, would replace those of the steps.
    half = typical[: max(1, len(typical) // 2)]  # a whole one may not fit
    more = batch_tokens(typical, train, task) / batch_tokens(half, train, task)
    report_seconds, token, answering = _measure_report(half, job, model, more)
    _step(few[:1], job, model)  # the first pass also pays for what later ones find ready
    release_memory()
    idle = resident_bytes()
    with DevicePeak(model.backend.device) as card:
        pass
    points: list[_Point] = []
    for batch in (few, typical, longest):
        if points:
            # The first rows that fit even if all memory of the last point was due to its tokens.
            last, tokens = points[-1], batch_tokens(batch, train, task)
            most = idle + (last.peak_bytes - idle) * tokens / last.tokens
            plenty = card.bytes is None and most < PLENTY * available.memory_bytes
            if batch is longest and len(points) > 1 and plenty and not far:
                break
            fitting = last.tokens * (available.memory_bytes - idle) / max(last.peak_bytes - idle, 1)
            if available.device_bytes is not None and card.bytes is not None and last.device_bytes is not None:
                room = available.device_bytes - card.bytes
                fitting = min(fitting, last.tokens * room / max(last.device_bytes - card.bytes, 1))
            batch = batch[: max(int(fitting * len(batch) / tokens), 0)]
            if not batch or batch_tokens(batch, train, task) <= last.tokens:
                continue
        points.append(_measure_batch(batch, job, model))
    sizes = [0, *(point.tokens for point in points)]
    steps = [0.0, *(point.step_seconds for point in points)]
    evaluations = [0.0, *(point.evaluation_seconds for point in points)]
    memory = [float(idle), *(float(point.peak_bytes) for point in points)]
    first = 1 if len(points) > 1 else 0  # a single point needs another one: no tokens take no time
    evaluation = Curve(sizes[first:], evaluations[first:])
    report = report_seconds / evaluation.at(batch_tokens(half, train, task)) if model.compute != "fp32" else 1.0
    return Measured(
        Curve(sizes[first:], steps[first:]),
        evaluation,
        report,
        token,
        Curve(sizes, memory),
        loading,
        answering,
        count_trained(model.backend),
        _choosing_seconds(job, model, evaluation),
        _card_curve(sizes, [card.bytes, *(point.device_bytes for point in points)]),
    )


def _choosing_seconds(job: Job, model: TrainableModel, evaluation: Curve) -> float | None:
    """`choosing` of `Measured`: as it took for the base, or an estimate where the base is float."""
    if model.calibration is not None:
        return model.calibration.again
    config, train = job.config, job.prepared.examples["train"]
    if config.frozen_format == "int4" or finishing_steps(config) == 0:
        return None
    length = sum(len(example.input_ids) for example in train) / len(train)
    return model.estimate_choosing(round(min(config.calibration_rows, len(train)) * length), evaluation.at)


def _card_curve(sizes: list[int], found: list[int | None]) -> Curve | None:
    """Bytes of the GPU by tokens; None where there is none."""
    known = [float(one) for one in found if one is not None]
    return Curve(sizes, known) if len(known) == len(sizes) else None


def _measure_batch(batch: list[int], job: Job, model: TrainableModel) -> _Point:
    """A step over a batch, whose gradients are discarded, and its scoring."""
    before = resident_bytes()
    with DevicePeak(model.backend.device) as card:
        seconds, extra = _timed(lambda: _step(batch, job, model))
    if seconds < SHORT:
        seconds = min(seconds, _seconds(lambda: _step(batch, job, model)))
    evaluation = _seconds(lambda: model.backend.token_nll(_collated(batch, job)))
    train, task = job.prepared.examples["train"], job.prepared.task
    return _Point(batch, batch_tokens(batch, train, task), seconds, evaluation, before + extra, card.bytes)


def _step(batch: list[int], job: Job, model: TrainableModel) -> None:
    """A forward and backward pass over a batch, whose gradients are discarded."""
    model.backend.gradient(_collated(batch, job), 1)
    model.backend.discard()


def _collated(batch: list[int], job: Job) -> Batch:
    train = job.prepared.examples["train"]
    return collate([train[index] for index in batch], job.tokenizer.pad_id, job.prepared.task)


def _measure_report(batch: list[int], job: Job, model: TrainableModel, more: float) -> tuple[float, float, int]:
    """Seconds to score a batch in float32, `token` of `Measured`, and its `answering` with `more` times the tokens."""
    collated = _collated(batch, job)
    with model.backend.in_float32():
        model.backend.token_nll(_collated(batch[:1], job))  # the first pass also pays for what later ones find ready
        report, scoring = _timed(lambda: model.backend.token_nll(collated))
        if job.prepared.task not in TEXT_TASKS:
            return report, 0.0, round(more * scoring)
        train = job.prepared.examples["train"]
        reading = report / batch_tokens(batch, train, job.prepared.task)
        token, answering = _measure_answers(train[batch[0]], reading, job, model)
    return report, token, max(round(more * scoring), answering)


def _measure_answers(example: Example, reading: float, job: Job, model: TrainableModel) -> tuple[float, int]:
    """Answer the prompt of a row.

    Args:
        example: The row.
        reading: Seconds to read a token of a prompt.
        job: Has the rows that the report answers.
        model: In float32.

    Returns:
        `token` of `Measured`, and the bytes that the report's answers need: a batch keeps keys and values of each.
    """
    backend, prompt = model.backend, example.input_ids[: example.prompt_length]
    answers: list[list[int]] = []
    _, opened = _timed(lambda: backend.answer(prompt, 1))  # the first answer may open what gives it
    seconds, extra = _timed(lambda: answers.append(backend.answer(prompt, 4)))
    steps = len(answers[0]) + 1  # the first one reads the prompt, too
    token = max(seconds - reading * len(prompt), seconds / 10) / steps
    if not isinstance(backend, BatchAnswerer):
        return token * ANSWERS / BATCH_COST, opened + extra
    answered, dims = answered_rows(job.prepared.examples), job.base.dims
    longest = max(row.prompt_length for row in answered) + answer_limit(answered)
    more = len(answered) * longest - len(prompt) - steps  # not measured: eight long prompts take seconds to read
    # Of each token: keys and values of all layers, and what one layer computes from it.
    values = 2 * dims.layers * dims.kv_heads * dims.head_dim + 3 * dims.intermediate + 4 * dims.hidden
    return token, opened + extra + max(more, 0) * 4 * values


def _timed(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds of `work`, and the resident bytes at its peak on top of those before it."""
    before = resident_bytes()
    with PeakMemory() as peak:
        seconds = _seconds(work)
    return seconds, peak.bytes - before


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
