"""A bundle learns on the device: 200 real rows, in an environment with the base install alone.

The bundle is exported here, with torch; from `tune` on, every command runs in the other environment, and the clock too.
"""

import subprocess
import time
from pathlib import Path
from typing import Any

from edge_ft.bench.report import markdown_table
from edge_ft.bench.studies.datasets import decoder_weights, transcript_rows, write_splits
from edge_ft.bench.studies.demo_full import Stage, percent
from edge_ft.errors import EdgeFTError
from edge_ft.files import write_text

__all__ = ["main"]

ABSENT = ("torch", "transformers", "peft", "onnx")
"""What the device has not."""
COLUMNS = ("--prompt", r"Transcript: {transcript}\nWritten:", "--completion", " {written}")


def main(*, python: Path, out: Path = Path("out/demo-device"), epochs: float = 2.0) -> None:
    """Let a bundle learn where there is no torch, keep what it learned in it, and score it before and after.

    Args:
        python: Of an environment with the base install alone.
        out: Folder for rows, bundle, run and table.
        epochs: As in edge-ft tune.

    Raises:
        EdgeFTError: the environment has torch, or a command failed.
    """
    find = f"import importlib.util as u; print(*(n for n in {ABSENT} if u.find_spec(n)))"
    if there := subprocess.run([python, "-c", find], capture_output=True, text=True, check=True).stdout.strip():
        raise EdgeFTError(f"{python} is no device: it has {there}; pip install edge-ft alone")
    rows = write_splits(transcript_rows(), out / "rows", train=200, validation=32, test=60)
    bundle, run = out / "bundle", out / "run"
    Stage(out)("export", "export", decoder_weights(), "--trainable", "--out", bundle)
    print(f"\nFrom here on without {', '.join(ABSENT)}: {python}")
    stage, started = Stage(out, str(python)), time.monotonic()
    given = ("--data", rows["train"], "--validation", rows["validation"], "--test", rows["test"], *COLUMNS)
    settings = ("--epochs", f"{epochs:g}", "--memory", "low")
    report = stage("tune", "tune", "--model", bundle, *given, *settings, "--out", run)
    learned = time.monotonic() - started
    stage("onto", "export", run, "--onto", bundle, "--name", "learned")
    asked = ("--data", rows["test"], "--max-new-tokens", "32")
    base = stage("base", "eval", bundle, "--adapter", "none", *asked, *COLUMNS)
    tuned = stage("tuned", "eval", bundle, *asked)
    trained = f"{report['rows']['train']} rows, {report['steps']} steps, {report['threads']} threads"
    cost = (f"{learned:.0f}", f"{report['peak_rss_bytes'] / 1e6:.0f}")
    header = ("", "loss (nats/token)", "token accuracy", "exactly right", "seconds of tune", "its peak RSS, MB")
    table = markdown_table(
        header, [("the bundle before", *_figures(base), "-", "-"), ("after", *_figures(tuned), *cost)]
    )
    title = f"SmolLM2-135M in int4 learns to write sentences from transcripts, without torch ({trained})"
    text = f"**{title}**\n\n{table}"
    write_text(out / "table.md", text)
    print(f"\n{text}\n{time.monotonic() - started:.0f} s in all since tune began; the bundle is in {bundle}")


def _figures(scores: dict[str, Any]) -> tuple[str, ...]:
    metrics = scores["metrics"]
    return f"{scores['nll']:.3f}", percent(metrics["token_accuracy"]), percent(metrics["verbatim_match"])
