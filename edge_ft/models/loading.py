"""Load a base's task model, in float or on the grid."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from edge_ft.config import BaseFormat, Pooling, ProblemType, Task
from edge_ft.data import Batch
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

__all__ = ["BITS", "load_model", "quantize_over"]

BITS: dict[BaseFormat, Bits] = {"int4": 4, "int8": 8}
Read = Callable[[str, slice], Tensor]
"""Gives some rows of the float parameter of a name."""
ADAPTED: dict[str, Callable[[Any], None]] = {"mpnet": use_attention_interface}
"""Families of which transformers' own module lacks something that all others have."""


def load_model(
    base: Base,
    task: Task,
    base_format: BaseFormat = "fp32",
    block_size: int = 32,
    labels: tuple[str, ...] = (),
    seed: int = 0,
    problem_type: ProblemType | None = None,
    pooling: Pooling | None = None,
    codes: Path | Calibration | None = None,
) -> nn.Module:
    """The task model of a base, frozen: in float32, or rounded: int4, int8 and bf16 with the embedding, nf4
    without.

    Codes are made of one weight after the other, so that the float model is never in memory; those of int4 are
    read from the file `codes`, or chosen over its rows, else each weight by itself. A classification
    head that the checkpoint lacks, or has for other classes, is drawn from `seed`, and stays float.

    Raises:
        ModelError: the weights cannot be loaded, or some are missing.
    """
    from optimum.exporters.tasks import TasksManager

    settings: dict[str, Any] = {}
    if task in CLASSIFIERS and labels:
        settings = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            "problem_type": problem_type,
        }
    fresh = base.family.trained_head(task) if labels else ()
    unread = base.family.heads[task] if task == "feature-extraction" else ()  # vectors are of the last hidden states
    model_class = TasksManager.get_model_class_for_task(task, framework="pt")
    absent, file = (*fresh, *unread), codes if isinstance(codes, Path) else None
    model, read = None, None
    try:
        with silence_libraries():
            if base_format != "fp32":
                model, read = _quantized(
                    base, model_class, task, settings, base_format, block_size, absent, seed, file
                ) or (None, None)
            if model is None:
                model = _whole(base, model_class, task, settings, absent, seed)
                if base.family.fan_in_fan_out:
                    transpose_conv1d(model)
                if isinstance(codes, Calibration):
                    read = float_reader(model)
                if base_format != "fp32":
                    _round(model, base, task, base_format, block_size, read, file)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{base.path} cannot be loaded as {task}: {error}") from error
    if fresh and base.labels(task) and not base.brings_head_of(task, labels):
        head = model.get_submodule(fresh[-1])
        head = getattr(head, "out_proj", head)
        torch.manual_seed(seed)
        nn.init.normal_(head.weight, std=model.config.initializer_range)
        nn.init.zeros_(head.bias)
    for name in unread:
        setattr(model, name, None)
    if task == "feature-extraction":
        model.config.pooling = pooling or "mean"
    if base.family.name in ADAPTED:
        ADAPTED[base.family.name](model)
    if isinstance(codes, Calibration) and base_format == "int4":
        assert read is not None
        choose_codes(model.eval(), task, read, codes)
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


def _whole(
    base: Base, model_class: Any, task: Task, settings: dict[str, Any], fresh: tuple[str, ...], seed: int
) -> Any:
    """The float model, as transformers loads it."""
    torch.manual_seed(seed)
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
    if lost := sorted(key for key in absent if not is_within(key, fresh)):
        raise ModelError(
            f"{base.path} lacks the weights of {lost[0]}"
            + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
            + (f": it has no head for {task}, {mend}" if is_within(lost[0], base.family.heads[task]) else "")
        )
    return model


def _quantized(
    base: Base,
    model_class: Any,
    task: Task,
    settings: dict[str, Any],
    base_format: BaseFormat,
    block_size: int,
    fresh: tuple[str, ...],
    seed: int,
    codes: Path | None,
) -> tuple[Any, Read] | None:
    """The quantized model, read one tensor at a time, and what reads it; None where the file's names are not the
    model's."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False, **settings)
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
    if not whole_modules or not all(is_within(name, fresh) for name in drawn):
        return None

    turned = transpose_conv1d(model) if base.family.fan_in_fan_out else set()

    def read(name: str, rows: slice) -> Tensor:
        """A copy, from a mapping of its own: the pages of a mapped file stay in memory as long as it is mapped."""
        key = keys[tied[name]]
        with safe_open(places[key], "pt") as weights:
            stored = weights.get_slice(key)
            part = stored[:, rows].T if name in turned else stored[rows]
            return part.to(torch.float32, copy=True)

    _round(model, base, task, base_format, block_size, read, codes)
    for name in [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        parent, _, attribute = name.rpartition(".")
        value = torch.empty(parameters[name].shape) if name in drawn else read(name, slice(None))
        setattr(model.get_submodule(parent), attribute, nn.Parameter(value))
    for target, source in tied.items():  # to an embedding that stays float
        parent, _, attribute = target.rpartition(".")
        if getattr(getattr(model.get_submodule(parent), attribute), "is_meta", False):
            setattr(model.get_submodule(parent), attribute, model.get_parameter(source))
    torch.manual_seed(seed)
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


def _round(
    model: nn.Module,
    base: Base,
    task: Task,
    base_format: BaseFormat,
    block_size: int,
    read: Read | None,
    codes: Path | None,
) -> None:
    """Bring a model's layers to `base_format`, in place; `read` as for `quantize_model`, int4's from a file."""
    keep = base.family.trained_head(task)
    if base_format == "nf4":
        require("bitsandbytes", "train")
        from edge_ft.quant.nf4 import round_to_nf4

        round_to_nf4(model, keep, read)
    elif base_format == "bf16":
        round_to_bf16(model, keep, read)
    else:
        chosen = {"known": read_codes(codes)} if codes is not None and base_format == "int4" else {}
        quantize_model(model, block_size, keep, BITS[base_format], read, **chosen)
