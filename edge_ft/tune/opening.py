"""How a run folder is opened, new or to resume, and what is said when a run stops."""

import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from edge_ft.artifacts import RunFolder
from edge_ft.config import TuneConfig, as_plain, without_retired
from edge_ft.errors import Interrupted, UsageError, WillNotFit
from edge_ft.files import disk_full, out_of_memory, refuse_existing
from edge_ft.quant.blockwise import Grid
from edge_ft.tune.checkpoint import Checkpoint, find_checkpoint, read_checkpoint

__all__ = ["NOT_COMPARED", "OpenedRun", "explain_stop", "finished_note", "open_run"]

NOT_COMPARED = {"out", "resume", "memory", "checkpoint_minutes", "checkpoint_steps", "allow", "show", "include_samples"}
"""Settings that do not change what is learned."""
BY_CONTENT = {"model", "data", "validation", "test"}
"""Names of things that may move: their content is compared instead."""


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
        return Grid.recorded(self.folder.base()) if self.folder.base_path.is_file() else None

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
    run.check_files(run.base_path.name, run.codes.name, run.vocabulary.name)
    checkpoint = read_checkpoint(out)
    if checkpoint is not None:
        _check_metrics(run.metrics_path, checkpoint)
        return OpenedRun(run, _complete(config, checkpoint.config), checkpoint)
    # Stopped before its first checkpoint: what was learned is lost, the resolved settings are not.
    run.check_files(run.config_path.name)
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
