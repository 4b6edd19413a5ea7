"""Which adapter a bundle answers with, and the values of its graph's LoRA inputs.

Answering with the bundle's own adapter binds nothing: it is the defaults of the graph's inputs. ONNX Runtime silently
ignores its own `add_active_adapter` under IO binding, so inputs are bound by hand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.errors import UsageError, did_you_mean
from edge_ft.families import family_of
from edge_ft.utf8 import read_json

if TYPE_CHECKING:
    from edge_ft.adapter import Adapter

__all__ = ["Bound", "adapter_inputs", "bind", "given_inputs", "is_adapter_input", "neutral_shape"]

HEAD = "head."
"""Before the name of a parameter of a classifier's head."""
Values = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Bound:
    """A bundle that answers with a certain adapter."""

    bundle: Bundle
    """With the graphs that answer so, and how they read rows."""
    values: Values | None = None
    """By LoRA input, its value; one that is missing is none of the adapter's. None: the defaults of the graphs."""
    name: str = ""
    """The adapter, for messages."""


def bind(bundle: Bundle, adapter: str | Path | Values | None) -> Bound:
    """Find an adapter for a bundle.

    Args:
        bundle: An open bundle.
        adapter: None (the bundle's own adapter, if it has one), "none" (the base without an adapter), the name of an
            adapter in the bundle, or a folder: a run, or an adapter in PEFT's format; or the values of its inputs.

    Returns:
        What to open.

    Raises:
        UsageError: the bundle has no such adapter, or takes none.
    """
    manifest = bundle.manifest
    adapters: dict[str, Any] = manifest.get("adapters", {})
    names: dict[str, Any] = adapters.get("names", {})
    if isinstance(adapter, Mapping):
        return Bound(replace(bundle, manifest=_with_inputs(bundle)), adapter, "the adapter")
    if adapter is None or (adapter == adapters.get("default") and adapter in names):
        return Bound(bundle)
    if manifest["lane"] == "merged":
        action = "cannot remove it" if adapter == "none" else f"cannot take {adapter} instead"
        raise UsageError(
            f"{bundle.path} has its adapter merged into the weights, so --adapter {adapter} {action}: "
            "export the run with --lane adapter"
        )
    if adapter == "none":
        if "base" in adapters:
            return Bound(replace(bundle, manifest={**manifest, **adapters["base"]}))
        return Bound(bundle, {} if manifest["lane"] == "adapter" else None)
    values, rendering, name = _values(bundle, adapter, names)
    return Bound(replace(bundle, manifest={**_with_inputs(bundle), "rendering": rendering}), values, name)


def _values(bundle: Bundle, adapter: str | Path, names: Mapping[str, Any]) -> tuple[Values, dict[str, Any], str]:
    """Return an adapter's values, how it reads rows, and its name for messages.

    Raises:
        UsageError: there is none, it is more than A and B, or it was trained with other tokens.
    """
    own: dict[str, Any] = bundle.manifest["rendering"]
    if adapter in names:
        from safetensors.numpy import load_file

        entry = names[str(adapter)]
        return load_file(bundle.path / entry["file"]), entry.get("rendering", own), f"the adapter {adapter}"
    folder = Path(adapter).expanduser()
    if not folder.exists():
        known = ", ".join([*names, "none"])
        raise UsageError(
            f"--adapter {adapter}: there is no such folder{did_you_mean(str(adapter), [*names, 'none'])}; give a run "
            f"folder, an adapter in PEFT's format, or one of {known}"
        )
    from edge_ft.adapter import find_adapter

    found = find_adapter(RunFolder(folder).adapter if RunFolder(folder).adapter.is_dir() else folder)
    run = RunFolder(found.path.parent)
    if not (run.path / "rendering.json").is_file():
        return _values_of(found, bundle), own, f"the adapter {found.path}"
    rendering = run.rendering()
    if not _have_same_tokens(run.tokenizer, bundle.path):  # the rendering names tokens by id
        raise UsageError(
            f"{folder} was trained with other tokens than those of {bundle.path}: export it with its model, edge-ft "
            f"export {folder} --lane adapter"
        )
    return _values_of(found, bundle), rendering, f"the adapter {found.path}"


def _have_same_tokens(one: Path, other: Path) -> bool:
    """Whether the tokenizers of a run and a bundle have the same tokens under the same ids."""
    files = [folder / "tokenizer.json" for folder in (one, other)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return True
    found = [read_json(file) for file in files]
    tokens = [
        (each["model"]["vocab"], [(token["id"], token["content"]) for token in each["added_tokens"]]) for each in found
    ]
    return bool(tokens[0] == tokens[1])


def _values_of(adapter: "Adapter", bundle: Bundle) -> Values:
    """Return the values of a graph's inputs for an adapter.

    Raises:
        UsageError: it is more than A and B of linear layers and a head.
    """
    head = family_of(str(bundle.manifest["family"])).trained_head(bundle.task)  # type: ignore[arg-type]
    if beyond := adapter.beyond_lora_inputs(head):
        raise UsageError(
            f"the adapter {adapter.path} has {beyond}, which A and B beside the weights cannot hold: export it with "
            "its model, edge-ft export MODEL --adapter DIR"
        )
    pairs, whole = adapter.read()
    return {
        f"lora_{part}.{module}": value for module, pair in pairs.items() for part, value in zip("AB", pair, strict=True)
    } | {f"{HEAD}{name}": value for name, value in whole.items()}


def _with_inputs(bundle: Bundle) -> dict[str, Any]:
    """Return the manifest with the graphs that take any adapter.

    Raises:
        UsageError: the bundle has none.
    """
    manifest = bundle.manifest
    graphs: dict[str, str] = manifest.get("adapters", {}).get("graphs", {})
    if not graphs:
        if manifest["lane"] == "adapter":  # of an earlier version, whose own graphs take any
            return manifest
        raise UsageError(
            f"{bundle.path} has no graph that takes an adapter: export the model again, with weights int4, int8, fp16 "
            "or fp32"
        )
    level = next(level for level, path in manifest["graphs"].items() if path == manifest["model"])
    found = {**manifest, "graphs": graphs, "model": graphs.get(level) or next(iter(graphs.values()))}
    if "encoder_graphs" in manifest:
        found["encoder_graphs"] = manifest["adapters"]["encoder_graphs"]
    return found


def adapter_inputs(sessions: Sequence[ort.InferenceSession], bound: Bound) -> list[dict[str, NDArray[np.float32]]]:
    """Return the values of the LoRA inputs of the graphs of one model.

    Args:
        sessions: The graphs, each of which may hold some of the layers.
        bound: What `bind` returned.

    Returns:
        For each graph by input name, lora_A [rank, in_features] and lora_B [out_features, rank] of every layer;
        nothing where the defaults answer.

    Raises:
        UsageError: the adapter has a layer that no graph has, or one of another size.
    """
    if bound.values is None:
        return [{} for _ in sessions]
    shapes = [given_inputs(session) for session in sessions]
    known = {name: shape for each in shapes for name, shape in each.items()}
    for name, value in bound.values.items():
        if name not in known:
            last = sorted({layer.rpartition(".")[2] for layer in known if not layer.startswith(HEAD)})
            raise UsageError(
                f"{bound.name} has {name.partition('.')[2]}, which takes no adapter in {bound.bundle.path}: it takes "
                f"one on {', '.join(last)}; export the model with this adapter, edge-ft export MODEL --adapter DIR"
            )
        wanted = known[name]
        sizes = zip(wanted, value.shape, strict=False)
        if len(wanted) != value.ndim or any(isinstance(want, int) and want != size for want, size in sizes):
            raise UsageError(
                f"{bound.name} has {name} of shape {list(value.shape)}, {bound.bundle.path} "
                f"{[size if isinstance(size, int) else 'rank' for size in wanted]}: it is of another model"
            )
    found = [
        {name: _padded(name, each, bound.values) for name in each if name in bound.values or not name.startswith(HEAD)}
        for each in shapes
    ]
    for session, given in zip(sessions, found, strict=True):
        for node in session.get_inputs():
            if node.name.startswith(HEAD) and node.name not in given:
                raise UsageError(
                    f"{bound.name} lacks {node.name.removeprefix(HEAD)}, a part of the head of {bound.bundle.path}: "
                    "save it again with this module in modules_to_save"
                )
    return found


def given_inputs(session: ort.InferenceSession) -> dict[str, list[int | str]]:
    """Return the shape of each input of a graph that an adapter gives; a free dimension has a name."""
    nodes = (*session.get_inputs(), *session.get_overridable_initializers())
    return {node.name: node.shape for node in nodes if is_adapter_input(node.name)}


def is_adapter_input(name: str) -> bool:
    """Whether an input of a graph is A or B of an adapter, or a weight or bias of the head that comes with it."""
    return name.startswith(("lora_A.", "lora_B.", HEAD))


def neutral_shape(shape: Sequence[Any]) -> tuple[int, ...]:
    """Return the shape of an A or B of rank 0, with which a layer is that of the base."""
    return tuple(size if isinstance(size, int) else 0 for size in shape)


def _padded(name: str, shapes: Mapping[str, list[int | str]], values: Values) -> NDArray[np.float32]:
    """Return the value of an input, with zeros up to the rank of its graph.

    Graphs of an earlier version have one rank for all layers: the largest.
    """
    shape = shapes[name]
    ranks = {size for size in shape if not isinstance(size, int)}
    rank = max(
        (
            size
            for other, sizes in shapes.items()
            if other in values and ranks & set(sizes)
            for want, size in zip(sizes, values[other].shape, strict=True)
            if want in ranks
        ),
        default=0,
    )
    padded = np.zeros([size if isinstance(size, int) else rank for size in shape], np.float32)
    value = values.get(name)
    if value is not None:
        padded[tuple(map(slice, value.shape))] = value
    return padded
