"""Both jobs in minutes: real rows through tune, export, eval and bench, sized to the speed of the machine.

The encoder comes first. What its fixed parts take (starting, quantizing, tracing, scoring) says what those of the
decoder will take, and the decoder trains in the time that is left.
"""

import json
import time
from dataclasses import dataclass
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
from edge_ft.bench.studies.demo_full import Stage, Table, decoder, encoder, figures_by_metric, percent
from edge_ft.files import write_text
from edge_ft.page import NO_PLOTS, Plot, Section, html_page
from edge_ft.page import Table as PageTable
from edge_ft.plots import Curve, can_plot, curves

__all__ = ["decoder_minutes", "main"]

ENCODER_MINUTES = 0.6
"""Of training and validation."""
FIXED_RATIO = 4.2
"""Seconds of the decoder's fixed parts over those of the encoder's, as measured on two cores."""
SHORTEST, LONGEST = 0.75, 3.0
"""Bounds of the decoder's minutes of training: above, little is gained; below, it takes `FEWEST_STEPS` instead."""
FEWEST_STEPS = 24
"""Steps after which the tuned model is better than its base by more than the interval."""
LIMIT = "0.05"
"""--max-tax of both exports: after a short training, rounding costs a larger share of what was learned."""


@dataclass(frozen=True)
class Job:
    """What one model's job gave."""

    title: str
    table: Table
    losses: dict[str, float]
    """Test loss of `base`, `trained` and `shipped`."""
    fixed_seconds: float
    """All but the training."""


def main(*, out: Path = Path("out/demo"), only: str | None = None, minutes: float = 6.0, full: bool = False) -> None:
    """Tune, export, run and score a decoder and an encoder on real rows.

    Args:
        out: Folder for rows, runs, bundles, tables and demo.html.
        only: decoder or encoder.
        minutes: Time in which all is to be done.
        full: Train to the end instead, on all rows, and compare with examples in the prompt: about 20 minutes.
    """
    started = time.monotonic()
    if full:
        for name, job in (("encoder", encoder), ("decoder", decoder)):
            if only in (None, name):
                job(out / name)
        tables = [file.read_text(encoding="utf-8") for file in sorted(out.glob("*/table.md"))]
        print("\n" + "\n".join(tables))
    else:
        jobs = []
        if only in (None, "encoder"):
            jobs.append(short_encoder(out / "encoder"))
        if only in (None, "decoder"):
            fixed = jobs[0].fixed_seconds if jobs else None
            jobs.append(short_decoder(out / "decoder", decoder_minutes(minutes, time.monotonic() - started, fixed)))
        _show(out, jobs)
    print(f"{time.monotonic() - started:.0f} s in all; rows, runs and bundles are in {out}")


def decoder_minutes(budget: float, spent_s: float, encoder_fixed_s: float | None) -> float | None:
    """Minutes in which the decoder trains.

    Args:
        budget: Minutes of the whole demo.
        spent_s: Seconds that have passed.
        encoder_fixed_s: Seconds of the encoder's fixed parts on this machine; None if they were not measured.

    Returns:
        What the budget leaves, at most `LONGEST`; None where that is less than `SHORTEST`.
    """
    if encoder_fixed_s is None:
        return None
    left = budget - spent_s / 60 - FIXED_RATIO * encoder_fixed_s / 60
    return round(min(left, LONGEST), 2) if left >= SHORTEST else None


def short_encoder(out: Path) -> Job:
    """MiniLM learns the department of a medical question."""
    stage, started = Stage(out), time.monotonic()
    rows = write_splits(department_rows(), out / "rows", train=6000, validation=128, test=600)
    given = ("--data", rows["train"], "--validation", rows["validation"], "--test", rows["test"])
    settings = ("--max-length", "96", "--batch-size", "16", "--epochs", "2", "--max-minutes", f"{ENCODER_MINUTES}")
    report = stage("tune", "tune", "--model", encoder_weights(), *given, *settings, "--out", out / "run")
    shipped = stage("export", "export", out / "run", "--out", out / "bundle", "--max-tax", LIMIT)
    records = stage("bench", "bench", out / "bundle", "--repeats", "2")
    speed = figures_by_metric(records, "bundle")
    test = shipped["verification"]["test"]
    cost = (f"{speed['size_bytes'] / 1e6:.1f}", f"{speed['latency_s_128'] * 1e3:.1f}")
    table: Table = [("", "loss (nats)", "accuracy", "size MB", "ms for 128 tokens", "peak RSS MB")]
    for name, column in (
        ("base, untrained head", "base"),
        ("tuned, as trained", "trained"),
        ("tuned, shipped", "shipped"),
    ):
        figures = (*cost, f"{speed['peak_rss_bytes'] / 1e6:.0f}") if column == "shipped" else ("-",) * 3
        table.append((name, f"{test['nll'][column]:.3f}", percent(test["metrics"]["accuracy"][column]), *figures))
    trained = f"{report['rows']['train']} rows, {report['steps']} steps, {test['rows']} test rows"
    fixed = time.monotonic() - started - _loop_seconds(report)
    return Job(f"MiniLM-L6 finds the department of a question, one of 16 ({trained})", table, test["nll"], fixed)


def short_decoder(out: Path, minutes: float | None) -> Job:
    """SmolLM2-135M learns to turn transcripts of speech into written sentences."""
    stage, started = Stage(out), time.monotonic()
    rows = write_splits(transcript_rows(), out / "rows", train=1400, validation=48, test=100)
    given = ("--data", rows["train"], "--validation", rows["validation"], "--test", rows["test"])
    columns = ("--prompt", r"Transcript: {transcript}\nWritten:", "--completion", " {written}")
    length = ("--max-steps", f"{FEWEST_STEPS}") if minutes is None else ("--max-minutes", f"{minutes}")
    settings = ("--epochs", "1", *length)
    report = stage("tune", "tune", "--model", decoder_weights(), *given, *columns, *settings, "--out", out / "run")
    shipped = stage("export", "export", out / "run", "--out", out / "bundle", "--max-tax", LIMIT)
    answers = stage("eval", "eval", out / "bundle", "--data", rows["test"], "--max-new-tokens", "32")
    records = stage("bench", "bench", out / "bundle", "--repeats", "2")
    speed = figures_by_metric(records, "bundle")
    test = shipped["verification"]["test"]
    cost = (f"{speed['size_bytes'] / 1e6:.0f}", f"{speed['decode_tps']:.0f}", f"{speed['peak_rss_bytes'] / 1e6:.0f}")
    header = ("", "loss (nats/token)", "token accuracy", "exactly right", "size MB", "decode tok/s", "peak RSS MB")
    table: Table = [header]
    for name, column in (("base", "base"), ("tuned, as trained", "trained"), ("tuned, shipped", "shipped")):
        right = percent(answers["metrics"]["verbatim_match"]) if column == "shipped" else "-"
        figures = (right, *cost) if column == "shipped" else ("-",) * 4
        table.append((name, f"{test['nll'][column]:.3f}", percent(test["metrics"]["token_accuracy"][column]), *figures))
    trained = f"{report['rows']['train']} rows, {report['steps']} steps, {test['rows']} test rows"
    fixed = time.monotonic() - started - _loop_seconds(report)
    return Job(f"SmolLM2-135M writes sentences from transcripts ({trained})", table, test["nll"], fixed)


def _loop_seconds(report: dict[str, Any]) -> float:
    return float(report["timings"].get("train", 0.0) + report["timings"].get("validation", 0.0))


def _show(out: Path, jobs: list[Job]) -> None:
    """Print the tables and what to do next, and write the page."""
    for job in jobs:
        print(f"\n**{job.title}**\n\n{markdown_table(job.table[0], job.table[1:])}")
    page = html_page(
        "edge-ft demo",
        "Two small models, tuned on this machine, exported to 4 bits, and scored before and after. Brackets are 95% "
        "intervals over test rows.",
        [_section(job) for job in jobs],
    )
    write_text(out / "demo.html", page)
    write_text(out / "fixed.json", json.dumps({job.title: round(job.fixed_seconds, 1) for job in jobs}))
    asked = f'edge-ft run {out}/decoder/bundle "the roads are wet because it rained"'
    print(f"Open {out}/demo.html for the plot, and {out}/*/run/report.html for the curves of each training.")
    print(f"Try it:   {asked}\nYours:    edge-ft tune --model MODEL --data rows.jsonl --out run")
    print("In full:  make demo-full trains on all rows to the end, and compares with examples in the prompt")


def _section(job: Job) -> Section:
    stages = ("base", "trained", "shipped")
    table = PageTable(job.table[0], job.table[1:])
    if not can_plot():
        return Section(job.title, texts=[NO_PLOTS], tables=[table])
    curve = Curve([(at, job.losses[name]) for at, name in enumerate(stages)], "test rows", marked=True)
    svg = curves([curve], "", "loss", ("base", "as trained", "as shipped"))
    return Section(job.title, plots=[Plot(svg, "loss on the way from the base to what ships")], tables=[table])
