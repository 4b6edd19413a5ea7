"""Checkpoints of a run, written whole or not at all, and how a run folder is opened to resume from one.

`checkpoint/` in the run folder holds `state.safetensors` (weights, moments, scores) and `state.json` (counters,
settings, and the identity of model and rows). A new one is written beside it and then renamed: at any moment the
older or the newer one is whole.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, get_type_hints

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edge_ft.artifacts import RunFolder
from edge_ft.config import Minimum, TuneConfig, as_plain, misfit, without_retired
from edge_ft.errors import Interrupted, UsageError, WillNotFit
from edge_ft.evaluate.scoring import RowScores
from edge_ft.files import (
    atomic_folder,
    disk_full,
    file_sha256,
    is_as_sealed,
    out_of_memory,
    refuse_existing,
    seal,
    write_json,
)
from edge_ft.quant.blockwise import Grid
from edge_ft.tune.loop import Fit
from edge_ft.utf8 import read_json

__all__ = [
    "FINISH",
    "REPORT_PARTS",
    "Checkpoint",
    "OpenedRun",
    "explain_stop",
    "find_checkpoint",
    "finished_note",
    "open_run",
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
NOT_COMPARED = {"out", "resume", "memory", "checkpoint_minutes", "checkpoint_steps", "allow", "show", "include_samples"}
"""Settings that do not change what is learned."""
BY_CONTENT = {"model", "data", "validation", "test"}
"""Names of things that may move: their content is compared instead."""


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


@dataclass(frozen=True)
class OpenedRun:
    """A run folder, and what an interrupted run left in it."""

    folder: RunFolder
    config: TuneConfig
    """The given settings; what they leave open is as the interrupted run resolved it."""
    checkpoint: Checkpoint | None = None
    is_new: bool = False
    """Whether the folder does not exist yet."""
    is_finished: bool = False
    """Whether the run in it has ended: then nothing is left to do."""

    @property
    def identity(self) -> dict[str, Any] | None:
        """`Job.identity` of the interrupted run, if it left a checkpoint."""
        return self.checkpoint.identity if self.checkpoint is not None else None

    @property
    def codes(self) -> Path | None:
        """The file with the int4 codes, if the interrupted run has chosen them."""
        return self.folder.codes if self.folder.codes.is_file() else None

    @property
    def grid(self) -> Grid | None:
        """How the interrupted run rounds weights, if it has begun."""
        return Grid.recorded(self.folder.base()) if (self.folder.path / "base.json").is_file() else None

    @property
    def resumed_from(self) -> int | None:
        """Step at which training starts; None in a new folder."""
        if self.checkpoint is not None:
            return self.checkpoint.state.steps
        return None if self.is_new else 0


def open_run(config: TuneConfig) -> OpenedRun:
    """Find out whether --out is a new run folder or that of an interrupted run; nothing is created.

    Args:
        config: As the user gave it.

    Returns:
        The folder with its settings and its checkpoint.

    Raises:
        UsageError: the folder exists and may not be resumed, its checkpoint cannot be read, or a given setting is
            not that of the interrupted run.
    """
    out, run = config.out, RunFolder(config.out)
    if not config.resume:
        if find_checkpoint(out) and not run.report_path.is_file():
            raise UsageError(
                f"{out} exists already and holds an unfinished run: resume it with --resume, or give another --out"
            )
        refuse_existing(out)
    if run.report_path.is_file():
        run.check_files()
        return OpenedRun(run, config, is_finished=True)
    if not out.exists():
        return OpenedRun(run, config, is_new=True)
    if not run.is_begun():
        raise UsageError(f"--resume: {out} is not a run folder: give another --out")
    for left in out.glob(".*.tmp"):  # of a process that was killed while it wrote
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    run.check_files("base.json", "codes.safetensors")
    checkpoint = read_checkpoint(out)
    if checkpoint is not None:
        _check_metrics(out / "metrics.jsonl", checkpoint)
        return OpenedRun(run, _complete(config, checkpoint.config), checkpoint)
    # Stopped before its first checkpoint: what was learned is lost, the resolved settings are not.
    run.check_files("config.yaml")
    for folder in (run.adapter, out / "checkpoint"):
        shutil.rmtree(folder, ignore_errors=True)
    return OpenedRun(run, _complete(config, run.settings()))


def _check_metrics(file: Path, checkpoint: Checkpoint) -> None:
    """Refuse a log whose lines are not those that the interrupted run wrote.

    Raises:
        UsageError: they are not.
    """
    if checkpoint.metrics_sha256 is None or not file.is_file():
        return
    with file.open("rb") as log:
        written = log.read(checkpoint.metrics_bytes)
    if sha256(written).hexdigest() != checkpoint.metrics_sha256:
        raise UsageError(f"{file} is not the file that was written: remove it to resume without its earlier lines")


def finished_note(config: TuneConfig) -> str:
    """Say that --resume changes nothing in the finished run at `config.out`, and which given settings are not its own.

    Returns:
        The note.
    """
    differences = ", ".join(_differences(config, RunFolder(config.out).settings()))
    other = f"; it was trained with {differences}: give another --out to train again" if differences else ""
    return f"{config.out} is finished: nothing was changed{other}"


@contextmanager
def explain_stop(opened: OpenedRun, is_main: bool) -> Iterator[None]:
    """If this block is interrupted or fails, say which files are saved and how to resume.

    A new folder is removed if nothing was learned: the same command can then be given again.

    Args:
        opened: The run folder.
        is_main: Whether this is the main process. The others explain and remove nothing: the main process may still
            be writing when they stop.

    Yields:
        Nothing.

    Raises:
        Interrupted: in place of a KeyboardInterrupt.
        WillNotFit: the disk or the GPU's memory is full.
    """
    run = opened.folder
    resume = f"edge-ft tune --config {shlex.quote(str(run.config_path))} --resume"
    try:
        yield
    except Exception as error:
        if opened.is_new and is_main and not (run.adapter.is_dir() or find_checkpoint(run.path)):
            shutil.rmtree(run.path, ignore_errors=True)
        again = f"run {resume}" if run.config_path.is_file() else "run the same command again"
        if disk_full(error):
            raise WillNotFit(f"the disk is full and training stopped: free some space, then {again}") from error
        if _gpu_is_full(error):
            raise WillNotFit(
                "the GPU's memory is too small for this run: give a smaller --batch-size or --max-length, or "
                "--memory low"
            ) from error
        if out_of_memory(error):
            raise WillNotFit(
                "there is not enough memory for this run: give a smaller --batch-size or --max-length, or --memory "
                f"low; what was saved is whole: with more memory, {again}"
            ) from error
        raise
    except KeyboardInterrupt:
        raise Interrupted(_stopped(run, resume) if is_main else "stopped") from None


def _gpu_is_full(error: Exception) -> bool:
    """Return whether torch says so; without torch there is no GPU."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _stopped(run: RunFolder, resume: str) -> str:
    """Return the sentence after a signal: what is saved, and how to go on."""
    if not run.config_path.is_file():
        return "stopped; nothing is saved yet: the same command starts again"
    saved = f"the best adapter so far is in {run.adapter}" if run.adapter.is_dir() else "no adapter is saved yet"
    checkpoint = read_checkpoint(run.path)
    if checkpoint is None:
        return f"stopped; {saved}; to start again from step 0, without a checkpoint: {resume}"
    state = checkpoint.state
    if not state.evaluation_due and (state.steps >= state.planned or state.stopped != "steps"):
        saved += ", the training is finished, and what is done of the report is kept"
    return f"stopped; {saved}; to resume from step {state.steps}: {resume}"


def _complete(config: TuneConfig, saved: Mapping[str, Any]) -> TuneConfig:
    """Fill the settings that `config` leaves open with the saved ones.

    Returns:
        The settings.

    Raises:
        UsageError: a given setting is not the saved one; the first such is named.
    """
    saved = without_retired(saved, config.out)
    if differences := _differences(config, saved):
        raise UsageError(
            f"{config.out} was started with {differences[0]}: resume it with its own settings, or give another --out"
        )
    known = {name: value for name, value in saved.items() if name in _compared(config)}
    return replace(config, **{"memory": config.memory or saved.get("memory"), **known})


def _differences(config: TuneConfig, saved: Mapping[str, Any]) -> list[str]:
    """Each setting that is given and not the saved one, as text."""
    return [
        f"--{name.replace('_', '-')} {_shown(saved[name])} and not {_shown(value)}"
        for name, value in _compared(config).items()
        if name in saved and value not in (None, "auto", saved[name])
    ]


def _compared(config: TuneConfig) -> dict[str, Any]:
    return {name: value for name, value in as_plain(config).items() if name not in NOT_COMPARED | BY_CONTENT}


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
