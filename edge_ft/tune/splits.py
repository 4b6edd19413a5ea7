"""The user's rows in three splits: train, validation and test rows that have no row in common."""

import json
from dataclasses import asdict, dataclass

from edge_ft.data import (
    Columns,
    Finding,
    Row,
    Rows,
    format_rows,
    has_answer,
    is_empty,
    overlap,
    preview,
    read_rows,
    record,
    shorten,
    split_names,
    split_rows,
)
from edge_ft.errors import AuditRefused, DataError

__all__ = ["SPLITS", "FileFindings", "GivenRows", "drop_unusable", "read_given", "split_given"]

SPLITS = ("train", "validation", "test")

FileFindings = list[tuple[str, Finding]]
"""Each with the file that its row numbers refer to."""

FEW_ROWS = 2
"""Fewer validation rows than these are a finding."""


@dataclass(frozen=True)
class GivenRows:
    """The rows as the user gave them."""

    rows: dict[str, list[Row]]
    """`train`: those of --data; `validation` and `test` if they have a source of their own."""
    files: dict[str, str]
    """The source of each of the three splits."""


def read_given(data: str, validation: str | None, test: str | None) -> GivenRows:
    """Read all rows that the user gave.

    Args:
        data: The train rows, or the rows to split.
        validation: Source of the validation rows, if they have one.
        test: Source of the test rows, if they have one.

    Returns:
        The rows.

    Raises:
        DataError: rows that cannot be read.
    """
    # A saved DatasetDict may have its own validation and test rows.
    own = {name: f"{data}:{name}" for name in ("validation", "test") if name in split_names(data)}
    sources = own | {name: file for name, file in (("validation", validation), ("test", test)) if file is not None}
    rows = {name: read_rows(source) for name, source in sources.items()}
    files = {name: sources.get(name, data) for name in SPLITS}
    return GivenRows({"train": read_rows(data, split="train"), **rows}, files)


def drop_unusable(given: GivenRows, columns: Columns) -> tuple[GivenRows, FileFindings]:
    """Drop empty rows and rows without an answer.

    Args:
        given: The rows.
        columns: Where the answer is.

    Returns:
        The other rows, and findings about the dropped ones.

    Raises:
        AuditRefused: no train row is left.
        DataError: a row has none of the columns that are read, and others.
    """
    usable, findings = dict(given.rows), list[tuple[str, Finding]]()
    for name, rows in given.rows.items():
        findings += [(given.files[name], found) for found in _find_comments(rows)]
        _refuse_other_columns(rows, columns, given.files[name])
        usable[name] = [row for row in rows if not is_empty(row) and has_answer(row, columns)]
        unlabelled = [row for row in rows if not is_empty(row) and not has_answer(row, columns)]
        for code, found, what in (
            ("empty-row", [row for row in rows if is_empty(row)], "are empty"),
            ("unlabelled", unlabelled, "have no answer or class"),
        ):
            if found:
                numbers = [row.number for row in found]
                message = f"{len(found)} of {len(rows)} rows {what} and are left out ({format_rows(numbers)})"
                example = shorten(json.dumps(found[0].fields, ensure_ascii=False))
                findings.append((given.files[name], Finding(code, "warning", numbers, message, example)))
    if not usable["train"]:
        raise AuditRefused(f"{given.files['train']}: no row has an answer or a class to learn")
    return GivenRows(usable, given.files), findings


def _refuse_other_columns(rows: list[Row], columns: Columns, file: str) -> None:
    """Refuse a file whose rows are of several forms, of which only one would be read.

    Raises:
        DataError: a row has none of the columns that are read.
    """
    for row in rows:
        needed = columns.needed(row.fields)
        if needed.isdisjoint(row.fields) and not is_empty(row):
            raise DataError(
                f"{file}: row {row.number} has the columns {', '.join(row.fields)} and none of "
                f"{', '.join(sorted(needed))}, which other rows have: write all rows of a file in one form"
            )


def _find_comments(rows: list[Row]) -> list[Finding]:
    """Return a finding about the comment lines of a CoNLL file."""
    if not isinstance(rows, Rows) or not rows.comments:
        return []
    where = format_rows(rows.comments).replace("row", "line", 1)
    message = f"{len(rows.comments)} lines are comments and are left out ({where})"
    return [Finding("comment-lines", "warning", rows.comments, message)]


def split_given(
    given: GivenRows, columns: Columns, shares: tuple[float, float, float], seed: int
) -> tuple[dict[str, list[Row]], FileFindings]:
    """Split the rows; equal rows stay together. Rows are equal if the model reads the same of them.

    Args:
        given: Usable rows.
        columns: What the model reads.
        shares: Of train, validation and test among the rows of --data; splits with their own source get none.
        seed: Of the random order.

    Returns:
        The rows of each split, and findings about rows that are in two of them.

    Raises:
        DataError: a split stays empty.
    """

    def key(row: Row) -> str:
        return json.dumps({**asdict(record(row, columns)), "row": 0})

    if not shares[0]:
        raise DataError("--split leaves no rows to train on: its first share is 0")
    train = shares[0]
    validation, test = (
        0.0 if name in given.rows else share for name, share in zip(SPLITS[1:], shares[1:], strict=True)
    )
    total = train + validation + test
    splits = split_rows(given.rows["train"], (train / total, validation / total, test / total), seed, key)
    splits |= {name: rows for name, rows in given.rows.items() if name != "train"}
    findings: FileFindings = []
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        if shared := overlap(splits[first], splits[second], key):
            a, b = shared[0]
            message = (
                f"{len(shared)} row(s) of the {second} split are also in the {first} split, e.g. {first} row {a} is "
                f"{second} row {b}: remove them from one of the two"
            )
            text = next(preview(record(row, columns)) for row in splits[second] if row.number == b)
            leak = Finding("leak", "error", [number for _, number in shared], message, text)
            findings.append((given.files[second], leak))
    for name in ("train", "validation"):
        if not splits[name]:
            raise DataError(
                f"{given.files['train']}: {len(given.rows['train'])} row(s) leave none for {name}; give more rows or "
                "another --split"
            )
    if len(few := splits["validation"]) < FEW_ROWS:
        message = (
            f"validation has {len(few)} row(s), which chooses the best weights and measures what was learned by next "
            "to nothing: give more rows, or more of them with --validation FILE or --split"
        )
        findings.append((given.files["train"], Finding("few-rows", "warning", [row.number for row in few], message)))
    return splits, findings
