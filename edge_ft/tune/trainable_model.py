"""The torch model that a tune trains: the frozen base, an adapter on top, and what trains and scores the two."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from edge_ft.data import collate, stop_ids
from edge_ft.errors import UsageError
from edge_ft.models.compute import set_malloc_thresholds
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.lora import add_lora
from edge_ft.progress import Progress
from edge_ft.quant.blockwise import Grid
from edge_ft.quant.calibration import Calibration, make_calibration
from edge_ft.quant.devices import to_device
from edge_ft.quant.kept_codes import codes_key, find_codes, keep_codes
from edge_ft.quant.serialization import codes_sha256, frozen_layers, write_codes
from edge_ft.tune.choosing import estimate_choosing
from edge_ft.tune.distributed import Processes
from edge_ft.tune.prepare import Job
from edge_ft.tune.torch_backend import TorchBackend

__all__ = ["TrainableModel", "load_trainable_model"]

COMPARED_ROWS = 4
"""Validation rows by whose loss bfloat16 is compared with float32."""
WORTH_KEEPING = 2.0
"""Seconds of choosing codes from which on they are kept in the cache."""


@dataclass(frozen=True)
class TrainableModel:
    """A loaded base with a fresh adapter."""

    peft_model: Any
    """The `peft.PeftModel`, on its device."""
    backend: TorchBackend
    """Trains and scores it, and answers."""
    compute: Literal["fp32", "bf16"]
    """What the steps compute in."""
    grid: Grid
    """How int4 and int8 weights are rounded."""
    calibration: Calibration | None
    """Rows over which the int4 codes were chosen, now or by an earlier run; None where the run had its codes."""

    @cached_property
    def codes_sha256(self) -> str | None:
        """Hex sha256 of the rounded weights; None of a base in float32."""
        return codes_sha256(self.peft_model) if frozen_layers(self.peft_model) else None

    def estimate_choosing(self, tokens: int, forward: Callable[[float], float]) -> float:
        """See `edge_ft.tune.engine.TrainableModel`."""
        return estimate_choosing(self.peft_model, tokens, self.grid.block_size, forward)

    def untuned(self) -> AbstractContextManager[Any]:
        """Answer and score as the base without the adapter, inside this block."""
        context: AbstractContextManager[Any] = self.peft_model.disable_adapter()
        return context

    def write_codes(self, file: Path) -> None:
        """Write the codes of every layer."""
        write_codes(file, self.peft_model.get_base_model())


def load_trainable_model(
    job: Job,
    processes: Processes,
    progress: Progress,
    codes: Path | None = None,
    *,
    grid: Grid | None = None,
    keep: bool = False,
) -> TrainableModel:
    """Load the base of a job with an adapter on top, on the device of this process.

    Args:
        job: The settings, the base and its rows.
        processes: Those that train together.
        progress: Gets the choosing of the codes.
        codes: File with int4 codes that were chosen before; else they are chosen over train rows, unless the cache
            has those of the same rows and weights.
        grid: How the weights were rounded before; None: as the settings say.
        keep: Keep codes that are chosen now in the cache.

    Returns:
        The model.

    Raises:
        ModelError: the weights cannot be loaded.
        UsageError: --target-modules names no layer of it, or the task cannot be trained in several processes.
    """
    if job.prepared.task == "feature-extraction" and processes.count > 1:
        raise UsageError("feature-extraction compares the texts of a whole batch: train it in one process")
    config, base, prepared = job.config, job.base, job.prepared
    task, rendering, pad_id = prepared.task, prepared.rendering, job.tokenizer.pad_id
    set_malloc_thresholds(config.memory == "low")  # before codes are chosen, which takes as much as a step
    rows_to_calibrate = 0 if codes else config.base_calibration_rows
    calibration = make_calibration(
        prepared.examples["train"], rows_to_calibrate, pad_id, task, progress, packed=base.family.packs
    )
    grid = grid or Grid(config.block_size)
    key = "" if calibration is None else _codes_key(job, grid, calibration)
    kept = find_codes(key) if key else None
    if kept is not None:
        progress.say("int4 codes of the same weights and rows were chosen before: they are read from the cache")
    found = codes or (kept[0] if kept is not None else calibration)
    spec = ModelSpec.from_rendering(base, rendering, config.frozen_format, grid, config.seed, found)
    began = time.monotonic()
    model = load_model(spec, progress)
    if calibration is not None:
        calibration.again = time.monotonic() - began - calibration.once if kept is None else kept[1]
        if keep and calibration.seconds >= WORTH_KEEPING:
            keep_codes(key, model, calibration.again)
    peft_model = to_device(add_lora(model, base.family, task, config), processes.device)
    peft_model.peft_config["default"].base_model_name_or_path = base.name
    backend = TorchBackend(peft_model, base.family, task, config, processes, stop_ids(rendering, job.tokenizer))
    compute = backend.resolve(collate(prepared.examples["validation"][:COMPARED_ROWS], pad_id, task))
    return TrainableModel(peft_model, backend, compute, grid, calibration)


def _codes_key(job: Job, grid: Grid, calibration: Calibration) -> str:
    """Name what the int4 codes of a job depend on."""
    rendering = job.prepared.rendering
    settings = {
        "content_sha256": job.base.content_sha256,
        "task": rendering.task,
        "labels": rendering.labels,
        "problem_type": rendering.problem_type,
        "pooling": rendering.pooling,
        **grid.to_dict(),
    }
    return codes_key(settings, calibration.batch)
