"""One tuned encoder in every weight format: accuracy, bytes and speed of each.

`python -m edge_ft.bench.studies encoders RUN` exports what is missing in its --out folder, scores the run's test rows
with each bundle, paired with the float one, and measures all of them beside torch eager and OpenVINO in one `bench`.
docs/studies.md describes the method.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.bench import bench
from edge_ft.bench.report import markdown_table, table
from edge_ft.config import BenchConfig, ExportConfig, Weights
from edge_ft.data import encode_rows, read_rows
from edge_ft.errors import GateRefused, UsageError
from edge_ft.evaluate.metrics import mean
from edge_ft.evaluate.scoring import Batching, RowScores, scorable, score
from edge_ft.files import write_json
from edge_ft.progress import Lines, Progress, Silent
from edge_ft.runtime import TextClassifier, load

__all__ = ["accuracy_table", "compare", "main"]

FORMATS: tuple[Weights, ...] = ("fp32", "int8", "int4", "int8-dynamic", "int8-static")
"""The first is what the others are compared with."""


def compare(run: RunFolder, out: Path, threads: int | None, progress: Progress) -> list[dict[str, Any]]:
    """Score the run's test rows in every format.

    Args:
        run: A text-classification run.
        out: Folder of bundles, one a format; those that are there are not made again.
        threads: CPU threads; default: all CPUs that the process may use.
        progress: Reports each format.

    Returns:
        By format `weights`, `path`, `rows`, `accuracy`, `difference` to fp32 with its 95% interval (`low`, `high`;
        rows drawn in pairs), `nll`, `size_bytes`, and `refused` (the gate's reasons, empty where it passed).

    Raises:
        UsageError: the run is of another task, or has no test rows.
    """
    if run.report()["task"] != "text-classification" or not run.split("test").stat().st_size:
        raise UsageError(f"{run.path} is no text-classification run with test rows: tune one, with a share of them")
    results: list[dict[str, Any]] = []
    right: dict[str, Any] = {}
    for weights in FORMATS:
        bundle, refused = _bundle(run, out / weights, weights, threads, progress)
        scores = _scores(bundle, run, threads, progress)
        right[weights] = scores.correct.astype(np.float64)
        difference = mean(right[weights] - right[FORMATS[0]])
        results.append(
            {
                "weights": weights,
                "path": str(bundle.path),
                "rows": len(scores.tokens),
                "accuracy": scores.accuracy,
                "difference": difference["value"],
                "low": difference["low"],
                "high": difference["high"],
                "nll": scores.mean_nll,
                "size_bytes": bundle.size_bytes,
                "refused": refused,
            }
        )
    return results


def accuracy_table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown row a format."""
    rows = [
        (
            row["weights"],
            f"{row['accuracy']:.2%}",
            f"{100 * row['difference']:+.2f} [{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]",
            f"{row['nll']:.4f}",
            f"{row['size_bytes'] / 1e6:.1f}",
            "; ".join(row["refused"]) or "passed",
        )
        for row in results
    ]
    return markdown_table(("weights", "accuracy", "difference to fp32, points [95%]", "nll", "MB", "gate"), rows)


def main(
    run: Path,
    /,
    *,
    out: Path = Path("out/encoders"),
    repeats: int = 5,
    threads: int | None = None,
    peers: tuple[str, ...] = ("torch", "openvino"),
    json: Path | None = None,
    quiet: bool = False,
) -> None:
    """Accuracy, size, latency and rows/s of one run in every format.

    Args:
        run: A finished text-classification run with test rows.
        out: Folder of bundles; those that are there are not made again.
        repeats: Fresh processes per subject, taken in turn.
        threads: CPU threads of every subject; default: all CPUs that the process may use.
        peers: Other engines to measure in turn with the bundles.
        json: Write both tables' figures to this file.
        quiet: No progress.
    """
    progress = Silent() if quiet else Lines()
    settings = BenchConfig(peers=peers, repeats=repeats, threads=threads)
    results = compare(RunFolder.open(run), out, threads, progress)
    records = bench([row["path"] for row in results], settings, progress)
    if json is not None:
        write_json(json, {"accuracy": results, "records": records})
    header, *rows = table(records)
    print(f"{results[0]['rows']} test rows\n\n{accuracy_table(results)}\n{markdown_table(header, rows)}", end="")


def _bundle(
    run: RunFolder, path: Path, weights: Weights, threads: int | None, progress: Progress
) -> tuple[Bundle, list[str]]:
    """The run's bundle in a format, exported where it is missing, and the gate's reasons to refuse it."""
    from edge_ft.export import export

    rejected = path.with_name(f"{path.name}.rejected")
    if not path.exists() and not rejected.exists():
        try:
            export(str(run.path), ExportConfig(out=path, weights=weights, threads=threads), progress)
        except GateRefused as error:
            progress.say(str(error))
    bundle = Bundle.open(path if path.exists() else rejected)
    return bundle, list(bundle.manifest["verification"]["refused"])


def _scores(bundle: Bundle, run: RunFolder, threads: int | None, progress: Progress) -> RowScores:
    classifier = load(bundle, threads=threads, engine="exact")
    assert isinstance(classifier, TextClassifier)
    rows = read_rows(str(run.split("test")))
    examples = scorable(encode_rows(classifier.rendering, classifier.tokenizer, rows))
    # One row at a time: dynamic ranges are those of a batch, and a device classifies as texts come.
    return score(
        classifier,
        examples,
        Batching(bundle.task, classifier.tokenizer.pad_id, size=1),
        progress,
        f"test rows, {bundle.path.name}",
    )
