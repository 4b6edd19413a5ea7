"""Checkpoints of a run: whole or not there, and only for the run that they are of.

`checkpoint/` in the run folder holds `state.safetensors` (weights, moments, scores) and `state.json`
(counters, settings, and what the run is of). A new one is written beside it and takes its place by
renaming: at any moment the older or the newer one is whole.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edge_ft.artifacts import file_sha256, write_json
from edge_ft.config import TuneConfig, as_plain
from edge_ft.data import Example
from edge_ft.errors import UsageError
from edge_ft.evaluate.scoring import RowScores
from edge_ft.tune.loop import Fit

__all__ = [
    "Checkpoint",
    "examples_sha256",
    "has_checkpoint",
    "read_checkpoint",
    "refuse_other",
    "remove_checkpoint",
    "same_settings",
    "write_checkpoint",
]

FORMAT = 1
NOT_COMPARED = {"out", "resume", "memory", "checkpoint_minutes", "checkpoint_steps", "allow", "show"}
"""Settings that do not change what is learned."""
BY_CONTENT = {"model", "data", "validation", "test"}
"""Names of things that may move: what they hold is compared instead."""
IDENTITY = {
    "content_sha256": "--model holds other weights than",
    "codes_sha256": "--model rounds to other codes than",
    "data_fingerprint": "--data holds other rows than",
    "rows": "--data is split otherwise than",
    "examples_sha256": "--data reads otherwise (another tokenizer or template) than",
}


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the rest of a run depends on."""

    identity: dict[str, Any]
    """What the run is of: values under the keys of IDENTITY, and the names of `model` and `data`."""
    config: dict[str, Any]
    """Its settings, resolved, as plain values."""
    metrics_bytes: int
    """Length of metrics.jsonl at that moment."""
    state: Fit
    """The loop's; `fit` goes on with this very object."""
    backend: dict[str, NDArray[Any]]

    @property
    def step(self) -> int:
        """Whole steps done."""
        return self.state.steps


def write_checkpoint(run: Path, checkpoint: Checkpoint) -> None:
    """Put a checkpoint in the place of the older one, which stays until this one is whole.

    Raises:
        OSError, SafetensorError: it could not be written; the older one is as it was.
    """
    place, new, old = _places(run)
    shutil.rmtree(new, ignore_errors=True)
    arrays = {f"backend.{name}": array for name, array in checkpoint.backend.items()}
    for name in ("base", "best"):
        scores: RowScores = getattr(checkpoint.state, name)
        arrays |= {f"{name}.{field}": getattr(scores, field) for field in ("nll", "tokens", "correct")}
        arrays[f"{name}.predicted"] = np.concatenate(scores.predicted)
    counters = {name: value for name, value in vars(checkpoint.state).items() if name not in ("base", "best")}
    try:
        new.mkdir()
        save_file(arrays, new / "state.safetensors")
        _sync(new / "state.safetensors")
        document = {
            "format": FORMAT,
            "step": checkpoint.state.steps,
            "identity": checkpoint.identity,
            "config": checkpoint.config,
            "metrics_bytes": checkpoint.metrics_bytes,
            "loop": {**counters, "last_nll": repr(checkpoint.state.last_nll)},
            "sha256": file_sha256(new / "state.safetensors"),
        }
        write_json(new / "state.json", document)  # last: with it the folder is whole
        _sync(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    _sync(run)
    shutil.rmtree(old, ignore_errors=True)


def has_checkpoint(run: Path) -> bool:
    """Whether a run can be gone on with."""
    return _whole(run) is not None


def read_checkpoint(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run folder.

    Raises:
        UsageError: it was written by another version, or changed since.
    """
    folder = _whole(run)
    if folder is None:
        return None
    document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if document["format"] != FORMAT:
        raise UsageError(f"{folder} is of checkpoint version {document['format']}, this edge-ft reads {FORMAT}")
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

    counters = document["loop"]
    counters["last_nll"] = float(counters["last_nll"])  # written as text: JSON has no NaN
    state = Fit(base=scores("base"), best=scores("best"), **counters)
    backend = {name.removeprefix("backend."): array for name, array in arrays.items() if name.startswith("backend.")}
    return Checkpoint(document["identity"], document["config"], document["metrics_bytes"], state, backend)


def remove_checkpoint(run: Path) -> None:
    """Remove what `write_checkpoint` may have left: the run is finished, or begins anew."""
    for folder in _places(run):
        shutil.rmtree(folder, ignore_errors=True)


def same_settings(config: TuneConfig, saved: Mapping[str, Any], run: Path) -> TuneConfig:
    """`config` with the saved value of every setting that it leaves open.

    Raises:
        UsageError: a setting that was given is not the saved one; the first such is named.
    """
    given, found = as_plain(config), {}
    for name, value in saved.items():
        if name not in given or name in NOT_COMPARED | BY_CONTENT or given[name] == value:
            continue
        if given[name] not in (None, "auto"):
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{run} was started with {flag} {_shown(value)} and not {_shown(given[name])}: "
                "go on with its own settings, or give another --out"
            )
        found[name] = value
    return replace(config, **found)


def refuse_other(saved: Mapping[str, Any], found: Mapping[str, Any], run: Path) -> None:
    """Raise UsageError when a value of `found` is not the saved one; what differs is named."""
    for name, what in IDENTITY.items():
        if name in found and found[name] != saved[name]:
            raise UsageError(
                f"{what} what {run} was started with ({saved['model']}, {saved['data']}): "
                "go on with these, or give another --out"
            )


def examples_sha256(splits: Mapping[str, Sequence[Example]]) -> str:
    """Hex sha256 of the token ids and labels of all rows, in their order."""
    digest = sha256()
    for examples in splits.values():
        for example in examples:
            for numbers in (example.input_ids, example.labels, example.token_type_ids, example.pair_ids):
                digest.update(np.array([len(numbers), *numbers], np.float64).tobytes())
    return digest.hexdigest()


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _places(run: Path) -> tuple[Path, Path, Path]:
    """The checkpoint, the one being written, and the one being replaced."""
    return run / "checkpoint", run / ".checkpoint.new", run / ".checkpoint.old"


def _whole(run: Path) -> Path | None:
    place, new, old = _places(run)
    # Between the two renamings there is no checkpoint/, but a new one that is whole.
    return next((folder for folder in (place, new, old) if (folder / "state.json").is_file()), None)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
