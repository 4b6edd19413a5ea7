"""Two reports of `bench`, before and after a change: what differs beyond the noise of their samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edge_ft.bench.report import format_value
from edge_ft.errors import UsageError
from edge_ft.utf8 import read_json

__all__ = ["Change", "compare", "higher_is_better", "read_records"]

SMALLEST = 0.02
"""Share of the old value below which a change of speed, memory or size is not reported."""
CONDITIONS = (
    "cpu",
    "cores",
    "threads",
    "prompt_tokens",
    "new_tokens",
    "memory_limit_bytes",
    "profile",
    "rows",
    "data",
    "positions",
    "reference",
)
"""Entries of `environment` without whose equality two figures do not compare."""
HIGHER_IS_BETTER = ("tok/s", "rows/s")
"""Units of which more is better."""
LOWER_IS_BETTER = ("nll", "perplexity", "repetition_4", "kl_divergence", "delta_p_rms")
"""Metrics without a unit of which less is better; of the others more is."""

Verdict = Literal["better", "worse", "same", "new", "gone"]
Key = tuple[str, str, str]
"""Subject, variant and metric."""


@dataclass(frozen=True)
class Change:
    """One metric of one subject, in both reports."""

    subject: str
    variant: str
    metric: str
    old: float | None
    new: float | None
    """None: it was not measured, or did not fit."""
    verdict: Verdict
    """same: within the noise. new, gone: only in one of the reports."""

    @property
    def cells(self) -> tuple[str, ...]:
        """Subject, metric, both values, their ratio and the verdict, as text."""
        old, new = (None if value is None else float(value) for value in (self.old, self.new))
        ratio = f"{new / old:.2f}" if old and new is not None else "-"
        shown = ("-" if value is None else format_value(value) for value in (old, new))
        return f"{self.subject} {self.variant}", self.metric, *shown, ratio, self.verdict


def read_records(file: Path) -> list[dict[str, Any]]:
    """Read what `edge-ft bench --json` wrote.

    Returns:
        The records.

    Raises:
        UsageError: the file holds something else.
    """
    records = read_json(file, advice="give a file that edge-ft bench --json wrote")
    wanted = {"subject", "variant", "metric", "unit", "value", "samples", "environment"}
    if not isinstance(records, list) or not all(isinstance(r, dict) and wanted <= r.keys() for r in records):
        raise UsageError(f"{file} holds no records of a bench: give a file that edge-ft bench --json wrote")
    return records


def compare(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[Change]:
    """Compare two reports metric by metric.

    A value has changed if no sample of one report lies within the samples of the other, and the medians differ by more
    than 2%. With five samples each, noise alone does that in fewer than one of a hundred comparisons. A score has
    changed if the intervals do not overlap, and a size if it differs by more than 2%.

    Args:
        old: Records of `edge_ft.bench.bench`.
        new: The same, after the change.

    Returns:
        A change for each metric, in the order of `new`, then those that only `old` has.

    Raises:
        UsageError: the reports have no subject in common, or were measured under different conditions.
    """
    before, after = _by_key(old), _by_key(new)
    shared = before.keys() & after.keys()
    if not shared:
        names = [", ".join(sorted({f"{key[0]} {key[1]}" for key in keys})) for keys in (before, after)]
        raise UsageError(f"the reports have no subject in common: {names[0]} in the old one, {names[1]} in the new one")
    for key in shared:
        _refuse_other_conditions(key, before[key]["environment"], after[key]["environment"])
    changes = [_change(key, before.get(key), record) for key, record in after.items()]
    return changes + [_change(key, record, None) for key, record in before.items() if key not in after]


def higher_is_better(metric: str, unit: str) -> bool:
    """Whether more of a metric is better."""
    return unit in HIGHER_IS_BETTER or (unit == "" and metric not in LOWER_IS_BETTER)


def _by_key(records: Sequence[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    return {(record["subject"], record["variant"], record["metric"]): record for record in records}


def _refuse_other_conditions(key: Key, old: dict[str, Any], new: dict[str, Any]) -> None:
    for name in CONDITIONS:
        if old.get(name) != new.get(name):
            raise UsageError(
                f"{key[0]} {key[1]} was measured with {name} {old.get(name)} before and {new.get(name)} now: "
                "measure both under the same conditions"
            )


def _change(key: Key, old: dict[str, Any] | None, new: dict[str, Any] | None) -> Change:
    before, after = (None if record is None else record["value"] for record in (old, new))
    return Change(*key, before, after, _verdict(old, new))


def _verdict(old: dict[str, Any] | None, new: dict[str, Any] | None) -> Verdict:
    if old is None or new is None:
        return "gone" if new is None else "new"
    before, after = old["value"], new["value"]
    if before is None or after is None:  # it did not fit
        return "same" if before is after else "worse" if after is None else "better"
    (low, high), (new_low, new_high) = (_range(record) for record in (old, new))
    large = "interval" in new or abs(after - before) > SMALLEST * abs(before)
    if not large or (new_low <= high and low <= new_high):
        return "same"
    return "better" if (after > before) == higher_is_better(new["metric"], new["unit"]) else "worse"


def _range(record: dict[str, Any]) -> tuple[float, float]:
    low, high = record.get("interval") or (min(record["samples"]), max(record["samples"]))
    return float(low), float(high)
