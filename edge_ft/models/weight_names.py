"""Which tensor of a checkpoint is which parameter of a model."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from edge_ft.errors import ModelError
from edge_ft.models.checkpoint import Checkpoint
from edge_ft.quant.conversion import is_within

__all__ = ["Names", "match_names"]


@dataclass(frozen=True)
class Names:
    """Where each parameter of a model is in a checkpoint."""

    keys: dict[str, str]
    """Key in the checkpoint by the name of the parameter; a tied one is there once, by its first name."""
    missing: frozenset[str]
    """Parameters that the checkpoint lacks."""
    untied: dict[str, str]
    """Parameters that the config ties to another, named here, but whose tensor in the checkpoint is not the same."""
    unused: tuple[str, ...]
    """Keys of tensors that the model does not have."""


def match_names(model: Any, checkpoint: Checkpoint, new_head: tuple[str, ...]) -> Names:
    """Find the tensor of every parameter.

    Names may differ by transformers' own renamings, by the prefix of the body, which a checkpoint of the body alone
    lacks, and by one prefix before all names (`module.`, `base_model.model.`).

    Args:
        model: A transformers model, on the meta device.
        checkpoint: The tensors.
        new_head: Modules that may have other sizes in the checkpoint, where they are missing then.

    Returns:
        The names.

    Raises:
        ModelError: a parameter has two tensors, one of another shape, or one that cannot be read.
    """
    folder = checkpoint.folder
    names = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    candidates = _candidates(model, names, checkpoint)
    matched = {name: found[0] for name, found in candidates.items() if found}
    for name, found in candidates.items():
        if len(found) > 1:
            raise ModelError(f"{folder} holds {name} twice, as {found[0]} and {found[1]}: leave one")
        if found and found[0] in checkpoint.unreadable:
            raise ModelError(f"{folder}: {found[0]} {checkpoint.unreadable[found[0]]}: it cannot be read as a weight")
    untied, groups = _tied(model, matched, checkpoint)
    keys, missing = dict[str, str](), set[str]()
    for name, members in groups.items():
        key = next((matched[member] for member in members if member in matched), None)
        if key is None:
            missing.add(name)
            continue
        shape = checkpoint.tensors[key].shape
        if shape != names[name]:
            if not is_within(name, new_head):
                raise ModelError(
                    f"{folder}: {key} is {list(shape)} in the weights and {list(names[name])} by config.json: one of "
                    "them is of another model"
                )
            missing.add(name)
            continue
        keys[name] = key
    known = {key for found in candidates.values() for key in found} | set(matched.values())
    return Names(keys, frozenset(missing), untied, tuple(_unused(model, known, checkpoint)))


def _candidates(model: Any, names: dict[str, tuple[int, ...]], checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Return the keys that may be each parameter."""
    keys = [*checkpoint.tensors, *checkpoint.unreadable]
    renamings = [item for item in get_model_conversion_mapping(model) if type(item) is WeightRenaming]
    renamed: dict[str, list[str]] = {}
    for key in keys:
        renamed.setdefault(rename_source_key(key, renamings, [])[0], []).append(key)
    body = f"{model.base_model_prefix}."
    forms = {name: list(dict.fromkeys([name, name.removeprefix(body)])) for name in names}
    wrapper = _wrapper({form for found in forms.values() for form in found}, renamed)
    return {name: [key for form in found for key in renamed.get(wrapper + form, [])] for name, found in forms.items()}


def _wrapper(forms: set[str], keys: dict[str, list[str]]) -> str:
    """Return the prefix with which most of the names are keys: the empty one unless it is another's."""
    counts = Counter({"": sum(form in keys for form in forms)})
    for key in keys:
        parts = key.split(".")
        for start in range(1, len(parts)):
            if ".".join(parts[start:]) in forms:
                counts[".".join(parts[:start]) + "."] += 1
    most = max(counts.values())
    return min((prefix for prefix, count in counts.items() if count == most), key=len)


def _tied(
    model: Any, matched: dict[str, str], checkpoint: Checkpoint
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Return the parameters that are not tied after all, and the names of each parameter, those it is tied by as well.

    Weights that the config ties stay apart where their tensors differ (FLAN-T5's head), as in `from_pretrained`.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    untied, groups = dict[str, str](), dict[str, tuple[str, ...]]()
    for first, *others in names.values():
        group = [first, *others]
        anchor = next((name for name in group if name in matched), first)
        for name in group:
            if name in matched and name != anchor and checkpoint.differ(matched[anchor], matched[name]):
                untied[name] = anchor
                groups[name] = (name,)
        groups[first] = tuple(name for name in group if name not in untied)
    return untied, groups


def _unused(model: Any, known: set[str], checkpoint: Checkpoint) -> list[str]:
    """Return the keys that are no parameter, but for buffers that are computed and what transformers ignores."""
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"\.masked_bias$"]
    buffers = tuple(name for name, _ in model.named_buffers())
    return [
        key
        for key in [*checkpoint.tensors, *checkpoint.unreadable]
        if key not in known
        and not any(re.search(pattern, key) for pattern in ignored)
        and not any(name.endswith(key) or key.endswith(f".{name}") for name in buffers)
    ]
