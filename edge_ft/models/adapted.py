"""Put a saved PEFT adapter on the model it was trained on, or merge it into its weights."""

import re
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from edge_ft.adapter import Adapter, find_adapter
from edge_ft.errors import ModelError
from edge_ft.families import Family, family_of
from edge_ft.models.dims import ModelDims
from edge_ft.models.libraries import without_bitsandbytes
from edge_ft.models.logging import silence_libraries
from edge_ft.models.lora import without_weights
from edge_ft.quant.conversion import restore_conv1d, transpose_conv1d

__all__ = ["load_adapter", "merge_adapter", "take_vocabulary"]

BESIDE = (
    *(
        f"{part}{kind}"
        for part in ("", "base_layer.", "original_module.", "modules_to_save.")
        for kind in ("weight", "bias")
    ),
    "token_adapter.base_layer.weight",
    "token_adapter.trainable_tokens_delta",
)
"""What PEFT saves of a layer over the vocabulary besides its adapter; of two tied ones, the same tokens twice."""
TRAINING_NAMES = (".default.", "_orig_mod.", "_fsdp_wrapped_module.")
MERGED_DIFFERS = 1e-3
"""Largest difference of logits by merging, as a share of the largest logit: float32 rounds; a fault is greater."""


def load_adapter(model: nn.Module, adapter: Adapter | Path) -> Any:
    """Put a saved PEFT adapter on `model`, frozen, as `PeftModel.from_pretrained` does.

    Args:
        model: A task model. Where the adapter has another vocabulary, the model must be float and gets it.
        adapter: The adapter, or its folder.

    Returns:
        The `peft.PeftModel`.

    Raises:
        ModelError: not a LoRA adapter in safetensors, or not one of this model; the message names a tensor.
    """
    found = adapter if isinstance(adapter, Adapter) else find_adapter(adapter)
    take_vocabulary(model, found)
    embeddings = {name for name, module in model.named_modules() if module in _vocabulary_layers(model)}
    try:
        with silence_libraries(), without_bitsandbytes():
            from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

            config = LoraConfig.from_pretrained(str(found.path))
            config.inference_mode = True
            config.init_lora_weights = True  # the saved weights follow: no start that changes the base
            wrapped = without_weights(get_peft_model(model, config))
            tensors = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
            _compare(found, model, embeddings, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
            wrapped.load_adapter(str(found.path), "default", is_trainable=False, torch_device="cpu")
    except (AttributeError, ImportError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the adapter {found.path} does not fit this model's layers: {reason}") from error
    return wrapped.eval()


def merge_adapter(model: Any, adapter: Adapter | Path) -> nn.Module:
    """Merge an adapter into the weights of a float model (every PEFT variant that can merge).

    Of tied weights only those are changed that the adapter adapts, as PEFT computes it unmerged.

    Args:
        model: A float task model; changed in place.
        adapter: The adapter, or its folder.

    Returns:
        The transformers model.

    Raises:
        ModelError: the adapter does not fit, or PEFT computes something else once it is merged.
    """
    family = family_of(model.config.model_type)
    if family.fan_in_fan_out:
        restore_conv1d(model, family.layers)  # as in the training: whole weights are saved in this layout
    peft_model = load_adapter(model, adapter)
    where = adapter.path if isinstance(adapter, Adapter) else adapter
    expected = _probe(peft_model, family)
    _untie_adapted(peft_model)
    try:
        with silence_libraries():  # PEFT warns that a head with its own weights is not tied
            merged: nn.Module = peft_model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"the adapter {where} cannot be merged: {' '.join(str(error).split())}") from error
    found = _probe(merged.eval(), family)
    if not (found - expected).abs().max() <= MERGED_DIFFERS * max(1.0, float(expected.abs().max())):
        raise ModelError(
            f"the adapter {where} computes something else once PEFT has merged it (logits differ by "
            f"{float((found - expected).abs().max()):.2g}): use --lane adapter, or export a merged model"
        )
    _tie_equal(merged)
    if family.fan_in_fan_out:
        transpose_conv1d(merged)
    return merged


@torch.inference_mode()
def _probe(model: Any, family: Family) -> Tensor:
    """Return the logits (or last hidden states) of a few tokens."""
    size = ModelDims(model.config).vocabulary
    ids = torch.tensor([[index * size // 12 for index in range(12)]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if family.kind == "encoder-decoder" else {})
    output = model(**inputs)
    return cast(Tensor, output["logits" if "logits" in output else "last_hidden_state"])


def _untie_adapted(peft_model: Any) -> None:
    """Give each adapted layer a weight of its own: PEFT merges in place, which would change what is tied to it."""
    users: dict[int, list[Any]] = {}
    for module in peft_model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(module)
    for wrapper in peft_model.modules():
        layer: Any = getattr(wrapper, "base_layer", None)
        weight = None if layer is None else layer._parameters.get("weight")
        if weight is not None and len(users[id(weight)]) > 1:
            layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def _tie_equal(model: Any) -> None:
    """Tie the head to the input embedding again if both got the same change; note in the config whether they are."""
    embedding, *heads = _vocabulary_layers(model)
    for head in heads:
        if head.weight is not embedding.weight and torch.equal(head.weight, embedding.weight):
            head.weight = embedding.weight
        if head.weight is not embedding.weight:
            model.config.tie_word_embeddings = False


def take_vocabulary(model: nn.Module, adapter: Adapter) -> None:
    """Give a float model the vocabulary that an adapter was trained with, in place; new rows are the adapter's.

    Raises:
        ModelError: the weights of a new token were not saved, or the model is quantized.
    """
    embedding, *_ = layers = _vocabulary_layers(model)
    size = adapter.vocabulary(embedding.num_embeddings)
    if size == embedding.num_embeddings:
        return
    if any(layer.weight is None for layer in layers):
        raise ModelError(
            f"the adapter {adapter.path} has a vocabulary of {size} tokens, its base of {embedding.num_embeddings}, "
            "which A and B beside the weights cannot hold: use --lane merged"
        )
    names = {module: name for name, module in model.named_modules()}
    before, resized = embedding.num_embeddings, {}
    with safe_open(adapter.weights, "pt") as weights:
        for layer in layers:
            if id(layer.weight) not in resized:
                rows = layer.weight.detach()[:size]
                if size > before:
                    rows = torch.cat(
                        (rows, _new_rows(adapter, weights, names[layer], embedding is layer, before, size))
                    )
                resized[id(layer.weight)] = nn.Parameter(rows.contiguous(), requires_grad=False)
    for module in model.modules():
        if id(getattr(module, "weight", None)) in resized:
            module.weight = resized[id(module.weight)]
            setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", size)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if getattr(head, "bias", None) is not None:
        raise ModelError(
            f"the adapter {adapter.path} has a vocabulary of {size} tokens, its base of {before} and a head with a "
            "bias, which PEFT does not save: merge it with PEFT and export the merged model"
        )
    model.config.vocab_size = size  # type: ignore[union-attr]


def _new_rows(adapter: Adapter, weights: Any, module: str, is_input: bool, before: int, size: int) -> Tensor:
    """Return the rows [size - before, hidden] that an adapter has for the tokens that the base lacks.

    Raises:
        ModelError: it has none for a token.
    """
    for ending in ("weight", "base_layer.weight", "token_adapter.base_layer.weight"):
        name = f"base_model.model.{module}.{ending}"
        if name in adapter.shapes:
            return cast(Tensor, weights.get_tensor(name)[before:size].float())
    last = module.rpartition(".")[2]
    tokens = next((ids for name, ids in adapter.trained_tokens.items() if name == last or (is_input and not name)), [])
    delta = f"base_model.model.{module}.token_adapter.trainable_tokens_delta"
    if delta in adapter.shapes and not set(range(before, size)) - set(tokens):
        order = [tokens.index(token) for token in range(before, size)]
        return cast(Tensor, weights.get_tensor(delta)[order].float())
    raise ModelError(
        f"the adapter {adapter.path} was trained with {size} tokens, its base has {before}, and the weights of the new "
        f"ones in {module} were not saved: save it again with save_pretrained(DIR, save_embedding_layers=True)"
    )


def _vocabulary_layers(model: nn.Module) -> list[Any]:
    """Return the input embedding, and the head over the vocabulary if there is one."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    return [layer for layer in layers if layer is not None]


def _compare(adapter: Adapter, model: nn.Module, embeddings: set[str], expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse an adapter whose tensors are not those of the model's adapted layers: PEFT only warns, or not even that.

    Args:
        adapter: What was saved.
        model: The task model, with PEFT's layers inside.
        embeddings: Names of the layers over the vocabulary, whose weights PEFT may save beside.
        expected: The shapes of the tensors that PEFT would save of this model.

    Raises:
        ModelError: they differ; the message names a tensor and the reason.
    """
    trained = f" (it was trained on {adapter.trained_on})" if adapter.trained_on else ""
    beside = {f"base_model.model.{name}.{part}" for name in embeddings for part in BESIDE}
    reasons: list[str] = []
    for name in sorted(adapter.shapes.keys() | expected.keys(), key=lambda name: (name not in adapter.shapes, name)):
        saved, wanted = adapter.shapes.get(name), expected.get(name)
        if saved == wanted or name in beside or _is_unused(model, name):
            continue
        if saved is None:
            reasons.append(f"lacks {name}: it is damaged, copy it again")
        elif wanted is not None and (len(saved) != len(wanted) or 0 in saved):
            reasons.append(f"holds only a part of {name} {list(saved)}: gather the shards before saving (ZeRO-3, FSDP)")
        elif wanted is not None:
            sizes = f"of shape {list(saved)}, this model {list(wanted)}"
            reasons.append(f"has {name} {sizes}: it is of another model{trained}")
        elif any(part in name for part in TRAINING_NAMES):
            reasons.append(f"has {name}, a name inside a training: save it with PEFT's save_pretrained")
        elif _module_of(model, name) is None:
            reasons.append(f"has {name}, which this model lacks: it is of another model{trained} or --task")
        else:
            reasons.append(f"has {name}, which adapter_config.json does not name as trained: copy both again")
    if not reasons:
        with safe_open(adapter.weights, "pt") as weights:
            for name in sorted(adapter.shapes):
                if not weights.get_tensor(name).isfinite().all():
                    reasons = [f"is of no use: {name} holds values that are not finite, its training diverged"]
                    break
    if reasons:
        more = f" ({len(reasons)} tensors differ)" if len(reasons) > 1 else ""
        raise ModelError(f"the adapter {adapter.path} {reasons[0]}{more}")


def _module_of(model: nn.Module, tensor: str) -> nn.Module | None:
    """Return the module of the model that a tensor of an adapter belongs to; None if it has no such module."""
    path = tensor.removeprefix("base_model.model.")
    path = re.split(r"\.(?:lora_|base_layer|token_adapter)", path)[0].removesuffix(".weight").removesuffix(".bias")
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _is_unused(model: nn.Module, tensor: str) -> bool:
    """Return whether a tensor belongs to a module that the task does not use, and which was removed (a pooler)."""
    at: Any = model
    for part in tensor.removeprefix("base_model.model.").split("."):
        if not hasattr(at, part):
            return False
        at = getattr(at, part)
        if at is None:
            return part not in ("weight", "bias")
    return False
