"""Memory, CPUs and threads are measured alike on a bare machine and within a container's limits."""

import os
import sys
import time
from pathlib import Path

import pytest

from edge_ft import system
from edge_ft.errors import MissingExtra
from edge_ft.system import (
    Available,
    PeakMemory,
    default_threads,
    peak_rss_bytes,
    resident_bytes,
    usable_cpus,
    use_threads,
)

MB = 10**6


class Machine:
    """A fake /proc and /sys/fs/cgroup."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", "MemTotal: 8000000 kB\nMemAvailable: 4000000 kB\n")
        self.write("proc/self/statm", "900 50 10 1 0 40 0\n")
        self.write("proc/self/status", "Name:\tpython\nVmSize:\t9000 kB\nVmHWM:\t700 kB\n")
        self.cgroup("0::/\n")

    def write(self, path: str, text: str | int) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}")

    def cgroup(self, lines: str) -> None:
        self.write("proc/self/cgroup", lines)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Eight CPUs, 4 GB of available memory, no limits."""
    monkeypatch.setattr(system, "PROC", tmp_path / "proc")
    monkeypatch.setattr(system, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return Machine(tmp_path)


def test_a_machine_without_limits_is_used_whole(machine: Machine) -> None:
    assert default_threads() == usable_cpus() == 8
    held = 50 * os.sysconf("SC_PAGE_SIZE")
    assert (resident_bytes(), peak_rss_bytes()) == (held, 700 * 1024)
    assert Available.here(machine.root / "run").memory_bytes == 4000000 * 1024 + held


def test_a_system_without_cgroups_and_proc_is_measured_too(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "PROC", machine.root / "none")
    assert usable_cpus() == 8
    assert MB < resident_bytes() == peak_rss_bytes() < 2**40
    assert 0 < Available.here(machine.root / "run").memory_bytes < 2**50


@pytest.mark.parametrize(
    ("quota", "cpus"), [("max 100000", 8), ("150000 100000", 1), ("50000 100000", 1), ("400000 100000", 4)]
)
def test_a_container_has_the_cpus_of_its_quota(machine: Machine, quota: str, cpus: int) -> None:
    machine.write("cgroup/cpu.max", quota)
    assert default_threads() == cpus


@pytest.mark.parametrize(("quota", "cpus"), [(-1, 8), (150000, 1), (400000, 4)])
def test_a_container_of_cgroup_version_1_has_them_too(machine: Machine, quota: int, cpus: int) -> None:
    machine.cgroup("5:cpuset:/\n4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n")
    # As in Docker: the path is the host's, the mounted root is the container's own group.
    machine.write("cgroup/cpu/cpu.cfs_quota_us", quota)
    machine.write("cgroup/cpu/cpu.cfs_period_us", 100000)
    assert default_threads() == cpus


def test_the_tightest_of_nested_quotas_counts(machine: Machine) -> None:
    machine.cgroup("0::/user/session\n")
    machine.write("cgroup/user/session/cpu.max", "max 100000")
    machine.write("cgroup/user/cpu.max", "200000 100000")
    assert usable_cpus() == 2


def test_an_affinity_of_one_core_is_one_thread(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5}, raising=False)
    machine.write("cgroup/cpu.max", "400000 100000")
    assert default_threads() == 1


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("2,1", 2), ("0", 1), ("", 8), ("many", 8)])
def test_omp_num_threads_is_the_default_where_it_is_set(
    machine: Machine, value: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert default_threads() == threads


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_memory_limit_counts_without_its_cached_files(machine: Machine, version: int) -> None:
    held = resident_bytes()
    if version == 1:
        machine.cgroup("3:memory:/docker/abc\n")
        folder, limit, used = "cgroup/memory/docker/abc", "memory.limit_in_bytes", "memory.usage_in_bytes"
    else:
        machine.cgroup("0::/docker/abc\n")
        folder, limit, used = "cgroup/docker/abc", "memory.max", "memory.current"
    machine.write(f"{folder}/{limit}", 500 * MB)
    machine.write(f"{folder}/{used}", 300 * MB)
    machine.write(f"{folder}/memory.stat", f"active_file 1\ninactive_file {40 * MB}\ntotal_inactive_file 7\n")
    assert Available.here(machine.root / "run").memory_bytes == 240 * MB + held
    machine.write(f"{folder}/{limit}", "max" if version == 2 else 2**63 - 4096)
    assert Available.here(machine.root / "run").memory_bytes == 4000000 * 1024 + held


def test_the_memory_and_disk_of_this_machine(tmp_path: Path) -> None:
    available = Available.here(tmp_path / "not" / "there")
    assert resident_bytes() < available.memory_bytes < 2**50
    assert 0 < available.disk_bytes < 2**60


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_resident_memory_of_this_process_and_of_others() -> None:
    now, peak = resident_bytes(os.getpid()), peak_rss_bytes()
    assert MB < now <= peak * 1.1  # the kernel counts pages in batches
    assert resident_bytes(2**22 + 1) == 0  # beyond the largest process id


def test_the_peak_of_what_is_freed_again_is_recorded() -> None:
    before = resident_bytes()
    with PeakMemory() as peak:
        taken = b"1" * (200 * MB)
        time.sleep(0.1)
        del taken
    assert peak.bytes - before > 150 * MB


def test_torch_is_given_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Torch:
        threads = 0

        def set_num_threads(self, threads: int) -> None:
            self.threads = threads

    torch = Torch()
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert use_threads(5) == torch.threads == 5
    assert use_threads(None) == torch.threads == 3
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=r"edge-ft\[train\]"):
        use_threads(None)


def test_a_processor_has_no_device_memory() -> None:
    class Device:
        type = "cpu"

    assert system.device_memory(Device()) is None


def test_the_memory_of_a_gpu_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        type = "cuda"

        def mem_get_info(self, device: object) -> tuple[int, int]:
            return 6, 8

        def max_memory_allocated(self, device: object) -> int:
            return 2

    monkeypatch.setitem(sys.modules, "torch", type("Torch", (), {"cuda": Cuda()}))
    assert system.device_memory(Cuda()) == system.DeviceMemory(free_bytes=6, total_bytes=8, peak_bytes=2)
