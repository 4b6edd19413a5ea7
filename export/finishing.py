"""`export --finish N`: the finishing phase of `tune`, for a merged model whose adapter was trained elsewhere."""

from pathlib import Path
from typing import Any

import torch

from edge_ft.config import ExportConfig, TuneConfig
from edge_ft.data import evenly_spaced
from edge_ft.evaluate.scoring import Batching
from edge_ft.export.source import ExportSource
from edge_ft.progress import Progress, heartbeat
from edge_ft.quant.devices import has_bf16
from edge_ft.tune.finish import finishing_config
from edge_ft.tune.finish_backend import FinishBackend, Teacher
from edge_ft.tune.loop import Callbacks, TrainingRows, fit

__all__ = ["load_finished"]

WATCHED = 64
"""Validation rows by which the trained scales and those before are compared."""
ROWS = 8
"""Rows of a step."""


def load_finished(source: ExportSource, config: ExportConfig, progress: Progress) -> Any:
    """Load the model that ships, and with --finish train its scales.

    Args:
        source: What is exported.
        config: Its `finish`.
        progress: Receives the steps.

    Returns:
        The model of `ExportSource.load_shipped`.
    """
    model = source.load_shipped(progress)
    if config.finish:
        _finish(source, model, config, progress)
    return model


class _Finishing(Callbacks):
    stage = "finish"
    untuned = "merged"


def _finish(source: ExportSource, model: Any, config: ExportConfig, progress: Progress) -> None:
    """Train the scales of `model`, in place, towards the model as trained."""
    family, task = source.base.family, source.task
    narrow = has_bf16(torch.device("cpu")) and not family.fan_in_fan_out
    with heartbeat(progress, "loading the model as trained"):
        trained = source.load_trained()
    settings = TuneConfig(
        model=source.base.name,
        data=str(config.data),
        out=Path("finish"),  # nothing is written
        task=task,
        batch_size=ROWS,
        compute="bf16" if narrow else "fp32",
        memory="normal",
        checkpoint_minutes=0,
    )
    settings = finishing_config(settings, config.finish)
    teacher = Teacher(trained, family, task, torch.bfloat16 if narrow else torch.float32)
    backend = FinishBackend(model, family, task, settings, teacher)
    watched = evenly_spaced(source.rows.validation, WATCHED)
    rows = TrainingRows(source.rows.train, watched, Batching(task, source.tokenizer.pad_id))
    fit(backend, rows, settings, progress, _Finishing())
    backend.release()
