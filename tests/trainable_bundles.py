"""Tiny bundles that can learn, their frozen models, and the torch models over the same codes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model

from edge_ft.artifacts import Bundle
from edge_ft.config import ExportConfig, Task, TuneConfig
from edge_ft.export import export
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.lora import without_weights
from edge_ft.progress import Silent
from edge_ft.tune.block_model import BlockModel, Pair
from edge_ft.tune.engine import engine_of
from edge_ft.tune.loop import Callbacks, TrainingRows, fit
from edge_ft.tune.prepare import prepare_job
from edge_ft.tune.processes import Processes

RANK, SCALING = 4, 2.0


def trainable_bundle(model: Path, out: Path, **settings: Any) -> Bundle:
    """The bundle of a base as it is."""
    return export(str(model), ExportConfig(out=out, trainable=True, threads=1, **settings))


def random_adapter(model: BlockModel) -> dict[str, Pair]:
    """A and B of every linear layer, neither of them zero."""
    random = np.random.default_rng(0)
    return {
        module: (
            random.normal(0, 0.1, (RANK, inputs)).astype(np.float32),
            random.normal(0, 0.1, (outputs, RANK)).astype(np.float32),
        )
        for module, (inputs, outputs) in model.linears.items()
    }


def torch_model(
    folder: Path, adapter: dict[str, Pair], task: Task = "text-generation", labels: tuple[str, ...] = ()
) -> Any:
    """The PEFT model with this adapter over the int4 codes of a checkpoint; a classifier's head is trained too."""
    base = find_base(str(folder))
    model = load_model(ModelSpec(base, task, "int4", labels=labels))
    head = [name.rpartition(".")[2] for name in base.family.trained_head(task)]
    lora = LoraConfig(
        r=RANK, lora_alpha=int(SCALING * RANK), target_modules=list(adapter), modules_to_save=head or None
    )
    tuned = without_weights(get_peft_model(model, lora))  # type: ignore[arg-type]
    for module, pair in adapter.items():
        for side, array in zip("AB", pair, strict=True):
            torch_parameter(tuned, module, side).data.copy_(torch.from_numpy(array))
    return tuned


def torch_parameter(tuned: Any, module: str, side: str) -> Any:
    return tuned.get_parameter(f"base_model.model.{module}.lora_{side}.default.weight")


def tokens(rows: int, length: int, vocabulary: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Ids, mask and labels [rows, length]; the second of several rows is padded, and prompts carry no loss."""
    ids = np.random.default_rng(1).integers(3, vocabulary, (rows, length))
    mask, labels = np.ones_like(ids), ids.copy()
    labels[:, : length // 3] = -100
    if rows > 1:
        end = length // 2 + 1
        ids[1, end:], mask[1, end:], labels[1, end:] = 0, 0, -100
    return ids, mask, labels


class _Losses(Callbacks):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_metrics(self, line: dict[str, Any]) -> None:
        self.found += [line["loss"]] if "loss" in line else []


def losses_of_both(given: TuneConfig, model: Path) -> tuple[list[float], list[float]]:
    """The loss of each step over a bundle, and by torch over the model, from the same start on the same batches."""
    losses: list[list[float]] = []
    start: dict[str, NDArray[np.float32]] = {}
    of_torch = replace(given, model=str(model), compute="fp32", calibration_rows=0, memory="normal")
    for config in (given, of_torch):
        engine = engine_of(config.model, Silent())
        job = engine.choose_memory(prepare_job(engine.resolve(config), Silent()), None, Processes())  # type: ignore[arg-type]
        loaded = engine.load(job, engine.alone(), Silent())
        if config is given:
            start = {key: value.copy() for key, value in loaded.backend.named.items()}
        else:
            for key, parameter in loaded.peft_model.named_parameters():
                if parameter.requires_grad:
                    plain = key.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
                    parameter.data.copy_(torch.from_numpy(start[plain.replace(".default.", ".")]))
        log = _Losses()
        rows = TrainingRows(job.prepared.examples["train"], job.prepared.examples["validation"], job.batching)
        fit(loaded.backend, rows, job.config, Silent(), log)
        losses.append(log.found)
    ours, theirs = losses
    return ours, theirs
