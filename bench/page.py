"""The records of a bench as one HTML page: table, plots, sample answers, machine and versions."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from edge_ft.bench.compare import higher_is_better
from edge_ft.bench.report import table
from edge_ft.page import NO_PLOTS, Plot, Section, Table, html_page
from edge_ft.plots import Axis, Distribution, Point, can_plot, distributions, scatter

__all__ = ["page_of"]

_QUALITY = {"accuracy": "accuracy", "nll": "loss, nats per token"}
"""Metrics of quality that are plotted, the first that was measured."""


@dataclass(frozen=True)
class _Measure:
    """A metric on an axis."""

    metric: str
    axis: Axis
    scale: float
    """From the record's unit to that of the axis."""


@dataclass(frozen=True, eq=False)
class _Subject:
    """The records of one subject, by metric."""

    name: str
    engine: int
    """Number of its engine, which has a colour."""
    records: dict[str, dict[str, Any]]

    def value(self, metric: str) -> float | None:
        record = self.records.get(metric)
        return None if record is None or record["value"] is None else float(record["value"])

    @property
    def decodes(self) -> bool:
        return "decode_tps" in self.records

    @cached_property
    def times(self) -> tuple[str, list[float]] | None:
        """Every single time in milliseconds of the last metric that has them, and what was timed."""
        timed = [record for record in self.records.values() if record.get("times")]
        if not timed:
            return None
        metric = timed[-1]["metric"]
        what = (
            "time between tokens" if metric.startswith("itl") else f"time of a text of {metric.split('_')[-1]} tokens"
        )
        return what, [second * 1e3 for times in timed[-1]["times"] for second in times]


def page_of(records: Sequence[dict[str, Any]]) -> str:
    """Write the page of a bench.

    Args:
        records: As `edge_ft.bench.bench` returns them.

    Returns:
        HTML that needs no other file and no network.
    """
    subjects = _subjects(records)
    environment = records[0]["environment"]
    threads = f"{environment['threads']} thread{'s' if environment['threads'] > 1 else ''}"
    repeats = max(len(record["samples"]) for record in records)
    lead = (
        f"{len(subjects)} subject{'s' if len(subjects) > 1 else ''} on {environment['cpu']}, {threads}, "
        f"{repeats} fresh process{'es' if repeats > 1 else ''} for each, taken in turn."
    )
    sections = [_results(records), _costs(subjects), _latencies(subjects), _answers(subjects), _conditions(subjects)]
    return html_page("edge-ft bench", lead, [section for section in sections if section is not None])


def _subjects(records: Sequence[dict[str, Any]]) -> list[_Subject]:
    keys = list(dict.fromkeys((record["subject"], record["variant"]) for record in records))
    engines, variants = (list(dict.fromkeys(part)) for part in zip(*keys, strict=True))
    return [
        _Subject(
            # What all have in common distinguishes nothing.
            variant if len(engines) == 1 else engine if len(variants) == 1 else f"{engine} {variant}",
            engines.index(engine),
            {r["metric"]: r for r in records if (r["subject"], r["variant"]) == (engine, variant)},
        )
        for engine, variant in keys
    ]


def _results(records: Sequence[dict[str, Any]]) -> Section:
    header, *rows = table(records)
    columns = list(dict.fromkeys((record["subject"], record["variant"]) for record in records))
    best = set()
    metrics = dict.fromkeys(record["metric"] for record in records if "answers" not in record)
    for row, metric in enumerate(metrics):
        values = {
            columns.index((record["subject"], record["variant"])) + 1: record["value"]
            for record in records
            if record["metric"] == metric and record["value"] is not None
        }
        if len(set(values.values())) > 1:
            unit = next(record["unit"] for record in records if record["metric"] == metric)
            choose: Callable[..., float] = max if higher_is_better(metric, unit) else min
            best |= {(row, at) for at, value in values.items() if value == choose(values.values())}
    note = (
        "A cell is the median of the processes and, in brackets, the smallest and the largest; of a score, its 95% "
        "interval. A percentage is the share of what the machine could do: in decode, of the bandwidth with which "
        "memory is read; in prefill, of the speed of float32 products. Green is the best of its row, which may be "
        "within the noise. MB are 10⁶ bytes."
    )
    return Section("Results", tables=[Table(header, rows, best=frozenset(best), note=note)])


def _costs(subjects: Sequence[_Subject]) -> Section:
    """Quality against size, speed and memory; where nothing was scored, speed against size and memory."""
    if not can_plot():
        return Section("Plots", texts=[NO_PLOTS])
    plots: list[Plot] = []
    groups = ([s for s in subjects if s.decodes], [s for s in subjects if not s.decodes])
    for group in filter(None, groups):
        scored = [metric for metric in _QUALITY if any(subject.value(metric) is not None for subject in group)]
        size, memory = _measure("size_bytes"), _measure("peak_rss_bytes")
        timed = [metric for metric in group[0].records if re.fullmatch(r"decode_tps|latency_s_\d+", metric)]
        speed = _measure(timed[-1] if timed else "decode_tps")
        if scored:
            plots += [_scatter(group, cost, _measure(scored[0])) for cost in (size, speed, memory)]
        else:
            plots += [_scatter(group, cost, speed) for cost in (size, memory)]
    texts = ["The dashed line joins the subjects that no other one beats on both axes."]
    if not any(plot.caption.startswith(tuple(_QUALITY.values())) for plot in plots):
        texts.append("Quality was not measured: give --data ROWS to see it here.")
    return Section("Trade-offs", texts=texts, plots=[plot for plot in plots if plot.svg])


def _measure(metric: str) -> "_Measure":
    if metric in _QUALITY:
        return _Measure(metric, Axis(_QUALITY[metric], "lower" if metric == "nll" else "higher"), 1.0)
    if metric == "decode_tps":
        return _Measure(metric, Axis("decode, tokens per second", "higher"), 1.0)
    if metric.startswith("latency_s_"):
        return _Measure(metric, Axis(f"{metric.split('_')[-1]} tokens classified, ms", "lower"), 1e3)
    return _Measure(metric, Axis("size, MB" if metric == "size_bytes" else "peak memory, MB", "lower"), 1e-6)


def _scatter(subjects: Sequence[_Subject], x: "_Measure", y: "_Measure") -> Plot:
    """A plot of the subjects that have both values; of none it has no drawing."""
    points = [
        Point(across * x.scale, up * y.scale, subject.name, subject.engine)
        for subject in subjects
        if (across := subject.value(x.metric)) is not None and (up := subject.value(y.metric)) is not None
    ]
    caption = f"{y.axis.label} against {x.axis.label}"
    missing = len(subjects) - len(points)
    if missing and points:
        caption += f"; {missing} of {len(subjects)} subjects lack one of them"
    return Plot(scatter(points, x.axis, y.axis) if points else "", caption)


def _latencies(subjects: Sequence[_Subject]) -> Section | None:
    """The single times of each subject, those of each kind in a plot."""
    kinds = dict.fromkeys(subject.times[0] for subject in subjects if subject.times is not None)
    if not kinds or not can_plot():
        return None
    plots = []
    for kind in kinds:
        shown = [
            Distribution(subject.times[1], subject.name, subject.engine)
            for subject in subjects
            if subject.times is not None and subject.times[0] == kind
        ]
        plots.append(Plot(distributions(shown, f"{kind}, ms"), f"{kind}: a tick for each, of all processes"))
    text = "The dot is the median, the thick line the middle half, the diamond the 99th percentile."
    return Section("Latency", texts=[text], plots=plots)


def _answers(subjects: Sequence[_Subject]) -> Section | None:
    """What the subjects answer to the same prompts, side by side."""
    asked: dict[tuple[str, str | None], dict[str, str]] = {}
    for subject in subjects:
        for one in subject.records.get("answers", {}).get("answers", ()):
            asked.setdefault((one["prompt"], one["reference"]), {})[subject.name] = one["answer"]
    if not asked:
        return None
    named = [subject.name for subject in subjects if "answers" in subject.records]
    from_rows = any(reference is not None for _, reference in asked)
    header = ["prompt", *(["right answer"] if from_rows else []), *named]
    rows = [
        [prompt, *([reference or ""] if from_rows else []), *(answers.get(name, "–") for name in named)]
        for (prompt, reference), answers in asked.items()
    ]
    text = (
        "Answers to rows of the data, greedy."
        if from_rows
        else "Greedy continuations of texts of edge-ft's own, without chat template; --include-samples shows answers "
        "to rows of --data."
    )
    return Section("Sample answers", texts=[text], tables=[Table(header, rows, kind="texts")])


def _conditions(subjects: Sequence[_Subject]) -> Section:
    """The machine, and under which settings and versions each subject was measured."""
    environments = [next(iter(subject.records.values()))["environment"] for subject in subjects]
    names = dict.fromkeys(name for environment in environments for name in environment)
    shown = [name for name in names if any(environment.get(name) is not None for environment in environments)]
    rows = [[name, *(_text(name, environment.get(name)) for environment in environments)] for name in shown]
    header = ["", *(subject.name for subject in subjects)]
    alike = [row for row in rows if len(set(row[1:])) == 1]
    tables = [Table(["", "of all subjects"], [row[:2] for row in alike])]
    if differing := [row for row in rows if row not in alike]:
        tables.append(Table(header, differing))
    return Section("Machine, settings and versions", tables=tables)


def _text(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if name.endswith("_bytes"):
        return f"{value / 1e6:.0f} MB"
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items() if not isinstance(entry, dict | list))
    if name.endswith("_per_s"):
        return f"{value / 1e9:.1f} G{name.split('_')[1].removesuffix('_per_s')}/s"
    return (", ".join(map(str, value)) or "–") if isinstance(value, list | tuple) else str(value)
