"""Readers: a file, folder or hub data set becomes a list of numbered rows, or an error that names the line."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_ft.data.conll import read_sentences
from edge_ft.errors import DataError, did_you_mean, require
from edge_ft.utf8 import check_characters, read_utf8

__all__ = ["Row", "Rows", "column_names", "read_rows", "split_names"]


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Row:
    """One record of the user's data."""

    number: int
    """Line of the file where the record starts, from 1; in formats without lines its position in the list."""
    fields: dict[str, Any]


class Rows(list[Row]):
    """Rows of a file, and the lines of it that are comments."""

    def __init__(self, rows: Sequence[Row], comments: Sequence[int]) -> None:
        """Hold rows, and the numbers of lines that are left out."""
        super().__init__(rows)
        self.comments = list(comments)


def column_names(rows: Sequence[Row]) -> list[str]:
    """Return the columns of all rows, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.fields))


def read_rows(source: str, split: str | None = None) -> list[Row]:
    """Read a .jsonl, .json, .csv, .tsv, .parquet or .conll file, a folder saved by `datasets`, or a hub data set.

    Args:
        source: File, folder or hub id; FOLDER:validation also names a split.
        split: Split of a folder or hub data set; a folder with several needs one, the default of a hub id is train.

    Returns:
        At least one row.

    Raises:
        DataError: the source is missing, empty or malformed; the message names the line.
        MissingExtra: Parquet, saved folders and hub data sets need `edge-ft[train]`.
    """
    place, colon, named = source.rpartition(":")
    maybe_hub = re.fullmatch(r"[\w-]+(/[\w.-]+)?", place) and not Path(place).is_file()
    if colon and not Path(source).exists() and (maybe_hub or Path(place).is_dir()):
        source, split = place, named
    path = Path(source)
    if path.is_file():
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise DataError(f"{path} has an unknown format: give a file that ends in {', '.join(READERS)}")
        rows = reader(path)
    elif path.is_dir():
        rows = _read_saved_folder(path, split)
    # An id is NAME or OWNER/NAME; with a file extension, or where OWNER is a folder, a mistyped path is more likely.
    elif re.fullmatch(r"[\w-]+", source) or (
        re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source)
        and path.suffix.lower() not in READERS
        and not path.parent.is_dir()
    ):
        rows = _read_hub(source, split)
    else:
        neighbours = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
        raise DataError(f"the rows file {source} does not exist{did_you_mean(path.name, neighbours)}")
    if not rows:
        raise DataError(f"{source} holds no rows: give a file with at least one")
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    # Not splitlines(), which also splits at U+2028 and the like: JSON strings may hold those unescaped.
    lines = enumerate(read_utf8(path, DataError).split("\n"), start=1)
    return [
        _row(number, _parse(line, f"{path} line {number}", ": write one object per line"), f"{path} line {number}")
        for number, line in lines
        if line.strip()
    ]


def _read_json(path: Path) -> list[Row]:
    content = _parse(read_utf8(path, DataError), str(path), "; if it has one object per line, name it .jsonl")
    if not isinstance(content, list):
        raise DataError(f"{path} holds one JSON {type(content).__name__}: it must be a list of objects")
    return [_row(number, fields, f"{path} item {number}") for number, fields in enumerate(content, start=1)]


def _parse(text: str, where: str, advice: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}){advice}") from error
    if _SURROGATE.search(text):
        check_characters(json.dumps(value, ensure_ascii=False), where, DataError)
    return value


def _row(number: int, fields: Any, where: str) -> Row:
    if not isinstance(fields, dict):
        raise DataError(f"{where} is a JSON {type(fields).__name__}: every row must be an object with named columns")
    return Row(number, fields)


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # the module's default refuses texts over 128 KiB
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # strict: a quote that is never closed is an error, and does not swallow the rest of the file
    records = csv.reader(io.StringIO(read_utf8(path, DataError), newline=""), delimiter=delimiter, strict=True)
    rows, header, line = [], list[str](), 1
    try:
        for record in records:
            start, line = line, records.line_num + 1
            if not header:
                header = record
                if len(header) == 1 and delimiter == "," and (other := next((s for s in ";\t|" if s in header[0]), "")):
                    raise DataError(
                        f"{path} separates its columns by {other!r}, not by commas: save it with commas, or with tabs "
                        "under a name that ends in .tsv"
                    )
                if twice := sorted({name for name in header if header.count(name) > 1}):
                    raise DataError(f"{path} names the column {twice[0]!r} twice: rename one")
            elif len(record) not in (0, len(header)):  # 0: a blank line
                raise DataError(
                    f"{path} line {start} has {len(record)} fields and its header has {len(header)}: "
                    "quote fields that hold the separator"
                )
            elif record:
                rows.append(Row(start, dict(zip(header, record, strict=True))))
    except csv.Error as error:
        raise DataError(f"{path} line {line} is not CSV ({error}): quote the field, doubling quotes in it") from error
    return rows


def _read_conll(path: Path) -> list[Row]:
    sentences, comments = read_sentences(read_utf8(path, DataError), str(path))
    rows = [Row(sentence.line, {"tokens": sentence.words, "tags": sentence.tags}) for sentence in sentences]
    return Rows(rows, comments)


def _read_parquet(path: Path) -> list[Row]:
    arrow = require("pyarrow", "train")
    parquet = require("pyarrow.parquet", "train")
    try:
        return _from_table(parquet.read_table(path).to_pylist())
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}): write the file again") from error


def _read_saved_folder(path: Path, split: str | None) -> list[Row]:
    datasets = require("datasets", "train")
    try:
        saved = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is not a folder saved by datasets: give a data file, or what save_to_disk wrote"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if split is None and len(saved) > 1:
            raise DataError(f"{path} has the splits {', '.join(saved)}: name one, as in {path}:{next(iter(saved))}")
        name = split or next(iter(saved))
        if name not in saved:
            raise DataError(f"{path} has no split {name!r}{did_you_mean(name, list(saved))}: it has {', '.join(saved)}")
        saved = saved[name]
    return _from_dataset(saved)


def split_names(source: str) -> list[str]:
    """Return the splits of a folder in which `datasets` saved several; none for anything else."""
    index = Path(source) / "dataset_dict.json"
    return list(json.loads(read_utf8(index, DataError))["splits"]) if index.is_file() else []


def _read_hub(source: str, split: str | None) -> list[Row]:
    datasets = require("datasets", "train")
    try:
        dataset = datasets.load_dataset(source, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source} is neither an existing file{did_you_mean(source, [file.name for file in Path().iterdir()])} "
            f"nor a hub data set that can be reached ({error})"
        ) from error
    return _from_dataset(dataset)


def _from_dataset(dataset: Any) -> list[Row]:
    """Return the rows of a `datasets.Dataset`, with class names instead of class numbers."""
    records = dataset.to_list()
    for column, feature in dataset.features.items():
        inner: Any = getattr(feature, "feature", None)  # of a list
        for record in records:
            value = record[column]
            if hasattr(feature, "int2str"):
                # Data sets without labels have -1 instead of null.
                record[column] = None if value is None or value < 0 else feature.int2str(value)
            elif hasattr(inner, "int2str") and value is not None:
                record[column] = inner.int2str(value)
    return _from_table(records)


def _from_table(records: list[dict[str, Any]]) -> list[Row]:
    # Dates, decimals and bytes become text, so that a row can always be written as JSON again.
    return [Row(number, json.loads(json.dumps(fields, default=str))) for number, fields in enumerate(records, start=1)]


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".conll": _read_conll,
}
