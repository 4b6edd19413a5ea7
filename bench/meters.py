"""The machine's description, limits on a process's memory, and timings of decoding."""

import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from edge_ft.errors import UsageError
from edge_ft.system import processor, total_memory_bytes, usable_cpus

__all__ = [
    "JOIN_GROUP",
    "DecodeTimings",
    "MemoryLimit",
    "cpu_flags",
    "group_parents",
    "machine",
    "memory_limit",
]

JOIN_GROUP = ("/bin/sh", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"')
"""Before a cgroup's folder and a command: joins the cgroup first, which then counts all memory of the command."""

FLAGS = frozenset(
    {"avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"}  # x86
    | {"asimddp", "i8mm", "bf16", "sve"}  # ARM
)
"""Names that /proc/cpuinfo has for them."""


@dataclass(frozen=True)
class MemoryLimit:
    """How much memory a process may use, and how the limit is enforced."""

    size: int
    """Bytes."""
    parent: Path | None
    """cgroup v2 folder in which this user may make groups with a memory limit; None: resident memory is watched."""

    cores: tuple[int, ...] = ()
    """Cores on which it runs; (): all that this process may use."""
    cpu_quota: float | None = None
    """CPUs' worth of time that it gets; None: no quota."""

    @property
    def holds_quota(self) -> bool:
        """Whether the quota is enforced: where cgroups of `parent` have the cpu controller."""
        control = self.parent / "cgroup.subtree_control" if self.parent is not None else None
        return control is not None and control.is_file() and "cpu" in control.read_text().split()

    @property
    def kind(self) -> str:
        """How the limit is enforced, as records name it."""
        return "cgroup v2" if self.parent is not None else "polled RSS"

    @contextmanager
    def group(self) -> Iterator[Path | None]:
        """Make a cgroup with this limit and no swap, for one process; yields None where `parent` is None."""
        if self.parent is None:
            yield None
            return
        group = self.parent / f"edge-ft-bench-{os.getpid()}"
        group.mkdir()
        try:
            (group / "memory.max").write_text(str(self.size))
            if (group / "memory.swap.max").exists():
                (group / "memory.swap.max").write_text("0")
            if self.cpu_quota is not None and self.holds_quota:
                (group / "cpu.max").write_text(f"{round(self.cpu_quota * 100_000)} 100000")
            yield group
        finally:
            group.rmdir()


def memory_limit(size: int) -> MemoryLimit:
    """Limit memory by cgroup v2 where this user may make one, else by watching resident memory.

    RLIMIT_AS does not serve: address space includes mapped files and untouched reservations, which take no memory.

    Args:
        size: Bytes.

    Returns:
        The limit.

    Raises:
        UsageError: this system has neither.
    """
    for parent in group_parents(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")):
        limit = MemoryLimit(size, parent)
        try:
            with limit.group() as group:
                joined = subprocess.run([*JOIN_GROUP, str(group), "true"], stderr=subprocess.DEVNULL, check=False)
        except OSError:
            continue
        if joined.returncode == 0:
            return limit
    if not Path("/proc/self/statm").is_file():
        raise UsageError("--memory-limit needs Linux, whose /proc shows a process's memory: leave it out here")
    return MemoryLimit(size, None)


def group_parents(own: Path, root: Path) -> list[Path]:
    """Find the folders of cgroup v2 below which the kernel counts memory.

    Args:
        own: /proc/self/cgroup.
        root: Where the cgroup v2 hierarchy is mounted.

    Returns:
        Of this process's own group and the one above, those that do.
    """
    lines = own.read_text().splitlines() if own.is_file() else []
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if path is None:
        return []
    folder = root / path
    controllers = ((parent, parent / "cgroup.subtree_control") for parent in dict.fromkeys((folder, folder.parent)))
    return [
        parent
        for parent, control in controllers
        if parent.is_relative_to(root) and control.is_file() and "memory" in control.read_text().split()
    ]


def cpu_flags() -> list[str]:
    """Which instructions for products of matrices, of those that kernels ask for, the processor has."""
    info = Path("/proc/cpuinfo")
    words = info.read_text().split() if info.is_file() else []
    return sorted(FLAGS.intersection(words))


def machine() -> dict[str, str | int | None]:
    """CPU model, cores, memory, operating system and Python."""
    return {
        "cpu": processor()[0],
        "cores": usable_cpus(),
        "memory_bytes": total_memory_bytes(),
        "os": platform.platform(),
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class DecodeTimings:
    """As `edge_ft.runtime.Timings`, whose import would bring onnxruntime into a peer's process."""

    prefill_s: float
    ttft_s: float
    decode_s: tuple[float, ...]

    @classmethod
    def between(cls, marks: Sequence[float]) -> "DecodeTimings":
        """Timings from clock readings: the start, and the end of each token."""
        seconds = [after - before for before, after in pairwise(marks)]
        return cls(seconds[0], seconds[0], tuple(seconds[1:]))
