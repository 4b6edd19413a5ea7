"""The main job in full, twice: real rows through tune, export, eval and bench, and one table for each model.

Every stage is the command that a user would give, in a process of its own; its JSON is kept in the output folder.
"""

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_ft.bench.report import markdown_table
from edge_ft.bench.studies.datasets import (
    decoder_weights,
    department_rows,
    encoder_weights,
    transcript_rows,
    write_splits,
)
from edge_ft.errors import EdgeFTError
from edge_ft.files import write_text

__all__ = ["Stage", "Table", "decoder", "encoder", "figures_by_metric", "percent"]

Table = list[tuple[str, ...]]


@dataclass
class Stage:
    """Runs edge-ft commands and records their seconds."""

    out: Path
    python: str = sys.executable
    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, name: str, *arguments: str | Path) -> Any:
        """Print and run one command, whose progress stays visible.

        Returns:
            Its JSON.

        Raises:
            EdgeFTError: it failed.
        """
        words = [str(argument) for argument in arguments]
        print(f"\n$ edge-ft {shlex.join(words)}", flush=True)
        started = time.monotonic()
        result = self.out / f"{name}.json"
        done = subprocess.run([self.python, "-m", "edge_ft", *words, "--json", str(result)], check=False)
        self.seconds[name] = round(time.monotonic() - started, 1)
        if done.returncode:
            raise EdgeFTError(
                f"edge-ft {words[0]} ended with exit code {done.returncode}; results so far are in {self.out}"
            )
        return json.loads(result.read_text(encoding="utf-8"))


def decoder(out: Path) -> None:
    """SmolLM2-135M learns to turn transcripts of speech into written sentences."""
    stage = Stage(out)
    rows = write_splits(transcript_rows(), out / "rows", train=1400, validation=100, test=200)
    weights = decoder_weights()
    columns = ("--prompt", r"Transcript: {transcript}\nWritten:", "--completion", " {written}")
    stage(
        *("tune", "tune", "--model", weights, "--data", rows["train"], "--validation", rows["validation"]),
        *("--test", rows["test"], *columns, "--epochs", "1", "--out", out / "run"),
    )
    shipped = stage("export", "export", out / "run", "--out", out / "bundle")
    stage("export-base", "export", weights, "--out", out / "base")
    answers = ("--data", rows["test"], "--max-new-tokens", "32")
    base = stage("eval-base", "eval", out / "base", *answers, *columns)
    shots = stage(
        "eval-base-shots", "eval", out / "base", *answers, *columns, "--shots", "3", "--shots-from", rows["train"]
    )
    tuned = stage("eval-shipped", "eval", out / "bundle", *answers)
    report = json.loads((out / "run" / "report.json").read_text(encoding="utf-8"))
    trained = {
        "nll": report["nll"]["test"],
        "metrics": {"token_accuracy": report["metrics"]["token_accuracy"]["test"]},
    }
    records = stage("bench", "bench", out / "base", out / "run", out / "bundle", "--repeats", "3")
    trivial = _share(out / "rows" / "test.jsonl", lambda row: row["transcript"].capitalize() + "." == row["written"])
    speed = {name: _speeds(records, name) for name in ("base", "run", "bundle")}
    header = (
        *("", "loss (nats/token)", "token accuracy", "exactly right sentences"),
        *("size MB", "prefill tok/s", "decode tok/s", "peak RSS MB"),
    )
    table: Table = [header]
    for name, found, figures in (
        ("base, int4 (ONNX)", base, speed["base"]),
        ("base, int4, 3 examples in the prompt", shots, speed["base"]),
        ("tuned, as trained (torch)", trained, speed["run"]),
        ("tuned, as shipped (ONNX, merged)", tuned, speed["bundle"]),
    ):
        metrics = found["metrics"]
        right = percent(metrics["verbatim_match"]) if "verbatim_match" in metrics else "-"
        table.append((name, f"{found['nll']:.3f}", percent(metrics["token_accuracy"]), right, *figures))
    table.append(("rule: capital letter, full stop", "-", "-", f"{trivial:.1%}", "-", "-", "-", "-"))
    tax = shipped["verification"]["quantization_tax"]
    note = f"200 test rows; quantization tax on validation rows {tax:+.4f} nats/token"
    _finish(stage, "SmolLM2-135M-Instruct, transcript to written sentence", table, note)


def encoder(out: Path) -> None:
    """MiniLM learns the department of a medical question."""
    stage = Stage(out)
    rows = write_splits(department_rows(), out / "rows", train=6000, validation=512, test=1500)
    stage(
        *("tune", "tune", "--model", encoder_weights(), "--data", rows["train"], "--validation", rows["validation"]),
        *("--test", rows["test"], "--max-length", "128", "--batch-size", "16", "--epochs", "2", "--out", out / "run"),
    )
    report = json.loads((out / "run" / "report.json").read_text(encoding="utf-8"))
    shipped = stage("export", "export", out / "run", "--out", out / "bundle")
    stage("verify", "verify", out / "bundle", "--data", rows["validation"])
    records = stage("bench", "bench", out / "run", out / "bundle", "--repeats", "3")
    labels = [json.loads(line)["label"] for line in rows["test"].read_text(encoding="utf-8").splitlines()]
    commonest = max(map(labels.count, set(labels))) / len(labels)
    test = shipped["verification"]["test"]
    header = ("", "loss (nats)", "accuracy", "macro-F1", "size MB", "latency ms (128 tokens)", "rows/s", "peak RSS MB")
    table: Table = [header]
    for name, column, subject in (
        ("base, untrained head", "base", ""),
        ("tuned, as trained (torch)", "trained", "run"),
        ("tuned, as shipped (ONNX int4, merged)", "shipped", "bundle"),
    ):
        metrics = (percent(test["metrics"][metric][column]) for metric in ("accuracy", "macro_f1"))
        table.append((name, f"{test['nll'][column]:.3f}", *metrics, *_latencies(records, subject)))
    table.append(("always the commonest department", "-", f"{commonest:.1%}", "-", "-", "-", "-", "-"))
    tax = shipped["verification"]["quantization_tax"]
    note = f"{report['rows']['test']} test rows, {len(report['findings'])} findings; tax on validation {tax:+.4f} nats"
    _finish(stage, "MiniLM-L6, medical question to one of 16 departments", table, note)


def _finish(stage: Stage, title: str, table: Table, note: str) -> None:
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in stage.seconds.items())
    write_text(stage.out / "table.md", f"**{title}** ({note}; {took})\n\n{markdown_table(table[0], table[1:])}")


def percent(value: dict[str, float]) -> str:
    """A share with its 95% interval."""
    return f"{value['value']:.1%} [{value['low']:.1%}, {value['high']:.1%}]"


def figures_by_metric(records: list[dict[str, Any]], variant: str) -> dict[str, float]:
    """The values of one variant in the records of a bench."""
    return {record["metric"]: record["value"] for record in records if record["variant"] == variant}


def _speeds(records: list[dict[str, Any]], variant: str) -> tuple[str, ...]:
    found = figures_by_metric(records, variant)
    return (
        f"{found['size_bytes'] / 1e6:.0f}",
        f"{found['prefill_tps']:.0f}",
        f"{found['decode_tps']:.0f}",
        f"{found['peak_rss_bytes'] / 1e6:.0f}",
    )


def _latencies(records: list[dict[str, Any]], variant: str) -> tuple[str, ...]:
    if not variant:
        return ("-", "-", "-", "-")
    found = figures_by_metric(records, variant)
    return (
        f"{found['size_bytes'] / 1e6:.1f}",
        f"{found['latency_s_128'] * 1e3:.1f}",
        f"{found['rows_per_s_128']:.0f}",
        f"{found['peak_rss_bytes'] / 1e6:.0f}",
    )


def _share(file: Path, holds: Any) -> float:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return sum(map(holds, rows)) / len(rows)
