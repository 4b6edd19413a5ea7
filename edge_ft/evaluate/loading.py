"""The one place that turns a RUN, a BUNDLE or a MODEL into something that can be scored."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ft.artifacts import Bundle, RunFolder, kind_of
from edge_ft.config import EvalConfig
from edge_ft.data import (
    Rendering,
    Row,
    TextTokenizer,
    column_names,
    guess_task,
    rendering_for,
    stop_ids,
    with_pooling,
)
from edge_ft.errors import ModelError, UsageError, require
from edge_ft.evaluate.scoring import Scorer
from edge_ft.system import use_threads

if TYPE_CHECKING:
    from edge_ft.models.base_model import Base

__all__ = ["LoadedSource", "find_run_base", "open_run_model", "open_source"]


@dataclass(frozen=True)
class LoadedSource:
    """A scorer, and how rows become what it reads."""

    scorer: Scorer
    tokenizer: TextTokenizer
    rendering: Rendering
    model_limit: int
    """Positions that the model has."""


def open_source(source: str, config: EvalConfig, rows: Sequence[Row]) -> LoadedSource:
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
        return LoadedSource(scorer, tokenizer, rendering, limit)

    if config.accuracy_level is not None:
        raise UsageError("--accuracy-level is for bundles: runs and models have one graph")
    torch = require("torch", "train")
    from edge_ft.models.scorer import TorchScorer
    from edge_ft.quant.layers import move

    use_threads(config.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "run":
        run = RunFolder.open(Path(source))
        tokenizer = TextTokenizer.load(run.tokenizer)
        limit = find_run_base(run).max_length
        own = Rendering.from_dict(run.rendering())
        rendering = rendering_for(config, rows, tokenizer, own, model_limit=limit)
        run_model, _ = open_run_model(run, adapter=config.adapter != "none")
        scorer = TorchScorer(move(run_model, device), rendering.task, stop_ids(rendering, tokenizer))
        return LoadedSource(scorer, tokenizer, rendering, limit)

    from edge_ft.models.base_model import find_base
    from edge_ft.models.loading import ModelSpec, load_model

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
    rendering = with_pooling(rendering, base, config.pooling)
    task_model: Any = move(
        load_model(ModelSpec(base, rendering.task, config.base_format, pooling=rendering.pooling)), device
    )
    if rendering.problem_type is not None:
        task_model.config.problem_type = rendering.problem_type  # some checkpoints leave it to be guessed
    scorer = TorchScorer(task_model, rendering.task, stop_ids(rendering, tokenizer))
    return LoadedSource(scorer, tokenizer, rendering, base.max_length)


def find_run_base(run: RunFolder) -> "Base":
    """The base that a run was trained over.

    Raises:
        ModelError: it is gone, or its content has changed.
    """
    from edge_ft.models.base_model import find_base

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
    from edge_ft.models.loading import ModelSpec, load_model
    from edge_ft.models.lora import load_adapter
    from edge_ft.quant.layers import codes_sha256

    identity = run.base()
    base = find_run_base(run)
    rendering, seed = Rendering.from_dict(run.rendering()), int(run.report()["seed"])
    codes = run.codes if run.codes.is_file() else None
    if codes is None and identity["format"] == "int4" and identity.get("calibration_rows"):
        raise ModelError(f"{run.codes} is missing, which holds the int4 codes that were trained over: tune again")
    model = load_model(
        ModelSpec.from_rendering(base, rendering, identity["format"], identity["block_size"], seed, codes)
    )
    if identity["codes_sha256"] is not None and codes_sha256(model) != identity["codes_sha256"]:
        raise ModelError(
            f"the {identity['format']} codes of {base.path} are not those that {run.path} was trained over: tune again"
        )
    return (load_adapter(model, run.adapter) if adapter else model), base
