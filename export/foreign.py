"""An adapter that was trained elsewhere: whether it fits the model and the lane, and what it brings besides A and B."""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from edge_ft.adapter import Adapter
from edge_ft.config import Task
from edge_ft.data import TextTokenizer
from edge_ft.errors import ModelError
from edge_ft.models.base_model import Base

__all__ = ["adapter_provenance", "check_adapter", "unknown_settings"]


def open_tokenizer(adapter: Adapter, base: Base) -> TextTokenizer:
    """Return the tokenizer that an adapter was trained with: its files win over the base's where it has them.

    Raises:
        ModelError: a file cannot be read, or there are no weights for a token.
    """
    known = base.known_ids
    known = replace(known, tokens=adapter.vocabulary(known.tokens))
    try:
        return TextTokenizer.load(base.path, known, adapter.path)
    except ModelError as error:
        unchecked = TextTokenizer.load(base.path, over=adapter.path)  # raises the same where a file cannot be read
        if not (adapter.path / "tokenizer.json").is_file() or unchecked.vocab_size <= known.tokens:
            raise
        raise ModelError(
            f"the tokenizer of the adapter {adapter.path} has {unchecked.vocab_size} tokens, the model {known.tokens}: "
            "the weights of the new ones were not saved, save the adapter again with "
            "save_pretrained(DIR, save_embedding_layers=True)"
        ) from error


def check_adapter(adapter: Adapter, base: Base, task: Task, lane: str, tokenizer: TextTokenizer) -> tuple[str, ...]:
    """Refuse an adapter that the lane cannot hold or whose tokens have no weights, before any weights are loaded.

    Args:
        adapter: The adapter.
        base: The model that it is put on.
        task: Of the bundle.
        lane: merged or adapter.
        tokenizer: What the bundle ships: the adapter's own where it has one.

    Returns:
        What the user should know, one sentence each: which adapter, what of it wins over the base, and doubts.

    Raises:
        ModelError: it cannot be used; the message says with what it can.
    """
    own = base.dims.vocabulary
    size = adapter.vocabulary(own)
    beyond = adapter.beyond_lora_inputs(base.family.trained_head(task))
    if beyond is None and size != own:
        beyond = f"a vocabulary of {size} tokens where the base has {own}"
    if lane == "adapter" and beyond is not None:
        raise ModelError(
            f"the adapter {adapter.path} has {beyond}, which A and B beside the weights cannot hold: use --lane merged"
        )
    for module in base.family.trained_head(task):
        names = module, module.removeprefix(f"{base.family.layers.partition('.')[0]}.")
        whole = (name for name in adapter.shapes if ".lora_" not in name)
        saved = any(name.startswith(f"base_model.model.{module}.") for name in whole)
        if not saved and not any(key.startswith(f"{name}.") for key in base.checkpoint.tensors for name in names):
            raise ModelError(
                f"neither {base.path} nor the adapter {adapter.path} has the weights of {module}, which {task} needs: "
                "save the adapter again with this module in modules_to_save"
            )
    return tuple(_notes(adapter, base, tokenizer))


def unknown_settings(adapter: Adapter) -> list[str]:
    """Return the fields of the config, with a value, that the installed PEFT does not know: a newer one wrote them."""
    from peft import LoraConfig

    known = {field.name for field in fields(LoraConfig)} | {"auto_mapping", "peft_version"}
    return sorted(name for name, value in adapter.config.items() if value and name not in known)


def _notes(adapter: Adapter, base: Base, tokenizer: TextTokenizer) -> list[str]:
    brings = _brings(adapter, base, tokenizer)
    notes = [f"adapter {adapter.path}" + (f": its own {', '.join(brings)} win over the model's" if brings else "")]
    if adapter.trained_on and not _same_model(adapter.trained_on, base):
        notes.append(
            f"the adapter was trained on {adapter.trained_on} and is put on {base.name}: if these are different "
            "models, the result is wrong"
        )
    if unknown := unknown_settings(adapter):
        notes.append(
            f"adapter_config.json has settings that this PEFT does not know ({', '.join(unknown)}): they are ignored, "
            "a newer PEFT may compute something else"
        )
    return notes


def _brings(adapter: Adapter, base: Base, tokenizer: TextTokenizer) -> list[str]:
    """Return what of the adapter's folder is not the base's."""
    plain = TextTokenizer.load(base.path) if (base.path / "tokenizer.json").is_file() else None
    found = []
    if (adapter.path / "tokenizer.json").is_file() and (
        plain is None or not _same_file(adapter.path / "tokenizer.json", base.path / "tokenizer.json")
    ):
        found.append(f"tokenizer ({tokenizer.vocab_size} tokens)")
    if plain is not None:
        if tokenizer.chat_template != plain.chat_template:
            found.append("chat template")
        end = tokenizer.special_tokens.get("eos_token")
        if end != plain.special_tokens.get("eos_token"):
            found.append(f"end of a text ({end})")
    if (adapter.path / "generation_config.json").is_file():
        found.append("generation settings")
    if adapter.class_names:
        found.append("class names")
    if (size := adapter.vocabulary(base.dims.vocabulary)) != base.dims.vocabulary:
        found.append(f"vocabulary of {size} tokens")
    return found + [f"{name}" for name in adapter.config.get("modules_to_save") or ()]


def _same_file(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _same_model(trained_on: str, base: Base) -> bool:
    """Return whether a recorded name or path can mean this base: by its last part, in whatever form it was loaded."""
    if Path(trained_on).is_dir() and Path(trained_on).resolve() == base.path.resolve():
        return True
    names = (base.name, str(base.path), str(base.config.get("_name_or_path") or ""))
    return _short_name(trained_on) in {_short_name(name) for name in names if name}


def _short_name(model: str) -> str:
    """Return the name of a model without its owner, folders, quantization and file ending."""
    cached = re.search(r"models--[^/]+--([^/]+)", model)
    name = cached[1] if cached else re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    name = name.lower().replace("_", "-")
    return re.sub(r"(\.gguf|[-.](i?q\d\w*|bf16|f16|f32)|-unsloth|-bnb-4bit|-(awq|gptq)\w*)+$", "", name)


def adapter_provenance(adapter: Adapter | None, notes: tuple[str, ...]) -> dict[str, Any]:
    """Return `adapter` of the manifest's provenance: what there is to say of one that was trained elsewhere, if any."""
    if adapter is None or not notes:
        return {}
    found = {"path": str(adapter.path), "sha256": adapter.sha256, "trained_on": adapter.trained_on}
    return {"adapter": {**found, "notes": list(notes)}}
