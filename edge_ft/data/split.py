"""Splits of rows that have no row in common, and a fingerprint of rows."""

import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np

from edge_ft.data.readers import Row

__all__ = ["content", "fingerprint", "overlap", "split_rows"]

SPLITS = ("train", "validation", "test")


def content(row: Row) -> str:
    """Return the fields of a row as JSON with sorted keys: equal for rows with equal fields."""
    return json.dumps(row.fields, sort_keys=True)


def split_rows(
    rows: Sequence[Row], shares: tuple[float, float, float], seed: int, key: Callable[[Row], str] = content
) -> dict[str, list[Row]]:
    """Split rows into train, validation and test; equal rows stay in one split.

    Args:
        rows: Rows in the order that each split keeps.
        shares: Share of train, validation and test; they sum to 1. Every non-zero share gets at least one row, train
            first, as long as there are enough different rows.
        seed: Seed of the random split.
        key: What makes two rows equal; default all their fields.

    Returns:
        Rows by the name of the split.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    shuffled = list(groups.values())
    wanted = {name: share * len(rows) for name, share in zip(SPLITS, shares, strict=True) if share > 0}
    found: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for index in np.random.default_rng(seed).permutation(len(shuffled)):
        empty = [name for name in wanted if not found[name]]
        name = empty[0] if empty else max(wanted, key=lambda name: wanted[name] - len(found[name]))
        found[name] += shuffled[index]
    return {name: sorted(rows, key=lambda row: row.number) for name, rows in found.items()}


def overlap(first: Sequence[Row], second: Sequence[Row], key: Callable[[Row], str] = content) -> list[tuple[int, int]]:
    """Return the numbers of equal rows, as (row of `first`, row of `second`); `key` is that of `split_rows`."""
    numbers = {key(row): row.number for row in reversed(first)}
    return [(numbers[found], row.number) for row in second if (found := key(row)) in numbers]


def fingerprint(rows: Sequence[Row]) -> str:
    """Return the hex sha256 of the rows' fields, in the order of the rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(content(row).encode() + b"\n")
    return digest.hexdigest()
