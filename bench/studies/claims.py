"""The usual promises of fine-tuning, measured: every case is trained, exported and scored, a table for each claim.

Each stage is the command that a user would give, in a process of its own. Its result is kept as soon as it ends, so
that a study that was stopped or killed resumes with the stage that it was in; a training resumes from its checkpoint.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.bench.studies.claim_cases import CASES, CLAIMS, MODELS, ROWS, Case, Stage, stages
from edge_ft.bench.studies.claim_tables import document
from edge_ft.bench.studies.datasets import write_splits
from edge_ft.errors import EdgeFTError, GateRefused, UsageError, did_you_mean
from edge_ft.files import write_json, write_text
from edge_ft.system import usable_cpus

__all__ = ["Results", "load_results", "main", "run_case", "run_stage"]

Results = dict[str, dict[str, Any]]
"""Case -> stage -> the JSON of its command."""
Command = Callable[[Sequence[str]], int]
"""Arguments of edge-ft -> exit code."""


def edge_ft(arguments: Sequence[str]) -> int:
    """Run one command of edge-ft, whose output stays visible, and return its exit code."""
    return subprocess.run([sys.executable, "-m", "edge_ft", *arguments], check=False).returncode


def run_stage(stage: Stage, folder: Path, command: Command = edge_ft) -> Any:
    """Run a stage unless its result is kept.

    Args:
        stage: The command.
        folder: Of the case.
        command: Runs edge-ft.

    Returns:
        The command's JSON, new or kept; of an export that the gate refused, the manifest of the refused bundle.

    Raises:
        EdgeFTError: the command failed.
    """
    kept = folder / f"{stage.name}.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    arguments = list(stage.arguments)
    if stage.name == "tune" and RunFolder(folder / "run").is_begun():
        arguments.append("--resume")
    if arguments[0] == "export":
        shutil.rmtree(arguments[arguments.index("--out") + 1], ignore_errors=True)  # left by an export that was stopped
    print(f"\n$ edge-ft {shlex.join(arguments)}", flush=True)
    given = folder / f".{stage.name}.json"  # no result until the command has succeeded
    code = command([*arguments, "--json", str(given)])
    if code == GateRefused.exit_code:
        out = Path(arguments[arguments.index("--out") + 1])
        write_json(kept, Bundle.open(out.with_name(out.name + ".rejected")).manifest)
    elif code:
        raise EdgeFTError(f"edge-ft {arguments[0]} ended with exit code {code}")
    else:
        given.replace(kept)
    return json.loads(kept.read_text(encoding="utf-8"))


def run_case(case: Case, folder: Path, command: Command = edge_ft) -> None:
    """Run every stage of a case that is not done yet; a refused bundle is not scored on answers.

    Raises:
        EdgeFTError: rows or weights are missing, or a command failed.
    """
    files = {name: folder / "rows" / f"{name}.jsonl" for name in ("train", "validation", "test")}
    if not all(file.is_file() for file in files.values()):
        counts = {"train": case.train, "validation": case.validation, "test": case.test}
        files = write_splits(ROWS[case.data].rows(), folder / "rows", **counts)
    for stage in stages(case, MODELS[case.model].weights(), files, folder):
        if stage.name == "answers-shipped" and not (folder / case.weights[0]).is_dir():
            continue
        run_stage(stage, folder, command)


def load_results(out: Path) -> Results:
    """The kept results of every case, finished or not."""
    return {
        name: {
            file.stem: json.loads(file.read_text(encoding="utf-8"))
            for file in sorted((out / name).glob("*.json"))
            if not file.name.startswith(".")
        }
        for name in CASES
    }


def main(*, out: Path = Path("out/claims"), write: Path | None = None, only: str | None = None) -> None:
    """Measure the claims, and write their tables.

    Args:
        out: Folder for rows, runs, bundles and results; finished stages are skipped.
        write: File for the tables, written again after every case; default claims.md in --out.
        only: One claim: understanding, coherence, domains, size, overfitting, rows, compute or recipe. The tables also
            show what was measured before.

    Raises:
        UsageError: there is no such claim.
        EdgeFTError: a case did not finish; the others are done.
    """
    if only is not None and only not in CLAIMS:
        raise UsageError(f"--only {only}: there is no such claim{did_you_mean(only, list(CLAIMS))}")
    names = CLAIMS[only] if only is not None else tuple(CASES)
    failed = []
    started = time.monotonic()
    for at, name in enumerate(names, 1):
        print(f"\n== {name}: case {at} of {len(names)}, {(time.monotonic() - started) / 60:.0f} min so far", flush=True)
        try:
            run_case(CASES[name], out / name)
        except EdgeFTError as error:
            print(f"{name}: {error}; the other cases continue", file=sys.stderr, flush=True)
            failed.append(name)
        write_text(write or out / "claims.md", document(load_results(out), usable_cpus()))
    print("\n" + (write or out / "claims.md").read_text(encoding="utf-8"))
    if failed:
        raise EdgeFTError(f"{len(failed)} case(s) did not finish: {', '.join(failed)}; the same command tries again")
