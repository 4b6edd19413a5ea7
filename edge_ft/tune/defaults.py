"""Settings that the user left open and that depend on the rows: passes of a step, evaluated rows.

The reasons are in docs/decisions/029.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from edge_ft.config import Task, TuneConfig
from edge_ft.data import Example, batch_tokens
from edge_ft.tune.schedule import EVALUATIONS, planned_steps

__all__ = ["chosen_by_rows"]

PASS_TOKENS = 1024
"""Tokens of a forward pass of training, unless --batch-size or --gradient-accumulation is given."""
EVALUATION_SHARE = 0.05
"""Share of the training's time that its evaluations may take, without the last one."""
FEWEST_EVAL_ROWS = 16
"""Validation rows of an evaluation, however long it takes."""


def chosen_by_rows(
    config: TuneConfig,
    given: TuneConfig,
    examples: Mapping[str, Sequence[Example]],
    task: Task,
    *,
    resumed: bool,
) -> TuneConfig:
    """Choose what is still open.

    Args:
        config: The settings, with the family's recipe.
        given: The settings as the user gave them, or as an interrupted run saved them.
        examples: The encoded rows of each split.
        task: What is trained.
        resumed: The run was interrupted; one of an earlier release evaluated all validation rows.

    Returns:
        The settings.
    """
    train, validation = examples["train"], examples["validation"]
    config = replace(config, gradient_accumulation=config.passes)
    if given.batch_size is None and given.gradient_accumulation is None:
        config = _in_passes(config, train, task)
    if given.eval_rows is None:
        affordable = len(validation) if resumed else _affordable_rows(config, train, validation, task)
        config = replace(config, eval_rows=affordable)
    return config


def _in_passes(config: TuneConfig, train: Sequence[Example], task: Task) -> TuneConfig:
    """Halve the rows of a forward pass, in twice as many passes, until most have at most `PASS_TOKENS`.

    Beyond, a pass is hardly faster per token and takes more memory; a step learns the same from the same rows.

    Returns:
        The settings.
    """
    rows, passes = config.rows_at_once, 1
    longest = float(np.quantile([batch_tokens([index], train, task) for index in range(len(train))], 0.9))
    while rows % 2 == 0 and rows * longest > PASS_TOKENS and task != "feature-extraction":
        rows, passes = rows // 2, passes * 2
    return replace(config, batch_size=rows, gradient_accumulation=passes)


def _affordable_rows(config: TuneConfig, train: Sequence[Example], validation: Sequence[Example], task: Task) -> int:
    """How many validation rows can be scored at every evaluation but the last in a twentieth of the training's time.

    A token costs a step three times as much as an evaluation: the forward pass, and twice that for the gradients.

    Returns:
        The number.
    """
    if task == "feature-extraction":  # a row's loss depends on the other rows of its batch
        return len(validation)
    steps = planned_steps(len(train), config)
    evaluations = steps / config.eval_steps if config.eval_steps else EVALUATIONS
    rows = steps * config.passes * config.rows_at_once
    trained, scored = (sum(len(example.input_ids) for example in some) / len(some) for some in (train, validation))
    affordable = EVALUATION_SHARE * 3 * rows * trained / (max(1.0, evaluations - 1) * scored)
    return min(len(validation), max(FEWEST_EVAL_ROWS, round(affordable)))
