"""`bench --data`: loss and task metrics of each subject on rows, with the weights that were timed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ft.bench.report import single_record
from edge_ft.bench.subjects import Subject
from edge_ft.config import BenchConfig, EvalConfig, RowsConfig, as_plain
from edge_ft.progress import Silent

if TYPE_CHECKING:
    from edge_ft.data import Row
    from edge_ft.evaluate.loading import LoadedSource

__all__ = ["SCORED", "engine_records", "open_subject", "quality_records", "reference", "score", "score_settings"]

SCORED = ("edge-ft", "torch")
"""Engines that can be scored; the others are only timed."""


def score_settings(config: BenchConfig, threads: int) -> dict[str, Any]:
    """Settings of `EvalConfig` for `score`, as plain values."""
    names = RowsConfig.__dataclass_fields__
    rows = {name: value for name, value in as_plain(config).items() if name in names}
    return rows | {
        "data": config.data,
        "limit": config.limit,
        "max_new_tokens": config.new_tokens,
        "threads": threads,
    }


def score(job: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the subject of a measuring job, opened as it is opened to be timed.

    Args:
        job: The job that measures the subject, with `score`: what `score_settings` returned.

    Returns:
        As `edge_ft.evaluate.evaluate`.
    """
    # Imported here: the process that starts the measurements imports no numpy.
    from edge_ft.data import read_rows
    from edge_ft.evaluate import evaluate_loaded

    settings = job["score"]
    rows = read_rows(settings["data"])[: settings["limit"]]
    config = EvalConfig(**settings, accuracy_level=job.get("accuracy_level"))
    return evaluate_loaded(open_subject(job, rows, config), rows, config, Silent())


def open_subject(job: dict[str, Any], rows: "Sequence[Row]", config: EvalConfig) -> "LoadedSource":
    """Open the subject of a measuring job, one of `SCORED`, as it is opened to be timed.

    Args:
        job: The job.
        rows: What it reads.
        config: How it reads them.

    Returns:
        The model, and how rows become its input.
    """
    from edge_ft.evaluate.loading import open_source

    if job["do"] == "bundle":
        return open_source(job["bundle"], config, rows)
    from edge_ft.bench.torch_peer import load_peer, prepare
    from edge_ft.data import Rendering, plain_rendering, trained_rendering
    from edge_ft.evaluate.loading import torch_source

    base = prepare(job)
    engine = load_peer(base, job)
    if job["rendering"] is None:
        rendering = plain_rendering(base, config, rows, engine.tokenizer, job["task"])
    else:
        own = Rendering.from_dict(job["rendering"])
        rendering = trained_rendering(own, config, rows, engine.tokenizer, base.max_length)
    return torch_source(engine.model, rendering, engine.tokenizer, base.max_length)


def reference(job: dict[str, Any]) -> dict[str, Any]:
    """Write the distributions of a float model, with which others are compared.

    Args:
        job: The job that measures it, with `score`: what `score_settings` returned, and `reference`: a folder.

    Returns:
        The number of `positions`.
    """
    from edge_ft.bench.divergence import labelled_positions, torch_log_probabilities, write_reference
    from edge_ft.data import encode_rows, read_rows
    from edge_ft.evaluate.scoring import scorable

    settings = job["score"]
    rows = read_rows(settings["data"])[: settings["limit"]]
    opened = open_subject(job, rows, EvalConfig(**settings))
    found = list(labelled_positions(scorable(encode_rows(opened.rendering, opened.tokenizer, rows))))
    write_reference(Path(job["reference"]), found, torch_log_probabilities(opened.scorer))
    return {"positions": sum(len(positions) for _, positions in found)}


def quality_records(subject: Subject, found: dict[str, Any], environment: dict[str, Any]) -> list[dict[str, Any]]:
    """Make records of the scores of one subject.

    Args:
        subject: What was scored.
        found: What `score` returned, with `data`: the name of the rows file.
        environment: Machine, versions and settings.

    Returns:
        Records as those of speed, with `interval` (95%, over rows) instead of several samples.
    """
    figures = {
        "nll": ("nats/token", found["nll"], found["nll_interval"]),
        "perplexity": ("", found["perplexity"], found["perplexity_interval"]),
        **{
            name: ("", value["value"], [value["low"], value["high"]])
            for name, value in found["metrics"].items()
            if value["value"] is not None
        },
    }
    where = environment | {"rows": found["rows"], "data": Path(found["data"]).name}
    return [
        single_record(subject, metric, unit, value, where, interval=interval)
        for metric, (unit, value, interval) in figures.items()
        if value is not None
    ]


def engine_records(subject: Subject, environment: dict[str, Any]) -> list[dict[str, Any]]:
    """Make the record of what the graphs that a bundle chose to run with lose against its exact one, if that is known.

    Args:
        subject: What was measured; scores of quality are those of its exact graph.
        environment: Machine, versions and settings.

    Returns:
        One record of `nll_above_exact`, or none.
    """
    engine = subject.job.get("engine") or {}
    if (value := engine.get("nll_above_exact")) is None:
        return []
    return [single_record(subject, "nll_above_exact", "nats/token", value, environment)]
