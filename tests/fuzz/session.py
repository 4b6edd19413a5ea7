"""A session: everything is imported once, workers fork a child for each case, and what fails is kept."""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import re
import select
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fuzz.child import Box, Case, Outcome, judge, run_case
from fuzz.kinds import make_case, schedule

__all__ = ["fuzz", "import_everything", "made_seeds", "replay"]

LIBRARIES = (
    *("datasets", "gguf", "matplotlib.pyplot", "pyarrow.parquet", "torch", "yaml", "peft", "onnx"),
    *(f"transformers.models.{family}.modeling_{family}" for family in ("llama", "bert", "t5")),
)
COMMANDS = ("cli", "data", "quant", "models", "runtime", "evaluate", "tune", "export", "bench")
"""Packages and modules of edge-ft whose modules are imported before the first fork."""
KEPT = 3
"""Failing cases whose input is kept, of each signature."""
SHOWN_EVERY = 5.0


def import_everything() -> None:
    """Import what the commands import, so that a fork has it; nothing here may start threads."""
    import platform

    platform.processor()  # keeps what a process of its own says
    os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="fuzz-matplotlib-")
    atexit.register(shutil.rmtree, os.environ["MPLCONFIGDIR"], ignore_errors=True)
    for name in LIBRARIES:
        importlib.import_module(name)
    for name in COMMANDS:
        package = importlib.import_module(f"edge_ft.{name}")
        for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
            with suppress(ImportError):  # of a peer that is not installed
                if module.name != "studies":
                    importlib.import_module(f"edge_ft.{name}.{module.name}")


@contextmanager
def made_seeds(folder: Path | None) -> Iterator[Path]:
    """The folder with the seeds, made in a child process where it is missing: torch starts threads as it trains."""
    with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as temporary:
        seeds = folder or Path(temporary) / "seeds"
        if not seeds.is_dir():
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    from fuzz.seeds import write_seeds

                    with (seeds.parent / "seeds.log").open("w") as log:
                        os.dup2(log.fileno(), 1)
                        os.dup2(log.fileno(), 2)
                        write_seeds(seeds)
                    code = 0
                except BaseException:  # noqa: BLE001 - a fork must not return
                    import traceback

                    traceback.print_exc()
                finally:
                    os._exit(code)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                print((seeds.parent / "seeds.log").read_text(errors="replace"), file=sys.stderr)
                raise SystemExit("fuzz: the seeds cannot be made")
        yield seeds


def fuzz(
    cases: int,
    seed: int,
    kinds: list[str],
    seeds: Path,
    out: Path,
    workers: int,
    *,
    plant: Callable[[], None] | None = None,
    stop_at: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """Run cases of all kinds.

    Args:
        cases: How many.
        seed: The same seed gives the same cases.
        kinds: Names of `KINDS`.
        seeds: What `write_seeds` wrote.
        out: Folder for the report and for failing cases.
        workers: Processes that fork cases.
        plant: Called in each worker first: puts a fault into edge-ft.
        stop_at: Stop after a case that fails with one of these verdicts, or with any if it is empty.

    Returns:
        `seed`, `cases`, `seconds`, `cpu_seconds`, counts by kind and outcome, and the failing cases.
    """
    todo = schedule(cases, kinds)
    out.mkdir(parents=True, exist_ok=True)
    gc.collect()
    gc.freeze()
    started = time.monotonic()
    report: dict[str, Any] = {"seed": seed, "cases": 0, "seconds": 0.0, "cpu_seconds": 0.0, "failed": 0}
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    signatures: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    shown = started
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        pool = _start([todo[at::workers] for at in range(workers)], seed, seeds, Path(temporary), out, plant)
        try:
            for result in _results(pool):
                report["cases"] += 1
                report["cpu_seconds"] += result["cpu_seconds"]
                verdict = result.get("verdict")
                counts[result["kind"]][verdict or f"exit code {result['code']}"] += 1
                if verdict:
                    report["failed"] += 1
                    signatures[result["signature"]] += 1
                    if signatures[result["signature"]] <= KEPT:
                        failures.append(result)
                        if stop_at is None:
                            _print_failure(result)
                    elif result.get("kept"):
                        shutil.rmtree(result["kept"], ignore_errors=True)
                    if stop_at is not None and (not stop_at or verdict in stop_at):
                        break
                now = time.monotonic()
                if stop_at is None and now - shown > SHOWN_EVERY:
                    shown = now
                    rate = report["cases"] / (now - started)
                    left = (len(todo) - report["cases"]) / rate
                    print(
                        f"{report['cases']}/{len(todo)} cases, {rate:.0f}/s, "
                        f"{report['failed']} failed, {left:.0f} s left",
                        flush=True,
                    )
        finally:
            _stop(pool)
    report["seconds"] = round(time.monotonic() - started, 1)
    report["cpu_seconds"] = round(report["cpu_seconds"], 1)
    report["kinds"] = {kind: {"cases": found.total(), **dict(sorted(found.items()))} for kind, found in counts.items()}
    report["signatures"] = dict(signatures.most_common())
    report["failures"] = failures
    (out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _print_failure(result: dict[str, Any]) -> None:
    print(f"FAILED: {result['kind']} {result['index']}: {result['verdict']} ({result['what']})")
    print(f"  {result['signature'][:300]}")
    print(f"  input: {result['kept']}; again: make fuzz REPLAY={result['kept']}", flush=True)


def _start(
    parts: list[list[tuple[str, int]]],
    seed: int,
    seeds: Path,
    temporary: Path,
    out: Path,
    plant: Callable[[], None] | None,
) -> list[tuple[int, int]]:
    """Fork a worker for each part; returns its process and the pipe from which its results are read."""
    pool = []
    for number, part in enumerate(parts):
        reader, writer = os.pipe()
        worker = os.fork()
        if worker == 0:
            code = 1
            try:
                os.close(reader)
                os.setpgid(0, 0)
                if plant is not None:
                    plant()
                _work(part, seed, seeds, temporary / str(number), out, writer)
                code = 0
            except BaseException:  # noqa: BLE001 - a fork must not return
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writer)
        pool.append((worker, reader))
    return pool


def _work(part: list[tuple[str, int]], seed: int, seeds: Path, place: Path, out: Path, writer: int) -> None:
    for kind, index in part:
        case, box = make_case(kind, seed, index, place, seeds)
        found = run_case(case, box)
        verdict = judge(case, found)
        result: dict[str, Any] = {
            "kind": kind,
            "index": index,
            "what": case.what,
            "code": found.code,
            "cpu_seconds": round(found.cpu_seconds, 3),
        }
        if verdict:
            result |= {
                "verdict": verdict,
                "signature": _signature(verdict, case, found),
                "kept": str(
                    _keep(
                        case, found, box, out / f"{kind.replace(' ', '-')}-{seed}-{index}", verdict, (kind, seed, index)
                    )
                ),
            }
        os.write(writer, json.dumps(result).encode() + b"\n")
    shutil.rmtree(place, ignore_errors=True)


def _results(pool: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """The results of all workers as they come."""
    rests = {reader: b"" for _, reader in pool}
    while rests:
        for reader in select.select(list(rests), [], [])[0]:
            data = os.read(reader, 1 << 16)
            if not data:
                del rests[reader]
                continue
            *lines, rests[reader] = (rests[reader] + data).split(b"\n")
            yield from map(json.loads, lines)


def _stop(pool: list[tuple[int, int]]) -> None:
    failed = False
    for worker, reader in pool:
        os.close(reader)
        done, status = os.waitpid(worker, os.WNOHANG)
        if not done:
            with suppress(ProcessLookupError):
                os.killpg(worker, 9)
            os.waitpid(worker, 0)
        elif os.waitstatus_to_exitcode(status):
            failed = True
    if failed and sys.exc_info()[0] is None:
        raise SystemExit("fuzz: a worker ended early, see its traceback above")


def _signature(verdict: str, case: Case, found: Outcome) -> str:
    """What cases with the same cause have in common."""
    lines = [line for line in found.stderr.split("\n") if line.startswith("edge-ft: ")]
    if found.trace:
        places = re.findall(r'File "[^"]*?((?:edge_ft|export|bench)/[^"]+)", line \d+, in (\S+)', found.trace)
        last = found.trace.strip().split("\n")[-1]
        detail = f"{':'.join(places[-1]) if places else '-'} {last.partition(':')[0]}"
    elif verdict in ("write", "changed"):
        detail = re.sub(r"\d+|/\S+/", "#", " ".join([*found.writes, *found.changed]))[:120]
    else:
        detail = re.sub(r"\d+|'[^']*'|\"[^\"]*\"", "#", lines[-1] if lines else found.stderr[-200:])[:90]
    return f"{verdict}: {case.argv[0] if case.argv else '-'}: {detail}"


def _keep(case: Case, found: Outcome, box: Box, kept: Path, verdict: str, number: tuple[str, int, int]) -> Path:
    """Copy the inputs of a failing case, with how it ended."""
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    shutil.copytree(box.work, kept / "work", symlinks=True, ignore=shutil.ignore_patterns("out*", ".out*"))
    (kept / "stderr.txt").write_text(found.stderr, encoding="utf-8", errors="replace")
    if found.trace:
        (kept / "trace.txt").write_text(found.trace, encoding="utf-8", errors="replace")
    (kept / "stdin").write_bytes(case.stdin)
    values = {**asdict(case), "stdin": len(case.stdin), "verdict": verdict, "code": found.code, "number": number}
    values |= {
        "writes": found.writes,
        "changed": found.changed,
        "peak_bytes": found.peak_bytes,
        "cpu_seconds": found.cpu_seconds,
    }
    (kept / "case.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return kept


def replay(kept: Path) -> int:
    """Run a kept case again and print how it ends; returns 1 if it fails as it did, or otherwise."""
    values = json.loads((kept / "case.json").read_text(encoding="utf-8"))
    names = ("kind", "argv", "what", "console", "expect", "agrees")
    case = Case(**{name: values[name] for name in names}, stdin=(kept / "stdin").read_bytes(), out=tuple(values["out"]))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        box = Box(Path(temporary) / "box", kept)
        shutil.rmtree(box.work)
        shutil.copytree(kept / "work", box.work)
        found = run_case(case, box)
    verdict = judge(case, found)
    print(f"edge-ft {' '.join(map(ascii, case.argv))}\n{found.stdout[-2000:]}{found.stderr[-4000:]}\n{found.trace}")
    used = f"{found.cpu_seconds:.1f} CPU-seconds, {found.peak_bytes / 1e6:.0f} MB"
    print(f"exit code {found.code}, {used}: {verdict or 'as it should be'}")
    return 1 if verdict else 0
