"""How much memory and disk there is, and how much this process holds."""

import gc
import os
import platform
import resource
import shutil
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Peak", "Room", "peak_rss_bytes", "release_memory", "resident_bytes"]


@dataclass(frozen=True)
class Room:
    """What this process may still take."""

    memory: int
    """Bytes of memory, those that it holds already included."""
    disk: int
    """Bytes free where the run folder will lie."""

    @classmethod
    def here(cls, out: Path) -> "Room":
        """What this machine, its control group and the limits of this process leave."""
        parent = next(folder for folder in [*out.absolute().parents] if folder.is_dir())
        return cls(_free_memory() + resident_bytes(), shutil.disk_usage(parent).free)


class Peak:
    """The most that this process holds resident while inside, in bytes.

    By watching: the kernel's own mark would have to be reset for it, and it is what others measure this process by.
    """

    def __enter__(self) -> "Peak":
        self.bytes = resident_bytes()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()
        self.bytes = max(self.bytes, resident_bytes())

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, resident_bytes())


def resident_bytes() -> int:
    """What this process holds now; where nobody tells, the most it ever held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError):
        return peak_rss_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _free_memory() -> int:
    """Bytes that this process could still take without anything being swapped or killed."""
    found = [_number(Path("/proc/meminfo"), "MemAvailable:", 1024)]
    if found == [None] and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - resident_bytes()]
    for folder, limit, used in _groups():
        most, now = _number(folder / limit), _number(folder / used)
        if most is not None and now is not None:
            # Cached files are given back when memory is short.
            found.append(most - now + (_number(folder / "memory.stat", "inactive_file") or 0))
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    mapped = _number(Path("/proc/self/status"), "VmSize:", 1024)
    if address_space != resource.RLIM_INFINITY and mapped is not None:
        found.append(address_space - mapped)
    known = [size for size in found if size is not None]
    return max(min(known), 0) if known else 2**62


def _groups() -> list[tuple[Path, str, str]]:
    """Control groups that this process is in, from its own upwards, and their files for limit and use."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top = root if not controllers else root / "memory"
        if controllers and "memory" not in controllers.split(","):
            continue
        names = ("memory.max", "memory.current")
        if controllers:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        own = top / path.lstrip("/")
        found += [(folder, *names) for folder in (own, *own.parents) if folder.is_relative_to(top)]
    return found


def _number(file: Path, name: str = "", scale: int = 1) -> int | None:
    """The number in a file, or the one behind `name` in it; None where there is none."""
    with suppress(OSError, ValueError, StopIteration, IndexError):
        lines = file.read_text().splitlines()
        return scale * int(next(line for line in lines if line.startswith(name)).removeprefix(name).split()[0])
    return None


def release_memory() -> None:
    """Return freed memory to the system, so that the next measurement does not find it lying about."""
    import ctypes

    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
