"""Faults at each stage of each command: what becomes of the files, and how it goes on.

    python tests/faults.py [--quick] [--only TEXT] [--write docs/faults.md]

Each cell of the table is a real process on tiny models: a fork of this one, which has imported everything and computed
nothing. The fault strikes when the command reports that it has reached the stage. Afterwards the files that are there
are opened, and the command is given again (`tune` with --resume).
"""

import argparse
import ctypes
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"

NOBODY = 65534
LONGEST_S = 120.0
"""Seconds of a command; one that takes longer hangs."""
DISK = 48 << 20
"""Bytes of the small disk that runs full."""


@dataclass(frozen=True)
class Stage:
    """A moment of a command."""

    command: str
    name: str
    reported: str
    """Pattern of the progress message that it begins with."""


STAGES = (
    Stage("tune", "loading", "loading .* as int4"),
    Stage("tune", "choosing codes", "GPTQ calibration 3/"),
    Stage("tune", "steps", "train 5/"),
    Stage("tune", "evaluation", "validation at step 8 1/"),
    Stage("tune", "report: scores", "test rows, tuned 1/"),
    Stage("tune", "report: answers", "answers, tuned 0/"),
    Stage("tune", "report: writing", "writing the report"),
    Stage("export", "loading", "loading "),
    Stage("export", "tracing", "tracing "),
    Stage("export", "writing", "writing the graphs"),
    Stage("export", "scoring", "opening the graph of accuracy level 4"),
    Stage("export", "manifest", "writing the manifest"),
    Stage("verify", "scoring", "probe 1/"),
    Stage("eval", "scoring", "score 1/"),
    Stage("run --jsonl", "answering", "answer 2/"),
)


@dataclass(frozen=True)
class Fault:
    """What strikes."""

    name: str
    strike: Callable[[], None] | None
    """In the process; None: the parent acts while the process is stopped."""


def _kill(*numbers: signal.Signals) -> Callable[[], None]:
    def strike() -> None:
        def send() -> None:
            for number in numbers:
                time.sleep(0.002)  # the message is out, the work goes on
                os.kill(os.getpid(), number)

        threading.Thread(target=send, daemon=True).start()

    return strike


def _fill_disk() -> None:
    """Leave no byte on the disk that the command writes to."""
    with Path(os.environ["FAULTS_DISK"], ".filler").open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


def _take_rights() -> None:
    """From now on this process is a user who may read everything and write nothing."""
    os.setegid(NOBODY)
    os.seteuid(NOBODY)


def _take_memory() -> None:
    """From now on the process gets no more memory, and all that it holds in large free blocks is taken."""
    hoard = []
    data = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (int(data.split()[1]) << 10, resource.RLIM_INFINITY))
    with suppress(MemoryError):
        while True:
            hoard.append(bytearray(32 << 10))
    globals()["_hoard"] = hoard


def _shift_clock(seconds: float) -> Callable[[], None]:
    def strike() -> None:
        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() + seconds
        time.time_ns = lambda: now_ns() + int(seconds * 1e9)

    return strike


FAULTS = (
    Fault("kill -9", lambda: os.kill(os.getpid(), signal.SIGKILL)),
    Fault("SIGTERM", _kill(signal.SIGTERM)),
    Fault("Ctrl-C", _kill(signal.SIGINT)),
    Fault("SIGHUP", _kill(signal.SIGHUP)),
    Fault("Ctrl-C twice", _kill(signal.SIGINT, signal.SIGINT)),
    Fault("full disk", _fill_disk),
    Fault("no permission", _take_rights),
    Fault("no memory", _take_memory),
    Fault("second process", None),
    Fault("clock back a day", _shift_clock(-86400)),
    Fault("clock on a day", _shift_clock(86400)),
)
QUICK = {
    ("tune", "choosing codes", "SIGTERM"),
    ("tune", "steps", "kill -9"),
    ("tune", "steps", "second process"),
    ("tune", "evaluation", "full disk"),
    ("tune", "report: scores", "SIGTERM"),
    ("tune", "report: answers", "kill -9"),
    ("tune", "report: writing", "no permission"),
    ("export", "tracing", "Ctrl-C"),
    ("export", "writing", "full disk"),
    ("export", "scoring", "kill -9"),
    ("verify", "scoring", "SIGTERM"),
    ("run --jsonl", "answering", "SIGHUP"),
}
"""The cells that guard every change."""


@dataclass
class Done:
    """A command that has ended."""

    code: int
    """Exit code; negative: the signal that ended it."""
    errors: str
    second: int | None = None
    """Exit code of the same command, given again while this one was stopped."""

    def is_clean(self, fault: Fault) -> bool:
        """Whether it ended with a documented code and no traceback; a library may abort where memory ends."""
        aborts = (-signal.SIGABRT,) if fault.name == "no memory" else ()
        return "Traceback" not in self.errors and self.code in (0, 2, 4, 130, -signal.SIGKILL, *aborts)

    @property
    def last_line(self) -> str:
        return (self.errors.strip().splitlines() or [""])[-1]


class Bench:
    """Tiny models, rows, a run and a bundle that were made without a fault, and a small disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = folder / "disk"
        self.disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=755", "tmpfs", str(self.disk)]
        self.has_disk = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
        os.environ["FAULTS_DISK"] = str(self.disk)
        self.in_child(self._write_models)
        run = self.command("tune", *self.tune_arguments(self.whole))
        assert run.code == 0, run.errors
        done = self.command("export", str(self.whole), *self.export_arguments(self.bundle))
        assert done.code == 0, done.errors
        done = self.command("run", str(self.bundle), *self.answer_arguments(folder / "answers.jsonl"))
        assert done.code == 0, done.errors
        self.bytes = {path: _content(path) for path in (self.whole, self.bundle)}

    def _write_models(self) -> None:
        from tiny_models import write_llama, write_sums

        write_llama(self.folder / "llama")
        write_sums(self.folder / "sums.jsonl")

    @property
    def whole(self) -> Path:
        return self.folder / "whole"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    def close(self) -> None:
        if self.has_disk:
            subprocess.run(["umount", "-l", str(self.disk)], check=False)

    def tune_arguments(self, out: Path) -> list[str]:
        given = {"model": self.folder / "llama", "data": self.folder / "sums.jsonl", "out": out, "threads": 1}
        given |= {"max-steps": 12, "eval-steps": 4, "learning-rate": 5e-3, "checkpoint-steps": 1, "batch-size": 2}
        given |= {"compute": "fp32", "dropout": 0.1}
        return [
            *(text for name, value in given.items() for text in (f"--{name}", str(value))),
            *["--split", ".6", ".2", ".2"],
        ]

    def export_arguments(self, out: Path) -> list[str]:
        return ["--out", str(out), "--threads", "1", "--max-tax", "9", "--min-retained", "-9", "--max-metric-drop", "9"]

    def answer_arguments(self, out: Path) -> list[str]:
        rows = str(self.whole / "splits" / "test.jsonl")
        return ["--jsonl", rows, "--out", str(out), "--threads", "1", "--max-new-tokens", "4"]

    def arguments(self, command: str, out: Path) -> list[str]:
        """The command line of a stage, which writes to `out` if it writes."""
        if command == "tune":
            return ["tune", *self.tune_arguments(out)]
        if command == "export":
            return ["export", str(self.whole), *self.export_arguments(out)]
        if command == "run --jsonl":
            return ["run", str(self.bundle), *self.answer_arguments(out)]
        if command == "eval":
            rows = str(self.whole / "splits" / "test.jsonl")
            return ["eval", str(self.bundle), "--data", rows, "--no-generate", "--threads", "1", "--json", str(out)]
        return ["verify", str(self.bundle), "--threads", "1", "--json", str(out)]

    def in_child(self, work: Callable[[], object]) -> None:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work()
                code = 0
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0

    def command(self, *arguments: str, stage: Stage | None = None, fault: Fault | None = None, stdin: str = "") -> Done:
        """Run a command line in a process of its own; a fault without `strike` is a second such process."""
        errors = self.folder / f"errors-{random.getrandbits(40):x}"
        pid = os.fork()
        if pid == 0:
            _be_command(arguments, errors, stage, fault)
        second = None
        watch = threading.Timer(LONGEST_S, os.kill, (pid, signal.SIGALRM))  # what hangs ends with a code of its own
        watch.daemon = True
        watch.start()
        _, status = os.waitpid(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            second = self.command(*arguments).code
            os.kill(pid, signal.SIGCONT)
            _, status = os.waitpid(pid, 0)
        watch.cancel()
        text = errors.read_text(errors="replace")
        errors.unlink()
        return Done(os.waitstatus_to_exitcode(status), text, second)


def _be_command(arguments: tuple[str, ...], errors: Path, stage: Stage | None, fault: Fault | None) -> None:
    """Become the command line in this forked process, and end it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT, 0o666), 2)
    sys.argv = ["edge-ft", *arguments]
    if stage is not None and fault is not None:
        _strike_at(stage, fault)
    from edge_ft.__main__ import main

    code: Any = 0
    try:
        main()
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 70
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _strike_at(stage: Stage, fault: Fault) -> None:
    """Let the fault strike when the command reports the stage for the first time."""
    from edge_ft.progress import Lines

    say, advance, struck = Lines.say, Lines.advance, []

    def reached(text: str) -> None:
        if not struck and re.match(stage.reported, text):
            struck.append(text)
            (fault.strike or (lambda: os.kill(os.getpid(), signal.SIGSTOP)))()

    def heard_say(self: Lines, text: str) -> None:
        say(self, text)
        reached(text)

    def heard_advance(self: Lines, name: str, done: int, total: int, detail: str = "") -> None:
        advance(self, name, done, total, detail)
        if threading.current_thread() is threading.main_thread():
            reached(f"{name} {done}/{total}")

    Lines.say, Lines.advance = heard_say, heard_advance  # type: ignore[method-assign]


def _content(folder: Path) -> dict[str, bytes]:
    """What must be the same: all but measured times."""
    found = {}
    for file in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
        if file.is_file():
            found[file.name if file == folder else file.relative_to(folder).as_posix()] = file.read_bytes()
    return found


def _tuned(run: Path) -> Any:
    """What a finished run has found: the adapter, and the report without what was measured of time and memory."""
    report = json.loads((run / "report.json").read_text())
    names = ("nll", "metrics", "best_step", "steps", "overfitting", "answers", "samples")
    return (run / "adapter" / "adapter_model.safetensors").read_bytes(), {name: report[name] for name in names}


def strike(bench: Bench, stage: Stage, fault: Fault) -> tuple[str, int]:
    """Make a cell of the table.

    Returns:
        The outcome, and the exit code; an outcome that begins with FAULT is one.
    """
    needs_disk = fault.name == "full disk"
    if needs_disk and not bench.has_disk:
        return "skipped: a small disk cannot be mounted here", 0
    if fault.name == "no permission" and os.geteuid() != 0:
        return "skipped: needs root, to give up its rights", 0
    place = bench.disk if needs_disk else Path(tempfile.mkdtemp(dir=bench.folder))
    out = place / "out"
    try:
        done = bench.command(*bench.arguments(stage.command, out), stage=stage, fault=fault)
        (place / ".filler").unlink(missing_ok=True)
        outcome = _after(bench, stage, fault, done, out)
    finally:
        for left in place.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    if not done.is_clean(fault) or outcome.startswith("FAULT"):
        outcome = f"FAULT {outcome}: exit code {done.code}: {done.errors[-1500:]}"
    return outcome, done.code


def _after(bench: Bench, stage: Stage, fault: Fault, done: Done, out: Path) -> str:
    """Open what is there, go on, and say how."""
    if fault.strike is None and stage.command in ("tune", "export", "run --jsonl") and done.second != 2:
        return f"FAULT the second process ended with {done.second}"
    if (
        done.code == 130
        and "twice" not in fault.name
        and not re.search("stopped; .*(resume|again|checks)", done.last_line)
    ):
        return "FAULT it does not say how to go on"
    if stage.command == "tune":
        return _after_tune(bench, done, out)
    again = bench.arguments(stage.command, out)
    if stage.command in ("verify", "eval"):
        if _content(bench.bundle) != bench.bytes[bench.bundle]:
            return "FAULT the bundle has changed"
        if done.code == 0:
            return "no effect"
        return "unharmed" if not out.exists() and bench.command(*again).code == 0 else "FAULT cannot be given again"
    expected = bench.bytes[bench.bundle] if stage.command == "export" else _content(bench.folder / "answers.jsonl")
    there = out.exists()
    if not there:
        repeated = bench.command(*again)
        if repeated.code != 0:
            return f"FAULT cannot be given again ({repeated.last_line})"
    page = f"{out.name}.report.html"  # of an export, which the next one replaces
    left = [path.name for path in out.parent.iterdir() if path != out and path.name != page]
    if left:
        return f"FAULT {left} is left beside the output"
    if stage.command == "export":
        same = _without_times(_content(out)) == _without_times(expected)
    else:
        same = _answers(out) == _answers(bench.folder / "answers.jsonl")
    if not same:
        return "FAULT another output"
    return ("no effect" if done.code == 0 else "whole") if there else "unharmed"


def _answers(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def _without_times(files: dict[str, bytes]) -> dict[str, bytes]:
    return files


def _after_tune(bench: Bench, done: Done, out: Path) -> str:
    expected = _tuned(bench.whole)
    if done.code == 0:
        return "no effect" if _tuned(out) == expected else "FAULT another result"
    if (out / "report.json").exists():
        return "whole" if _tuned(out) == expected else "FAULT a report that is not whole"
    existed = out.exists()
    resumed = bench.command(*bench.arguments("tune", out), "--resume")
    if resumed.code != 0:
        return f"FAULT cannot be resumed ({resumed.last_line})"
    if _tuned(out) != expected:
        return "FAULT resumed to another result"
    left = [path.name for path in out.parent.iterdir() if path != out]
    if left or any(path.name.startswith(".") or path.name == "checkpoint" for path in out.iterdir()):
        return f"FAULT files are left: {left}"
    step = json.loads((out / "report.json").read_text())["resumed_from_step"]
    return f"resumes at step {step}" if step else "unharmed" if not existed else "starts again"


# Flipped bits.

FLIPS = 4
"""In each file."""


def flips(bench: Bench, quick: bool) -> Iterator[tuple[str, str, str, int]]:
    """Flip bits in every file of a bundle, a run and an unfinished run, and open them.

    Yields:
        What the file belongs to, its name, the outcome, and how many bits were flipped.
    """
    stopped = bench.folder / "stopped"
    done = bench.command(*bench.arguments("tune", stopped), stage=STAGES[4], fault=FAULTS[1])
    assert done.code == 130, done.errors
    rows = str(bench.folder / "whole" / "splits" / "test.jsonl")
    plain = ("--no-generate", "--threads", "1", "--data", rows)

    def score(source: Path) -> Callable[[Path], tuple[int, Any, str]]:
        def opened(folder: Path) -> tuple[int, Any, str]:
            result = bench.folder / "scores.json"
            result.unlink(missing_ok=True)
            done = bench.command("eval", str(folder), *plain, "--json", str(result), "--quiet")
            found = json.loads(result.read_text())["nll"] if result.exists() else None
            return done.code, found, done.last_line

        return opened

    def resume(folder: Path) -> tuple[int, Any, str]:
        done = bench.command(*bench.arguments("tune", folder), "--resume")
        return done.code, _tuned(folder) if done.code == 0 else None, done.last_line

    cases = (
        ("bundle", bench.bundle, score(bench.bundle)),
        ("finished run", bench.whole, score(bench.whole)),
        ("unfinished run", stopped, resume),
    )
    copy = bench.folder / "copy"
    for what, folder, opened in cases:
        shutil.copytree(folder, copy)
        expected = opened(copy)
        shutil.rmtree(copy)
        assert expected[0] == 0, expected
        names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
        for name in names[:: 6 if quick else 1]:
            where = random.Random(name)
            outcomes: dict[str, int] = {}
            for _ in range(1 if quick else FLIPS):
                shutil.copytree(folder, copy)
                _flip(copy / name, where)
                code, found, line = opened(copy)
                shutil.rmtree(copy)
                outcome = (
                    "refused" if code == 2 else "unharmed" if (code, found) == expected[:2] else f"FAULT {code} {line}"
                )
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
            for outcome, count in sorted(outcomes.items()):
                yield what, name, outcome, count


def _flip(file: Path, where: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if not content:
        content = bytearray(b"\0")
    at = where.randrange(8 * len(content))
    content[at // 8] ^= 1 << at % 8
    file.write_bytes(content)


# The page.

HEADER = """# Faults and stages

What happens when a fault strikes while a command works, as `make faults` found it on tiny models: each cell is a
process that was struck when it had reached the stage. Beside the outcome is the exit code; a negative one is the signal
that ended the process.

- **resumes at step N**: `edge-ft tune --resume` goes on there, and ends with the adapter and the report of a run that
  was not struck, bit for bit.
- **starts again**: the run folder holds no checkpoint yet; `--resume` starts at the first step, with the same end.
- **unharmed**: nothing was written or changed, nothing is left, and the same command succeeds.
- **whole**: the output had been written; it is complete.
- **no effect**: the command ends well, with the same output.

In no cell is there half a file that opens.
"""
FOOTER = """
*Full disk*: no byte is left on the disk that the command writes to. *No permission*: from then on the process is a
user who may read everything and write nothing. *No memory*: it gets no more memory; a library
in C++ may then end the process itself (-6). *Second process*: the same command
is given again meanwhile; where there is an output, it is refused by name (2), and the cell shows the first process.
*Clock*: the system's time jumps; times are measured with a clock that does not.

A place that cannot be written (a read-only disk, a folder of another user) is refused before any work, by name (2).

## Flipped bits

One bit of one file is flipped, and the folder is opened: `edge-ft eval` of a bundle and of a finished run, `edge-ft
tune --resume` of a run that was stopped in its report. *Unharmed*: the result is the same.

| folder | file | flips |
| --- | --- | --- |
"""


def page(cells: dict[tuple[Stage, str], tuple[str, int]], flipped: list[tuple[str, str, str, int]]) -> str:
    """Return docs/faults.md."""
    names = [fault.name for fault in FAULTS]
    lines = [HEADER, f"| command: stage | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for stage in STAGES:
        row = [f"{outcome} ({code})" for outcome, code in (cells[stage, name] for name in names)]
        lines.append(f"| `{stage.command}`: {stage.name} | {' | '.join(row)} |")
    lines += FOOTER.splitlines()
    files: dict[tuple[str, str], list[str]] = {}
    for what, name, outcome, count in flipped:
        files.setdefault((what, name), []).append(f"{count} {outcome}")
    lines += [f"| {what} | `{name}` | {', '.join(found)} |" for (what, name), found in files.items()]
    return "\n".join(lines) + "\n"


@contextmanager
def made_bench() -> Iterator[Bench]:
    """Import what the commands import, and make what they read."""
    import edge_ft.tune.run  # noqa: F401
    import edge_ft.tune.torch_engine  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        bench = Bench(Path(folder))
        try:
            yield bench
        finally:
            bench.close()


def read_only(bench: Bench) -> list[str]:
    """Give each command that writes an output on a read-only disk; return what is wrong."""
    if not bench.has_disk:
        return []
    subprocess.run(["mount", "-o", "remount,ro", str(bench.disk)], check=True)
    wrong = []
    for command in ("tune", "export", "run --jsonl"):
        done = bench.command(*bench.arguments(command, bench.disk / "out"))
        if done.code != 2 or "give another --out" not in done.last_line or "loading" in done.errors:
            wrong.append(f"{command} on a read-only disk: {done.code} {done.errors}")
    subprocess.run(["mount", "-o", "remount,rw", str(bench.disk)], check=True)
    return wrong


def main() -> int:
    """Fill the table; return 1 if a cell is a fault."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    ctypes.CDLL(None)  # what later forks need is loaded
    cells: dict[tuple[Stage, str], tuple[str, int]] = {}
    wrong: list[str] = []
    flipped: list[tuple[str, str, str, int]] = []
    with made_bench() as bench:
        for stage in STAGES:
            for fault in FAULTS:
                key = (stage.command, stage.name, fault.name)
                if (given.quick and key not in QUICK) or given.only not in " ".join(key):
                    continue
                found = cells[stage, fault.name] = strike(bench, stage, fault)
                print(*key, *found, sep=" | ", flush=True)
                if found[0].startswith("FAULT"):
                    wrong.append(" | ".join(key))
        if not given.only:
            wrong += read_only(bench)
        if given.only in "flips":
            for row in flips(bench, given.quick):
                print(*row, sep=" | ", flush=True)
                flipped.append(row)
                if row[2].startswith("FAULT"):
                    wrong.append(" | ".join(row[:3]))
    for line in wrong:
        print("FAULT", line, file=sys.stderr)
    if given.write is not None and not wrong:
        given.write.write_text(page(cells, flipped), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
