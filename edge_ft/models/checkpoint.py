"""Which files of a folder are its model, and how each of their tensors is read: one answer for every weight format."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edge_ft.errors import ModelError
from edge_ft.models.stored import Entry, Stored, find_stored
from edge_ft.utf8 import read_json

__all__ = ["Checkpoint", "open_checkpoint"]

SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
"""Weights in other formats, which are never loaded."""
METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "auto-round": "AutoRound",
    "hqq": "HQQ",
    "mxfp4": "MXFP4",
    "aqlm": "AQLM",
    "quip": "QuIP#",
}
"""What a value of `quant_method` is called, where that differs."""
READ = ("fp8", "fbgemm_fp8", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "compressed-tensors", "modelopt")
"""Values of `quant_method` whose weights can be read, at least in some of their formats."""
FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "dense")
"""Formats of compressed-tensors that store a number and a scale."""
CODES = {
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "W_q": "HQQ",
    "weight_blocks": "MXFP4",
    "lora_A": "",
    "lora_embedding_A": "",
    "modules_to_save": "",
}
"""Names in the keys of weights that cannot be read, and the method that writes them; of an adapter's, none."""
WAY_OUT = "give the float checkpoint that it was made from (its model card names it)"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder."""

    folder: Path
    files: tuple[Path, ...]
    """Those that hold the model."""
    tensors: dict[str, Stored]
    """How each tensor is read, by its key."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Why a tensor cannot be read, by its key, in words that follow the key."""
    notes: tuple[str, ...] = ()
    """What was left aside, or is read in a way that a user should know; a sentence each."""

    def differ(self, first: str, second: str) -> bool:
        """Return whether two tensors differ; a few rows of them are in memory at a time."""
        one, other = self.tensors[first], self.tensors[second]
        if one.shape != other.shape:
            return True
        parts = (slice(start, start + 4096) for start in range(0, one.shape[0] if one.shape else 1, 4096))
        return any(not torch.equal(one.read(rows), other.read(rows)) for rows in parts)

    def read(self, key: str, rows: slice, transposed: bool = False) -> Tensor:
        """Return rows of a tensor or of its transpose, float32.

        Raises:
            ModelError: the file cannot be read any more.
        """
        try:
            return self.tensors[key].read(rows, transposed)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ModelError(f"{key} in {self.tensors[key].entry.file} cannot be read: {error}") from error


def open_checkpoint(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """Find the files that are the model of a folder, and how their tensors are stored.

    An index decides; else `model.safetensors`, a complete set of shards, or the only safetensors file. Files beside
    them are not read. Only headers are read here.

    Args:
        folder: With config.json.
        config: Its content.

    Returns:
        The checkpoint.

    Raises:
        ModelError: no weights, pickled weights, a file that is missing or damaged, or weights that are quantized in a
            way that is not read.
    """
    quantized, method = _quantization(folder, config)
    files, index, notes = _model_files(folder)
    entries = _read_headers(folder, files, index, notes)
    for key in entries:
        for part, name in CODES.items():
            if part in key.split("."):
                _refuse_keys(folder, key, method or name)
    found = find_stored(entries, _block_size(quantized), method is not None)
    unreadable = {key: how for key, how in found.items() if isinstance(how, str)}
    for key, why in unreadable.items():
        if key.endswith(".weight") and entries[key].dtype not in ("BOOL", "I64"):
            stored = f"{method} weights: " if method else ""
            raise ModelError(f"{folder} holds {stored}{key}, which {why}: {WAY_OUT}")
    tensors = {key: how for key, how in found.items() if isinstance(how, Stored)}
    if any(type(how) is not Stored for how in tensors.values()):
        by = f" with {method}" if method else ""
        notes.append(
            f"{folder} is quantized{by}: its weights are read as float numbers, its activations are not rounded"
        )
    return Checkpoint(folder, files, tensors, unreadable, tuple(notes))


def _quantization(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return the settings with which a checkpoint was quantized, and what the method is called.

    Raises:
        ModelError: the method is not read.
    """
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings is None:
        for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
            if (folder / name).is_file():
                settings = read_json(folder / name, ModelError)
                settings = settings.get("quantization", settings) if isinstance(settings, dict) else settings
                default = {"quantize_config.json": "gptq", "quant_config.json": "awq"}.get(name, "modelopt")
                settings = {"quant_method": default, **settings} if isinstance(settings, dict) else settings
                break
        else:
            return {}, None
    if not isinstance(settings, dict):
        raise ModelError(f"{folder / 'config.json'} has a quantization_config that is not a JSON object")
    method = str(settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "unknown")).lower()
    name = METHODS.get(method, method)
    form = str(settings.get("format") or settings.get("quant_algo") or "")
    readable = method in READ
    if method == "compressed-tensors":
        groups = [group.get("format") or form for group in (settings.get("config_groups") or {}).values()]
        readable = all(each in FORMATS for each in groups or [form]) and not settings.get("transform_config")
        sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
        readable = readable and sparse == "dense"
    elif method == "modelopt":
        readable = form.upper().startswith("FP8")
    if not readable:
        raise ModelError(
            f"{folder} is quantized with {name}{f' ({form})' if form else ''}, which is not read: {WAY_OUT}"
        )
    return settings, name


def _block_size(quantized: dict[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale, where the config says it."""
    groups = (quantized.get("config_groups") or {}).values()
    sizes = [
        quantized.get("weight_block_size"),
        *((group.get("weights") or {}).get("block_structure") for group in groups),
    ]
    return next(((int(size[0]), int(size[1])) for size in sizes if isinstance(size, list) and len(size) == 2), None)


def _model_files(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None, list[str]]:
    """Return the files that hold the model, the index if there is one, and what is left aside.

    Raises:
        ModelError: there is no file, or it is not clear which ones count.
    """
    there, notes = sorted(file.name for file in folder.glob("*.safetensors")), list[str]()
    names, index = _indexed(folder, there, notes)
    if names is None:
        candidates = [name for name in there if name != ADAPTER]
        shards = {match[1]: int(match[3]) for name in candidates if (match := SHARD.fullmatch(name))}
        if SINGLE in candidates:
            names = [SINGLE]
        elif len(candidates) == 1 and not shards:
            names = candidates
        elif len(shards) == 1:
            ((stem, count),) = shards.items()
            width = len(next(match[2] for name in candidates if (match := SHARD.fullmatch(name))))
            names = [f"{stem}-{number:0{width}}-of-{count:0{width}}.safetensors" for number in range(1, count + 1)]
            if lost := [name for name in names if name not in there]:
                raise ModelError(f"{folder} lacks {lost[0]}, one of {count} parts of its weights: download it again")
        elif candidates:
            raise ModelError(
                f"{folder} holds {', '.join(candidates)} and no {INDEX} that says which ones are the model: leave one"
            )
        else:
            _refuse_without_weights(folder, there)
    assert names is not None
    if (folder / "adapter_config.json").is_file() or ADAPTER in there:
        notes.append(
            f"{folder} holds an adapter beside its weights (adapter_config.json): it is not applied; to apply it, give "
            "it as the adapter of a base"
        )
    left = [name for name in there if name not in names and name != ADAPTER]
    if left:
        why = (
            f"{INDEX} does not name {'it' if len(left) == 1 else 'them'}" if index is not None else f"{names[0]} counts"
        )
        notes.append(f"{folder}: {_some(left)} {'is' if len(left) == 1 else 'are'} not read, {why}")
    return tuple(folder / name for name in names), index, notes


def _indexed(folder: Path, there: list[str], notes: list[str]) -> tuple[list[str] | None, dict[str, str] | None]:
    """Return the files that the index names, and the file of each tensor; None twice where there is no index.

    Raises:
        ModelError: the index is damaged, or names a file that is not there.
    """
    found = [folder / INDEX] if (folder / INDEX).is_file() else sorted(folder.glob("*.safetensors.index.json"))
    if len(found) != 1:
        return None, None
    content = read_json(found[0], ModelError)
    index = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise ModelError(f"{found[0]} names no files of weights (weight_map): download it again")
    names = sorted(set(index.values()))
    lost = [name for name in names if name not in there]
    if len(lost) == len(names) and SINGLE in there:
        notes.append(f"{found[0]} is not read: none of its files is there, {SINGLE} is")
        return None, None
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ModelError(f"{folder} lacks {lost[0]}{more}, which {found[0].name} names: download it again")
    return names, index


def _refuse_without_weights(folder: Path, there: list[str]) -> None:
    """Refuse a folder in which no safetensors file is a model's.

    Raises:
        ModelError: always.
    """
    if ADAPTER in there or (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} holds an adapter and no model: give its base as the model, and it as --adapter")
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder} holds no *.safetensors weights, and {_some(pickled)} is never loaded (pickled weights can run "
            "code): save it once where you trust it, AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    raise ModelError(f"{folder} holds no *.safetensors weights: download or save them there")


def _read_headers(
    folder: Path, files: tuple[Path, ...], index: dict[str, str] | None, notes: list[str]
) -> dict[str, Entry]:
    """Return all tensors of the files that count: with an index, those that it names.

    Raises:
        ModelError: a file is damaged, or tensors are missing or twice there.
    """
    entries: dict[str, Entry] = {}
    unnamed = []
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a dict
                    if index is not None and index.get(key) != file.name:
                        unnamed.append(key)
                        continue
                    if key in entries:
                        raise ModelError(
                            f"{folder} holds {key} in {entries[key].file.name} and in {file.name}: leave one"
                        )
                    part = tensors.get_slice(key)
                    entries[key] = Entry(file, key, part.get_dtype(), tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read as safetensors: {error}") from error
    if lost := sorted(key for key in index or () if key not in entries):
        more = f" and {len(lost) - 1} more tensors" if len(lost) > 1 else ""
        raise ModelError(f"{folder}: {index[lost[0]] if index else ''} lacks {lost[0]}{more}, which the index names")
    if unnamed:
        notes.append(f"{folder}: {len(unnamed)} tensors of its files are not read, the index does not name them there")
    return entries


def _refuse_keys(folder: Path, key: str, method: str) -> None:
    """Refuse weights whose names say that they are codes, or a model with an adapter around it.

    Raises:
        ModelError: always.
    """
    if method:
        raise ModelError(f"{folder} is quantized with {method} ({key}), which is not read: {WAY_OUT}")
    raise ModelError(
        f"{folder} was saved with an adapter around its layers ({key}): save it after merge_and_unload(), or give the "
        "base as the model and the adapter as --adapter"
    )


def _some(names: list[str]) -> str:
    """The first three of some names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
