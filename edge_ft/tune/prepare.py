"""A training before its weights are loaded: settings, base, tokenizer and rows, found, encoded and checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_ft.artifacts import kind_of
from edge_ft.config import TEXT_TASKS, ProblemType, Task, TuneConfig
from edge_ft.data import (
    CODES,
    Example,
    Record,
    Rendering,
    Row,
    TextTokenizer,
    batch_tokens,
    clock_at,
    column_names,
    encode_example,
    evenly_spaced,
    find_answers,
    find_columns,
    find_problem,
    fingerprint,
    guess_task,
    longest_sequence,
    make_rendering,
    record,
    show_example,
    train_batches,
    with_pooling,
    writes_bos,
)
from edge_ft.errors import UsageError, did_you_mean
from edge_ft.evaluate.scoring import Batching
from edge_ft.families import family_of
from edge_ft.progress import Progress, Silent
from edge_ft.tune.classes import choose_classes, find_class_problems
from edge_ft.tune.defaults import chosen_by_rows
from edge_ft.tune.row_findings import audit_files, drop_untrainable, report_and_refuse, unread_fields
from edge_ft.tune.schedule import planned_steps
from edge_ft.tune.splits import SPLITS, drop_unusable, read_given, split_given
from edge_ft.tune.vocabulary import Cut, compare_tokens, find_vocabulary

if TYPE_CHECKING:
    from edge_ft.models.base_model import Base

__all__ = ["Job", "Prepared", "prepare", "prepare_job", "refuse_other"]

SCORED_ROWS, SCORED_TOKENS = 64, 1024
"""Most rows, and most tokens of rows of mean length, that are scored together; a batch of a step may be larger."""
HOLDS: dict[ProblemType, str] = {
    "single_label_classification": "a class",
    "multi_label_classification": "several classes",
    "regression": "a number",
}

IDENTITY = {
    "content_sha256": "--model holds other weights",
    "codes_sha256": "--model rounds to other codes",
    "data_fingerprint": "--data holds other rows",
    "rows": "--data is split differently",
    "examples_sha256": "--data reads differently (another tokenizer or template)",
}
"""Values of a run's identity that must not change, and the message if they do."""


@dataclass(frozen=True)
class Prepared:
    """The rows of a training."""

    task: Task
    rendering: Rendering
    rows: dict[str, list[Row]]
    """Of each split, as the user gave them."""
    examples: dict[str, list[Example]]
    """Of each split, in token ids: those with something to learn."""
    fingerprint: str
    """Hex sha256 of the content of all rows."""
    findings: list[dict[str, Any]]
    """Of the audit, as JSON values, each with the `file` that its row numbers refer to."""
    shown: list[str] = field(default_factory=list)
    """The first --show train rows, as the model reads them."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of examples in each split."""
        return {name: len(examples) for name, examples in self.examples.items()}

    @cached_property
    def examples_sha256(self) -> str:
        """Hex sha256 of the token ids and labels of all examples, in their order."""
        digest = sha256()
        for examples in self.examples.values():
            for example in examples:
                digest.update(example.content)
        return digest.hexdigest()


@dataclass(frozen=True)
class Job:
    """A training that could begin."""

    config: TuneConfig
    """The settings; what the user left open is resolved, but for `memory` and `compute`."""
    base: "Base"
    tokenizer: TextTokenizer
    prepared: Prepared
    cut: Cut | None = None
    """How the base was made, if it has fewer tokens than the one that was given."""

    def with_settings(self, **settings: Any) -> "Job":
        """Return the job with some settings replaced."""
        return replace(self, config=replace(self.config, **settings))

    @property
    def identity(self) -> dict[str, Any]:
        """Names and hashes of model and rows, by which a resumed run is recognized."""
        return {
            "model": self.base.name,
            "data": self.config.data,
            "content_sha256": self.base.content_sha256,
            "data_fingerprint": self.prepared.fingerprint,
            "rows": self.prepared.counts,
            "examples_sha256": self.prepared.examples_sha256,
            "rendered_at": self.prepared.rendering.rendered_at,
        }

    @property
    def steps(self) -> int:
        """Optimizer steps, before any limit of time."""
        return planned_steps(len(self.prepared.examples["train"]), self.config)

    @property
    def batching(self) -> Batching:
        """How the rows become batches that are scored: of short rows more than a step takes, which is faster."""
        if self.config.memory == "low":
            return Batching(self.prepared.task, self.tokenizer.pad_id, self.config.rows_at_once)
        longest = max(1, round(np.mean([len(example.input_ids) for example in self.prepared.examples["validation"]])))
        together = max(self.config.rows_at_once, min(SCORED_ROWS, SCORED_TOKENS // longest))
        return Batching(self.prepared.task, self.tokenizer.pad_id, together)

    @property
    def watched(self) -> list[int]:
        """Indices of the --eval-rows validation rows of all lengths that most evaluations score; []: all rows."""
        validation, count = self.prepared.examples["validation"], self.config.eval_rows
        assert count is not None  # resolved
        by_length = sorted(range(len(validation)), key=lambda index: len(validation[index].input_ids))
        return sorted(evenly_spaced(by_length, count)) if count < len(validation) else []

    @property
    def unwatched(self) -> list[int]:
        """Indices of the validation rows that only the last evaluation scores; []: all are watched."""
        watched = set(self.watched)
        return [row for row in range(len(self.prepared.examples["validation"])) if watched and row not in watched]

    @cached_property
    def batches(self) -> list[list[int]]:
        """The batches of the first three epochs, as indices of train rows; those of later epochs are alike."""
        lengths = [len(example.input_ids) for example in self.prepared.examples["train"]]
        count = self.steps * self.config.passes
        epochs = (train_batches(lengths, self.config.rows_at_once, self.config.seed, epoch) for epoch in range(3))
        return list(islice(chain.from_iterable(epochs), count))

    @cached_property
    def batch_tokens(self) -> list[int]:
        """`batch_tokens` of each of `batches`."""
        train, task = self.prepared.examples["train"], self.prepared.task
        return [batch_tokens(batch, train, task) for batch in self.batches]


def prepare_job(config: TuneConfig, progress: Progress, saved: Mapping[str, Any] | None = None) -> Job:
    """Find the base, complete the settings with its family's recipe, and prepare the rows for it.

    Args:
        config: As the user gave it, or as an interrupted run saved it.
        progress: Gets the inferred task, the audit's findings and the number of rows.
        saved: `Job.identity` of the interrupted run to resume, if any.

    Returns:
        The job.

    Raises:
        ModelError: no such model, a family or task that is not supported, or a tokenizer of another model.
        DataError: rows that cannot be read or mapped, or a split that stays empty.
        AuditRefused: a finding that refuses the rows and that --allow does not name.
        UsageError: options that do not fit the rows, or a model or rows that are not those of `saved`.
    """
    base = _find_base(config, progress, saved)
    cut: Cut | None = None
    if config.vocabulary == "all":
        refuse_other(saved, {"content_sha256": base.content_sha256}, str(config.out))
    given, tokenizer = config, base.open_tokenizer()
    config = base.family.resolve(given, base.dims.hidden)
    with clock_at((saved or {}).get("rendered_at")):
        prepared = prepare(config, base, tokenizer, progress)
        if config.vocabulary == "rows":
            whole, before = base, prepared
            base = _cut(config, whole, before, progress, saved)
            tokenizer = base.open_tokenizer()
            prepared = prepare(config, base, tokenizer, Silent())
            cut = compare_tokens(whole, base, before.examples, prepared.examples, progress)
    if saved is None and config.finish_steps and prepared.task not in TEXT_TASKS:
        raise UsageError(f"--finish-steps is for models that write text, and the task is {prepared.task}: leave it out")
    if config.class_names and len(config.class_names) == len(base.labels(prepared.task)):
        base = base.with_class_names(config.class_names)
    job = Job(config, base, tokenizer, prepared, cut)
    refuse_other(saved, job.identity, str(config.out))
    job = job.with_settings(task=prepared.task, max_length=prepared.rendering.max_length)
    chosen = chosen_by_rows(job.config, given, prepared.examples, prepared.task, resumed=bool(saved))
    return replace(job, config=chosen)


def _find_base(config: TuneConfig, progress: Progress, saved: Mapping[str, Any] | None) -> "Base":
    """Find the base; for a run that began over a GGUF file's conversion by a first release, that conversion.

    Returns:
        The base.

    Raises:
        ModelError: there is no such model, or that conversion is not the whole of it.
    """
    if kind_of(config.model) == "bundle":
        from edge_ft.tune.bundle_base import find_bundle_base

        return find_bundle_base(config.model, config.task)  # type: ignore[return-value]
    from edge_ft.models.base_model import find_base
    from edge_ft.models.gguf_first import check_first_conversion, first_conversion

    if saved is None:
        return find_base(config.model, config.task, progress)
    # The task of an interrupted run is not required here: another model is to be refused as such.
    if (folder := first_conversion(config.model)) is not None:
        base = find_base(str(folder))
        if base.content_sha256 == saved["content_sha256"]:
            check_first_conversion(folder, config.model, progress)
            return replace(base, name=config.model)
    return find_base(config.model, None, progress).as_recorded(saved)


def _cut(
    config: TuneConfig, base: "Base", whole: Prepared, progress: Progress, saved: Mapping[str, Any] | None
) -> "Base":
    """Return a base with the tokens that its rows and a general text need.

    Raises:
        ModelError: a kind of tokenizer that cannot be cut.
        UsageError: a model or rows that are not those of `saved`.
    """
    from edge_ft.models.vocabulary import cut_base

    found = {"data_fingerprint": whole.fingerprint, "rows": whole.counts}
    refuse_other(saved, found, str(config.out))
    vocabulary = find_vocabulary(config, base, whole.examples["train"], whole.task, resumed=saved is not None)
    before = None if saved is None else {**saved, "content_sha256": vocabulary.content_sha256}
    refuse_other(before, {"content_sha256": base.content_sha256}, str(config.out))
    return cut_base(base, vocabulary, whole.task, progress)


def refuse_other(saved: Mapping[str, Any] | None, found: Mapping[str, Any], run: str) -> None:
    """Refuse to resume a run with another model or other rows.

    Args:
        saved: `Job.identity` of the interrupted run; None where there is none.
        found: Some or all of these values today.
        run: Path of the run folder, for the message.

    Raises:
        UsageError: a value differs; the message names it.
    """
    if saved is None:
        return
    for name, what in IDENTITY.items():
        if name in found and found[name] != saved.get(name):
            raise UsageError(
                f"{what} than at the start of {run} ({saved.get('model')}, {saved.get('data')}): "
                "resume it with the same model and rows, or give another --out"
            )


def prepare(config: TuneConfig, base: "Base", tokenizer: TextTokenizer, progress: Progress) -> Prepared:
    """Read, split, encode and audit the rows of a training.

    Args:
        config: Resolved settings.
        base: Its family, labels and longest sequence count; no weights are loaded.
        tokenizer: Of the base.
        progress: Gets what was inferred from the rows, the findings and the number of rows.

    Returns:
        The rows.

    Raises:
        DataError: rows that cannot be read or mapped, or a split that stays empty.
        AuditRefused: a finding that refuses the rows and that --allow does not name.
        UsageError: --allow names no finding, or a batch would be too small for the task.
        ModelError: the base does not have the task, or its files cannot be read.
    """
    for code in config.allow:
        if code not in CODES:
            raise UsageError(f"--allow {code}: there is no such finding{did_you_mean(code, list(CODES))}")
    given = read_given(config.data, config.validation, config.test)
    names = column_names(given.rows["train"])
    task = config.task or guess_task(names, config, base.family.kind)
    if config.task is None:
        progress.say(f"task: {task} (from the model and the columns {', '.join(names)}; --task overrides)")
    family_of(base.family.name, task)  # refuses a task that the family does not have
    model_labels = base.labels(task)  # a weight file that cannot be read is reported before the rows are mapped
    everything_given = given
    given, dropped = drop_unusable(given, columns := find_columns(names, config, task))
    columns = find_problem(given.rows["train"], columns, config.problem_type)
    rows, leaks = split_given(given, columns, config.split, config.seed)
    if columns.problem_type is not None and config.problem_type is None:
        written = f", as a 0 or 1 for each of {columns.places}" if columns.places else ""
        progress.say(f"{columns.label} holds {HOLDS[columns.problem_type]}{written} (--problem-type overrides)")
    labels = choose_classes(rows, columns, task, model_labels, progress, config.class_names)
    limit = base.max_length
    longest = limit if config.max_length == "auto" else longest_sequence(config.max_length, limit)
    rendering = with_pooling(make_rendering(config, columns, task, tokenizer, longest, labels), base, config.pooling)
    records = {name: [record(row, columns) for row in rows[name]] for name in SPLITS}
    examples = _encode(rendering, tokenizer, records)
    if config.max_length == "auto":
        rendering = replace(rendering, max_length=_length_of_most(examples, limit))
        examples = _encode(rendering, tokenizer, records)
        progress.say(f"--max-length auto: {rendering.max_length} tokens")
    if task == "text-generation" and (answers := find_answers(rows["train"], rendering, tokenizer)):
        rendering = replace(rendering, answers=answers)
        progress.say(f"the rows have {len(answers)} different answers: edge-ft run --labels auto chooses among them")
    if columns.prompt is not None and task == "text-generation" and writes_bos(columns, tokenizer):
        progress.say("the prompt writes the beginning-of-sequence token itself: it is not put before it a second time")
    unused = unread_fields(everything_given, columns, examples)
    found = [*unused, *dropped, *leaks, *audit_files(given.files, records, examples, rendering, tokenizer)]
    findings = [finding.plain(file=file) for file, finding in found]
    findings += find_class_problems(rows, examples, rendering, model_labels, given.files)
    report_and_refuse(findings, config.allow, progress)
    trainable = drop_untrainable(examples, rendering.max_length, "nothing-to-learn" in config.allow)
    if task == "feature-extraction" and min(len(trainable["validation"]), config.rows_at_once) < 2:
        raise UsageError(
            f"{config.data}: each text is compared with the others of its batch: at least 2 validation rows and "
            f"--batch-size 2 are needed, there are {len(trainable['validation'])} and {config.rows_at_once}"
        )
    progress.say(", ".join(f"{len(trainable[name])} {name}" for name in SPLITS) + " rows")
    shown = [show_example(example, rendering, tokenizer) for example in trainable["train"][: config.show]]
    everything = fingerprint([row for name in SPLITS for row in rows[name]])
    return Prepared(task, rendering, rows, trainable, everything, findings, shown)


def _encode(
    rendering: Rendering, tokenizer: TextTokenizer, records: dict[str, list[Record]]
) -> dict[str, list[Example]]:
    return {name: [encode_example(rendering, tokenizer, row) for row in records[name]] for name in SPLITS}


def _length_of_most(examples: dict[str, list[Example]], model_limit: int) -> int:
    """Tokens that hold 99% of the rows uncut, rounded up to a multiple of 32, within the model's limit."""
    lengths = [
        max(len(example.input_ids), len(example.labels)) + example.cut for rows in examples.values() for example in rows
    ]
    whole = float(np.quantile(lengths, 0.99, method="inverted_cdf"))
    return min(math.ceil(whole / 32) * 32, model_limit)
