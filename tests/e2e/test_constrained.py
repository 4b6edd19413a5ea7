"""A bundle learns within little memory: the whole command, its report included, with one thread.

The limit is a cgroup's where this user may make one; else the process is watched, and ended past it.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from once import once
from trainable_bundles import trainable_bundle

from edge_ft.artifacts import RunFolder
from edge_ft.bench.meters import JOIN_GROUP, memory_limit
from edge_ft.bench.studies.datasets import decoder_weights
from edge_ft.system import resident_bytes

DEVICE = """
import sys
sys.modules["rouge_score"] = sys.modules["sacrebleu"] = None  # 160 MB that a base install does not have
from edge_ft.cli import main
main()
"""
POLL = 0.02
"""Seconds between two looks."""


def tune_within(size: int, arguments: Sequence[str | Path]) -> None:
    """Run `edge-ft tune` within `size` bytes of memory."""
    limit, seen = memory_limit(size), 0
    command = [sys.executable, "-c", DEVICE, "tune", "--threads", "1", "--quiet", *map(str, arguments)]
    with limit.group() as group:
        joined = [*JOIN_GROUP, str(group), *command] if group is not None else command
        with subprocess.Popen(joined, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while True:
                try:
                    _, said = process.communicate(timeout=POLL)
                    break
                except subprocess.TimeoutExpired:
                    seen = max(seen, resident_bytes(process.pid))
                    if seen > size:
                        process.kill()
    assert process.returncode == 0, f"{said} ({limit.kind}, {seen / 1e6:.0f} MB seen)"


def test_a_tiny_bundle_learns_in_250_mb(work: Path, llama: Path, sums: Path, tmp_path: Path) -> None:
    bundle, run = once(work / "learning-llama-chat.bundle", lambda out: trainable_bundle(llama, out)), tmp_path / "run"
    tune_within(250_000_000, ("--model", bundle, "--data", sums, "--max-steps", "4", "--out", run))
    report = RunFolder.open(run).report()
    assert report["answers"]["rows"] > 0
    assert report["peak_rss_bytes"] < 250_000_000


@pytest.mark.long
def test_smollm2_learns_in_700_mb(work: Path, smollm2_rows: dict[str, Path], tmp_path: Path) -> None:
    bundle, run = once(work / "smollm2-base", lambda out: trainable_bundle(decoder_weights(), out)), tmp_path / "run"
    columns = ("--prompt", r"Transcript: {transcript}\nWritten:", "--completion", " {written}")
    names = zip(("--data", "--validation", "--test"), ("train", "validation", "test"), strict=True)
    rows = [word for flag, split in names for word in (flag, smollm2_rows[split])]
    steps = ("--max-steps", "4", "--learning-rate", "3e-3", "--memory", "low")
    tune_within(700_000_000, ("--model", bundle, *rows, *columns, *steps, "--out", run))
    report = RunFolder.open(run).report()
    assert report["nll"]["test"] < report["nll"]["test_base"] - 0.5
    assert report["answers"]["rows"] > 0
    assert report["peak_rss_bytes"] < 700_000_000
