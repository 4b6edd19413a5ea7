"""How the threads of OpenMP, which torch computes with on a CPU, wait for each other."""

import os
import time
from collections.abc import MutableMapping
from pathlib import Path

from edge_ft.system import usable_cpus

__all__ = ["WAITING", "set_waiting"]

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""The environment variables, read when torch is imported."""
SPINS = "2000"
"""Rounds that a thread spins before it sleeps, some microseconds: most waits of a training step are shorter."""
_LOAD = Path("/proc/loadavg")


def set_waiting(environment: MutableMapping[str, str], load: Path = _LOAD) -> None:
    """Let threads sleep where they wait; where the processors are idle, let them spin for some microseconds before.

    Every operator ends with a wait. To be woken takes longer than most of these waits, so spinning makes a step 1.5
    times as fast; beside another busy process it makes it 1.5 times as slow, because the thread that the others wait
    for may not be running (docs/decisions/006 and 050).

    Args:
        environment: Gets the variables; a policy that is set there stays as it is.
        load: Linux's file of what is running; where there is none, threads sleep.
    """
    if "OMP_WAIT_POLICY" in environment:
        return
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    if _enough_are_idle(load):
        environment.setdefault("GOMP_SPINCOUNT", SPINS)


def _enough_are_idle(load: Path) -> bool:
    """Return whether as many processors as this process may use have nothing else to do, in one of three samples."""
    processors, needed = os.cpu_count() or 1, usable_cpus()
    for wait in (0.002, 0.002, 0.0):
        try:
            running = int(load.read_text(encoding="ascii").split()[3].partition("/")[0])
        except (OSError, ValueError, IndexError):
            return False
        if processors - max(0, running - 1) >= needed:
            return True
        time.sleep(wait)
    return False
