"""metrics.jsonl: a line as soon as it is known, and never one twice."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Metrics"]


class Metrics:
    """A file of JSON lines that goes on behind its first `keep` bytes; without a path nothing is kept."""

    def __init__(self, path: Path | None, keep: int = 0) -> None:
        if path is not None:
            path.touch()
            os.truncate(path, min(keep, path.stat().st_size))
        self.file = (path or Path(os.devnull)).open(
            "ab", buffering=0
        )  # a full disk is met when writing, not when closing

    def log(self, line: dict[str, Any]) -> None:
        """Append one line."""
        data = json.dumps(line).encode() + b"\n"
        while data:
            data = data[self.file.write(data) :]

    def sync(self) -> int:
        """Bytes so far, all of them on the disk."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
