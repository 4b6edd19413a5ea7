"""Torch eager in float32: how runs and models are measured, and the peer of a bundle."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.models.auto.configuration_auto import model_type_to_module_name

from edge_ft.artifacts import Bundle, RunFolder, kind_of
from edge_ft.bench.meters import DecodeTimings
from edge_ft.config import Task
from edge_ft.data import TextTokenizer
from edge_ft.errors import ModelError, UsageError
from edge_ft.evaluate.loading import find_run_base
from edge_ft.families import FAMILIES
from edge_ft.models.base_model import Base, find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.scorer import task_model_of

__all__ = ["TorchClassifier", "TorchDecoder", "TorchSeq2Seq", "find", "find_bundle_base", "load_peer", "prepare"]


@dataclass(frozen=True)
class _TorchModel:
    model: Any
    tokenizer: TextTokenizer


class TorchDecoder(_TorchModel):
    """A causal model that decodes greedily with transformers' own cache."""

    @torch.inference_mode()
    def time_decode(self, prompt_ids: list[int], new_tokens: int) -> DecodeTimings:
        """Decode exactly `new_tokens` greedily, past any stop token; `prefill_s` is the time to the first one."""
        marks = [perf_counter()]
        tokens, past = torch.tensor([prompt_ids]), None
        for _ in range(new_tokens):
            output = self.model(input_ids=tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
            tokens, past = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
            marks.append(perf_counter())
        return DecodeTimings.between(marks)


class TorchSeq2Seq(_TorchModel):
    """An encoder-decoder that decodes greedily with transformers' own caches."""

    @torch.inference_mode()
    def time_decode(self, prompt_ids: list[int], new_tokens: int) -> DecodeTimings:
        """As `TorchDecoder.time_decode`; `prefill_s` is the time of the encoder and the first token."""
        marks = [perf_counter()]
        model = task_model_of(self.model)
        encoded = model.get_encoder()(input_ids=torch.tensor([prompt_ids]))
        token, past = int(model.config.decoder_start_token_id), None
        for _ in range(new_tokens):
            output = model(
                encoder_outputs=encoded,
                decoder_input_ids=torch.tensor([[token]]),
                past_key_values=past,
                use_cache=True,
            )
            token, past = int(output.logits[0, -1].argmax()), output.past_key_values
            marks.append(perf_counter())
        return DecodeTimings.between(marks)


class TorchClassifier(_TorchModel):
    """A sequence classifier."""

    @torch.inference_mode()
    def logits(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [batch, num_labels] of ids and mask, both [batch, seq]."""
        ids, mask = torch.from_numpy(input_ids), torch.from_numpy(attention_mask)
        logits: NDArray[np.float32] = self.model(input_ids=ids, attention_mask=mask).logits.numpy()
        return logits


def find(source: str) -> dict[str, Any]:
    """Find a run folder or a model, and download what is missing.

    Returns:
        What `prepare` and `load_peer` read: base, task, labels, rendering, tokenizer, adapter, and sizes.

    Raises:
        UsageError: it cannot be opened.
        ModelError: there is no such model, or a run's base is gone.
    """
    if kind_of(source) == "run":
        run = RunFolder.open(Path(source))
        base = find_run_base(run)
        tokenizer = TextTokenizer.load(run.tokenizer, base.known_ids)
        return _found(base, run.report()["task"], run.rendering(), tokenizer, run.adapter)
    base = find_base(source)
    return _found(base, base.task, None, base.open_tokenizer(), None)


def find_bundle_base(source: str) -> dict[str, Any]:
    """Find the float model that a bundle was made from, without its adapter: the same shape and the same work.

    Returns:
        As `find`.

    Raises:
        UsageError: the model is no longer there, or has changed.
    """
    manifest = Bundle.open(Path(source)).manifest
    identity = manifest["provenance"]["base"]
    way_out = f"the peer of {source} is its base: name the model or the run folder as another argument instead"
    try:
        base = find_base(identity["model"])
    except ModelError as error:
        raise UsageError(f"{error}; {way_out}") from error
    if base.content_sha256 != identity["content_sha256"]:
        raise UsageError(f"{identity['model']} is not the model that the bundle was made from; {way_out}")
    return _found(base, manifest["task"], manifest["rendering"], TextTokenizer.of_bundle(Path(source)), None)


def prepare(job: dict[str, Any]) -> Base:
    """Set the threads and import what loading needs, so that the time to load is that of the weights."""
    torch.set_num_threads(job["threads"])
    base = job["base"]
    family = FAMILIES[base["family"]]
    module = model_type_to_module_name(family.name)
    import_module(f"transformers.models.{module}.modeling_{module}")
    if job["adapter"] is not None:
        import_module("peft")
    return Base(**base | {"path": Path(base["path"]), "family": family})


def load_peer(base: Base, job: dict[str, Any]) -> TorchDecoder | TorchSeq2Seq | TorchClassifier:
    """The float model, with its adapter unmerged if it has one, and its tokenizer."""
    from edge_ft.models.adapted import load_adapter

    tokenizer = TextTokenizer.load(Path(job["tokenizer"]), base.known_ids)
    model: Any = load_model(ModelSpec(base, job["task"], "fp32", labels=tuple(job["labels"])))
    if job["adapter"] is not None:
        model = load_adapter(model, Path(job["adapter"]))
    kinds: dict[str, type[TorchDecoder | TorchSeq2Seq]] = {
        "text-generation": TorchDecoder,
        "text2text-generation": TorchSeq2Seq,
    }
    return kinds.get(job["task"], TorchClassifier)(model, tokenizer)


def _found(
    base: Base, task: Task, rendering: dict[str, Any] | None, tokenizer: TextTokenizer, adapter: Path | None
) -> dict[str, Any]:
    def size(files: Iterable[Path]) -> int:
        return sum(file.stat().st_size for file in files)

    weights = [base.path / "config.json", *base.checkpoint.files, *tokenizer.files()]
    return {
        "base": asdict(base) | {"path": str(base.path.resolve()), "family": base.family.name},
        "task": task,
        "labels": base.labels(task) if rendering is None else rendering["labels"],
        "rendering": rendering,
        "tokenizer": str(tokenizer.folder.resolve()),
        "adapter": str(adapter.resolve()) if adapter else None,
        "max_length": base.max_length,
        "parameters": sum(prod(stored.shape) for stored in base.checkpoint.tensors.values()),
        "size_bytes": size(weights) + (size(adapter.iterdir()) if adapter else 0),
    }
