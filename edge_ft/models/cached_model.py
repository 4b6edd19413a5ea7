"""A model folder that is written once into the user's cache, by one of the processes that want it."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_ft.errors import ModelError, WillNotFit
from edge_ft.files import atomic_folder, locked
from edge_ft.progress import Progress

__all__ = ["Words", "write_once"]


@dataclass(frozen=True)
class Words:
    """What the user reads about a folder that is to be written."""

    doing: str
    """What happens now, such as "converting model.gguf"."""
    waiting: str
    """What another process may be doing."""
    holds: str
    """What takes the space, with its verb."""
    place: str
    """What the cache's folder is for, after "where"."""


def write_once(folder: Path, size: int, words: Words, write: Callable[[Path], None], progress: Progress) -> Path:
    """Write a folder in the cache unless it is there; of two processes that want the same, one waits for the other.

    Args:
        folder: What is written, whole or not at all.
        size: Bytes that it takes.
        words: For the messages.
        write: Fills an empty folder.
        progress: Receives what happens.

    Returns:
        `folder`.

    Raises:
        ModelError: this user may not write into the cache.
        WillNotFit: its disk is too small.
        OSError: it cannot be written.
    """
    if folder.is_dir():
        return folder
    cache = folder.parent
    _check_writable(cache, words)
    if folder.with_name(f".{folder.name}.lock").exists():
        progress.say(f"another process may be {words.waiting}: waiting for it to end")
    with locked(folder, wait=True):
        if folder.is_dir():  # another process was faster
            return folder
        free = shutil.disk_usage(cache).free
        if size > free:
            raise WillNotFit(
                f"{words.holds} {size / 1e9:.1f} GB, {cache} has {free / 1e9:.1f} GB free: free some, or set "
                "EDGE_FT_CACHE to a folder on a larger disk"
            )
        progress.say(f"{words.doing}, once")
        with atomic_folder(folder) as temporary:
            write(temporary)
    return folder


def _check_writable(cache: Path, words: Words) -> None:
    """Make the cache's folder, before anything is computed.

    Raises:
        ModelError: this user may not write there.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        writable = os.access(cache, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ModelError(f"{cache} cannot be written, where {words.place}: set EDGE_FT_CACHE to a folder")
