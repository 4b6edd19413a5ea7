"""Records: metrics with their units, samples and conditions."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from edge_ft.bench.subjects import Subject
from edge_ft.config import TEXT_TASKS

__all__ = ["DECODER_UNITS", "classifier_lengths", "records_of", "units_of"]

DECODER_UNITS = {
    "load_s": "s",
    "cold_start_s": "s",
    "ttft_s": "s",
    "prefill_tps": "tok/s",
    "decode_tps": "tok/s",
    "itl_s_p50": "s",
    "itl_s_p90": "s",
    "itl_s_p99": "s",
    "peak_rss_bytes": "bytes",
    "size_bytes": "bytes",
}


def classifier_lengths(prompt_tokens: int) -> list[int]:
    """Lengths in tokens at which a classifier is measured: 32 and 128 where they are shorter, and `prompt_tokens`."""
    return [length for length in (32, 128) if length < prompt_tokens] + [prompt_tokens]


def units_of(task: str, prompt_tokens: int) -> dict[str, str]:
    """Every metric of a task with its unit, in the order of reports; a classifier's metrics carry their length."""
    if task in TEXT_TASKS:
        return DECODER_UNITS
    per_length = {"latency_s": "s", "latency_s_p99": "s", "rows_per_s": "rows/s"}
    lengths = classifier_lengths(prompt_tokens)
    timed = {f"{metric}_{length}": unit for length in lengths for metric, unit in per_length.items()}
    return {"load_s": "s", "cold_start_s": "s", **timed, "peak_rss_bytes": "bytes", "size_bytes": "bytes"}


def records_of(
    subject: Subject, results: Sequence[dict[str, float]], environment: dict[str, Any], note: str | None
) -> list[dict[str, Any]]:
    """Make a record for each metric of a subject.

    Args:
        subject: What was measured; its task decides the metrics.
        results: One mapping of metric to value a repeat, without the size.
        environment: Machine, versions and settings.
        note: Why the subject has no results, or None; its size is known all the same.

    Returns:
        Records as `edge_ft.bench.bench` documents them, in the order of `units_of`.
    """
    records = []
    for metric, unit in units_of(subject.task, environment["prompt_tokens"]).items():
        if metric == "size_bytes":
            samples: list[float] = [subject.size_bytes] * max(1, len(results))
        elif note is not None:
            samples = []
        else:
            samples = [result[metric] for result in results if result[metric] is not None]
        record: dict[str, Any] = {
            "subject": subject.engine,
            "variant": subject.variant,
            "metric": metric,
            "unit": unit,
            "value": median(samples) if samples else None,
            "samples": samples,
            "environment": environment,
        }
        if not samples:
            record["note"] = note or "cannot be measured on this system"
        records.append(record)
    return records
