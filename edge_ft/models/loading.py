"""Load the task model of a base, in float32 or quantized."""

from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from edge_ft.config import BaseFormat, Pooling, ProblemType, Task
from edge_ft.data import Batch, Rendering
from edge_ft.errors import ModelError, require
from edge_ft.families import CLASSIFIERS
from edge_ft.models.base_model import Base
from edge_ft.models.dims import ModelDims
from edge_ft.models.logging import silence_libraries
from edge_ft.models.mpnet import use_attention_interface
from edge_ft.models.scorer import HEAD_INPUTS, LOSSES
from edge_ft.models.weight_names import Names, match_names
from edge_ft.progress import Progress, Silent
from edge_ft.quant.blockwise import Bits, Grid
from edge_ft.quant.calibration import Calibration, calibrate
from edge_ft.quant.conversion import (
    ReadWeight,
    is_within,
    quantize_model,
    retained_weights,
    round_to_bf16,
    transpose_conv1d,
)
from edge_ft.quant.sensitivity import refine, saved_bytes, spend
from edge_ft.quant.serialization import read_codes
from edge_ft.system import release_memory

__all__ = ["BITS", "Changes", "Finer", "ModelSpec", "load_model", "model_class", "quantize_calibrated"]

GRID = Grid()
Finer = Mapping[str, int] | int | None
"""Rows with 8 bits by layer, the bytes for them, or None: see `quantize_calibrated`."""
BITS: dict[BaseFormat, Bits] = {"int4": 4, "int8": 8}
Changes = Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]


@dataclass(frozen=True)
class ModelSpec:
    """Which task model of a base to load, and the format of its frozen weights."""

    base: Base
    task: Task
    base_format: BaseFormat = "fp32"
    """int4, int8 and bf16 include the token embedding; with nf4 it and the output layer stay float32."""
    grid: Grid = GRID
    """How int4 and int8 weights are rounded."""
    labels: tuple[str, ...] = ()
    """Classes of a classifier in the order of its logits; (): the checkpoint's own."""
    seed: int = 0
    """Initialises a classification head that the checkpoint lacks, or has for other classes."""
    problem_type: ProblemType | None = None
    """What a text classifier's logits are; None: decided by transformers."""
    pooling: Pooling | None = None
    """How token states become a text's vector (feature-extraction); None: their mean."""
    codes: Path | Calibration | None = None
    """The file that int4 codes are read from, or the rows that they are calibrated on; None: each weight is rounded
    by itself."""
    finer: Finer = None
    """Of codes that are calibrated, what `quantize_calibrated` takes."""
    start: Path | None = None
    """Of codes that are calibrated, the file of those before `changes`: only layers that change get others, and keep
    their scales, zero points and 8 bits."""
    changes: Changes = field(default_factory=dict)
    """A [rank, in] and B [out, rank] by a layer's name: B A is added to its weight before that is rounded."""

    @classmethod
    def from_rendering(
        cls,
        base: Base,
        rendering: Rendering,
        base_format: BaseFormat,
        grid: Grid = GRID,
        seed: int = 0,
        codes: Path | Calibration | None = None,
        changes: Changes | None = None,
    ) -> "ModelSpec":
        """Return the specification of a model for rows of this rendering: its task, classes and pooling."""
        return cls(
            base,
            rendering.task,
            base_format,
            grid,
            rendering.labels,
            seed,
            rendering.problem_type,
            rendering.pooling,
            codes,
            changes=changes or {},
        )

    @property
    def trained_head(self) -> tuple[str, ...]:
        """Modules of a classification head over `labels`, which is trained and stays float32."""
        return self.base.family.trained_head(self.task) if self.labels else ()

    @property
    def unused_modules(self) -> tuple[str, ...]:
        """Modules that the task does not use: a text's vector is computed from the last hidden states."""
        return self.base.family.heads[self.task] if self.task == "feature-extraction" else ()

    @property
    def optional_modules(self) -> tuple[str, ...]:
        """Modules whose weights the checkpoint may lack."""
        return *self.trained_head, *self.unused_modules

    @property
    def config_overrides(self) -> dict[str, Any]:
        """Settings of the transformers config that differ from the checkpoint's."""
        if self.task not in CLASSIFIERS or not self.labels:
            return {}
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "problem_type": self.problem_type,
        }


def load_model(spec: ModelSpec, progress: Progress | None = None) -> nn.Module:
    """Load the task model of a base, frozen and in evaluation mode, on the CPU.

    Every format reads the same tensors, those of `Base.checkpoint`. Quantized weights are read and rounded one after
    the other, so that the float model is never in memory as a whole. A classification head that the checkpoint lacks,
    or has for other classes, is initialised from the seed and stays float32.

    Args:
        spec: What to load.
        progress: Receives what the model does not use of the checkpoint.

    Returns:
        The transformers model of the task.

    Raises:
        ModelError: the weights cannot be loaded, or some are missing.
    """
    try:
        with silence_libraries():
            model, read = _load(spec, progress or Silent())
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{spec.base.path} cannot be loaded as {spec.task}: {error}") from error
    _initialise_other_classes(model, spec)
    for name in spec.unused_modules:
        setattr(model, name, None)
    if spec.task == "feature-extraction":
        model.config.pooling = spec.pooling or "mean"
    if spec.base.family.name == "mpnet":
        use_attention_interface(model)
    if isinstance(spec.codes, Calibration) and spec.base_format == "int4":
        only = None if spec.start is None else spec.changes
        _calibrate(model.eval(), spec.task, read, spec.codes, spec.grid, spec.finer, only)
    return model.eval().requires_grad_(False)


def quantize_calibrated(
    model: Any,
    task: Task,
    grid: Grid,
    keep: tuple[str, ...],
    calibration: Calibration,
    finer: Finer = None,
) -> None:
    """Quantize a float model to 4 bits in place, with the codes of its linear layers calibrated on rows.

    Args:
        model: A task model.
        task: Of the model and the rows.
        grid: How weights are rounded.
        keep: Names of modules that stay float with all that is in them.
        calibration: The rows.
        finer: Rows with 8 bits by layer, as the run has them; or the bytes that they may take, chosen over the rows;
            None: as many bytes as scales in float16 save. Only decoders have such rows.

    Raises:
        ModelError: an input of a layer is not finite.
    """
    read = retained_weights(model)
    quantize_model(model, grid, keep)
    _calibrate(model, task, read, calibration, grid, finer)


def _calibrate(
    model: Any,
    task: Task,
    read: ReadWeight,
    calibration: Calibration,
    grid: Grid,
    finer: Finer = None,
    only: Collection[str] | None = None,
) -> None:
    """Calibrate the int4 codes of a model, but for shared layers (ALBERT): each of their calls has other inputs.

    `only` names the layers that get other codes; None: all do, and in decoders the bytes that scales in float16 save
    are spent on 8 bits where they save the most loss.
    """

    def forward(model: Any, batch: Batch) -> Tensor | None:
        found, _ = (HEAD_INPUTS.get(task) or LOSSES[task])(model, batch, torch.device("cpu"))
        return found if task in HEAD_INPUTS else None

    if ModelDims(model.config).shares_layers:
        return
    with calibration.timed():
        calibrate(model, task, read, calibration, forward, only)
        if only is None and task == "text-generation" and grid.half_scales:
            budget = saved_bytes(model) if finer is None else finer
            if isinstance(budget, int):
                release_memory()  # what a whole pass took: this one keeps its activations, for a gradient
                with calibration.first_time():
                    budget = spend(model, calibration.batch, read, forward, budget)
            refine(model, read, budget)
    release_memory()


def _initialise_other_classes(model: Any, spec: ModelSpec) -> None:
    """Initialise the output layer of a head that the checkpoint has for other classes."""
    if spec.trained_head and spec.base.labels(spec.task) and not spec.base.has_head_for(spec.task, spec.labels):
        head = model.get_submodule(spec.trained_head[-1])
        head = getattr(head, "out_proj", head)
        torch.manual_seed(spec.seed)
        nn.init.normal_(head.weight, std=model.config.initializer_range)
        nn.init.zeros_(head.bias)


def model_class(task: Task) -> Any:
    """Return the transformers class that loads a model for a task."""
    from optimum.exporters.tasks import TasksManager

    return TasksManager.get_model_class_for_task(task, framework="pt")


def _load(spec: ModelSpec, progress: Progress) -> tuple[Any, ReadWeight]:
    """Load and round the model one tensor at a time.

    Returns:
        The model, and what reads its float weights.

    Raises:
        ModelError: weights are missing, or are not the model's.
    """
    from transformers import AutoConfig

    checkpoint = spec.base.checkpoint
    config = AutoConfig.from_pretrained(spec.base.path, trust_remote_code=False, **spec.config_overrides)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the files: what is loaded here is float, or has codes of its own
    with init_empty_weights(include_buffers=False):
        model = model_class(spec.task).from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.tie_weights()
    if strangers := sorted(spec.changes.keys() - dict(model.named_modules()).keys()):
        raise ModelError(f"{spec.base.path} has no layer {strangers[0]}, which the adapter changes: copy both again")
    names = match_names(model, checkpoint, spec.trained_head)
    _refuse_missing(names, model, spec)
    _untie(model, names.untied)
    for name, source in names.untied.items():
        progress.say(f"{spec.base.name}: {name} differs from {source}: they are not tied, though config.json ties them")
    if names.unused:
        progress.say(
            f"{spec.base.name}: {len(names.unused)} tensors of the checkpoint are not used for {spec.task}: "
            f"{', '.join(names.unused[:3])}{' ...' if len(names.unused) > 3 else ''}"
        )
    parameters = dict(model.named_parameters())  # a tied one once
    first = {id(parameter): name for name, parameter in parameters.items()}
    tied = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    transposed = transpose_conv1d(model) if spec.base.family.fan_in_fan_out else set()

    def read(name: str, rows: slice) -> Tensor:
        weight = checkpoint.read(names.keys[tied[name]], rows, name in transposed)
        if change := spec.changes.get(name.removesuffix(".weight")):
            a, b = change
            weight = weight + torch.from_numpy(b[rows] @ a)
        return weight

    if spec.base_format != "fp32":
        with spec.codes.first_time() if isinstance(spec.codes, Calibration) else nullcontext():
            _quantize(model, spec, read)
    for name in [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        value = torch.empty(parameters[name].shape) if name in names.missing else read(name, slice(None))
        _set_parameter(model, name, value)
    for target, source in tied.items():  # to an embedding that stays float
        parent, _, attribute = target.rpartition(".")
        if getattr(getattr(model.get_submodule(parent), attribute), "is_meta", False):
            setattr(model.get_submodule(parent), attribute, model.get_parameter(source))
    torch.manual_seed(spec.seed)
    for name, module in model.named_modules():
        if any(parameter.rpartition(".")[0] == name for parameter in names.missing):
            model._init_weights(module)
    return model, read


def _refuse_missing(names: Names, model: Any, spec: ModelSpec) -> None:
    """Refuse a checkpoint that lacks weights, but for whole modules that are optional: nothing else is initialised.

    Raises:
        ModelError: it does.
    """
    there, task = {name.rpartition(".")[0] for name in names.keys}, spec.task
    lost = sorted(
        name for name in names.missing if not is_within(name, spec.optional_modules) or name.rpartition(".")[0] in there
    )
    if not lost:
        return
    head, remedy = model.get_output_embeddings(), ""
    if is_within(lost[0], spec.base.family.heads[task]):
        how = "tune it first" if spec.base.family.trained_head(task) else "take a checkpoint that was saved with one"
        remedy = f": it has no head for {task}, {how}"
    if spec.base.family.decoder and head is not None and model.get_parameter(lost[0]) is head.weight:
        remedy += "; if its head is the embedding, config.json must say so (tie_word_embeddings: true)"
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    raise ModelError(f"{spec.base.path} lacks the weights of {lost[0]}{more}{remedy}")


def _untie(model: Any, untied: Iterable[str]) -> None:
    """Untie weights that differ in the checkpoint, as `from_pretrained` does (FLAN-T5's head).

    `tie_word_embeddings` stays in the config: T5 scales the input of its head by it.
    """
    for name in untied:
        shape = model.get_parameter(name).shape
        _set_parameter(model, name, torch.empty(shape, device="meta"))
        model.all_tied_weights_keys.pop(name, None)


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Parameter(value))


def _quantize(model: nn.Module, spec: ModelSpec, read: ReadWeight) -> None:
    """Convert a model's layers to `spec.base_format`, in place; `read` as for `quantize_model`."""
    keep = (*spec.base.family.trained_head(spec.task), *spec.unused_modules)
    if spec.base_format == "nf4":
        require("bitsandbytes", "train")
        from edge_ft.quant.nf4 import round_to_nf4

        round_to_nf4(model, keep, read)
    elif spec.base_format == "bf16":
        round_to_bf16(model, keep, read)
    else:
        codes = spec.start or spec.codes if spec.base_format == "int4" else None
        existing = {"existing": read_codes(codes)} if isinstance(codes, Path) else {}
        quantize_model(model, spec.grid, keep, BITS[spec.base_format], read, **existing)
