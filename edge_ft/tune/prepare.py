"""From the user's rows to three lists of examples: read, map, split, tokenize, audit. No torch."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_ft.artifacts import write_text
from edge_ft.config import ProblemType, Task, TuneConfig
from edge_ft.data import (
    Columns,
    Example,
    Finding,
    Record,
    Rendering,
    Row,
    TextTokenizer,
    audit,
    class_numbers,
    column_names,
    encode_example,
    find_answers,
    find_columns,
    find_labels,
    find_problem,
    fingerprint,
    guess_task,
    has_answer,
    is_empty,
    longest_sequence,
    make_rendering,
    overlap,
    read_rows,
    record,
    split_names,
    split_rows,
    template_marks,
    with_pooling,
)
from edge_ft.data.audit import CODES, format_rows, preview, shorten
from edge_ft.data.example import IGNORED
from edge_ft.errors import AuditRefused, DataError, UsageError, did_you_mean
from edge_ft.evaluate.scoring import scorable
from edge_ft.families import CLASSIFIERS
from edge_ft.progress import Progress

if TYPE_CHECKING:
    from edge_ft.models.base_model import Base

__all__ = ["Prepared", "prepare", "write_splits"]

SPLITS = ("train", "validation", "test")
HOLDS: dict[ProblemType, str] = {
    "single_label_classification": "a class",
    "multi_label_classification": "several classes",
    "regression": "a number",
}


@dataclass(frozen=True)
class Prepared:
    """Everything about the data that the loop and the run folder need."""

    task: Task
    rendering: Rendering
    rows: dict[str, list[Row]]
    examples: dict[str, list[Example]]
    fingerprint: str
    findings: list[dict[str, Any]]
    """The audit's, each with the `file` that its row numbers are of."""
    shown: list[str] = field(default_factory=list)
    """The first --show train rows as the model reads them."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of examples in each split."""
        return {name: len(examples) for name, examples in self.examples.items()}


def prepare(config: TuneConfig, base: "Base", tokenizer: TextTokenizer, progress: Progress) -> Prepared:
    """Read, split, encode and audit the rows of a tune.

    Args:
        base: Its family, labels and longest sequence are asked for; nothing of it is loaded.

    Raises:
        DataError: rows that cannot be read or mapped, or a split that stays empty.
        AuditRefused: a finding that refuses the rows and that --allow does not name.
    """
    for code in config.allow:
        if code not in CODES:
            raise UsageError(f"--allow {code}: there is no such finding{did_you_mean(code, list(CODES))}")
    given, files = _read_splits(config)
    names = column_names(given["train"])
    task = config.task or guess_task(names, config, base.family.kind)
    if config.task is None:
        progress.say(f"task: {task} (from the model and the columns {', '.join(names)}; --task overrides)")
    model_labels = base.labels(task)  # a weight file that cannot be read is said here, before the rows are mapped
    columns = find_columns(names, config, task)
    findings: list[dict[str, Any]] = []
    for name, rows_given in given.items():
        given[name], left_out = _leave_out(rows_given, columns)
        findings += [finding.plain(file=files[name]) for finding in left_out]
    if not given["train"]:
        raise AuditRefused(f"{config.data}: no row has an answer or a class to learn")
    columns = find_problem(given["train"], columns, config.problem_type)
    if columns.problem_type is not None and config.problem_type is None:
        progress.say(f"{columns.label} holds {HOLDS[columns.problem_type]} (--problem-type overrides)")
    rows, leaks = _split(given, config, columns)
    findings += [finding.plain(file=files[name]) for name, finding in leaks]
    labels: tuple[str, ...] = ()
    if columns.problem_type == "regression":
        labels = model_labels if len(model_labels) == 1 else find_labels((), columns)
    elif task in CLASSIFIERS:
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
    longest = base.max_length if config.max_length == "auto" else longest_sequence(config.max_length, base.max_length)
    rendering = with_pooling(make_rendering(config, columns, task, tokenizer, longest, labels), base, config.pooling)
    records = {name: [record(row, columns) for row in rows[name]] for name in SPLITS}
    examples = _encode(rendering, tokenizer, records)
    if config.max_length == "auto":
        rendering = replace(rendering, max_length=_length_of_most(examples, base.max_length))
        examples = _encode(rendering, tokenizer, records)
        progress.say(f"--max-length auto: {rendering.max_length} tokens")
    if task == "text-generation" and (answers := find_answers(rows["train"], columns, rendering, tokenizer)):
        rendering = replace(rendering, answers=answers)
        progress.say(f"the rows have {len(answers)} different answers: run --labels auto will choose among them")
    marks = template_marks(rendering.chat_template, tokenizer)
    for file in dict.fromkeys(files.values()):
        together = [name for name in SPLITS if files[name] == file]
        pairs = sorted(
            (pair for name in together for pair in zip(records[name], examples[name], strict=True)),
            key=lambda pair: pair[0].row,
        )
        for finding in audit([a for a, _ in pairs], [b for _, b in pairs], rendering.max_length, marks):
            if finding.code == "one-class" and "train" not in together:
                finding = replace(finding, severity="warning")
            findings.append(finding.plain(file=file))
    trainable = {name: scorable(examples[name]) for name in SPLITS}
    _judge(findings, config, progress)
    for name in SPLITS:
        if examples[name] and not trainable[name]:
            raise AuditRefused(
                f"no row of the {name} split has a token to learn: every answer is empty or cut off by "
                f"--max-length {rendering.max_length}"
                + (" (which --allow cannot mend)" if "nothing-to-learn" in config.allow else "")
            )
    if task == "feature-extraction" and min(len(trainable["validation"]), config.rows_at_once) < 2:
        raise UsageError(
            f"{config.data}: each text is told apart from the others of its batch: at least 2 validation rows and "
            f"--batch-size 2 are needed, there are {len(trainable['validation'])} and {config.rows_at_once}"
        )
    progress.say(", ".join(f"{len(trainable[name])} {name}" for name in SPLITS) + " rows")
    shown = [_shown(example, rendering, tokenizer) for example in trainable["train"][: config.show]]
    everything = fingerprint([row for name in SPLITS for row in rows[name]])
    return Prepared(task, rendering, rows, trainable, everything, findings, shown)


def _order_labels(found: tuple[str, ...], model_labels: tuple[str, ...]) -> tuple[str, ...]:
    """Classes in the order of the logits: a head that knows all of them, by name or number, keeps its own."""
    for known in (model_labels, class_numbers(model_labels)):
        if set(found) <= set(known):
            return known
    return found


def _encode(
    rendering: Rendering, tokenizer: TextTokenizer, records: dict[str, list[Record]]
) -> dict[str, list[Example]]:
    return {name: [encode_example(rendering, tokenizer, row) for row in records[name]] for name in SPLITS}


def _length_of_most(examples: dict[str, list[Example]], model_limit: int) -> int:
    """Tokens in which 99% of the rows are whole, rounded up to a multiple of 32, within the model's limit."""
    lengths = [
        max(len(example.input_ids), len(example.labels)) + example.cut for rows in examples.values() for example in rows
    ]
    whole = float(np.quantile(lengths, 0.99, method="inverted_cdf"))
    return min(math.ceil(whole / 32) * 32, model_limit)


def _leave_out(rows: list[Row], columns: Columns) -> tuple[list[Row], list[Finding]]:
    """The rows that can be learned from, and findings about the others."""
    empty = [row for row in rows if is_empty(row)]
    unlabelled = [row for row in rows if not is_empty(row) and not has_answer(row, columns)]
    findings = [
        Finding(
            code,
            "warning",
            [row.number for row in found],
            f"{len(found)} of {len(rows)} rows {what} and are left out ({format_rows([row.number for row in found])})",
            shorten(json.dumps(found[0].fields, ensure_ascii=False)),
        )
        for code, found, what in (
            ("empty-row", empty, "are empty"),
            ("unlabelled", unlabelled, "have no answer or class"),
        )
        if found
    ]
    return [row for row in rows if not is_empty(row) and has_answer(row, columns)], findings


def _judge(findings: list[dict[str, Any]], config: TuneConfig, progress: Progress) -> None:
    """Say every finding, and make those that --allow names warnings.

    Raises:
        AuditRefused: one refuses the rows; `nothing-to-learn` is left to the caller, who knows the splits.
    """
    for finding in findings:
        if finding["code"] in config.allow:
            finding["severity"] = "warning"
        progress.say(f"{finding['file']}: {finding['message']} [{finding['code']}]")
    fatal = [found for found in findings if found["severity"] == "error" and found["code"] != "nothing-to-learn"]
    if fatal:
        codes = " ".join(dict.fromkeys(found["code"] for found in fatal))
        reasons = "; ".join(found["message"] for found in fatal)
        raise AuditRefused(f"{reasons} (--allow {codes} goes on all the same)")


def _shown(example: Example, rendering: Rendering, tokenizer: TextTokenizer) -> str:
    """A row as the model reads it, between ⟦ and ⟧ what it is trained on."""
    ids = example.input_ids
    if rendering.task == "text2text-generation":
        labels = [int(label) for label in example.labels]
        source, target = (tokenizer.decode(part, skip_special_tokens=False) for part in (ids, labels))
        return f"row {example.row}: {len(ids)} tokens read, {example.targets} trained\n{source} → ⟦{target}⟧"
    if rendering.task in ("text-classification", "feature-extraction"):
        text, paired = (tokenizer.decode(part, skip_special_tokens=False) for part in (ids, example.pair_ids))
        what = f"{example.targets} label{'s' if example.targets > 1 else ''}" if not paired else "the second text"
        read = len(ids) + len(example.pair_ids)
        return f"row {example.row}: {read} tokens read, {what} trained\n{text} → ⟦{paired or example.reference}⟧"
    if rendering.task == "token-classification":
        return _shown_tags(example, rendering, tokenizer)
    if rendering.task == "fill-mask":
        # What is trained stands where the model reads a mask.
        ids = [token if label == IGNORED else int(label) for token, label in zip(ids, example.labels, strict=True)]
    edges = [at for at in range(1, len(ids)) if (example.labels[at] == IGNORED) != (example.labels[at - 1] == IGNORED)]
    text, before = "", ""
    for start, stop in zip([0, *edges], [*edges, len(ids)], strict=True):
        # Parts are cut from the whole text: a tokenizer may write a token otherwise at the start of a text.
        whole = tokenizer.decode(ids[:stop], skip_special_tokens=False)
        part, before = whole[len(before) :], whole
        text += part if example.labels[start] == IGNORED else f"⟦{part}⟧"
    trained = example.targets
    return f"row {example.row}: {len(ids)} tokens read, {trained} of them trained\n{text}"


def _shown_tags(example: Example, rendering: Rendering, tokenizer: TextTokenizer) -> str:
    """The row with its tags behind the first tokens of its words."""
    parts = [
        tokenizer.decode([token], skip_special_tokens=False)
        + ("" if label == IGNORED else f"⟦{rendering.labels[int(label)]}⟧")
        for token, label in zip(example.input_ids, example.labels, strict=True)
    ]
    return f"row {example.row}: {len(parts)} tokens read, {example.targets} tags trained\n{' '.join(parts)}"


def write_splits(prepared: Prepared, folder: Path) -> None:
    """One JSONL per split, the rows as they were given."""
    for name in SPLITS:
        lines = [json.dumps(row.fields, ensure_ascii=False, default=str) + "\n" for row in prepared.rows[name]]
        write_text(folder / f"{name}.jsonl", "".join(lines))


def _read_splits(config: TuneConfig) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Rows of the splits that have a source of their own, under `train` those of --data, and each split's source."""
    # A saved DatasetDict may bring its own validation and test rows.
    own = {name: f"{config.data}:{name}" for name in ("validation", "test") if name in split_names(config.data)}
    sources = own | {
        name: source
        for name, source in (("validation", config.validation), ("test", config.test))
        if source is not None
    }
    rows = {name: read_rows(source) for name, source in sources.items()}
    files = {name: sources.get(name, config.data) for name in SPLITS}
    return {"train": read_rows(config.data, split="train"), **rows}, files


def _split(
    given: dict[str, list[Row]], config: TuneConfig, columns: Columns
) -> tuple[dict[str, list[Row]], list[tuple[str, Finding]]]:
    """The three splits, and what lies in two of them; rows are equal when what the model reads of them is.

    Raises:
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
    leaks = []
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        if shared := overlap(splits[first], splits[second], key):
            a, b = shared[0]
            message = (
                f"{len(shared)} equal row(s) lie in both the {first} and the {second} split, the first is row {a} "
                f"of one and row {b} of the other: remove them from one"
            )
            text = next(preview(record(row, columns)) for row in splits[second] if row.number == b)
            leaks.append((second, Finding("leak", "error", [b for _, b in shared], message, text)))
    for name in ("train", "validation"):
        if not splits[name]:
            raise DataError(
                f"{config.data}: {len(given['train'])} row(s) leave none for {name}; give more rows or another --split"
            )
    return splits, leaks
