"""Find a base (hub id, folder or GGUF file), identify it, and load it in float or on the grid."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from edge_ft.artifacts import atomic_folder, file_sha256, write_text
from edge_ft.base.linear import is_within, quantize_model
from edge_ft.base.quiet import quiet_libraries
from edge_ft.config import BaseFormat, Task
from edge_ft.data import class_numbers
from edge_ft.errors import ModelError, did_you_mean
from edge_ft.families import Family, family_of

__all__ = ["Base", "find_base", "load_model"]


@dataclass(frozen=True)
class Base:
    """A base model on disk: a folder with config.json, safetensors weights and a tokenizer."""

    name: str
    """As the user gave it."""
    path: Path
    family: Family
    content_sha256: str
    """Over config.json and every weight file."""
    config: dict[str, Any]
    """config.json"""

    @property
    def max_length(self) -> int:
        """Positions that the model has."""
        return int(self.config.get("max_position_embeddings", 1024))

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names that the checkpoint brings, in the order of its head; none for a headless one."""
        key = f"{self.family.head[-1]}.weight"
        for file in sorted(self.path.glob("*.safetensors")):
            try:
                with safe_open(file, "np") as weights:
                    size = weights.get_slice(key).get_shape()[0] if key in weights.keys() else 0  # noqa: SIM118
            except SafetensorError as error:
                raise ModelError(f"{file} cannot be read as safetensors: {error}") from error
            if size and not self.family.decoder:
                # transformers leaves out names that are LABEL_0, LABEL_1 ...
                names: dict[str, str] = self.config.get("id2label") or {}
                return tuple(names.get(str(index), f"LABEL_{index}") for index in range(size))
        return ()

    def brings_head_of(self, labels: tuple[str, ...]) -> bool:
        """Whether the checkpoint's head is one of these classes: by their names, or by their numbers."""
        return bool(self.labels) and labels in (self.labels, class_numbers(self.labels))

    @property
    def license(self) -> str | None:
        """The `license:` of the model card's front matter, if it has one."""
        card = self.path / "README.md"
        found = (
            re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.MULTILINE) if card.is_file() else None
        )
        return found[1] if found else None


def find_base(model: str, task: Task | None = None) -> Base:
    """Find the folder of a hub id, local folder, or GGUF file (converted once into the user's cache).

    Raises:
        ModelError: nothing there, no safetensors weights, or a family or task that is not supported.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        folder = _convert_gguf(path)
    elif path.is_dir():
        folder = path
        if not (path / "config.json").is_file():
            ggufs = sorted(path.glob("*.gguf"))
            if len(ggufs) != 1:
                found = f"{len(ggufs)} GGUF files" if ggufs else "neither config.json nor a GGUF file"
                raise ModelError(f"{path} is not a model folder: it holds {found}; name the model file or its folder")
            folder = _convert_gguf(ggufs[0])
    else:
        folder = _download(model)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'config.json'} is not a model's config: it must be one JSON object")
    family = family_of(str(config.get("model_type")), task)
    if family.decoder:
        heads = int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
        if head_dim % 16:
            raise ModelError(f"{folder} has heads of size {head_dim}: ONNX Runtime's attention takes multiples of 16")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"{folder} holds no *.safetensors weights (pickled weights are never loaded): convert them first"
        )
    digest = hashlib.sha256()
    for file in [folder / "config.json", *weights]:
        digest.update(file_sha256(file).encode())
    return Base(model, folder, family, digest.hexdigest(), config)


def load_model(
    base: Base,
    task: Task,
    base_format: BaseFormat = "fp32",
    block_size: int = 32,
    labels: tuple[str, ...] = (),
    seed: int = 0,
) -> nn.Module:
    """The task model of a base in float32, frozen, its linear layers and embedding on the grid for `int4`.

    A classification head that the checkpoint lacks, or has for other classes, is drawn from `seed`, and
    stays float.

    Raises:
        ModelError: the weights cannot be loaded, or some are missing.
    """
    from optimum.exporters.tasks import TasksManager

    arguments: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False, "use_safetensors": True}
    if task == "text-classification" and labels:
        arguments |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            "ignore_mismatched_sizes": True,
        }
    model_class = TasksManager.get_model_class_for_task(task, framework="pt")
    torch.manual_seed(seed)
    try:
        with quiet_libraries():
            model, found = model_class.from_pretrained(base.path, output_loading_info=True, **arguments)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{base.path} cannot be loaded as {task}: {error}") from error
    fresh = base.family.head if labels and not base.family.decoder else ()
    absent = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    if lost := sorted(key for key in absent if not is_within(key, fresh)):
        raise ModelError(
            f"{base.path} lacks the weights of {lost[0]}"
            + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
            + (": it has no classification head, tune it first" if is_within(lost[0], base.family.head) else "")
        )
    if fresh and base.labels and not base.brings_head_of(labels):
        head = model.get_submodule(base.family.head[-1])
        torch.manual_seed(seed)
        nn.init.normal_(head.weight, std=model.config.initializer_range)
        nn.init.zeros_(head.bias)
    model.eval().requires_grad_(False)
    if base_format == "int4":
        try:
            quantize_model(model, block_size, () if base.family.decoder else base.family.head)
        except ValueError as error:
            raise ModelError(f"{base.path} cannot be put on the 4-bit grid: {error}") from error
    return model


def _convert_gguf(file: Path) -> Path:
    """A float folder made once from a GGUF file, kept in the user's cache under the file's hash."""
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    cache = Path(os.environ.get("EDGE_FT_CACHE", Path.home() / ".cache" / "edge-ft"))
    folder = cache / f"gguf-{file_sha256(file)[:16]}"
    if folder.is_dir():
        return folder
    try:
        with quiet_libraries(), atomic_folder(folder) as temporary:
            # The family is checked on the header, before hundreds of MB are converted.
            family_of(AutoConfig.from_pretrained(file.parent, gguf_file=file.name).model_type, "text-generation")
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
            # Dequantized weights are plain floats: left there, the entry would make the next load pack them again.
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(temporary)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(temporary)
            licence = GGUFReader(file).get_field("general.license")
            if licence is not None:
                write_text(temporary / "README.md", f"---\nlicense: {licence.contents()}\n---\n")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ModelError(f"{file} cannot be read as a GGUF model: {error}") from error
    return folder


def _download(model: str) -> Path:
    """The local snapshot of a hub id."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    path = Path(model)
    looks_like_path = (
        path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or path.suffix == ".gguf"
    )
    neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = did_you_mean(path.name, neighbours)
    if looks_like_path or near:
        raise ModelError(f"there is no model at {model}{near}")
    try:
        header = Path(snapshot_download(model, allow_patterns=["config.json"]))
        # An architecture that cannot be used is said before its weights are downloaded.
        family_of(str(json.loads((header / "config.json").read_text(encoding="utf-8")).get("model_type")))
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "README.md"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{model} is neither a local folder nor a model that the hub serves: {reason}") from error
