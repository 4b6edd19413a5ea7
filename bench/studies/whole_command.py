"""`edge-ft tune` as a person runs it: a process of its own, watched from outside.

What it writes is stamped when it appears, so that the clock holds imports, loading, evaluations and the report, and
nothing inside the command knows that it is timed.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from edge_ft.errors import EdgeFTError
from edge_ft.files import write_json

__all__ = ["Ran", "tune_command"]

POLL = 0.05
"""Seconds between two looks at what the command has written."""
SET_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


@dataclass(frozen=True)
class Ran:
    """A command that ended well."""

    seconds: float
    """From the start of its process to the end of it."""
    cpu_seconds: float
    """Of all its threads."""
    seconds_to_first_line: float | None
    """Until it first said something."""
    lines: list[dict[str, Any]]
    """Of metrics.jsonl, each with `whole_seconds`: when it appeared, at most `POLL` too late."""
    kept: dict[int, str] = field(default_factory=dict)
    """By step of an evaluation: the file with the weights that were the best ones after it, where it was caught."""


def tune_command(settings: dict[str, Any], out: Path, threads: int) -> Ran:
    """Run `edge-ft tune`, and keep the weights that it writes on the way.

    Args:
        settings: Of `TuneConfig`, without `out`.
        out: The run folder.
        threads: CPU threads.

    Returns:
        What was seen.

    Raises:
        EdgeFTError: the command failed; the message is its last line.
    """
    file = out.with_name(f"{out.name}.yaml")
    given = {name: value for name, value in settings.items() if value is not None}
    write_json(file, given | {"threads": threads, "out": str(out)})  # YAML too
    # -P: a file in the current folder that is named like a library must not be imported.
    command = [sys.executable, "-P", "-m", "edge_ft", "tune", "--config", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with tempfile.TemporaryFile() as said:
        watch = _Watch(out, said, began)
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, preexec_fn=_end_with_parent()
        ) as process:
            try:
                while process.returncode is None:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(POLL)
                    seconds = time.monotonic() - began
                    watch.look()
            finally:
                process.kill()
        said.seek(0)
        last = said.read().decode(errors="replace").strip().splitlines()[-1:]
    if process.returncode != 0:
        raise EdgeFTError(f"edge-ft tune ended with exit code {process.returncode}: {''.join(last) or 'no message'}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Ran(seconds, cpu_seconds, watch.first_line, watch.lines, watch.kept)


def _end_with_parent() -> Any:
    """What a child does before its program starts, so that it ends when this process does, however that ends."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL)


class _Watch:
    """What a running command has written so far."""

    def __init__(self, out: Path, said: IO[bytes], began: float) -> None:
        self.out, self.said, self.began = out, said, began
        self.first_line: float | None = None
        self.lines: list[dict[str, Any]] = []
        self.kept: dict[int, str] = {}
        self.read = 0
        """Bytes of metrics.jsonl that were read."""

    def look(self) -> None:
        """Stamp what is new."""
        now = time.monotonic() - self.began
        if self.first_line is None and os.fstat(self.said.fileno()).st_size:
            self.first_line = now
        file = self.out / "metrics.jsonl"
        if not file.is_file() or file.stat().st_size == self.read:
            return
        with file.open("rb") as stream:
            stream.seek(self.read)
            new = stream.read()
        new = new[: new.rfind(b"\n") + 1]
        self.read += len(new)
        self.lines += [json.loads(line) | {"whole_seconds": now} for line in new.splitlines()]
        self._keep_best()

    def _keep_best(self) -> None:
        """Keep the weights after the last evaluation, once a step follows: an evaluation is logged before they are."""
        evaluated = [at for at, line in enumerate(self.lines) if "validation_nll" in line]
        if not evaluated or evaluated[-1] == len(self.lines) - 1:
            return
        step = self.lines[evaluated[-1]]["step"]
        link = self.out.with_name(f"{self.out.name}-kept") / f"{step}.safetensors"
        if step and step not in self.kept:
            link.parent.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):  # no evaluation was better than the untuned base
                os.link(self.out / "adapter" / "adapter_model.safetensors", link)
                self.kept[step] = str(link)
