"""The model that a tune trains: the frozen base as its settings say, with an adapter on top."""

from pathlib import Path
from typing import Any

import torch

from edge_ft.config import TuneConfig
from edge_ft.models.base_model import Base
from edge_ft.models.compute import give_freed_memory_back
from edge_ft.models.loading import load_model
from edge_ft.models.lora import add_lora
from edge_ft.quant.calibration import Calibration
from edge_ft.quant.layers import move
from edge_ft.tune.prepare import Prepared

__all__ = ["load_trainable_model"]


def load_trainable_model(
    base: Base, prepared: Prepared, config: TuneConfig, codes: Path | Calibration | None, device: torch.device
) -> Any:
    """The PEFT model, on `device`; int4 codes are read from a file, or chosen over rows.

    Raises:
        ModelError: the weights cannot be loaded.
        UsageError: --target-modules names no layer of it.
    """
    give_freed_memory_back(config.memory == "low")  # before codes are chosen, which takes as much as a step
    asked, task = prepared.rendering, prepared.task
    model = load_model(
        base,
        task,
        config.base_format,
        config.block_size,
        asked.labels,
        config.seed,
        asked.problem_type,
        asked.pooling,
        codes,
    )
    return move(add_lora(model, base.family, task, config), device)
