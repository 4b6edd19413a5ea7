"""How many steps a training takes, and at which learning rates."""

import math

from edge_ft.config import TEXT_TASKS, TuneConfig

__all__ = [
    "EVALUATIONS",
    "FINISHING_STEP",
    "finishing_steps",
    "learning_rate_at",
    "planned_steps",
    "training_minutes",
]

EVALUATIONS = 5
"""Evaluations of the validation rows in a run, unless --eval-steps says otherwise."""
FINISHING_SHARE = 0.1
"""Steps of the finishing phase, as a share of those of the training, unless --finish-steps says otherwise."""
FINISHING_STEP = 2.1
"""Time of a finishing step, in steps of the training: it computes a gradient of the weights, and the model as trained
beside."""


def learning_rate_at(step: int, steps: int, config: TuneConfig) -> float:
    """Return the rate of step 1 … `steps`: linear warm-up, then constant or half a cosine to 0 after the last step."""
    peak = config.learning_rate
    assert peak is not None
    warmup = math.ceil(config.warmup * steps)
    if step <= warmup:
        return peak * step / warmup
    if config.schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup - 1) / max(1, steps - warmup)))


def planned_steps(rows: int, config: TuneConfig) -> int:
    """Return the optimizer steps of `config` over so many train rows, before any limit of time."""
    if config.max_steps is not None:
        return config.max_steps
    assert config.epochs is not None  # resolved
    return max(1, round(config.epochs * rows / (config.rows_at_once * config.passes)))


def finishing_steps(config: TuneConfig, steps: int) -> int:
    """Return the steps of the finishing phase after a training of so many `steps`; 0 where it has none."""
    if config.task not in TEXT_TASKS:
        return 0
    if config.finish_steps is None:
        return math.ceil(FINISHING_SHARE * steps) if config.frozen_format == "int4" else 0
    return config.finish_steps


def training_minutes(config: TuneConfig) -> float | None:
    """Return what the training may take of --max-minutes: the finishing phase takes the rest."""
    if config.max_minutes is None or finishing_steps(config, 1) == 0:
        return config.max_minutes
    return config.max_minutes / (1 + FINISHING_STEP * FINISHING_SHARE)
