"""PEFT's LoRA adapters: add a fresh one, load a saved one, read its matrices, or merge it."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import nn

from edge_ft.config import Task, TuneConfig, last_layers
from edge_ft.errors import ModelError, UsageError, did_you_mean
from edge_ft.families import Family
from edge_ft.models.dims import ModelDims
from edge_ft.models.logging import silence_libraries
from edge_ft.quant.conversion import is_within
from edge_ft.quant.layers import FrozenLinear
from edge_ft.utf8 import read_json

__all__ = ["adapter_task", "add_lora", "layer_stacks", "load_adapter", "lora_pairs", "merge_adapter"]

PEFT_TASKS: dict[Task, str | None] = {
    "text-generation": "CAUSAL_LM",
    "text2text-generation": "SEQ_2_SEQ_LM",
    "text-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "feature-extraction": "FEATURE_EXTRACTION",
    "fill-mask": None,  # PEFT has no name for it
}


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
    with silence_libraries():  # its import warns too
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
    with silence_libraries():
        peft_model = _without_weights(get_peft_model(model, lora))
    # For whoever loads the adapter on the original model: here GPT-2's layers are linear ones.
    peft_model.peft_config["default"].fan_in_fan_out = family.fan_in_fan_out
    return peft_model


def load_adapter(model: nn.Module, folder: Path) -> Any:
    """Put a saved PEFT adapter on `model`, frozen, as `PeftModel.from_pretrained` does.

    Returns:
        The `peft.PeftModel`.

    Raises:
        ModelError: not a LoRA adapter in safetensors, or not one of this model.
    """
    adapter_config(folder)
    try:
        with silence_libraries():
            from peft import PeftModel, get_peft_model_state_dict

            loaded = _without_weights(PeftModel.from_pretrained(model, str(folder), is_trainable=False).eval())
            taken = set(get_peft_model_state_dict(loaded, save_embedding_layers=False))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"the adapter {folder} does not fit this model's layers: {reason} (--lane merged may accept it)"
        ) from error
    with safe_open(folder / "adapter_model.safetensors", "np") as weights:
        saved = set(weights.keys())
    # PEFT only warns when the tensors of the adapter are not those of the model's LoRA layers.
    if odd := sorted(saved ^ taken):
        what = f"lacks {odd[0]}" if odd[0] in taken else f"has {odd[0]}, which this model lacks"
        raise ModelError(f"the adapter {folder} {what} ({len(odd)} tensors differ): it is of another model or damaged")
    return loaded


def adapter_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json of a LoRA adapter whose weights are safetensors.

    Returns:
        Its content.

    Raises:
        ModelError: there is none, it is of another kind, or it uses an option that an export would lose.
    """
    config = read_json(folder / "adapter_config.json", ModelError, "give the folder of a PEFT adapter")
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'adapter_config.json'} must hold one JSON object: save the adapter again")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} is a {config.get('peft_type')} adapter: only LORA can be exported")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{folder} lacks adapter_model.safetensors (pickled weights are never loaded): save it again")
    # These change the base or layers without LoRA, which an export of A and B alone would lose.
    for field in ("trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens"):
        if config.get(field):
            raise ModelError(f"{folder} uses {field}, which cannot be exported: train it without")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva"):
        raise ModelError(
            f"{folder} was initialised with init_lora_weights={start!r}, which changed its base: save it with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )
    return config


def adapter_task(folder: Path) -> Task | None:
    """Return the task in an adapter's config; None if it has none, or PEFT has no name for it."""
    named = adapter_config(folder).get("task_type")
    return next((task for task, name in PEFT_TASKS.items() if name is not None and name == named), None)


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


def merge_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Merge the adapter into the weights of a float model (every PEFT variant that can merge).

    Returns:
        The transformers model.

    Raises:
        ModelError: the adapter changes one of two tied weights, which would change the other as well.
    """
    peft_model = load_adapter(model, folder)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if any(hasattr(layer, "lora_A") or hasattr(layer, "modules_to_save") for layer in (head, embedding)) and getattr(
        model.config, "tie_word_embeddings", False
    ):
        raise ModelError(f"{folder} adapts the embedding or the head of a model that ties them: it cannot be exported")
    with silence_libraries():  # PEFT warns that a head with its own weights is not tied
        merged: nn.Module = peft_model.merge_and_unload(safe_merge=True)
    return merged.eval()


def _without_weights(peft_model: Any) -> Any:
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
        endings = sorted({name.rpartition(".")[2] for name in linear})
        for wanted in config.target_modules:
            if not any(name == wanted or name.endswith(f".{wanted}") for name in linear):
                raise UsageError(
                    f"--target-modules {wanted}: no linear layer has this name{did_you_mean(wanted, endings)}; "
                    f"choose from {', '.join(endings)}"
                )
        linear = [
            name for name in linear if any(name == end or name.endswith(f".{end}") for end in config.target_modules)
        ]
    if count is not None:
        last = tuple(f"{stack}.{index}." for stack, layers in stacks.items() for index in range(layers - count, layers))
        linear = [name for name in linear if name.startswith(last)]
    if not linear:
        raise UsageError("--target-modules and --layers together leave nothing to train")
    return linear
