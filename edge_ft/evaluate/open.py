"""The one place that turns a RUN, a BUNDLE or a MODEL into something that can be scored."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edge_ft.artifacts import Bundle, RunFolder, kind_of
from edge_ft.config import EvalConfig, Pooling, ProblemType, RowsConfig, Task
from edge_ft.data import (
    Rendering,
    Row,
    TextTokenizer,
    class_numbers,
    column_names,
    find_columns,
    find_labels,
    find_problem,
    guess_task,
    make_rendering,
    stop_ids,
)
from edge_ft.errors import DataError, ModelError, UsageError, require
from edge_ft.evaluate.score import Scorer
from edge_ft.families import CLASSIFIERS, Kind

if TYPE_CHECKING:
    from edge_ft.base.find import Base

__all__ = ["Opened", "find_run_base", "longest_sequence", "open_run_model", "open_source", "pooled", "rendering_for"]


@dataclass(frozen=True)
class Opened:
    """A scorer, and how rows become what it reads."""

    scorer: Scorer
    tokenizer: TextTokenizer
    rendering: Rendering
    model_limit: int
    """Positions that the model has."""


def open_source(source: str, config: EvalConfig, rows: Sequence[Row]) -> Opened:
    """Open what a SOURCE argument names.

    A run or bundle renders rows as it was trained to; a plain model as `config` says.

    Raises:
        UsageError: options that do not fit the source.
        BundleError, ModelError, DataError: it cannot be opened, or the rows do not fit it.
    """
    kind = kind_of(source)
    if kind == "bundle":
        from edge_ft.runtime import load

        bundle = Bundle.open(Path(source))
        tokenizer = TextTokenizer.load(bundle.path)
        limit = int(bundle.manifest["max_length"])
        own = Rendering.from_dict(bundle.manifest["rendering"])
        rendering = rendering_for(config, rows, tokenizer, own, model_limit=limit)
        scorer: Scorer = load(
            bundle, threads=config.threads, accuracy_level=config.accuracy_level, adapter=config.adapter
        )
        return Opened(scorer, tokenizer, rendering, limit)

    if config.accuracy_level is not None:
        raise UsageError("--accuracy-level is for bundles: runs and models have one graph")
    torch = require("torch", "train")
    from edge_ft.base.linear import move
    from edge_ft.base.scorer import TorchScorer

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "run":
        run = RunFolder.open(Path(source))
        tokenizer = TextTokenizer.load(run.tokenizer)
        limit = find_run_base(run).max_length
        own = Rendering.from_dict(run.rendering())
        rendering = rendering_for(config, rows, tokenizer, own, model_limit=limit)
        run_model, _ = open_run_model(run, adapter=config.adapter != "none")
        scorer = TorchScorer(move(run_model, device), rendering.task, stop_ids(rendering, tokenizer))
        return Opened(scorer, tokenizer, rendering, limit)

    from edge_ft.base.find import find_base
    from edge_ft.base.load import load_model

    if config.adapter is not None:
        raise UsageError("--adapter none is for runs and bundles: a plain model has no adapter")
    base = find_base(source, config.task)
    task = config.task or guess_task(column_names(rows), config, base.family.kind)
    tokenizer = TextTokenizer.load(base.path)
    rendering = rendering_for(
        config,
        rows,
        tokenizer,
        None,
        kind=base.family.kind,
        task=task,
        model_limit=base.max_length,
        labels=base.labels(task),
        problem_type=base.problem_type,
    )
    rendering = pooled(rendering, base, config.pooling)
    task_model: Any = move(load_model(base, rendering.task, config.base_format, pooling=rendering.pooling), device)
    if rendering.problem_type is not None:
        task_model.config.problem_type = rendering.problem_type  # some checkpoints leave it to be guessed
    scorer = TorchScorer(task_model, rendering.task, stop_ids(rendering, tokenizer))
    return Opened(scorer, tokenizer, rendering, base.max_length)


def find_run_base(run: RunFolder) -> "Base":
    """The base that a run was trained over.

    Raises:
        ModelError: it is gone, or its content has changed.
    """
    from edge_ft.base.find import find_base

    identity = run.base()
    where = identity["path"] if Path(identity["path"]).is_dir() else identity["model"]
    base = find_base(where)
    if base.content_sha256 != identity["content_sha256"]:
        raise ModelError(
            f"the base at {where} is not the one that {run.path} was trained over: its content has changed"
        )
    return replace(base, name=identity["model"])


def open_run_model(run: RunFolder, adapter: bool = True) -> "tuple[Any, Base]":
    """The torch model of a run, on the grid it was trained over, with its adapter unless told otherwise.

    Raises:
        ModelError: the base is gone or changed, or rounds to other codes than it was trained over.
    """
    from edge_ft.base.adapter import load_adapter
    from edge_ft.base.linear import codes_sha256
    from edge_ft.base.load import load_model

    identity, report = run.base(), run.report()
    base = find_run_base(run)
    task: Task = report["task"]
    rendering = Rendering.from_dict(run.rendering())
    labels, seed, problem = rendering.labels, int(report["seed"]), rendering.problem_type
    codes = run.codes if run.codes.is_file() else None
    if codes is None and identity["format"] == "int4" and identity.get("calibration_rows"):
        raise ModelError(f"{run.codes} is missing, which holds the int4 codes that were trained over: tune again")
    model = load_model(
        *(base, task, identity["format"], identity["block_size"], labels, seed, problem, rendering.pooling, codes)
    )
    if identity["codes_sha256"] is not None and codes_sha256(model) != identity["codes_sha256"]:
        raise ModelError(
            f"the {identity['format']} codes of {base.path} are not those that {run.path} was trained over: tune again"
        )
    return (load_adapter(model, run.adapter) if adapter else model), base


def pooled(rendering: Rendering, base: "Base", asked: Pooling | None) -> Rendering:
    """The rendering of an embedder with how it makes one vector of a text: as `asked`, else as its own files say.

    Raises:
        UsageError: `asked` of another task.
        ModelError: the files say what cannot be exported.
    """
    if rendering.task != "feature-extraction":
        if asked is not None:
            raise UsageError(f"--pooling is for feature-extraction, and this is {rendering.task}")
        return rendering
    pooling, normalize = (asked, True) if asked is not None else base.pooling
    return replace(rendering, pooling=pooling, normalize=normalize)


def longest_sequence(max_length: int | Literal["auto"] | None, model_limit: int) -> int:
    """The longest sequence in tokens: what was asked for, within what the model allows; else at most 1024.

    Raises:
        DataError: more was asked for than the model allows, or `auto`, which only a tune finds out.
    """
    if max_length == "auto":
        raise DataError("--max-length auto is for tune and plan: give a number of tokens here")
    if max_length is not None and max_length > model_limit:
        raise DataError(f"--max-length {max_length} is beyond the model's {model_limit} positions")
    return max_length or min(model_limit, 1024)


def rendering_for(
    config: RowsConfig,
    rows: Sequence[Row],
    tokenizer: TextTokenizer,
    own: Rendering | None,
    *,
    kind: Kind = "decoder",
    task: Task | None = None,
    model_limit: int,
    labels: tuple[str, ...] = (),
    problem_type: ProblemType | None = None,
) -> Rendering:
    """How `rows` are rendered: as `own` says where its columns are there and nothing else was asked for.

    Rows with other columns than the training rows had are mapped anew, with the template and labels of
    `own`. A `config.max_length` replaces the length of `own`; without `own` see `longest_sequence`.

    Raises:
        DataError: the rows have no columns that can be used, or --max-length is beyond `model_limit`.
    """
    names = column_names(rows)
    if own is not None:
        if config.max_length is not None:
            own = replace(own, max_length=longest_sequence(config.max_length, model_limit))
        asked = any(
            value is not None
            for value in (
                *(config.prompt, config.completion, config.label, config.chat_template, config.text_pair),
                *(config.problem_type, config.pooling),
            )
        )
        if not asked and own.columns.fits(names):
            return own
        if config.pooling not in (None, own.pooling):
            raise DataError(f"--pooling {config.pooling}: this model was made with {own.pooling or 'none'}")
        if config.problem_type not in (None, own.problem_type):
            raise DataError(f"--problem-type {config.problem_type}: this model was trained for {own.problem_type}")
        mapped = config.prompt or config.label or not own.columns.fits(names)
        columns = find_columns(names, config, own.task) if mapped else own.columns
        if (columns.pair is None) != (own.columns.pair is None):
            texts = "one text" if own.columns.pair is None else "two texts"
            raise DataError(
                f"this model reads {texts}: name the columns as it was trained, see --prompt and --text-pair"
            )
        columns = replace(columns, problem_type=own.problem_type)
        if config.chat_template is None:
            return replace(own, columns=columns)
        anew = make_rendering(config, columns, own.task, tokenizer, own.max_length, own.labels)
        return replace(anew, answers=own.answers)
    task = task or guess_task(names, config, kind)
    if task in CLASSIFIERS and not labels:
        raise DataError("this model has no class names of its own: tune it first")
    longest = longest_sequence(config.max_length, model_limit)
    columns = find_problem(rows, find_columns(names, config, task), config.problem_type or problem_type)
    numbers = class_numbers(labels)
    if task in CLASSIFIERS and columns.problem_type != "regression":
        found = set(find_labels(rows, columns))
        if not found <= set(labels) and found <= set(numbers):
            labels = numbers  # rows that name classes by their place in the head
    return make_rendering(config, columns, task, tokenizer, longest, labels)
