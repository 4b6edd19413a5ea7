"""Devices that `bench --profile` imitates: threads, cores, share of their time, and memory."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from edge_ft.config import Minimum, from_plain
from edge_ft.errors import UsageError, did_you_mean
from edge_ft.utf8 import read_utf8

__all__ = ["DeviceProfile", "read_profile", "usable_cores"]

_FOLDER = Path(__file__).with_name("profiles")


@dataclass(frozen=True)
class DeviceProfile:
    """What a process may use on a device."""

    threads: Annotated[int, Minimum(1)]
    cpus: Annotated[int, Minimum(1)]
    """Cores on which it runs (affinity)."""
    memory_mb: Annotated[int, Minimum(1)]
    """Without swap, in 10⁶ bytes."""
    cpu_quota: float | None = None
    """CPUs' worth of time that it gets; None is all of its cores."""


def read_profile(name: str) -> DeviceProfile:
    """Read a profile.

    Args:
        name: One that comes with edge-ft, or a YAML file with the fields of `DeviceProfile`.

    Returns:
        The profile.

    Raises:
        UsageError: there is none of this name, or the file holds something else.
    """
    import yaml

    known = {file.stem: file for file in sorted(_FOLDER.glob("*.yaml"))}
    file = known.get(name, Path(name))
    if not file.is_file():
        choose = f"choose from {', '.join(known)}, or give a YAML file{did_you_mean(name, list(known))}"
        raise UsageError(f"--profile {name}: {choose}")
    try:
        values: Any = yaml.safe_load(read_utf8(file))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"--profile {name} cannot be read as YAML: {error}") from error
    try:
        profile = from_plain(DeviceProfile, values, "the profile")
    except ValueError as error:
        raise UsageError(f"--profile {name}: {error}") from error
    if profile.cpu_quota is not None and profile.cpu_quota <= 0:
        raise UsageError(f"--profile {name}: cpu_quota is {profile.cpu_quota}: give a number of CPUs above 0, e.g. 0.5")
    return profile


def usable_cores(count: int) -> list[int]:
    """The first cores that this process may use, at most `count`; [] where the system has no affinity."""
    return sorted(os.sched_getaffinity(0))[:count] if hasattr(os, "sched_getaffinity") else []
