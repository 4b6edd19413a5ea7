"""From the user's rows to three lists of examples: read, map, split, tokenize, audit. No torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_ft.artifacts import write_text
from edge_ft.config import Task, TuneConfig
from edge_ft.data import (
    Columns,
    Example,
    Rendering,
    Row,
    TextTokenizer,
    audit,
    class_numbers,
    column_names,
    encode_rows,
    find_columns,
    find_labels,
    fingerprint,
    guess_task,
    make_rendering,
    overlap,
    read_rows,
    record,
    split_names,
    split_rows,
)
from edge_ft.errors import AuditRefused, DataError
from edge_ft.evaluate.open import longest_sequence
from edge_ft.evaluate.score import scorable
from edge_ft.progress import Progress

__all__ = ["Prepared", "prepare", "write_splits"]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Prepared:
    """Everything about the data that the loop and the run folder need."""

    task: Task
    rendering: Rendering
    rows: dict[str, list[Row]]
    examples: dict[str, list[Example]]
    fingerprint: str
    findings: list[dict[str, Any]]


def prepare(
    config: TuneConfig,
    tokenizer: TextTokenizer,
    *,
    decoder: bool,
    model_limit: int,
    model_labels: tuple[str, ...],
    progress: Progress,
) -> Prepared:
    """Read, split, encode and audit the rows of a tune.

    Raises:
        DataError: rows that cannot be read or mapped, or a split that stays empty.
        AuditRefused: nothing would be trained, or a row lies in two given splits.
    """
    given = _read_splits(config)
    names = column_names(given["train"])
    task = config.task or guess_task(names, config, decoder)
    if config.task is None:
        progress.say(f"task: {task} (from the model and the columns {', '.join(names)}; --task overrides)")
    columns = find_columns(names, config, task)
    rows = _split(given, config, columns)
    labels: tuple[str, ...] = ()
    if task == "text-classification":
        found = find_labels([row for name in SPLITS for row in rows[name]], columns)
        if len(found) < 2:
            raise DataError(f"{config.data}: the label column holds {len(found)} class(es), at least 2 are needed")
        labels = _order_labels(found, model_labels)
        if model_labels:
            kept = labels == model_labels or labels == class_numbers(model_labels)
            what = "going on from the model's head for" if kept else "a new head instead of the model's, which is for"
            progress.say(f"{what} {', '.join(model_labels)}")
        if unseen := sorted(set(found) - set(find_labels(rows["train"], columns))):
            progress.say(f"no train row is of class {', '.join(unseen)}: it cannot be learned")
    rendering = make_rendering(
        config, columns, task, tokenizer, longest_sequence(config.max_length, model_limit), labels
    )
    examples = {name: encode_rows(rendering, tokenizer, rows[name]) for name in SPLITS}
    findings = [
        {"split": name, **finding}
        for name in SPLITS
        for finding in audit_split(examples[name], rendering.max_length, progress, name)
    ]
    trainable = {name: scorable(examples[name]) for name in SPLITS}
    for name in SPLITS:
        if examples[name] and not trainable[name]:
            raise AuditRefused(
                f"no row of the {name} split has a token to learn: every answer is empty or cut off by "
                f"--max-length {rendering.max_length}"
            )
    progress.say(", ".join(f"{len(trainable[name])} {name}" for name in SPLITS) + " rows")
    return Prepared(task, rendering, rows, trainable, fingerprint([r for name in SPLITS for r in rows[name]]), findings)


def _order_labels(found: tuple[str, ...], model_labels: tuple[str, ...]) -> tuple[str, ...]:
    """Classes in the order of the logits: a head that knows all of them, by name or number, keeps its own."""
    for known in (model_labels, class_numbers(model_labels)):
        if set(found) <= set(known):
            return known
    return found


def audit_split(examples: Sequence[Example], max_length: int, progress: Progress, name: str) -> list[dict[str, Any]]:
    """The audit's findings as plain values, each one said."""
    findings = audit(examples, max_length)
    for finding in findings:
        progress.say(f"{name}: {finding.message}")
    return [
        {"code": finding.code, "severity": finding.severity, "rows": list(finding.rows), "message": finding.message}
        for finding in findings
    ]


def write_splits(prepared: Prepared, folder: Path) -> None:
    """One JSONL per split, the rows as they were given."""
    for name in SPLITS:
        lines = [json.dumps(row.fields, ensure_ascii=False, default=str) + "\n" for row in prepared.rows[name]]
        write_text(folder / f"{name}.jsonl", "".join(lines))


def _read_splits(config: TuneConfig) -> dict[str, list[Row]]:
    """Rows of the splits that have a source of their own, and under `train` those of --data."""
    # A saved DatasetDict may bring its own validation and test rows.
    own = {name: f"{config.data}:{name}" for name in ("validation", "test") if name in split_names(config.data)}
    sources = own | {
        name: source
        for name, source in (("validation", config.validation), ("test", config.test))
        if source is not None
    }
    rows = {name: read_rows(source) for name, source in sources.items()}
    return {"train": read_rows(config.data, split="train"), **rows}


def _split(given: dict[str, list[Row]], config: TuneConfig, columns: Columns) -> dict[str, list[Row]]:
    """The three splits; rows are equal when what the model reads of them is.

    Raises:
        AuditRefused: a row lies in two given splits.
        DataError: a split stays empty.
    """

    def key(row: Row) -> str:
        return json.dumps({**asdict(record(row, columns)), "row": 0})

    train, validation, test = config.split
    shares = (train, 0.0 if "validation" in given else validation, 0.0 if "test" in given else test)
    total = sum(shares)
    if not shares[0]:
        raise DataError("--split leaves no rows to train on: its first share is 0")
    splits = split_rows(given["train"], (shares[0] / total, shares[1] / total, shares[2] / total), config.seed, key)
    splits |= {name: rows for name, rows in given.items() if name != "train"}
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        if shared := overlap(splits[first], splits[second], key):
            a, b = shared[0]
            raise AuditRefused(
                f"{len(shared)} equal row(s) lie in both the {first} and the {second} split, the first is row {a} "
                f"of one and row {b} of the other: remove them from one"
            )
    for name in ("train", "validation"):
        if not splits[name]:
            raise DataError(
                f"{config.data}: {len(given['train'])} row(s) leave none for {name}; give more rows or another --split"
            )
    return splits
