"""metrics.jsonl: each line is written at once, and none is written twice by a resumed run."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Metrics"]


class Metrics:
    """A file of JSON lines."""

    def __init__(self, path: Path | None, keep: int = 0) -> None:
        """Open the file and drop what is behind its first `keep` bytes; without a path nothing is written."""
        if path is not None:
            path.touch()
            os.truncate(path, min(keep, path.stat().st_size))
        # Without a buffer a full disk shows when a line is written, not when the file is closed.
        self.file = (path or Path(os.devnull)).open("ab", buffering=0)

    def log(self, line: dict[str, Any]) -> None:
        """Append one line."""
        data = json.dumps(line).encode() + b"\n"
        while data:
            data = data[self.file.write(data) :]

    def sync(self) -> int:
        """Return the size in bytes, once all of it is on the disk."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
