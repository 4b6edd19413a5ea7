"""Losses of encoder tasks: one function a task, for training and scoring alike."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from edge_ft.data import IGNORED, Batch
from edge_ft.data.contrastive import SCALE, duplicate_texts

__all__ = [
    "class_losses",
    "contrastive_losses",
    "embed",
    "encoder_inputs",
    "mask_losses",
    "tag_losses",
    "task_model_of",
]


def task_model_of(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def encoder_inputs(model: Any, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return what the task model takes of a batch [batch, seq]: RoBERTa, DistilBERT and MPNet have no token types."""
    task_model = task_model_of(model)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    takes = "token_type_ids" in signature(task_model.forward).parameters
    if "token_type_ids" in batch and takes and getattr(task_model.config, "type_vocab_size", 1) > 1:
        inputs["token_type_ids"] = batch["token_type_ids"]
    return {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}


def class_losses(model: Any, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Score a text classifier by the `problem_type` of its config.

    Returns:
        nll and prediction. single_label_classification: cross-entropy [batch], likeliest class.
        multi_label_classification: binary cross-entropy of each class, whether it is likelier than not
        [batch x classes]. regression: half the squared error [batch], which is the nll of a normal distribution of
        variance 1 up to a constant, and the number.
    """
    logits = model(**encoder_inputs(model, batch, device)).logits.float()
    labels = torch.from_numpy(batch["labels"]).to(device)
    problem = model.config.problem_type
    if problem == "regression":
        return (logits - labels).square().flatten() / 2, logits.flatten()
    if problem == "multi_label_classification":
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return losses.flatten(), (logits > 0).float().flatten()
    return nn.functional.cross_entropy(logits, labels[:, 0], reduction="none"), logits.argmax(dim=-1)


def tag_losses(model: Any, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return nll and likeliest tag of each word, at its first token [words]."""
    logits = model(**encoder_inputs(model, batch, device)).logits
    labels = torch.from_numpy(batch["labels"]).to(device)
    at = labels != IGNORED
    logits = logits[at].float()
    return nn.functional.cross_entropy(logits, labels[at], reduction="none"), logits.argmax(dim=-1)


def mask_losses(model: Any, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return nll and likeliest token of each masked token [targets]; logits are computed only there."""
    labels = torch.from_numpy(batch["labels"]).to(device)
    at = labels != IGNORED
    task_model = task_model_of(model)
    # What comes between the layers and the output layer differs by family; the input of that layer does not.
    handle = task_model.get_output_embeddings().register_forward_pre_hook(lambda _, arguments: arguments[0][at])
    try:
        logits = model(**encoder_inputs(model, batch, device)).logits.float()  # [targets, vocab]
    finally:
        handle.remove()
    return nn.functional.cross_entropy(logits, labels[at], reduction="none"), logits.argmax(dim=-1)


def embed(model: Any, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return vectors of length 1 of a batch's first and second texts [batch, hidden], pooled as the config says."""
    task_model = task_model_of(model)
    vectors = []
    for ids, mask in (("input_ids", "attention_mask"), ("pair_input_ids", "pair_attention_mask")):
        input_ids, attention_mask = (torch.from_numpy(batch[name]).to(device) for name in (ids, mask))  # type: ignore[literal-required]
        hidden = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        if task_model.config.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weight = attention_mask[:, :, None].float()
            pooled = (hidden * weight).sum(1) / weight.sum(1)
        vectors.append(nn.functional.normalize(pooled, dim=-1))
    return vectors[0], vectors[1]


def contrastive_losses(model: Any, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return nll and rank of each row's own second text among those of its batch [batch].

    See `edge_ft.data.contrastive`; texts that occur twice are no negatives of each other.
    """
    first, second = embed(model, batch, device)
    same = torch.from_numpy(duplicate_texts(batch)).to(device)
    scores = (SCALE * first @ second.T).masked_fill(same, float("-inf"))
    own = torch.arange(len(scores), device=device)
    rank = (scores > scores.diagonal()[:, None]).sum(1)
    return nn.functional.cross_entropy(scores, own, reduction="none"), rank
