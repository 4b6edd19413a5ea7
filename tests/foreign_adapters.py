"""Adapters as other trainers save them: made with plain PEFT on plain transformers, with random weights."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

__all__ = ["merged_by_peft", "plain_logits", "plain_model", "save_foreign", "with_peft"]

CLASSES: dict[str | None, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "FEATURE_EXTRACTION": AutoModel,
    None: AutoModelForMaskedLM,
}


def plain_model(base: Path, task: str | None, vocabulary: int | None = None, num_labels: int = 3) -> Any:
    """The transformers model, with a resized vocabulary if one is given; `num_labels` are of a classifier."""
    settings: dict[str, Any] = {"num_labels": num_labels} if task == "SEQ_CLS" else {}
    torch.manual_seed(0)
    model = CLASSES[task].from_pretrained(base, dtype=torch.float32, **settings)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model.eval()


def save_foreign(
    base: Path,
    folder: Path,
    task: str | None = "CAUSAL_LM",
    *,
    vocabulary: int | None = None,
    dtype: torch.dtype = torch.float32,
    save: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Save an adapter whose trained parameters are random, in `dtype`."""
    model = plain_model(base, task, vocabulary, settings.pop("num_labels", 3))
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings}
    wrapped = get_peft_model(model, LoraConfig(task_type=task, **settings))  # type: ignore[arg-type]
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            change = torch.randn_like(parameter) * 0.15
            parameter.data = change if "lora_" in name and "magnitude" not in name else parameter.data + change.abs()
    if vocabulary is not None:  # trained elsewhere: not what a fresh resize would make
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
            rows = getattr(layer, "base_layer", layer).weight.data
            rows[-2:] = torch.randn(rows[-2:].shape) * 0.3
    if dtype != torch.float32:
        wrapped = wrapped.to(dtype)
    wrapped.save_pretrained(folder, **(save or {}))
    return folder


def with_peft(base: Path, folder: Path, task: str | None = "CAUSAL_LM", vocabulary: int | None = None) -> Any:
    """The adapter beside the plain model, as PEFT itself computes it."""
    return PeftModel.from_pretrained(plain_model(base, task, vocabulary), str(folder)).eval()


def merged_by_peft(base: Path, folder: Path, task: str | None = "CAUSAL_LM", vocabulary: int | None = None) -> Any:
    """The adapter merged into the plain model by PEFT, whose tied weights were cloned first."""
    model = with_peft(base, folder, task, vocabulary)
    for module in model.modules():
        if isinstance(layer := getattr(module, "base_layer", None), nn.Linear | nn.Embedding):
            layer.weight = nn.Parameter(layer.weight.detach().clone())
    model.get_base_model().config.tie_word_embeddings = False
    return model.merge_and_unload().eval()


@torch.inference_mode()
def plain_logits(model: Any, seq2seq: bool = False) -> Tensor:
    """Logits, or last hidden states, of a few tokens."""
    ids = torch.tensor([[3, 5, 7, 9, 11, 4, 6, 8]])
    output = model(input_ids=ids, **({"decoder_input_ids": ids} if seq2seq else {}))
    found: Tensor = output["logits" if "logits" in output else "last_hidden_state"]
    return found
