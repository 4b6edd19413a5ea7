"""Checkpoints of a run: written whole or not at all.

`checkpoint/` in the run folder holds `state.safetensors` (weights, moments, scores) and `state.json` (counters,
settings, and the identity of model and rows). A new one is written beside it and then renamed: at any moment the
older or the newer one is whole.
"""

import json
import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edge_ft.artifacts import atomic_folder, file_sha256, write_json
from edge_ft.errors import UsageError
from edge_ft.evaluate.scoring import RowScores
from edge_ft.tune.loop import Fit

__all__ = ["Checkpoint", "find_checkpoint", "read_checkpoint", "remove_checkpoint", "write_checkpoint"]

FORMAT = 1
STORED_NAMES = {"evaluations_without_gain": "bad_looks", "evaluation_due": "look_due"}
"""Fields of `Fit` that have other names in state.json of format 1."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the rest of a run depends on."""

    identity: dict[str, Any]
    """`Job.identity`, and `codes_sha256` of the model."""
    config: dict[str, Any]
    """The resolved settings, as plain values."""
    metrics_bytes: int
    """Length of metrics.jsonl at that moment."""
    state: Fit
    """Of the loop."""
    backend: dict[str, NDArray[Any]]
    """What `Backend.restore` takes."""


def write_checkpoint(run: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint of a run folder; the older one stays until this one is whole.

    Args:
        run: The run folder.
        checkpoint: What to write.

    Raises:
        OSError: it could not be written (safetensors raises its own SafetensorError); the older one is unchanged.
    """
    place, new, old = _places(run)
    shutil.rmtree(new, ignore_errors=True)
    arrays = {f"backend.{name}": array for name, array in checkpoint.backend.items()}
    for name in ("base", "best"):
        scores: RowScores = getattr(checkpoint.state, name)
        arrays |= {f"{name}.{field}": getattr(scores, field) for field in ("nll", "tokens", "correct")}
        arrays[f"{name}.predicted"] = np.concatenate(scores.predicted)
    state = vars(checkpoint.state)
    counters = {STORED_NAMES.get(name, name): state[name] for name in state if name not in ("base", "best")}
    with atomic_folder(new) as folder:
        save_file(arrays, folder / "state.safetensors")
        _sync(folder / "state.safetensors")
        document = {
            "format": FORMAT,
            "step": checkpoint.state.steps,
            "identity": checkpoint.identity,
            "config": checkpoint.config,
            "metrics_bytes": checkpoint.metrics_bytes,
            "loop": {**counters, "last_nll": repr(checkpoint.state.last_nll)},
            "sha256": file_sha256(folder / "state.safetensors"),
        }
        write_json(folder / "state.json", document)
        _sync(folder)
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    _sync(run)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(run: Path) -> Path | None:
    """Return the folder of the newest whole checkpoint of a run folder; None where there is none."""
    # Between the two renamings there is no checkpoint/, but the new one is whole.
    return next((folder for folder in _places(run) if (folder / "state.json").is_file()), None)


def read_checkpoint(run: Path) -> Checkpoint | None:
    """Read the newest whole checkpoint of a run folder.

    Args:
        run: The run folder.

    Returns:
        The checkpoint; None where there is none.

    Raises:
        UsageError: it was written by another version, or was changed since.
    """
    folder = find_checkpoint(run)
    if folder is None:
        return None
    document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if document["format"] != FORMAT:
        raise UsageError(f"{folder} has checkpoint version {document['format']}, this edge-ft reads {FORMAT}")
    weights = folder / "state.safetensors"
    try:
        if file_sha256(weights) != document["sha256"]:
            raise UsageError(f"{weights} is not the file that was written: remove {folder} to start at step 0")
        arrays = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{weights} cannot be read ({error}): remove {folder} to start at step 0") from error

    def scores(name: str) -> RowScores:
        nll, tokens, correct, predicted = (
            arrays[f"{name}.{field}"] for field in ("nll", "tokens", "correct", "predicted")
        )
        return RowScores(nll, tokens, correct, np.split(predicted, np.cumsum(tokens)[:-1]))

    names = [field.name for field in fields(Fit) if field.name not in ("base", "best")]
    counters = {name: document["loop"][STORED_NAMES.get(name, name)] for name in names}
    counters["last_nll"] = float(counters["last_nll"])  # written as text: JSON has no NaN
    state = Fit(base=scores("base"), best=scores("best"), **counters)
    backend = {name.removeprefix("backend."): array for name, array in arrays.items() if name.startswith("backend.")}
    return Checkpoint(document["identity"], document["config"], document["metrics_bytes"], state, backend)


def remove_checkpoint(run: Path) -> None:
    """Remove all that `write_checkpoint` may have left in a run folder."""
    for folder in _places(run):
        shutil.rmtree(folder, ignore_errors=True)


def _places(run: Path) -> tuple[Path, Path, Path]:
    """The checkpoint, the newer one that replaces it, and the older one until it is removed."""
    return run / "checkpoint", run / ".checkpoint.new", run / ".checkpoint.old"


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
