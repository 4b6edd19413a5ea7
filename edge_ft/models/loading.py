"""Load a base's task model, in float or on the grid."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from edge_ft.config import BaseFormat, Pooling, ProblemType, Task
from edge_ft.data import Batch, Rendering
from edge_ft.errors import ModelError, require
from edge_ft.families import CLASSIFIERS
from edge_ft.models.base_model import Base
from edge_ft.models.dims import ModelDims
from edge_ft.models.logging import silence_libraries
from edge_ft.models.mpnet import use_attention_interface
from edge_ft.models.scorer import HIDDEN, LOSSES
from edge_ft.quant.bf16 import round_to_bf16
from edge_ft.quant.blockwise import Bits
from edge_ft.quant.calibration import Calibration, calibrate, float_reader
from edge_ft.quant.layers import is_within, quantize_model, transpose_conv1d
from edge_ft.quant.serialization import read_codes

__all__ = ["BITS", "ModelSpec", "load_model", "quantize_over"]

BITS: dict[BaseFormat, Bits] = {"int4": 4, "int8": 8}
Read = Callable[[str, slice], Tensor]
"""Gives some rows of the float parameter of a name."""
ADAPTED: dict[str, Callable[[Any], None]] = {"mpnet": use_attention_interface}
"""Families of which transformers' own module lacks something that all others have."""


@dataclass(frozen=True)
class ModelSpec:
    """The task model to load of a base, and the format that its frozen weights are held in."""

    base: Base
    task: Task
    base_format: BaseFormat = "fp32"
    """int4, int8 and bf16 hold the token embedding too; nf4 leaves it and the output layer in float32."""
    block_size: int = 32
    """Weights per scale of int4 and int8."""
    labels: tuple[str, ...] = ()
    """Classes of a classifier in the order of its logits; none: as many as the checkpoint's config says."""
    seed: int = 0
    """Initialises a classification head that the checkpoint lacks, or has for other classes."""
    problem_type: ProblemType | None = None
    """What a text classifier's logits are; None: decided by transformers."""
    pooling: Pooling | None = None
    """How token states become a text's vector (feature-extraction); None: their mean."""
    codes: Path | Calibration | None = None
    """The file that int4 codes are read from, or the rows that they are calibrated on; None: each weight is rounded
    by itself."""

    @classmethod
    def from_rendering(
        cls,
        base: Base,
        rendering: Rendering,
        base_format: BaseFormat,
        block_size: int = 32,
        seed: int = 0,
        codes: Path | Calibration | None = None,
    ) -> "ModelSpec":
        """The model that reads rows as `rendering` makes them: its task, classes and pooling."""
        return cls(
            base,
            rendering.task,
            base_format,
            block_size,
            rendering.labels,
            seed,
            rendering.problem_type,
            rendering.pooling,
            codes,
        )

    @property
    def codes_file(self) -> Path | None:
        """The file of int4 codes, if they come from one."""
        return self.codes if isinstance(self.codes, Path) and self.base_format == "int4" else None

    @property
    def trained_head(self) -> tuple[str, ...]:
        """Modules of a classification head over `labels`, which is trained and stays float32."""
        return self.base.family.trained_head(self.task) if self.labels else ()

    @property
    def unused_modules(self) -> tuple[str, ...]:
        """Modules that the task does not read: an embedding is made of the last hidden states."""
        return self.base.family.heads[self.task] if self.task == "feature-extraction" else ()

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


def load_model(spec: ModelSpec) -> nn.Module:
    """Load the task model of a base, frozen and in evaluation mode, on the CPU.

    Quantized weights are read and rounded one after the other, so that the float model is never in memory as a whole.
    A classification head that the checkpoint lacks, or has for other classes, is initialised from the seed and stays
    float32.

    Raises:
        ModelError: the weights cannot be loaded, or some are missing.
    """
    from optimum.exporters.tasks import TasksManager

    base, model_class = spec.base, TasksManager.get_model_class_for_task(spec.task, framework="pt")
    model, read = None, None
    try:
        with silence_libraries():
            if spec.base_format != "fp32":
                model, read = _quantized(spec, model_class) or (None, None)
            if model is None:
                model = _whole(spec, model_class)
                if base.family.fan_in_fan_out:
                    transpose_conv1d(model)
                if isinstance(spec.codes, Calibration):
                    read = float_reader(model)
                if spec.base_format != "fp32":
                    _round(model, spec, read)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{base.path} cannot be loaded as {spec.task}: {error}") from error
    fresh = spec.trained_head
    if fresh and base.labels(spec.task) and not base.brings_head_of(spec.task, spec.labels):
        head = model.get_submodule(fresh[-1])
        head = getattr(head, "out_proj", head)
        torch.manual_seed(spec.seed)
        nn.init.normal_(head.weight, std=model.config.initializer_range)
        nn.init.zeros_(head.bias)
    for name in spec.unused_modules:
        setattr(model, name, None)
    if spec.task == "feature-extraction":
        model.config.pooling = spec.pooling or "mean"
    if base.family.name in ADAPTED:
        ADAPTED[base.family.name](model)
    if isinstance(spec.codes, Calibration) and spec.base_format == "int4":
        assert read is not None
        choose_codes(model.eval(), spec.task, read, spec.codes)
    return model.eval().requires_grad_(False)


def choose_codes(model: Any, task: Task, read: Read, calibration: Calibration) -> None:
    """Choose the 4-bit codes of a model's linear layers over rows, in place (see `calibrate`).

    Layers that a text passes through several times (ALBERT) keep the codes they have: each pass reads other inputs.
    """

    def forward(model: Any, batch: Batch) -> Tensor | None:
        found, _ = (HIDDEN.get(task) or LOSSES[task])(model, batch, torch.device("cpu"))
        return found if task in HIDDEN else None

    if not ModelDims(model.config).repeats_layers:
        calibrate(model, task, read, calibration, forward)


def quantize_over(model: Any, task: Task, block_size: int, keep: tuple[str, ...], calibration: Calibration) -> None:
    """`quantize_model` to 4 bits of a float model, with the codes of its linear layers chosen over rows."""
    read = float_reader(model)
    quantize_model(model, block_size, keep)
    choose_codes(model, task, read, calibration)


def _whole(spec: ModelSpec, model_class: Any) -> Any:
    """The float model, as transformers loads it."""
    base, task, settings = spec.base, spec.task, spec.config_overrides
    torch.manual_seed(spec.seed)
    model, found = model_class.from_pretrained(
        base.path,
        output_loading_info=True,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        **(settings | {"ignore_mismatched_sizes": True} if settings else {}),
    )
    absent = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    mend = "tune it first" if base.family.trained_head(task) else "take a checkpoint that was saved with one"
    if lost := sorted(key for key in absent if not is_within(key, (*spec.trained_head, *spec.unused_modules))):
        raise ModelError(
            f"{base.path} lacks the weights of {lost[0]}"
            + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
            + (f": it has no head for {task}, {mend}" if is_within(lost[0], base.family.heads[task]) else "")
        )
    return model


def _quantized(spec: ModelSpec, model_class: Any) -> tuple[Any, Read] | None:
    """The quantized model, read one tensor at a time, and what reads it; None where the file's names are not the
    model's."""
    from transformers import AutoConfig

    base = spec.base
    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False, **spec.config_overrides)
    with init_empty_weights(include_buffers=False):
        model = model_class.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.tie_weights()
    places: dict[str, Path] = {}
    shapes: dict[str, list[int]] = {}
    # A headless checkpoint leaves the name of the body out.
    prefixes = ("", f"{model.base_model_prefix}.")
    for file in sorted(base.path.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                places[key], shapes[key] = file, weights.get_slice(key).get_shape()
    tied: dict[str, str] = model.all_tied_weights_keys
    for target, source in list(tied.items()):
        if target in shapes and source in shapes and _differ(places, target, source):
            # As from_pretrained does (FLAN-T5's head is one, whatever its config says).
            parent, _, attribute = target.rpartition(".")
            setattr(
                model.get_submodule(parent),
                attribute,
                nn.Parameter(torch.empty(shapes[target], device="meta"), requires_grad=False),
            )
            del tied[target]
    parameters = dict(model.named_parameters())  # a tied one once
    first = {id(parameter): name for name, parameter in parameters.items()}
    tied = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    keys = {
        name: key
        for name, parameter in parameters.items()
        for key in (name.removeprefix(prefix) for prefix in prefixes)
        if shapes.get(key) == list(parameter.shape)
    }
    drawn = {name for name in parameters if name not in keys}
    modules = {name.rpartition(".")[0] for name in drawn}
    whole_modules = {name for name in parameters if name.rpartition(".")[0] in modules} == drawn
    if not whole_modules or not all(is_within(name, (*spec.trained_head, *spec.unused_modules)) for name in drawn):
        return None

    turned = transpose_conv1d(model) if base.family.fan_in_fan_out else set()

    def read(name: str, rows: slice) -> Tensor:
        """A copy, from a mapping of its own: the pages of a mapped file stay in memory as long as it is mapped."""
        key = keys[tied[name]]
        with safe_open(places[key], "pt") as weights:
            stored = weights.get_slice(key)
            part = stored[:, rows].T if name in turned else stored[rows]
            return part.to(torch.float32, copy=True)

    _round(model, spec, read)
    for name in [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        parent, _, attribute = name.rpartition(".")
        value = torch.empty(parameters[name].shape) if name in drawn else read(name, slice(None))
        setattr(model.get_submodule(parent), attribute, nn.Parameter(value))
    for target, source in tied.items():  # to an embedding that stays float
        parent, _, attribute = target.rpartition(".")
        if getattr(getattr(model.get_submodule(parent), attribute), "is_meta", False):
            setattr(model.get_submodule(parent), attribute, model.get_parameter(source))
    torch.manual_seed(spec.seed)
    for name, module in model.named_modules():
        if name in modules:
            model._init_weights(module)
    return model, read


def _differ(places: dict[str, Path], first: str, second: str) -> bool:
    """Whether two stored matrices of one shape differ."""
    with safe_open(places[first], "pt") as a, safe_open(places[second], "pt") as b:
        one, other = a.get_slice(first), b.get_slice(second)
        rows, step = one.get_shape()[0], 4096
        return one.get_shape() != other.get_shape() or any(
            not torch.equal(one[start : start + step], other[start : start + step]) for start in range(0, rows, step)
        )


def _round(model: nn.Module, spec: ModelSpec, read: Read | None) -> None:
    """Bring a model's layers to `spec.base_format`, in place; `read` as for `quantize_model`."""
    keep = spec.base.family.trained_head(spec.task)
    if spec.base_format == "nf4":
        require("bitsandbytes", "train")
        from edge_ft.quant.nf4 import round_to_nf4

        round_to_nf4(model, keep, read)
    elif spec.base_format == "bf16":
        round_to_bf16(model, keep, read)
    else:
        known = {} if spec.codes_file is None else {"known": read_codes(spec.codes_file)}
        quantize_model(model, spec.block_size, keep, BITS[spec.base_format], read, **known)
