"""The one place that turns a RUN, a BUNDLE or a MODEL into something that can be scored."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ft.artifacts import Bundle, RunFolder, kind_of
from edge_ft.config import EvalConfig, RowsConfig, Task
from edge_ft.data import (
    Rendering,
    Row,
    TextTokenizer,
    column_names,
    find_columns,
    guess_task,
    make_rendering,
    stop_ids,
)
from edge_ft.errors import DataError, ModelError, UsageError, require
from edge_ft.evaluate.score import Scorer

if TYPE_CHECKING:
    from edge_ft.base.load import Base

__all__ = ["Opened", "find_run_base", "open_run_model", "open_source", "rendering_for"]


@dataclass(frozen=True)
class Opened:
    """A scorer, and how rows become what it reads."""

    scorer: Scorer
    tokenizer: TextTokenizer
    rendering: Rendering


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
        rendering = rendering_for(config, rows, tokenizer, Rendering.from_dict(bundle.manifest["rendering"]))
        return Opened(load(bundle, threads=config.threads, adapter=config.adapter), tokenizer, rendering)

    torch = require("torch", "train")
    from edge_ft.base.scorer import TorchScorer

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if kind == "run":
        run = RunFolder.open(Path(source))
        tokenizer = TextTokenizer.load(run.tokenizer)
        rendering = rendering_for(config, rows, tokenizer, Rendering.from_dict(run.rendering()))
        model, base = open_run_model(run, adapter=config.adapter != "none")
        return Opened(TorchScorer(model, base.family, stop_ids(rendering, tokenizer)), tokenizer, rendering)

    from edge_ft.base.load import find_base, load_model

    if config.adapter is not None:
        raise UsageError("--adapter none is for runs and bundles: a plain model has no adapter")
    base = find_base(source, config.task)
    tokenizer = TextTokenizer.load(base.path)
    labels = base.labels
    rendering = rendering_for(config, rows, tokenizer, None, base.family.decoder, config.task, base.max_length, labels)
    model = load_model(base, rendering.task, config.base_format)
    return Opened(TorchScorer(model, base.family, stop_ids(rendering, tokenizer)), tokenizer, rendering)


def find_run_base(run: RunFolder) -> "Base":
    """The base that a run was trained over.

    Raises:
        ModelError: it is gone, or its content has changed.
    """
    from edge_ft.base.load import find_base

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
    labels = tuple(run.rendering()["labels"])
    model = load_model(base, task, identity["format"], identity["block_size"], labels, int(report["seed"]))
    if identity["codes_sha256"] is not None and codes_sha256(model) != identity["codes_sha256"]:
        raise ModelError(f"the 4-bit codes of {base.path} are not those that {run.path} was trained over: tune again")
    return (load_adapter(model, run.adapter) if adapter else model), base


def rendering_for(
    config: RowsConfig,
    rows: Sequence[Row],
    tokenizer: TextTokenizer,
    own: Rendering | None,
    decoder: bool = True,
    task: Task | None = None,
    max_length: int = 1024,
    labels: tuple[str, ...] = (),
) -> Rendering:
    """How `rows` are rendered: as `own` says where its columns are there and nothing else was asked for.

    Rows with other columns than the training rows had are mapped anew, with the template, labels and
    length of `own`.

    Raises:
        DataError: the rows have no columns that can be used.
    """
    names = column_names(rows)
    if own is not None:
        asked = any(
            value is not None for value in (config.prompt, config.completion, config.label, config.chat_template)
        )
        if not asked and own.columns.fits(names):
            return own
        columns = find_columns(names, config, own.task) if config.prompt or not own.columns.fits(names) else own.columns
        if config.chat_template is None:
            return replace(own, columns=columns)
        return make_rendering(config, columns, own.task, tokenizer, own.max_length, own.labels)
    task = task or guess_task(names, config, decoder)
    if task == "text-classification" and not labels:
        raise DataError("this model has no class names of its own: tune it first")
    limit = config.max_length or max_length
    return make_rendering(config, find_columns(names, config, task), task, tokenizer, limit, labels)
