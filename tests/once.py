"""Files that several test processes share: the first one writes them."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

__all__ = ["once"]


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """Call `make(path)` unless another process of the session has done so, and return `path`.

    Other processes wait while it is made. What a `make` that failed has left is removed.
    """
    with path.with_name(f"{path.name}.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if not lock.read():
            try:
                make(path)
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)
                raise
            lock.write("made")
    return path
