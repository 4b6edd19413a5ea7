"""Run one case in a forked child with limits, in a folder of its own that is watched, and judge how it ended."""

import io
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["BYTES_LIMIT", "Box", "Case", "Outcome", "judge", "run_case"]

CPU_SECONDS = 20
WALL_SECONDS = 90.0  # generous: a busy machine must not look like a hang
MEMORY_BYTES = 1_200_000_000
"""What a case may add to the memory of the process that forks it: its inputs are a few hundred kilobytes."""
ADDRESS_BYTES = 4 * 2**30
BYTES_LIMIT = 256 * 2**20
"""Largest file that a case may write."""
DOCUMENTED = {0, 1, 2, 3, 4, 5}
DISAGREE = 99
_SHOWN = 2000
"""Longest refusal, in characters."""
_BARE_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_NAMES = re.compile(r"--?[a-z]|(row|line|item|column|token|prompt|text|template|stdin|message)s?\b|['\"`{:/._]")


@dataclass(frozen=True)
class Case:
    """One command on mutated input."""

    kind: str
    argv: list[str]
    what: str
    """What was mutated, for people."""
    stdin: bytes = b""
    console: str = "utf-8:strict"
    """Encoding and error handler of the standard streams, as in PYTHONIOENCODING."""
    expect: Literal["any", "refused", "accepted"] = "any"
    """What is right by construction; any: either."""
    out: tuple[str, ...] = ("out",)
    """Beginnings of the names in the work folder that the command may write."""
    agrees: list[str] = field(default_factory=list)
    """A second command, which must end with the same code and report the same findings about the rows."""


@dataclass
class Outcome:
    """How a case ended."""

    code: int
    """Exit code; -N: ended by signal N."""
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    stdout: str
    stderr: str
    writes: list[str] = field(default_factory=list)
    """Writes and processes that are not allowed, seen while it ran."""
    changed: list[str] = field(default_factory=list)
    """Files outside the output folder that are new, changed or gone afterwards."""
    trace: str = ""
    """Traceback behind exit code 70, or of what escaped."""
    timed_out: bool = False
    left: list[str] = field(default_factory=list)
    """Files of the output, but for bundles that the gate refused."""


class Box:
    """A folder for one case: work (the current folder), home, tmp and cache."""

    def __init__(self, root: Path, seeds: Path) -> None:
        self.root, self.seeds = root, seeds
        shutil.rmtree(root, ignore_errors=True)
        for name in ("work", "home", "tmp", "cache"):
            (root / name).mkdir(parents=True)

    @property
    def work(self) -> Path:
        """The current folder of the command."""
        return self.root / "work"

    def copy(self, name: str, to: str | None = None) -> Path:
        """Copy a seed into the work folder."""
        source, target = self.seeds / name, self.work / (to or name)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        return target

    def state(self, case: Case) -> dict[str, tuple[int, ...]]:
        """Size, time and inode of every file that the command must leave alone."""
        found = {}
        for folder, _, files in os.walk(self.root):
            inside = os.path.relpath(folder, self.root)
            if inside.startswith("cache") or inside.startswith(tuple(f"work/{name}" for name in case.out)):
                continue
            for name in files:
                path = f"{inside}/{name}"
                if (inside == "work" and name.startswith(case.out)) or inside == ".":
                    continue
                at = os.lstat(f"{folder}/{name}")
                found[path] = (at.st_mode, at.st_size, at.st_mtime_ns, at.st_ino)
        return found


def run_case(case: Case, box: Box) -> Outcome:
    """Run the command of `case` in `box`, whose inputs are written already."""
    before = box.state(case)
    names = {name: box.root / name for name in ("stdin", "stdout", "stderr", "writes", "trace")}
    for name, path in names.items():
        path.write_bytes(case.stdin if name == "stdin" else b"")
    base = _resident_bytes()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(case, box, names)
    timed_out = _wait(child)
    _, status, usage = os.wait4(child, 0)
    texts = {name: path.read_bytes().decode("utf-8", "replace") for name, path in names.items()}
    after = box.state(case)
    return Outcome(
        os.waitstatus_to_exitcode(status),
        time.monotonic() - started,
        usage.ru_utime + usage.ru_stime,
        max(usage.ru_maxrss * 1024 - base, 0),
        texts["stdout"],
        texts["stderr"],
        sorted(set(texts["writes"].splitlines())),
        sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path)),
        texts["trace"],
        timed_out,
        [path.name for path in box.work.iterdir() if path.name.startswith(case.out) and path.suffix != ".rejected"],
    )


def judge(case: Case, found: Outcome) -> str | None:
    """Which property the case breaks; None: none.

    Args:
        case: The case.
        found: How it ended.
    """
    lines = [line for line in found.stderr.split("\n") if line.startswith("edge-ft: ")]
    message = lines[-1].removeprefix("edge-ft: ") if lines else ""
    checks: tuple[tuple[str, bool], ...] = (
        ("hang", found.timed_out or found.code in (-signal.SIGXCPU, -signal.SIGKILL)),
        ("crash", found.code < 0),
        ("write", bool(found.writes)),
        ("changed", bool(found.changed)),
        ("traceback", "Traceback (most recent call last)" in found.stderr),
        ("internal error", found.code == 70),
        ("disagreement", found.code == DISAGREE),
        ("undocumented exit code", found.code not in DOCUMENTED or (found.code == 1 and case.argv[:1] != ["bench"])),
        ("memory", found.peak_bytes > MEMORY_BYTES or message.startswith("out of memory")),
        ("file size", message.startswith("the disk is full")),
        ("silent refusal", found.code != 0 and not message.strip()),
        ("long refusal", found.code != 0 and len(message) > _SHOWN),
        ("several lines", found.code != 0 and bool(lines) and not found.stderr.endswith(lines[-1] + "\n")),
        ("control characters", bool(_BARE_CONTROL.search(message))),
        ("names nothing", found.code != 0 and not _NAMES.search(message)),
        ("half an output", found.code != 0 and case.argv[:1] in (["run"], ["export"]) and bool(found.left)),
        ("accepted", case.expect == "refused" and found.code == 0),
        ("refused", case.expect == "accepted" and found.code != 0),
    )
    return next((name for name, holds in checks if holds), None)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _wait(child: int) -> bool:
    """Wait for the end of a child; whether it had to be killed."""
    handle = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if poll.poll(WALL_SECONDS * 1000):
            return False
        os.kill(child, signal.SIGKILL)
        return True
    finally:
        os.close(handle)


def _child(case: Case, box: Box, names: dict[str, Path]) -> None:
    """Become the command; never returns."""
    code = 70
    try:
        _enter(case, box, names)
        code = _command(names["trace"])
        if case.agrees:
            code = _compare(case, code, names["trace"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - whatever happens, the child must not go on as a worker
        names["trace"].write_text(traceback.format_exc(), errors="replace")
    finally:
        os._exit(code)


def _enter(case: Case, box: Box, names: dict[str, Path]) -> None:
    """Give this process the folder, streams, limits and watch of the case."""
    for target, name in enumerate(("stdin", "stdout", "stderr")):
        opened = os.open(names[name], os.O_RDONLY if target == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, target)
        os.close(opened)
    encoding, _, errors = case.console.partition(":")
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding, errors)  # type: ignore[type-var]
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding, errors, write_through=True)  # type: ignore[type-var]
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding, "backslashreplace", write_through=True)  # type: ignore[type-var]
    os.environ |= {
        "HOME": str(box.root / "home"),
        "TMPDIR": str(box.root / "tmp"),
        "EDGE_FT_CACHE": str(box.root / "cache"),
        "XDG_CACHE_HOME": str(box.root / "cache"),
        "COLUMNS": "100",
    }
    tempfile.tempdir = None
    os.chdir(box.work)
    sys.argv = ["edge-ft", *case.argv]
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES_LIMIT, BYTES_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _watch(case, box, os.open(names["writes"], os.O_WRONLY | os.O_APPEND))


def _command(trace: Path) -> int:
    """Run edge-ft's command line and return its exit code."""
    from edge_ft.cli import failures

    fail = failures._fail

    def noted(message: str, code: int, debug: bool) -> None:
        if code == 70:
            trace.write_text(traceback.format_exc(), errors="replace")
        fail(message, code, debug)

    failures._fail = noted
    try:
        failures.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # noqa: BLE001 - what Python would print as a traceback
        trace.write_text(traceback.format_exc(), errors="replace")
        traceback.print_exc()
        return 1
    return 0


def _compare(case: Case, code: int, trace: Path) -> int:
    """Run the second command, and return the code of both, or `DISAGREE`."""
    from edge_ft.data import CODES

    sys.argv = ["edge-ft", *case.agrees]
    other = _command(trace)
    found = [
        json.loads(Path(name).read_text(encoding="utf-8"))["findings"] if Path(name).is_file() else []
        for name in ("out-1.json", "out-2.json")
    ]
    findings = [[each for each in every if each["code"] in CODES] for every in found]  # not those about scores
    if (code, *findings[:1]) == (other, *findings[1:]):
        return code
    print(f"edge-ft: codes {code} and {other}, findings {findings}", file=sys.stderr)
    return DISAGREE


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGING = {
    "os.remove": 1,
    "os.rename": 2,
    "os.mkdir": 1,
    "os.rmdir": 1,
    "os.link": 2,
    "os.symlink": 2,
    "os.chmod": 1,
    "os.truncate": 1,
    "shutil.rmtree": 1,
}
"""Audit events of Python that change files, and how many of their arguments are paths."""
_STARTING = (
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.system",
    "socket.connect",
    "pickle.find_class",
)


def _watch(case: Case, box: Box, note: int) -> None:
    """Note and stop every write outside the output, cache and temporary folders, and every new process."""
    root = os.path.realpath(box.root)
    allowed = (f"{root}/cache", f"{root}/tmp", f"{root}/trace", "/dev/null", "/dev/tty")
    allowed += tuple(f"{root}/work/{prefix}{name}" for name in case.out for prefix in ("", "."))

    def is_allowed(path: Any) -> bool:
        if isinstance(path, int):
            return True
        place = Path(os.fsdecode(path))
        return f"{os.path.realpath(place.parent)}/{place.name}".startswith(allowed)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        paths: tuple[Any, ...] = ()
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            paths = arguments[:1]
        elif event in _CHANGING:
            paths = arguments[: _CHANGING[event]]
        if event in _CHANGING and any(isinstance(rest, int) and rest > 2 for rest in arguments[-2:]):
            paths = ()  # relative to an open folder, as shutil.rmtree does; what it changes shows afterwards
        bad = [path for path in paths if path is not None and not is_allowed(path)]
        if event == "subprocess.Popen" and case.argv[:1] == ["bench"]:
            raise PermissionError("fuzz: what bench measures runs in processes without limits")
        if bad or event in _STARTING:
            os.write(note, f"{event} {bad or arguments!r}\n".encode("utf-8", "replace"))
            raise PermissionError(f"fuzz: {event} is outside what this case may do")

    sys.addaudithook(hook)
