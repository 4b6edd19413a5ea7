"""LoRA layers of PEFT on a model: add fresh ones, and read their matrices."""

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edge_ft.adapter import PEFT_TASKS
from edge_ft.config import Task, TuneConfig, last_layers
from edge_ft.errors import ModelError, UsageError, did_you_mean
from edge_ft.families import Family
from edge_ft.models.dims import ModelDims
from edge_ft.models.libraries import without_bitsandbytes
from edge_ft.models.logging import silence_libraries
from edge_ft.quant.conversion import is_within
from edge_ft.quant.layers import FrozenLinear

__all__ = ["add_lora", "layer_stacks", "lora_pairs", "tied_layers", "without_weights"]


def layer_stacks(model: nn.Module, family: Family) -> tuple[str, ...]:
    """Return the names of the lists of transformer layers in `model`: a body without a head has no prefix."""
    prefix = str(model.base_model_prefix)
    return tuple(stack if hasattr(model, prefix) else stack.removeprefix(f"{prefix}.") for stack in family.stacks)


def add_lora(model: nn.Module, family: Family, task: Task, config: TuneConfig) -> Any:
    """Wrap `model` with fresh LoRA layers, initialised from the seed; a classifier's head is trained in full.

    Returns:
        The `peft.PeftModel`.

    Raises:
        UsageError: target_modules or layers name nothing in this model.
    """
    with silence_libraries(), without_bitsandbytes():  # its import warns too
        from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.seed)
    lora = LoraConfig(
        task_type=PEFT_TASKS[task],
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=_targets(model, family, task, config),
        modules_to_save=[name.rpartition(".")[2] for name in family.trained_head(task)] or None,
    )
    with silence_libraries(), without_bitsandbytes():
        peft_model = without_weights(get_peft_model(model, lora))
    # For whoever loads the adapter on the original model: here GPT-2's layers are linear ones.
    peft_model.peft_config["default"].fan_in_fan_out = family.fan_in_fan_out
    return peft_model


def lora_pairs(model: Any) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Collect A and B of every adapted layer.

    Returns:
        A [rank, in] and B [out, rank] by the layer's name, B multiplied by the scaling that PEFT computed for the layer
        (so rank and alpha patterns and rsLoRA are included).

    Raises:
        ModelError: a variant that A and B alone do not express (DoRA, LoRA biases, adapted embeddings).
    """
    from peft.tuners.lora import Linear

    pairs = {}
    for name, module in model.named_modules():
        adapters, embedding, variants = (
            getattr(module, field, {}) for field in ("lora_A", "lora_embedding_A", "lora_variant")
        )
        for adapter in model.active_adapters:
            if adapter in variants:
                raise ModelError(
                    f"{name} uses {type(variants[adapter]).__name__.removesuffix('LinearVariant')}, "
                    "which is more than A and B: export it with --lane merged"
                )
            if adapter in embedding:
                raise ModelError(
                    f"{name} is an adapted embedding, which the adapter lane does not support: use --lane merged"
                )
            if adapter not in adapters:
                continue
            if not isinstance(module, Linear) or module.lora_B[adapter].bias is not None:
                raise ModelError(f"{name} is not a plain LoRA linear layer: export it with --lane merged")
            a, b = (
                layers.get_parameter(f"{adapter}.weight").detach().float() for layers in (module.lora_A, module.lora_B)
            )
            pairs[name.removeprefix("base_model.model.")] = a.cpu().numpy(), b.cpu().numpy() * module.scaling[adapter]
    return pairs


def tied_layers(model: nn.Module) -> dict[str, str]:
    """Return by the name of each layer that shares its weight with an earlier one, the name of that one."""
    first: dict[int, str] = {}
    tied = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        held = weight if weight is not None else module._buffers.get("qweight")
        if held is not None and first.setdefault(id(held), name) != name:
            tied[name] = first[id(held)]
    return tied


def without_weights(peft_model: Any) -> Any:
    """Set the `weight` of LoRA layers over quantized layers to None, as in the layers inside.

    PEFT's property returns the codes, and T5 casts the input of its `wo` to the dtype of that weight: to uint8.

    Returns:
        The same model.
    """
    for module in peft_model.modules():
        if hasattr(module, "lora_A") and isinstance(module.base_layer, FrozenLinear):
            module.__class__ = _weightless(module.__class__)
    return peft_model


@cache
def _weightless(kind: Any) -> Any:
    return type(kind.__name__, (kind,), {"weight": None, "__module__": kind.__module__})


def _targets(model: nn.Module, family: Family, task: Task, config: TuneConfig) -> list[str]:
    """Return the names of the linear layers to adapt.

    Raises:
        UsageError: target_modules or layers name nothing in this model.
    """
    stacks = {stack: len(model.get_submodule(stack)) for stack in layer_stacks(model, family)}  # type: ignore[arg-type]
    count = last_layers(config.layers)
    fewest = min(stacks.values())
    dims = ModelDims(model.config)
    if count is not None and dims.shares_layers:
        raise UsageError(
            f"--layers {config.layers}: this model calls the same {fewest} layer(s) {dims.layers} times, so its "
            "last ones are its first ones too: use --layers all"
        )
    if count is not None and count > fewest:
        where = " in its smaller stack" if len(stacks) > 1 else ""
        raise UsageError(f"--layers {config.layers}: this model has {fewest} layers{where}")
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_within(name, family.heads[task])
    ]
    if config.target_modules != ("all-linear",):
        for wanted in config.target_modules:
            if not any(_ends_in(name, wanted) for name in linear):
                raise UsageError(f"--target-modules {wanted}: {_why_not(model, family, task, wanted, linear)}")
        linear = [name for name in linear if any(_ends_in(name, end) for end in config.target_modules)]
    if count is not None:
        last = tuple(f"{stack}.{index}." for stack, layers in stacks.items() for index in range(layers - count, layers))
        linear = [name for name in linear if name.startswith(last)]
    if not linear:
        raise UsageError("--target-modules and --layers together leave nothing to train")
    return linear


def _ends_in(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _why_not(model: nn.Module, family: Family, task: Task, wanted: str, linear: list[str]) -> str:
    """Say why no layer that can be adapted has this name, and what to do."""
    found = {name: module for name, module in model.named_modules() if _ends_in(name, wanted)}
    if any(is_within(name, family.trained_head(task)) for name in found):
        return "it belongs to the head, which is trained in full already: leave it out"
    elsewhere = "leave it out, or train it with PEFT and give that adapter to edge-ft export --adapter"
    if any(is_within(name, family.heads[task]) for name in found):
        return f"it belongs to the head of {task}, which stays frozen: {elsewhere}"
    if any(isinstance(module, nn.Embedding) for module in found.values()):
        return f"it is an embedding, and only linear layers are adapted: {elsewhere}"
    endings = sorted({name.rpartition(".")[2] for name in linear})
    what = "it is no linear layer" if found else f"no linear layer has this name{did_you_mean(wanted, endings)}"
    return f"{what}; choose from {', '.join(endings)}"
