"""What this process may use of the machine: memory, disk, CPUs and the GPU. Measured here and nowhere else."""

import _thread
import gc
import os
import platform
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_ft.errors import require

__all__ = [
    "Available",
    "DeviceMemory",
    "DevicePeak",
    "PeakMemory",
    "default_threads",
    "device_memory",
    "free_memory_bytes",
    "peak_rss_bytes",
    "processor",
    "release_memory",
    "resident_bytes",
    "thread_choices",
    "total_memory_bytes",
    "usable_cpus",
    "use_threads",
]

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Available:
    """Memory and disk that this process may use."""

    memory_bytes: int
    """Includes the memory that the process already holds."""
    disk_bytes: int
    device_bytes: int | None = None
    """Memory of the GPU, with what the process's tensors take already; None on a CPU."""

    def on(self, device: Any) -> "Available":
        """Add the memory of a `torch.device`, if it is not a CPU and not known yet.

        Args:
            device: Where the work runs.

        Returns:
            The memory and disk.
        """
        memory = device_memory(device) if self.device_bytes is None else None
        if memory is None:
            return self
        held = require("torch", "train").cuda.memory_allocated(device)
        return replace(self, device_bytes=memory.free_bytes + held)

    @classmethod
    def here(cls, out: Path) -> "Available":
        """Measure memory within the limits of the machine, the cgroup and the process, and disk where `out` will be."""
        parent = next(folder for folder in [*out.absolute().parents] if folder.is_dir())
        return cls(free_memory_bytes() + resident_bytes(), shutil.disk_usage(parent).free)


class DevicePeak:
    """Context manager that records in `bytes` the most memory of a GPU that tensors took while it is open.

    On a CPU `bytes` stays None. The peak of the process in `device_memory` counts from here on.
    """

    def __init__(self, device: Any) -> None:
        """Measure a `torch.device`."""
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> "DevicePeak":
        if self.device.type == "cuda":
            require("torch", "train").cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        memory = device_memory(self.device)
        self.bytes = None if memory is None else memory.peak_bytes


class PeakMemory:
    """Context manager that records in `bytes` the most resident memory of this process while it is open.

    A thread samples it. The kernel's own peak would have to be reset for each measurement, and that peak is what
    `peak_rss_bytes` and other tools report about the whole process.
    """

    def __enter__(self) -> "PeakMemory":
        self.bytes = resident_bytes()
        self._done = threading.Event()
        # Not threading.Thread: where memory ends its start() and join() wait for a thread that could not begin.
        with suppress(RuntimeError, MemoryError):
            _thread.start_new_thread(self._sample, ())
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.bytes = max(self.bytes, resident_bytes())

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, resident_bytes())


def resident_bytes(pid: int | None = None) -> int:
    """Measure the resident memory of a process, mapped files included.

    Args:
        pid: The process; None is this one.

    Returns:
        Bytes; 0 if the process has ended. Where there is no /proc, the peak of this process.
    """
    pages = _numbers(PROC / (str(pid) if pid else "self") / "statm")
    if len(pages) > 1:
        return pages[1] * os.sysconf("SC_PAGE_SIZE")
    return 0 if pid else peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Measure the peak of the resident memory of this process, mapped files included.

    It is read from VmHWM, since getrusage's ru_maxrss is not reset when a program starts: a small program that a
    large one started would report the large one's memory. ru_maxrss is used only where there is no /proc.

    Returns:
        Bytes.
    """
    if peak := _numbers(PROC / "self/status", "VmHWM:"):
        return peak[0] * 1024
    import resource  # not on Windows, where `edge-ft run` needs nothing but the threads

    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss if sys.platform == "darwin" else peak_rss * 1024


def total_memory_bytes() -> int | None:
    """Memory that the machine has; None where the system does not report it."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def release_memory() -> None:
    """Return freed memory to the system, so that it is not part of the next measurement."""
    import ctypes

    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def usable_cpus() -> int:
    """Count the CPUs that this process may keep busy: those of its affinity, within the CPU quota of its cgroups.

    A quota of 1.5 CPUs counts as 1: two threads would use it up before the end of each period and then stand still.

    Returns:
        The number, at least 1.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroups("cpu"):
        limit = _numbers(folder / "cpu.max")
        limit = limit or [*_numbers(folder / "cpu.cfs_quota_us"), *_numbers(folder / "cpu.cfs_period_us")]
        if len(limit) == 2 and min(limit) > 0:  # no quota is "max" in version 2 and -1 in version 1
            cpus = min(cpus, limit[0] // limit[1])
    return max(cpus, 1)


def default_threads() -> int:
    """Choose the number of CPU threads for commands without --threads.

    Returns:
        OMP_NUM_THREADS if it is set, as `accelerate launch` does where several processes share the machine; else
        `usable_cpus`.
    """
    with suppress(ValueError):
        return max(int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0]), 1)
    return usable_cpus()


def thread_choices() -> list[int]:
    """Return the numbers of threads that are worth trying: the default, and half of four and more CPUs.

    Half may be faster where two CPUs share a core, where half of the cores are slow ones, or where a small model gives
    a thread so little to do that waiting for the others takes longer.

    Returns:
        The default first; OMP_NUM_THREADS alone if it is set.
    """
    threads = default_threads()
    if threads < 4 or os.environ.get("OMP_NUM_THREADS"):
        return [threads]
    return [threads, threads // 2]


def processor() -> tuple[str, str]:
    """Return the name of the CPU model, and its instruction sets as Linux lists them; "" where nothing says them."""
    lines = (PROC / "cpuinfo").read_text().splitlines() if (PROC / "cpuinfo").is_file() else []
    # ARM kernels name no model there but, on boards, the board.
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = named.get("model name") or named.get("Model") or platform.processor() or platform.machine()
    return name, named.get("flags") or named.get("Features") or ""


def use_threads(threads: int | None) -> int:
    """Set the number of CPU threads of torch.

    Args:
        threads: The number; None is `default_threads`.

    Returns:
        The number.

    Raises:
        MissingExtra: torch is not installed.
    """
    threads = threads or default_threads()
    require("torch", "train").set_num_threads(threads)
    return threads


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a GPU, in bytes."""

    free_bytes: int
    """What no process uses."""
    total_bytes: int
    peak_bytes: int
    """The most that this process's tensors took together."""


def device_memory(device: Any) -> DeviceMemory | None:
    """Measure the memory of a `torch.device`.

    Returns:
        Its memory; None for the CPU.

    Raises:
        MissingExtra: torch is not installed.
    """
    if device.type != "cuda":
        return None
    cuda = require("torch", "train").cuda
    free_bytes, total_bytes = cuda.mem_get_info(device)
    return DeviceMemory(free_bytes, total_bytes, cuda.max_memory_allocated(device))


def free_memory_bytes() -> int:
    """Return how many bytes this process could still take without swapping and without being killed."""

    found = [kib * 1024 for kib in _numbers(PROC / "meminfo", "MemAvailable:")[:1]]
    if not found and (total := total_memory_bytes()) is not None:
        found.append(total - resident_bytes())
    for folder in _cgroups("memory"):
        limit = _numbers(folder / "memory.max") or _numbers(folder / "memory.limit_in_bytes")
        used = _numbers(folder / "memory.current") or _numbers(folder / "memory.usage_in_bytes")
        if limit and used:
            # The kernel gives cached files back when memory is short.
            found.append(limit[0] - used[0] + sum(_numbers(folder / "memory.stat", "inactive_file")))
    with suppress(ImportError):  # on Windows
        import resource

        address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
        mapped = _numbers(PROC / "self/status", "VmSize:")
        if address_space != resource.RLIM_INFINITY and mapped:
            found.append(address_space - mapped[0] * 1024)
    return max(min(found), 0) if found else 2**62


def _cgroups(controller: str) -> Iterator[Path]:
    """The cgroups of this process that may limit `controller` (versions 1 and 2): its own, then those above."""
    with suppress(OSError):
        for line in (PROC / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = CGROUPS / controller if controllers else CGROUPS
            own = top / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(top))


def _numbers(file: Path, name: str = "") -> list[int]:
    """The whole numbers of a file's first line, or of the first line that starts with `name`; empty without them."""
    with suppress(OSError, StopIteration):
        line = next(line for line in file.read_text().splitlines() if line.startswith(name))
        return [int(word) for word in line.removeprefix(name).split() if word.lstrip("-").isdigit()]
    return []
