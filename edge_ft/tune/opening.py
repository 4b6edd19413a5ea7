"""How a run begins: in a new folder, or in the folder of an interrupted run of the same model, rows and settings."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from edge_ft.artifacts import RunFolder, refuse_existing
from edge_ft.config import TuneConfig, as_plain, without_retired
from edge_ft.data import Example
from edge_ft.errors import UsageError, require
from edge_ft.tune.checkpoint import Checkpoint, has_checkpoint, read_checkpoint
from edge_ft.tune.job import Job

__all__ = ["OpenedRun", "identity_of", "open_run"]

NOT_COMPARED = {"out", "resume", "memory", "checkpoint_minutes", "checkpoint_steps", "allow", "show"}
"""Settings that do not change what is learned."""
BY_CONTENT = {"model", "data", "validation", "test"}
"""Names of things that may move: their content is compared instead."""
IDENTITY = {
    "content_sha256": "--model holds other weights",
    "codes_sha256": "--model rounds to other codes",
    "data_fingerprint": "--data holds other rows",
    "rows": "--data is split differently",
    "examples_sha256": "--data reads differently (another tokenizer or template)",
}
"""Values of a run's identity that must not change, and the message if they do."""


@dataclass(frozen=True)
class OpenedRun:
    """A run folder, and what an interrupted run left in it."""

    folder: RunFolder
    is_new: bool
    """Whether the folder does not exist yet."""
    settings: Mapping[str, Any] | None = None
    """Resolved settings of the interrupted run, as plain values."""
    checkpoint: Checkpoint | None = None
    is_finished: bool = False
    """Whether the run in it has ended: then nothing is left to do."""

    @property
    def elapsed(self) -> float:
        """Wall seconds of training and validation up to the checkpoint."""
        return self.checkpoint.state.elapsed if self.checkpoint is not None else 0.0

    @property
    def resumed_from(self) -> int | None:
        """Step at which training starts; None in a new folder."""
        if self.checkpoint is not None:
            return self.checkpoint.step
        return None if self.is_new else 0

    def complete(self, config: TuneConfig) -> TuneConfig:
        """Fill the settings that `config` leaves open with those of the interrupted run.

        Args:
            config: As the user gave it.

        Returns:
            The settings to train with.

        Raises:
            UsageError: a given setting is not the interrupted run's; the first such is named.
        """
        if self.settings is None:
            return config
        given, found = as_plain(config), {}
        for name, value in without_retired(self.settings, self.folder.path).items():
            if name not in given or name in NOT_COMPARED | BY_CONTENT or given[name] == value:
                continue
            if given[name] not in (None, "auto"):
                flag = "--" + name.replace("_", "-")
                raise UsageError(
                    f"{self.folder.path} was started with {flag} {_shown(value)} and not {_shown(given[name])}: "
                    "resume it with its own settings, or give another --out"
                )
            found[name] = value
        return replace(config, **found)

    def refuse_other(self, identity: Mapping[str, Any]) -> None:
        """Refuse a model or rows that are not those of the checkpoint.

        Args:
            identity: Some or all of the values of `identity_of`.

        Raises:
            UsageError: one of them differs; the message names it.
        """
        if self.checkpoint is None:
            return
        saved = self.checkpoint.identity
        for name, what in IDENTITY.items():
            if name in identity and identity[name] != saved[name]:
                raise UsageError(
                    f"{what} than at the start of {self.folder.path} ({saved['model']}, {saved['data']}): "
                    "resume it with the same model and rows, or give another --out"
                )


def open_run(out: Path, resume: bool) -> OpenedRun:
    """Find out whether `out` is a new run folder or that of an interrupted run; nothing is created.

    Args:
        out: The run folder.
        resume: Whether an interrupted run may be resumed.

    Returns:
        The folder with the settings and the checkpoint in it.

    Raises:
        UsageError: the folder exists and may not be resumed, or its checkpoint cannot be read.
    """
    run = RunFolder(out)
    if resume and run.report_path.is_file():
        return OpenedRun(run, is_new=False, is_finished=True)
    if not resume:
        if has_checkpoint(out) and not run.report_path.is_file():
            raise UsageError(
                f"{out} exists already and holds an unfinished run: resume it with --resume, or give another --out"
            )
        refuse_existing(out)
    if not out.exists():
        return OpenedRun(run, is_new=True)
    if not run.is_begun():
        raise UsageError(f"--resume: {out} is not a run folder: give another --out")
    for left in out.glob(".*.tmp"):  # of a process that was killed while it wrote
        if left.is_file():
            left.unlink(missing_ok=True)
    checkpoint = read_checkpoint(out)
    if checkpoint is not None:
        return OpenedRun(run, False, checkpoint.config, checkpoint)
    # Stopped before its first checkpoint: what was learned is lost, the resolved settings are not.
    for folder in (run.adapter, out / "checkpoint"):
        shutil.rmtree(folder, ignore_errors=True)
    if not run.config_path.is_file():
        return OpenedRun(run, is_new=False)
    yaml = require("yaml", "train")
    return OpenedRun(run, False, yaml.safe_load(run.config_path.read_text(encoding="utf-8")))


def identity_of(job: Job) -> dict[str, Any]:
    """Return the names and hashes of a job's model and rows, by which a resumed run is recognized."""
    examples = job.prepared.examples
    return {
        "model": job.base.name,
        "data": job.config.data,
        "content_sha256": job.base.content_sha256,
        "data_fingerprint": job.prepared.fingerprint,
        "rows": job.prepared.counts,
        "examples_sha256": _sha256(examples),
    }


def _sha256(splits: Mapping[str, Sequence[Example]]) -> str:
    """Hex sha256 of the token ids and labels of all rows, in their order."""
    digest = sha256()
    for examples in splits.values():
        for example in examples:
            for numbers in (example.input_ids, example.labels, example.token_type_ids, example.pair_ids):
                digest.update(np.array([len(numbers), *numbers], np.float64).tobytes())
    return digest.hexdigest()


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
