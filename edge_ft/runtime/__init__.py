"""Run bundles, with onnxruntime, numpy and tokenizers alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from edge_ft.artifacts import Bundle
from edge_ft.errors import BundleError
from edge_ft.runtime.adapters import Bound, Values, adapter_inputs, bind
from edge_ft.runtime.cache import KVCache
from edge_ft.runtime.classify import Classification, TextClassifier
from edge_ft.runtime.conversation import Conversation
from edge_ft.runtime.decode import Generation, Timings
from edge_ft.runtime.embed import TextEmbedder
from edge_ft.runtime.engine import choose, fixed_engine
from edge_ft.runtime.fill_mask import Fill, FilledText, MaskFiller
from edge_ft.runtime.seq2seq import Seq2SeqGenerator
from edge_ft.runtime.session import open_session
from edge_ft.runtime.tag import TaggedText, TaggedWord, TextTagger
from edge_ft.runtime.text_generator import TextGenerator
from edge_ft.runtime.trials import Trial, measure_ways
from edge_ft.runtime.ways import Engine, Way

__all__ = [
    "Classification",
    "Conversation",
    "Engine",
    "Fill",
    "FilledText",
    "Generation",
    "KVCache",
    "MaskFiller",
    "Seq2SeqGenerator",
    "TaggedText",
    "TaggedWord",
    "TextClassifier",
    "TextEmbedder",
    "TextGenerator",
    "TextTagger",
    "Timings",
    "Way",
    "load",
]

EncoderBundle = TextClassifier | TextTagger | MaskFiller | TextEmbedder
"""An open bundle whose model reads a text at once."""
_ONE_GRAPH: dict[str, type[TextGenerator | EncoderBundle]] = {
    "text-generation": TextGenerator,
    "text-classification": TextClassifier,
    "token-classification": TextTagger,
    "fill-mask": MaskFiller,
    "feature-extraction": TextEmbedder,
}
"""The class of an open bundle, for each task whose bundles have one graph."""


def load(
    bundle: Bundle | Path | str,
    *,
    threads: int | None = None,
    accuracy_level: int | None = None,
    adapter: str | Path | Values | None = None,
    engine: Literal["auto", "exact"] = "auto",
) -> TextGenerator | Seq2SeqGenerator | EncoderBundle:
    """Open a bundle for inference.

    Args:
        bundle: A bundle, or its folder; every file of a folder is hashed first.
        threads: CPU threads; default those that are fastest, at most `edge_ft.system.default_threads`.
        accuracy_level: 1 (exact) or 4 (activations in int8), if verification passed it; default as `engine` says.
        adapter: What it answers with: None is the bundle's own adapter, "none" the base without an adapter; else the
            name of an adapter in the bundle, or a folder: a run, or an adapter in PEFT's format; or the values of the
            LoRA inputs, `lora_A.LAYER` and `lora_B.LAYER`, B with its scaling. Of a folder and of values only the
            manifest's model runs, since nothing has verified the other graphs with it.
        engine: "auto": the fastest verified graphs here, measured for about two seconds at the first open and
            remembered in the user's cache; "exact": the manifest's model.

    Returns:
        An object with the methods of the bundle's task: `generate`, `stream` and `chat`, `classify`, `tag`, `fill` or
        `embed`. Its `engine` says how it runs.

    Raises:
        BundleError: not a bundle, changed since it was written, or not runnable by this onnxruntime.
        UsageError: an adapter that the bundle does not have.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(Path(bundle))
    if bundle.task not in ("text2text-generation", *_ONE_GRAPH):
        raise BundleError(f"{bundle.path} is for the task {bundle.task}, which this release cannot run: update edge-ft")
    bound = bind(bundle, adapter)
    if engine == "exact" or accuracy_level is not None or bound.values:
        return _open(bound, fixed_engine(bound.bundle, accuracy_level, threads), accuracy_level)

    def measure(ways: Sequence[Way], together: bool) -> list[Trial]:
        own = Bound(bundle)
        return measure_ways(ways, together, lambda way: _open(own, Engine(way, way), way.accuracy_level))

    opened = _open(bound, choose(bundle, threads, measure), None)
    if isinstance(opened, TextGenerator):
        opened.exact = False
    return opened


def _open(bound: Bound, engine: Engine, accuracy_level: int | None) -> TextGenerator | Seq2SeqGenerator | EncoderBundle:
    """Open the graphs of an engine; `accuracy_level` is the one that was asked for, if one was.

    Returns:
        The open bundle.

    Raises:
        BundleError: the bundle lacks a graph, or this onnxruntime cannot run it.
        UsageError: an adapter that the bundle does not have.
    """
    bundle = bound.bundle
    exact = fixed_engine(bundle, None, None).prefill.accuracy_level

    def level(way: Way) -> int | None:
        return None if accuracy_level is None and way.accuracy_level == exact else way.accuracy_level

    if bundle.task == "text2text-generation":
        parts = ((bundle.encoder_graph, engine.prefill), (bundle.graph, engine.decode))
        sessions = [open_session(graph(level(way)), way.threads) for graph, way in parts]
        opened: TextGenerator | Seq2SeqGenerator | EncoderBundle = Seq2SeqGenerator(
            bundle, *zip(sessions, adapter_inputs(sessions, bound), strict=True)
        )
    else:
        session = open_session(bundle.graph(level(engine.decode)), engine.decode.threads)
        (inputs,) = adapter_inputs([session], bound)
        opened = _ONE_GRAPH[bundle.task](bundle, session, inputs)
        if isinstance(opened, TextGenerator) and engine.prefill != engine.decode:
            opened.prefill = open_session(bundle.graph(level(engine.prefill)), engine.prefill.threads)
    opened.engine = engine
    return opened
