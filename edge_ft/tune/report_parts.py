"""The parts of a report that are done, kept in the run folder until the report is written.

Scoring long test rows may take longer than the training. What is scored is written every half minute and when the
report is stopped, so that --resume scores the rest alone. Kept parts count only for the same weights, rows and
settings, and a damaged one is made again.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edge_ft.artifacts import RunFolder
from edge_ft.config import as_plain
from edge_ft.evaluate.scoring import RowScores, ScoredRow, row_scores
from edge_ft.files import atomic_file, disk_full, file_sha256, is_as_sealed, seal, write_json
from edge_ft.tune.checkpoint import REPORT_PARTS
from edge_ft.tune.opening import NOT_COMPARED

if TYPE_CHECKING:
    from edge_ft.tune.prepare import Job

__all__ = ["ReportParts", "kept_parts"]

SECONDS = 30.0
"""Between two writings of a part that is not done."""


@dataclass
class ReportParts:
    """What an earlier process of the run has found, and what this one finds."""

    folder: Path | None
    """Where parts are kept; None keeps none: of several processes, only the main one does."""
    key: str = ""
    """Hash of all that the parts depend on."""
    written: float = field(default_factory=time.monotonic)
    """When a part was last written."""

    def scores(self, name: str, score: Callable[[dict[int, ScoredRow], Callable[[], None]], RowScores]) -> RowScores:
        """Score rows, but for those that were scored before.

        Args:
            name: Of the part.
            score: Gets the rows that are known, by index, and what is to be called between batches; adds the others.

        Returns:
            The scores of all rows.
        """
        found = self._read(name)
        known = len(found)

        def keep_sometimes() -> None:
            if time.monotonic() - self.written >= SECONDS:
                self._write(name, found)

        try:
            return score(found, keep_sometimes)
        finally:
            if len(found) > known:
                self._write(name, found)

    def value(self, name: str, find: Callable[[], Any]) -> Any:
        """Return what `find` returned, now or in an earlier process of the run.

        Args:
            name: Of the part.
            find: Returns a JSON value.

        Returns:
            The value.
        """
        file = self._file(f"{name}.json")
        if file is None:
            return find()
        with suppress(OSError, ValueError, KeyError, TypeError):
            document = json.loads(file.read_text(encoding="utf-8"))
            if is_as_sealed(file, document) and document["key"] == self.key:
                return document["value"]
        value = find()
        with _unless_full():
            write_json(file, seal({"key": self.key, "value": value}))
        return value

    def _file(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name.replace(" ", "-")

    def _read(self, name: str) -> dict[int, ScoredRow]:
        """Return the rows of a part that are known, by index; none where they are damaged or of other weights."""
        file = self._file(f"{name}.safetensors")
        if file is None or not file.is_file():
            return {}
        with suppress(OSError, SafetensorError, KeyError, ValueError), safe_open(file, "np") as stored:
            arrays = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - not a dict
            metadata = stored.metadata() or {}
            if metadata.get("key") == self.key and metadata.get("sha256") == _digest(arrays):
                return _rows(arrays)
        return {}

    def _write(self, name: str, found: dict[int, ScoredRow]) -> None:
        file = self._file(f"{name}.safetensors")
        if file is None:
            return
        arrays = _arrays(found)
        with _unless_full(), atomic_file(file) as temporary:
            save_file(arrays, temporary, {"key": self.key, "sha256": _digest(arrays)})
        self.written = time.monotonic()


def kept_parts(run: RunFolder, job: "Job") -> ReportParts:
    """Open the kept parts of a run whose training is finished.

    Args:
        run: Holds the best adapter.
        job: With all settings resolved.

    Returns:
        The parts.
    """
    config = {name: value for name, value in as_plain(job.config).items() if name not in NOT_COMPARED}
    weights = file_sha256(run.adapter_weights)
    key = json.dumps([config, job.identity, weights], sort_keys=True)
    return ReportParts(run.path / REPORT_PARTS, sha256(key.encode()).hexdigest())


@contextmanager
def _unless_full() -> Iterator[None]:
    """Go on without a part for which the disk has no room: a part saves time at best."""
    try:
        yield
    except Exception as error:
        if not disk_full(error):
            raise


def _arrays(found: dict[int, ScoredRow]) -> dict[str, NDArray[Any]]:
    indices = sorted(found)
    scores = row_scores([found[index] for index in indices])
    arrays = {"rows": np.array(indices, np.int64), **scores.to_arrays()}
    if scores.vectors is not None:
        arrays |= {"first": scores.vectors[0], "second": scores.vectors[1]}
    return arrays


def _rows(arrays: dict[str, NDArray[Any]]) -> dict[int, ScoredRow]:
    sides: Sequence[Any] = [None] * len(arrays["rows"])
    if "first" in arrays:
        sides = list(zip(arrays["first"], arrays["second"], strict=True))
    numbers = (arrays[name].tolist() for name in ("rows", "nll", "tokens", "correct"))
    return {
        row: ScoredRow(nll, count, correct, values, pair)
        for row, nll, count, correct, values, pair in zip(
            *numbers, RowScores.from_arrays(arrays).predicted, sides, strict=True
        )
    }


def _digest(arrays: dict[str, NDArray[Any]]) -> str:
    digest = sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
