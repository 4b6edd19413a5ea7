"""Open what is exported: a run folder, or a model with or without an adapter; refuse options that do not fit it."""

from dataclasses import replace
from pathlib import Path

from edge_ft.adapter import Adapter, find_adapter
from edge_ft.artifacts import RunFolder, kind_of
from edge_ft.config import (
    INT8_ACTIVATIONS,
    TEXT_TASKS,
    BaseFormat,
    ExportConfig,
    ProblemType,
    Task,
    TuneConfig,
    Weights,
)
from edge_ft.data import (
    Example,
    Finding,
    Rendering,
    Row,
    TextTokenizer,
    class_numbers,
    column_names,
    encode_rows,
    evenly_spaced,
    find_columns,
    find_empty_answers,
    find_labels,
    find_problem,
    find_unused,
    is_unnamed,
    plain_rendering,
    read_rows,
    record,
    split_rows,
)
from edge_ft.errors import DataError, ModelError, UsageError
from edge_ft.evaluate.gate import MOST_ROWS
from edge_ft.evaluate.loading import find_run_base
from edge_ft.evaluate.scoring import scorable
from edge_ft.export.figures import ExportRows
from edge_ft.export.foreign import check_adapter, open_tokenizer
from edge_ft.export.source import ExportSource
from edge_ft.families import CLASSIFIERS, family_of
from edge_ft.models.base_model import Base, find_base
from edge_ft.progress import Progress
from edge_ft.quant.blockwise import Grid

__all__ = ["open_export_source"]

CALIBRATION_ROWS = 128
"""Training rows that int8-static reads; more rows hardly widen the ranges of activations."""
CALIBRATED: dict[Weights, int] = {"int8-static": CALIBRATION_ROWS, "int4": TuneConfig.calibration_rows}
"""Train rows on which ranges or codes are chosen."""
FEWEST_SPLIT = 30
"""Rows of --data that are split; fewer all gate, and choose no codes."""
MOST_READ = 20480
"""Rows of --data that are split."""
FEW_ROWS = 10
"""With fewer rows an export says that they say little."""


def open_export_source(source: str, config: ExportConfig, progress: Progress | None = None) -> ExportSource:
    """Open a SOURCE of `edge-ft export`.

    Args:
        source: A run folder; or a hub id, a folder or a GGUF file of a model.
        config: Options of the export.
        progress: Receives the state of a conversion; None is silent.

    Returns:
        The source, with its options resolved and its rows encoded.

    Raises:
        UsageError: a source that cannot be exported, or options that do not fit it.
    """
    kind = kind_of(source)
    if kind == "bundle":
        raise UsageError(f"{source} is already a bundle: export takes a run folder or a model")
    if kind == "run":
        return _from_run(RunFolder.open(Path(source)), config, progress)
    return _from_model(source, config, progress)


def _from_run(run: RunFolder, config: ExportConfig, progress: Progress | None) -> ExportSource:
    """Return a finished run as a source.

    Raises:
        UsageError: options of a model, or a lane that cannot hold the run's format.
    """
    for flag, value in (
        ("--adapter", config.adapter),
        ("--data", config.data),
        ("--task", config.task),
        ("--pooling", config.pooling),
        ("--class-names", config.class_names or None),
        ("--finish", config.finish or None),
    ):
        if value is not None:
            raise UsageError(f"{flag} is for a model: the run folder {run.path} has its own")
    identity = run.base()
    trained_format: BaseFormat = identity["format"]
    weights = config.weights or "int4"
    _check_size(config, weights, int(identity.get("calibration_rows") or 0), run.rendering()["task"])
    if config.lane == "adapter":
        if trained_format == "nf4":
            raise UsageError(f"{run.path} has a base of format nf4, which no bundle can have: use --lane merged")
        weights = config.weights or (trained_format if trained_format == "int8" else "int4")
    base = find_run_base(run, progress)
    _refuse_int8_activations(weights, base, config.lane)
    tokenizer = TextTokenizer.load(run.tokenizer, base.known_ids)
    rendering, recorded = Rendering.from_dict(run.rendering()), Grid.recorded(identity)
    return ExportSource(
        base=base,
        adapter=find_adapter(run.adapter),
        trained_format=trained_format,
        weights=weights,
        lane=config.lane,
        grid=replace(recorded, block_size=config.block_size or recorded.block_size),
        tokenizer=tokenizer,
        rendering=rendering,
        rows=_rows_of_run(run, base, weights, rendering, tokenizer),
        data_fingerprint=identity["data_fingerprint"],
        run=run,
        seed=int(run.report()["seed"]),
        size_mb=config.size_mb,
    )


def _check_size(config: ExportConfig, weights: Weights, calibration_rows: int, task: Task) -> None:
    """Refuse --size-mb where there is nothing to choose, or nothing to choose by.

    Raises:
        UsageError: the export is none of a merged int4 decoder whose codes are calibrated on rows.
    """
    if config.size_mb is None:
        return
    for is_so, why in (
        (config.format != "bundle", "is for bundles: leave --format out"),
        (
            config.lane == "adapter",
            "chooses the bits of merged weights, and the adapter lane ships those of the training",
        ),
        (weights != "int4", f"chooses between 4 and 8 bits, and --weights is {weights}"),
        (task != "text-generation", f"is for text-generation, and this is {task}"),
        (not calibration_rows, "measures on training rows what rounding costs: tune with --calibration-rows"),
    ):
        if is_so:
            raise UsageError(f"--size-mb {why}")


def _rows_of_run(
    run: RunFolder, base: Base, weights: Weights, rendering: Rendering, tokenizer: TextTokenizer
) -> ExportRows:
    """Return the run's own rows, encoded."""
    validation = read_rows(str(run.split("validation")))[:MOST_ROWS]
    test = read_rows(str(run.split("test"))) if run.split("test").stat().st_size else []
    calibrated = 0 if base.dims.shares_layers else run.base().get("calibration_rows", 0)
    count = {"int8-static": CALIBRATION_ROWS, "int4": calibrated}.get(weights, 0)
    calibration = evenly_spaced(read_rows(str(run.split("train"))), count) if count else []
    return ExportRows(
        validation=scorable(encode_rows(rendering, tokenizer, validation)),
        test=scorable(encode_rows(rendering, tokenizer, test)),
        calibration=encode_rows(rendering, tokenizer, calibration),
        read=validation,
    )


def _from_model(source: str, config: ExportConfig, progress: Progress | None) -> ExportSource:
    """Return a model, with `config.adapter` on it, as a source.

    Raises:
        UsageError: options that do not fit it.
        DataError: no row has an answer.
    """
    base = find_base(source, config.task, progress)
    adapter = find_adapter(config.adapter) if config.adapter is not None else None
    weights = config.weights or "int4"
    if config.size_mb is not None:
        raise UsageError("--size-mb measures on a run's training rows what rounding costs: it is for run folders")
    _refuse_int8_activations(weights, base, config.lane if adapter else "base")
    if weights == "int8-static" and config.data is None:
        raise UsageError("--weights int8-static measures ranges of activations on rows: give --data")
    tokenizer = base.open_tokenizer() if adapter is None else open_tokenizer(adapter, base)
    task = config.task or (adapter.task if adapter is not None else None) or base.task
    family_of(base.family.name, task)  # refuses a task that the family does not have
    notes = () if adapter is None else check_adapter(adapter, base, task, config.lane, tokenizer)
    if adapter is not None and config.problem_type is None:
        config = replace(config, problem_type=_problem_type(base, task, adapter))
    _refuse_finish(config, weights, task)
    chooses = weights == "int8-static" or (weights == "int4" and adapter is not None and config.lane == "merged")
    rows = read_rows(config.data)[: MOST_READ if chooses else MOST_ROWS] if config.data is not None else []
    if config.class_names and task not in CLASSIFIERS:
        raise UsageError(f"--class-names is for classes and tags, and the task is {task}: leave it out")
    labels = _labels(base, task, config, rows, adapter) if base.family.trained_head(task) else ()
    if labels and len(labels) == len(base.labels(task)) and not _head_size(base, task, adapter):
        base = base.with_class_names(labels)  # its own head stays, with these names
    rendering = plain_rendering(base, config, rows, tokenizer, task, labels)
    encoded = encode_rows(rendering, tokenizer, rows)
    findings = _find_what_misleads(rows, encoded, rendering)
    notes = (*notes, *(f"{config.data}: {finding.message} [{finding.code}]" for finding in findings))
    rendering = replace(rendering, labels=labels)  # rows may name classes by number; the bundle names them by name
    given = ExportRows(scorable(encoded), [], [], rows)
    if rows and not given.validation:
        raise DataError(f"{config.data}: no row has an answer to score")
    if task == "feature-extraction" and len(given.validation) == 1:
        raise DataError(f"{config.data}: each text is compared with those of other rows: give at least 2")
    if chooses and len(given.validation) >= FEWEST_SPLIT:
        given = _split(rows, encoded, CALIBRATED[weights])
        notes = (*notes, *_check_split(given, config))
    elif weights == "int8-static":
        given = replace(given, calibration=given.validation)
    if config.finish and not given.train:
        raise UsageError(f"--finish trains on rows: {config.data} has fewer than {FEWEST_SPLIT} with an answer")
    if adapter is not None and 0 < len(given.validation) < FEW_ROWS:
        notes = (*notes, f"{config.data}: the gate goes by {len(given.validation)} row(s), too few to know the loss by")
    return ExportSource(
        base=base,
        adapter=adapter,
        trained_format="fp32",
        weights=weights,
        lane=config.lane if adapter else "base",
        grid=Grid(config.block_size or 32),
        tokenizer=tokenizer,
        rendering=rendering,
        rows=given,
        data_fingerprint=None,
        run=None,
        seed=0,
        notes=notes,
    )


def _find_what_misleads(rows: list[Row], encoded: list[Example], rendering: Rendering) -> list[Finding]:
    """Return what a user should know of rows that are scored: what is not read of them, and answers without text."""
    unread = {example.row: example.unread for example in encoded}
    empty = find_empty_answers([record(row, rendering.columns) for row in rows], encoded)
    return find_unused(rows, rendering.columns, unread) + empty


def _split(rows: list[Row], encoded: list[Example], calibrated: int) -> ExportRows:
    """Split the rows of --data as `tune` does: what is chosen on train rows is not scored on them.

    Args:
        rows: As they were read.
        encoded: The same rows.
        calibrated: Number of train rows that ranges or codes are chosen on.

    Returns:
        The rows.
    """
    shares = TuneConfig.split
    splits = split_rows(rows, shares, seed=0)
    by_number = {example.row: example for example in encoded}
    train, validation, test = (scorable([by_number[row.number] for row in splits[name]]) for name in splits)
    calibration = evenly_spaced(train, calibrated)
    return ExportRows(validation, test, calibration, splits["validation"], train, shares).first(MOST_ROWS)


def _check_split(given: ExportRows, config: ExportConfig) -> tuple[str, ...]:
    """Return what there is to say of split rows. Equal rows stay together, so that a part may get none.

    Raises:
        DataError: no row is left to score.
    """
    if not given.validation:
        raise DataError(
            f"{config.data}: nearly all of its rows are equal, and the split of 8 : 1 : 1, which keeps these together, "
            f"leaves none to score: give more different rows, or fewer than {FEWEST_SPLIT}"
        )
    return () if given.test else (f"{config.data}: too few different rows for test rows beside those of the gate",)


def _refuse_finish(config: ExportConfig, weights: Weights, task: Task) -> None:
    """Refuse --finish where no merged int4 model that writes text is made.

    Raises:
        UsageError: one of these.
    """
    if not config.finish:
        return
    if config.adapter is None or config.data is None:
        raise UsageError("--finish trains a merged model towards its adapter on rows: give --adapter and --data")
    if weights != "int4" or config.lane != "merged":
        raise UsageError(f"--finish is for --weights int4 and --lane merged, not {weights} and {config.lane}")
    if task not in TEXT_TASKS:
        raise UsageError(f"--finish is for models that write text, and the task is {task}: leave it out")


def _refuse_int8_activations(weights: Weights, base: Base, lane: str) -> None:
    """Refuse int8 activations where they do not work.

    Raises:
        UsageError: the model is not an encoder, or the lane is adapter.
    """
    if weights in INT8_ACTIVATIONS and base.family.kind != "encoder":
        raise UsageError(
            f"--weights {weights} is for encoders and {base.family.name} is none: use --weights int8, whose graph of "
            "accuracy level 4 has int8 activations too"
        )
    if weights in INT8_ACTIVATIONS and lane == "adapter":
        raise UsageError(
            f"--weights {weights} cannot be used with --lane adapter: use --lane merged, or --weights int4 or int8"
        )


def _head_size(base: Base, task: Task, adapter: Adapter | None) -> int:
    """Return the number of outputs of the head that an adapter brings; 0 if it brings none."""
    if adapter is None or not base.family.trained_head(task):
        return 0
    endings = base.family.class_weights(task)
    return next((shape[0] for name, shape in adapter.shapes.items() if name.endswith(endings)), 0)


def _problem_type(base: Base, task: Task, adapter: Adapter) -> ProblemType | None:
    """Return what the logits of an adapter's head are: what is said beside it, a number of a single one, else None."""
    found: ProblemType | None = adapter.model_config.get("problem_type")
    single = task == "text-classification" and _head_size(base, task, adapter) == 1
    return found or ("regression" if single else None)


def _labels(base: Base, task: Task, config: ExportConfig, rows: list[Row], adapter: Adapter | None) -> tuple[str, ...]:
    """Return the class names: --class-names, else the adapter's or the checkpoint's own, else LABEL_i.

    Raises:
        ModelError: neither the model nor the adapter has a head, and --class-names asks for no new one.
        UsageError: --class-names gives more or fewer names than the head has outputs.
        DataError: the rows name the classes of a head that does not: in which order is not known.
    """
    own, size = base.labels(task), _head_size(base, task, adapter)
    if not size and not own and not config.class_names:
        raise ModelError(
            f"{base.path} has no head for {task}: tune it first, or name the classes of a new head, which the bundle "
            "can then learn, --class-names NAME,NAME,…"
        )
    size = size or len(own) or len(config.class_names)
    named = adapter.class_names if adapter is not None else ()
    own = () if is_unnamed(own) else own
    names = next((names for names in (config.class_names, named, own) if len(names) == size), ())
    if config.class_names and names != config.class_names:
        raise UsageError(f"--class-names gives {len(config.class_names)} names, the head has {size} outputs")
    if names:
        return names
    names = tuple(f"LABEL_{index}" for index in range(size))
    found: tuple[str, ...] = ()
    if rows and size > 1:
        columns = find_columns(column_names(rows), config, task)
        columns = find_problem(rows, columns, config.problem_type or base.problem_type)
        found = () if columns.places else find_labels(rows, columns)
    if set(found) - {*names, *class_numbers(names)}:
        raise DataError(
            f"{config.data} names classes ({', '.join(found[:8])}) and the head has {size} outputs without names: give "
            "them in the order of its outputs, --class-names NAME,NAME,…"
        )
    return names
