"""Which bundles were found in order, and in which state, so that their files are not hashed at every open."""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge_ft.files import cache_folder, write_json

__all__ = ["State", "is_remembered", "remember", "state_of"]

_TICK_NS = 2 * 10**9
"""The coarsest clock of a file system in use, FAT's."""

State = dict[str, list[int | str]]
"""For each file of a bundle the sha256 of its manifest, then device, inode, size, mtime and ctime."""


def state_of(path: Path, manifest: dict[str, Any]) -> State:
    """Return the state in which the files of a bundle are now."""
    found = {name: (path / name).stat() for name in manifest["files"]}
    return {
        name: [
            *(manifest["files"][name]["sha256"], stat.st_dev, stat.st_ino, stat.st_size),
            *(stat.st_mtime_ns, stat.st_ctime_ns),
        ]
        for name, stat in found.items()
    }


def _memory_of(path: Path) -> Path:
    """The file that says in which state a bundle was when its files were last found to be in order."""
    return cache_folder() / "opened" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"


def is_remembered(path: Path, state: State) -> bool:
    """Whether the files of a bundle were in this state when they were last found to be in order."""
    # Windows has no time of the last change of a file that a program cannot set.
    with suppress(OSError, ValueError):
        return os.name != "nt" and bool(json.loads(_memory_of(path).read_text("utf-8")) == state)
    return False


def remember(path: Path, state: State) -> None:
    """Keep the state of a bundle whose files are in order, unless one changed so lately that its times may not show it.

    A file that is written twice within a tick of the file system's clock has the same times after both.
    """
    newest = max((int(at) for *_, mtime, ctime in state.values() for at in (mtime, ctime)), default=0)
    if time.time_ns() - newest > _TICK_NS:
        with suppress(OSError):  # a read-only or full cache: hashed again next time
            write_json(_memory_of(path), state)
