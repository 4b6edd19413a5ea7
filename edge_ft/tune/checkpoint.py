"""Checkpoints of a run, written whole or not at all.

`checkpoint/` in the run folder holds `state.safetensors` (weights, moments, scores) and `state.json` (counters,
settings, and the identity of model and rows). A new one is written beside it and then renamed: at any moment the
older or the newer one is whole.
"""

import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, get_type_hints

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edge_ft.config import Minimum, misfit
from edge_ft.errors import UsageError
from edge_ft.evaluate.scoring import RowScores
from edge_ft.files import (
    atomic_folder,
    file_sha256,
    is_as_sealed,
    out_of_memory,
    seal,
    write_json,
)
from edge_ft.tune.loop import Fit
from edge_ft.utf8 import read_json

__all__ = [
    "FINISH",
    "REPORT_PARTS",
    "Checkpoint",
    "find_checkpoint",
    "read_checkpoint",
    "remove_checkpoint",
    "write_checkpoint",
]

FORMAT = 1
REPORT_PARTS = ".report"
"""Folder in the run folder for the parts of the report that are done, until all are."""
FINISH = ".finish"
"""Folder in the run folder for the finishing phase, until it is done."""
SCORES = ("base", "best")
"""Fields of `Fit` that state.safetensors holds."""
STORED_NAMES = {"evaluations_without_gain": "bad_looks", "evaluation_due": "look_due"}
"""Fields of `Fit` that have other names in state.json of format 1."""


class _Document(TypedDict):
    """state.json."""

    sha256: str
    metrics_bytes: Annotated[int, Minimum(0)]
    metrics_sha256: NotRequired[str | None]
    identity: dict[str, Any]
    config: dict[str, Any]
    loop: dict[str, Any]


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
    metrics_sha256: str | None = None
    """Of the first `metrics_bytes` of metrics.jsonl; None in a checkpoint of an earlier release."""


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
    state = checkpoint.state
    for name, scores in (("base", state.base), ("best", state.best)):
        arrays |= {f"{name}.{field}": array for field, array in scores.to_arrays().items()}
    counters = {STORED_NAMES.get(name, name): value for name, value in vars(state).items() if name not in SCORES}
    with atomic_folder(new) as folder:
        save_file(arrays, folder / "state.safetensors")
        _sync(folder / "state.safetensors")
        document = {
            "format": FORMAT,
            "step": state.steps,
            "identity": checkpoint.identity,
            "config": checkpoint.config,
            "metrics_bytes": checkpoint.metrics_bytes,
            "metrics_sha256": checkpoint.metrics_sha256,
            "loop": {**counters, "last_nll": repr(state.last_nll)},
            "sha256": file_sha256(folder / "state.safetensors"),
        }
        write_json(folder / "state.json", seal(document))
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
        OSError: there is not enough memory for it; safetensors has an error of its own.
    """  # noqa: DOC501 - that is the SafetensorError
    folder = find_checkpoint(run)
    if folder is None:
        return None
    document = _read_state(folder)
    weights = folder / "state.safetensors"
    try:
        if file_sha256(weights) != document["sha256"]:
            raise UsageError(f"{weights} is not the file that was written: remove {folder} to start at step 0")
        arrays = load_file(weights)
    except (OSError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise UsageError(f"{weights} cannot be read ({error}): remove {folder} to start at step 0") from error

    names = [field.name for field in fields(Fit) if field.name not in SCORES]
    counters = {name: document["loop"][STORED_NAMES.get(name, name)] for name in names}
    parts: dict[str, dict[str, NDArray[Any]]] = {"backend": {}}  # of the arrays, by what stands before the first dot
    for name, array in arrays.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = array
    state = Fit(base=RowScores.from_arrays(parts["base"]), best=RowScores.from_arrays(parts["best"]), **counters)
    log = document.get("metrics_sha256")
    return Checkpoint(document["identity"], document["config"], document["metrics_bytes"], state, parts["backend"], log)


def _read_state(folder: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint.

    Raises:
        UsageError: it is of another version, or damaged.
    """
    file, again = folder / "state.json", f"remove {folder} to start at step 0"
    document: dict[str, Any] = read_json(file, advice=again)
    version = document.get("format") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not is_as_sealed(file, document):
        raise UsageError(f"{file} is not the file that was written: {again}")
    if version != FORMAT:
        raise UsageError(f"{folder} has checkpoint version {version}, this edge-ft reads {FORMAT}")
    if found := misfit(document, _Document, "it") or _misfit_of_counters(document["loop"]):
        raise UsageError(f"{file} is damaged: {found}; {again}")
    return document


def _misfit_of_counters(loop: dict[str, Any]) -> str | None:
    """Make a number of `last_nll`, in place; return what is missing or of another type among the loop's counters."""
    try:
        loop["last_nll"] = float(loop["last_nll"])  # written as text: JSON has no NaN
    except (KeyError, TypeError, ValueError):
        return "it has no number last_nll"
    hints = {STORED_NAMES.get(name, name): hint for name, hint in get_type_hints(Fit).items()}
    for name, hint in hints.items():
        if name in (*SCORES, "last_nll"):
            continue
        if name not in loop:
            return f"it lacks {name}"
        if found := misfit(loop[name], Annotated[hint, Minimum(0)] if hint in (int, float) else hint, name):
            return found
    return None


def remove_checkpoint(run: Path) -> None:
    """Remove all that `write_checkpoint` may have left in a run folder."""
    for folder in (*_places(run), run / REPORT_PARTS, run / FINISH):
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
