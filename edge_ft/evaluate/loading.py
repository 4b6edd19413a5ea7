"""Open a RUN, a BUNDLE or a MODEL as a scorer, with torch or ONNX Runtime behind it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ft.artifacts import Bundle, RunFolder, kind_of
from edge_ft.config import EvalConfig
from edge_ft.data import Rendering, Row, TextTokenizer, plain_rendering, stop_ids, trained_rendering
from edge_ft.errors import ModelError, UsageError
from edge_ft.evaluate.scoring import Scorer
from edge_ft.progress import Progress, Silent, heartbeat
from edge_ft.system import use_threads

if TYPE_CHECKING:
    from edge_ft.models.base_model import Base

__all__ = ["LoadedSource", "find_run_base", "open_run_model", "open_source", "torch_source"]


@dataclass(frozen=True)
class LoadedSource:
    """A scorer, and how rows become what it reads."""

    scorer: Scorer
    tokenizer: TextTokenizer
    rendering: Rendering
    model_limit: int
    """Number of positions of the model."""


def open_source(source: str, config: EvalConfig, rows: Sequence[Row], progress: Progress | None = None) -> LoadedSource:
    """Open a run folder, a bundle or a plain model.

    Args:
        source: Folder of a run or bundle, or a model as `find_base` takes it.
        config: The user's settings: a run or bundle renders rows as in its training unless they differ.
        rows: Rows to score, whose columns decide how they are rendered.
        progress: Receives what is loaded; None is silent.

    Returns:
        The scorer: ONNX Runtime for a bundle and a run over one, else torch on the GPU if there is one.

    Raises:
        UsageError: an option does not fit the source.
        BundleError: the bundle cannot be opened.
        ModelError: the model cannot be opened.
        DataError: the rows do not fit the source.
    """
    progress, kind = progress or Silent(), kind_of(source)
    if kind == "bundle":
        with heartbeat(progress, f"opening {source}"):
            return _open_bundle(Path(source), config, rows)
    run = RunFolder.open(Path(source)) if kind == "run" else None
    if run is not None and config.adapter not in (None, "none"):
        raise UsageError(f"--adapter {config.adapter} is for bundles: of a run only none is another choice")
    if run is not None and (bundle := run.bundle) is not None:
        with heartbeat(progress, f"opening {bundle}"):
            _check_bundle(bundle, run)
            return _open_bundle(bundle, replace(config, adapter=config.adapter or str(run.path)), rows, run.rendering())
    if config.accuracy_level is not None:
        raise UsageError("--accuracy-level is for bundles: runs and models have no such levels, leave it out")
    from edge_ft.models.libraries import import_libraries

    torch = import_libraries(progress)
    use_threads(config.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with heartbeat(progress, f"loading {source}"):
        from edge_ft.models.base_model import find_base
        from edge_ft.models.loading import ModelSpec, load_model
        from edge_ft.quant.devices import to_device

        if run is not None:
            base = find_run_base(run, progress)
            tokenizer = TextTokenizer.load(run.tokenizer, base.known_ids)
            own = Rendering.from_dict(run.rendering())
            rendering = trained_rendering(own, config, rows, tokenizer, base.max_length)
            model, _ = open_run_model(run, config.adapter is None, base)
        elif config.adapter is not None:
            raise UsageError(
                f"--adapter {config.adapter} is for runs and bundles: score the adapter's run, leave it out"
            )
        else:
            base = find_base(source, config.task, progress)
            tokenizer = base.open_tokenizer()
            rendering = plain_rendering(base, config, rows, tokenizer, config.task)
            model = load_model(ModelSpec(base, rendering.task, config.base_format), progress)
        return torch_source(to_device(model, device), rendering, tokenizer, base.max_length)


def torch_source(model: Any, rendering: Rendering, tokenizer: TextTokenizer, model_limit: int) -> LoadedSource:
    """Return a torch model, with its adapter if it has one, as a scorer of rows of this rendering.

    Args:
        model: Task model, on the device where it scores.
        rendering: How rows are rendered; it replaces the problem type and pooling of the model's own config.
        tokenizer: Tokenizer of the model.
        model_limit: Number of positions of the model.
    """
    from edge_ft.models.scorer import TorchScorer, task_model_of

    settings = task_model_of(model).config
    if rendering.problem_type is not None:
        settings.problem_type = rendering.problem_type  # absent from the config of some checkpoints
    if rendering.pooling is not None:
        settings.pooling = rendering.pooling
    return LoadedSource(
        TorchScorer(model, rendering.task, stop_ids(rendering, tokenizer)), tokenizer, rendering, model_limit
    )


def _check_bundle(path: Path, run: RunFolder) -> None:
    """Check that a bundle is the one that a run was trained over.

    Raises:
        ModelError: it is gone, or its weights are others.
    """
    if not path.is_dir():
        raise ModelError(
            f"the bundle {path} is gone, over which {run.path} was trained: edge-ft eval BUNDLE --adapter {run.path} "
            "scores it on a copy"
        )
    if Bundle.open(path).weights_sha256() != run.base()["content_sha256"]:
        raise ModelError(
            f"the bundle {path} is not the one that {run.path} was trained over, its weights have changed: restore it, "
            "or tune again"
        )


def _open_bundle(
    path: Path, config: EvalConfig, rows: Sequence[Row], rendering: dict[str, Any] | None = None
) -> LoadedSource:
    from edge_ft.runtime import load
    from edge_ft.runtime.adapters import bind

    bundle = Bundle.open(path)
    tokenizer, limit = TextTokenizer.of_bundle(path), bundle.max_length
    own = Rendering.from_dict(rendering or bind(bundle, config.adapter).bundle.manifest["rendering"])
    given = trained_rendering(own, config, rows, tokenizer, limit)
    return LoadedSource(
        load(
            bundle,
            threads=config.threads,
            accuracy_level=config.accuracy_level,
            adapter=config.adapter,
            engine="exact",  # scores are of the graph that was verified against torch, on every machine
        ),
        tokenizer,
        given,
        limit,
    )


def find_run_base(run: RunFolder, progress: Progress | None = None) -> "Base":
    """Return the base model that a run was trained on.

    Args:
        run: The run.
        progress: Receives what could not be checked, and the state of a conversion; None is silent.

    Returns:
        The base.

    Raises:
        ModelError: the base is gone, its content has changed, or it is an incomplete conversion of a GGUF file.
        UsageError: it was trained over a bundle.
    """
    run.refuse_over_bundle()
    from edge_ft.models.base_model import find_base
    from edge_ft.models.gguf_first import check_first_conversion, is_first_conversion

    identity = run.base()
    where = identity["path"] if Path(identity["path"]).is_dir() else identity["model"]
    if is_first_conversion(Path(identity["path"])):
        check_first_conversion(Path(identity["path"]), identity["model"], progress)
    base = find_base(where, None, progress)
    if run.vocabulary.is_file() and where != identity["path"]:
        base = _cut_again(run, base, progress)
    base = base.as_recorded(identity)
    if base.content_sha256 != identity["content_sha256"]:
        raise ModelError(
            f"the base at {where} is not the one that {run.path} was trained on, its content has changed: "
            "restore it, or tune again"
        )
    names = tuple(identity.get("class_names") or ())
    if names and len(names) == len(base.labels(run.rendering()["task"])):
        base = base.with_class_names(names)
    return replace(base, name=identity["model"])


def _cut_again(run: RunFolder, whole: "Base", progress: Progress | None) -> "Base":
    """Return the base of a run over fewer tokens, cut as in the training, where the one of the training is gone.

    Raises:
        ModelError: the whole model is not the one that it was cut from.
    """
    from edge_ft.models.vocabulary import Vocabulary, cut_base

    vocabulary = Vocabulary.read(run.vocabulary)
    if whole.content_sha256 != vocabulary.content_sha256:
        raise ModelError(
            f"{run.path} was trained over a part of the vocabulary of {whole.name}, whose content has changed since: "
            "restore it, or tune again"
        )
    return cut_base(whole, vocabulary, run.rendering()["task"], progress)


def open_run_model(run: RunFolder, adapter: bool = True, base: "Base | None" = None) -> "tuple[Any, Base]":
    """Load the torch model of a run on the CPU, over the 4-bit codes it was trained on.

    Args:
        run: The run folder.
        adapter: Whether to put the run's adapter on the base.
        base: What `find_run_base` returned, which reads all weights; default it is called.

    Returns:
        The model, frozen, and its base.

    Raises:
        ModelError: the base is gone or has changed, or is rounded to other codes than in the training.
    """
    from edge_ft.models.adapted import load_adapter
    from edge_ft.models.loading import ModelSpec, load_model
    from edge_ft.quant.blockwise import Grid
    from edge_ft.quant.serialization import codes_sha256

    identity = run.base()
    base = base or find_run_base(run)
    rendering, seed = Rendering.from_dict(run.rendering()), int(run.report()["seed"])
    codes = run.codes if run.codes.is_file() else None
    if codes is None and identity["format"] == "int4" and identity.get("calibration_rows"):
        raise ModelError(f"{run.codes} is missing, which holds the int4 codes of the training: tune again")
    model = load_model(
        ModelSpec.from_rendering(base, rendering, identity["format"], Grid.recorded(identity), seed, codes)
    )
    if identity["codes_sha256"] is not None and codes_sha256(model) != identity["codes_sha256"]:
        raise ModelError(
            f"the {identity['format']} codes of {base.path} are not those that {run.path} was trained on: tune again"
        )
    return (load_adapter(model, run.adapter) if adapter else model), base
