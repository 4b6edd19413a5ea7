"""Records: metrics with their units, samples and conditions; as a table, and checked against budgets."""

from collections.abc import Iterable, Sequence
from math import floor, log10
from statistics import median
from typing import Any

from edge_ft.bench.subjects import Subject
from edge_ft.config import TEXT_TASKS, BenchConfig

__all__ = [
    "BATCHES",
    "BATCH_UNITS",
    "DECODER_UNITS",
    "budget_failures",
    "classifier_lengths",
    "format_value",
    "markdown_table",
    "records_of",
    "single_record",
    "table",
    "units_of",
]

BATCHES = (1, 4, 8)
"""Texts in a batch, at which a decoder's throughput is measured where an engine answers batches."""
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
BATCH_UNITS = {f"batch_tps_{texts}": "tok/s" for texts in BATCHES}
"""Generated tokens of all texts of a batch; only of engines that were asked for them."""


def classifier_lengths(prompt_tokens: int) -> list[int]:
    """Lengths in tokens at which a classifier is measured: 32 and 128 where they are shorter, and `prompt_tokens`."""
    return [length for length in (32, 128) if length < prompt_tokens] + [prompt_tokens]


def units_of(task: str, prompt_tokens: int, depths: Sequence[int] = ()) -> dict[str, str]:
    """Every metric of a task with its unit, in the order of reports.

    Args:
        task: Of the subject; a classifier's metrics carry their length.
        prompt_tokens: The longest length.
        depths: Tokens of context after which a decoder was measured too.

    Returns:
        Units by metric.
    """
    if task in TEXT_TASKS:
        if task != "text-generation":
            return DECODER_UNITS
        deep: dict[str, str] = {}
        for depth in depths:
            deep |= {f"prefill_tps_d{depth}": "tok/s"} if depth else {}
            deep |= {f"decode_tps_d{depth}": "tok/s", f"peak_rss_d{depth}_bytes": "bytes"}
        return DECODER_UNITS | deep
    per_length = {"latency_s": "s", "latency_s_p99": "s", "rows_per_s": "rows/s"}
    lengths = classifier_lengths(prompt_tokens)
    timed = {f"{metric}_{length}": unit for length in lengths for metric, unit in per_length.items()}
    return {"load_s": "s", "cold_start_s": "s", **timed, "peak_rss_bytes": "bytes", "size_bytes": "bytes"}


def single_record(
    subject: Subject, metric: str, unit: str, value: float, environment: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """Make the record of a figure that is found once, not in every repeat.

    Args:
        subject: What it is of.
        metric: Its name.
        unit: Its unit; "" has none.
        value: The figure.
        environment: Machine, versions and settings.
        more: Further keys, as `interval` (95%).

    Returns:
        The record.
    """
    return {
        "subject": subject.engine,
        "variant": subject.variant,
        "metric": metric,
        "unit": unit,
        "value": value,
        "samples": [value],
        **more,
        "environment": environment,
    }


def records_of(
    subject: Subject, results: Sequence[dict[str, Any]], environment: dict[str, Any], note: str | None
) -> list[dict[str, Any]]:
    """Make a record for each metric of a subject.

    Args:
        subject: What was measured; its task decides the metrics.
        results: One mapping of metric to value a repeat, without the size; `times` has the single times of metrics.
        environment: Machine, versions and settings.
        note: Why the subject has no results, or None; its size is known all the same.

    Returns:
        Records as `edge_ft.bench.bench` documents them, in the order of `units_of`.
    """
    records = []
    units = units_of(subject.task, environment["prompt_tokens"], environment.get("depths", ()))
    units |= {metric: unit for metric, unit in BATCH_UNITS.items() if any(metric in result for result in results)}
    for metric, unit in units.items():
        if metric == "size_bytes":
            samples: list[float] = [subject.size_bytes] * max(1, len(results))
        elif note is not None:
            samples = []
        else:
            samples = [result[metric] for result in results if result.get(metric) is not None]
        record: dict[str, Any] = {
            "subject": subject.engine,
            "variant": subject.variant,
            "metric": metric,
            "unit": unit,
            "value": median(samples) if samples else None,
            "samples": samples,
            "environment": environment,
        }
        if name := _known_as(subject.task, metric, environment):
            record["known_as"] = name
        if note is None and any(metric in result.get("times", {}) for result in results):
            record["times"] = [result["times"][metric] for result in results]
        if not samples:
            record["note"] = note or _unknown(metric)
        records.append(record)
    return records


def _unknown(metric: str) -> str:
    """Why nothing was measured."""
    if "_tps_d" in metric or "_rss_d" in metric:
        return "the context is too long for this model"
    return "memory is too short for this batch" if metric in BATCH_UNITS else "cannot be measured on this system"


def _known_as(task: str, metric: str, environment: dict[str, Any]) -> str | None:
    """The name that llama-bench gives to a decoder's speed: pp256 is a prompt of 256 tokens, tg64 64 new ones.

    `@ d2048` is a context of 2,048 tokens before them.

    Returns:
        The name; None for what llama-bench does not measure.
    """
    prompt, new = environment["prompt_tokens"], environment.get("new_tokens")
    if task != "text-generation" or "_tps" not in metric or metric in BATCH_UNITS or new is None:
        return None
    kind, _, depth = metric.partition("_tps")
    # The new tokens of `decode_tps` follow the prompt.
    at = int(depth.removeprefix("_d")) if depth else prompt if kind == "decode" else 0
    return f"{f'pp{prompt}' if kind == 'prefill' else f'tg{new}'}{f' @ d{at}' if at else ''}"


def table(records: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Arrange records with a row a metric and a column a subject.

    Returns:
        The header and the rows. A cell is the median with the smallest and largest sample in brackets; of a score, the
        value with its 95% interval; of a speed, its share of the machine's limit in percent. Bytes are shown as MB.
    """
    records = [record for record in records if "answers" not in record]
    columns = list(dict.fromkeys((record["subject"], record["variant"]) for record in records))
    cells = {(record["subject"], record["variant"], record["metric"]): _cell(record) for record in records}
    units = {record["metric"]: record["unit"] for record in records}
    names = {record["metric"]: record["known_as"] for record in records if "known_as" in record}
    rows: list[tuple[str, ...]] = [("median [min–max]", *(f"{subject} {variant}" for subject, variant in columns))]
    for metric, unit in units.items():
        shown = "" if unit in ("s", "") else f" ({unit})"
        known = f" = {names[metric]}" if metric in names else ""
        name = f"{metric.removesuffix('_bytes')} (MB)" if unit == "bytes" else f"{metric}{known}{shown}"
        rows.append((name, *(cells.get((*column, metric), "-") for column in columns)))
    return rows


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown.

    Args:
        header: Titles of the columns.
        rows: A cell for each column.

    Returns:
        A line for the header, the rule and each row, each with its newline.
    """
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))


def budget_failures(records: Sequence[dict[str, Any]], config: BenchConfig) -> list[str]:
    """Check the medians against the budgets.

    Budgets are for bundles, and peers are only compared with; without a bundle they are for all subjects. A subject
    that did not fit fails its budgets, and so does a budget for which nothing was measured.

    Returns:
        A sentence for each budget that does not hold.
    """
    checked = [record for record in records if record["subject"] == "edge-ft"] or list(records)
    budgets = (
        ("--max-ttft-ms", config.max_ttft_ms, ("ttft_s", f"latency_s_{config.prompt_tokens}"), 1e3, "latency of {} ms"),
        ("--min-decode-tps", config.min_decode_tps, ("decode_tps",), 1.0, "speed of {} tok/s"),
        ("--max-rss-mb", config.max_rss_mb, ("peak_rss_bytes",), 1e-6, "peak memory of {} MB"),
        ("--max-size-mb", config.max_size_mb, ("size_bytes",), 1e-6, "size of {} MB"),
    )
    failures = []
    for flag, bound, metrics, scale, figure in budgets:
        if bound is None:
            continue
        measured = [record for record in checked if record["metric"] in metrics]
        if not measured:
            failures.append(f"{flag} {bound:g}: none of the subjects has {' or '.join(metrics)}")
        for record in measured:
            where = f"{record['subject']} {record['variant']}"
            if record["value"] is None:
                failures.append(f"{flag} {bound:g}: {where} {record['note']}")
                continue
            value = record["value"] * scale
            if value < bound if flag.startswith("--min") else value > bound:
                failures.append(f"{flag} {bound:g}: {where} has a {figure.format(format_value(value))}")
    return failures


def _cell(record: dict[str, Any]) -> str:
    if record["value"] is None:
        return "did not fit" if record["environment"]["memory_limit_bytes"] else "-"
    scale = 1e-6 if record["unit"] == "bytes" else 1.0
    samples = [sample * scale for sample in record["samples"]]
    low, high = record.get("interval") or (min(samples), max(samples))
    spread = f" [{format_value(low)}–{format_value(high)}]" if low != high else ""
    share = f" ({record['share']['value']:.0%})" if "share" in record else ""
    return format_value(record["value"] * scale) + spread + share


def format_value(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = max(0, 2 - floor(log10(abs(value)))) if value else 0
    return f"{value:.{digits}f}"
