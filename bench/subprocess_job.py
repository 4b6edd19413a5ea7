"""Run one job in a process of its own, whose memory may be limited."""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from edge_ft import errors
from edge_ft.bench.meters import JOIN_GROUP, MemoryLimit
from edge_ft.errors import EdgeFTError, WillNotFit
from edge_ft.system import resident_bytes

__all__ = ["run_worker"]

_POLL_S = 0.01
"""Seconds between two readings of a watched process's memory."""


def run_worker(
    job: dict[str, Any],
    doing: str,
    threads: int,
    limit: MemoryLimit | None = None,
    module: str = "edge_ft.bench.worker",
) -> dict[str, Any]:
    """Do a job in a fresh process.

    Args:
        job: What the worker reads; `started` (`time.monotonic()`) and `parent` (a pipe that closes with this process)
            are added, and `affinity`, the cores of `limit`.
        doing: What the job is about, for messages.
        threads: CPU threads of OpenMP libraries (`OMP_NUM_THREADS`).
        limit: Memory, cores and CPU time that the process may use.
        module: The worker, whose `main` calls `edge_ft.bench.worker.answer_job`.

    Returns:
        The worker's result.

    Raises:
        WillNotFit: it used more than the limit.
        EdgeFTError: it died, or raised an error: the same class is raised here.
    """
    # The worker ends when this pipe closes, however this process ends.
    alive, ours = os.pipe()
    # -P: a file in the current folder that is named like a library must not be imported.
    command = [sys.executable, "-P", "-m", module]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile() as stderr, limit.group() if limit else nullcontext() as group:
        if group is not None:
            command = [*JOIN_GROUP, str(group), *command]
        cores = {"affinity": limit.cores} if limit is not None and limit.cores else {}
        request: bytes | None = json.dumps(job | {"started": time.monotonic(), "parent": alive, **cores}).encode()
        seen = 0
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment, pass_fds=[alive]
        ) as process:
            os.close(alive)
            try:
                while True:
                    try:
                        watched = limit is not None and group is None
                        answer, _ = process.communicate(request, timeout=_POLL_S if watched else None)
                        break
                    except subprocess.TimeoutExpired:
                        request = None  # already sent
                        seen = max(seen, resident_bytes(process.pid))
                        if limit is not None and seen > limit.size:
                            process.kill()
            finally:
                process.kill()
                process.wait()  # a cgroup with processes cannot be removed
                os.close(ours)
        stderr.seek(0)
        lines = stderr.read().decode(errors="replace").strip().splitlines()
        ended_by_kernel = group is not None and _oom_kills(group) > 0
    reply = json.loads(answer) if answer else {}
    if limit is not None:
        seen = max(seen, reply.get("result", {}).get("peak_rss_bytes") or 0)  # a peak between two readings counts too
        if ended_by_kernel or seen > limit.size:
            reached = f", it held {seen / 1e6:.0f} MB" if seen else ""
            raise WillNotFit(f"does not fit into {limit.size / 1e6:.0f} MB{reached} ({limit.kind})")
    if "error" in reply:
        kind, message = reply["error"]
        raise getattr(errors, kind)(message)
    if process.returncode != 0 or not reply:
        ended = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        raise EdgeFTError(f"{doing} ended with {ended}: {lines[-1] if lines else 'no output on stderr'}")
    return dict(reply["result"])


def _oom_kills(group: Path) -> int:
    """How many processes of a cgroup the kernel ended because memory ran out."""
    events = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
    return int(events["oom_kill"])
