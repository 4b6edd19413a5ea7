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


def finishing_steps(config: TuneConfig) -> int:
    """Return the steps of the finishing phase; 0 where it has none."""
    return (config.finish_steps or 0) if config.task in TEXT_TASKS else 0


def training_minutes(config: TuneConfig, steps: int) -> float | None:
    """Return what the training of so many steps may take of --max-minutes: the finishing phase takes the rest."""
    if config.max_minutes is None:
        return None
    return config.max_minutes / (1 + FINISHING_STEP * finishing_steps(config) / steps)
