"""Run bundles, with onnxruntime, numpy and tokenizers alone."""

from pathlib import Path

from edge_ft.artifacts import Bundle
from edge_ft.errors import BundleError
from edge_ft.runtime.adapters import adapter_inputs
from edge_ft.runtime.cache import KVCache
from edge_ft.runtime.classify import Classification, TextClassifier
from edge_ft.runtime.decode import Generation, Timings
from edge_ft.runtime.embed import TextEmbedder
from edge_ft.runtime.fill_mask import Fill, FilledText, MaskFiller
from edge_ft.runtime.seq2seq import Seq2SeqGenerator
from edge_ft.runtime.session import open_session
from edge_ft.runtime.tag import TaggedText, TaggedWord, TextTagger
from edge_ft.runtime.text_generator import Conversation, TextGenerator

__all__ = [
    "Classification",
    "Conversation",
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
    adapter: str | None = None,
) -> TextGenerator | Seq2SeqGenerator | EncoderBundle:
    """Open a bundle for inference.

    Args:
        bundle: A bundle, or its folder; every file of a folder is hashed first.
        threads: CPU threads; by default `edge_ft.system.default_threads`.
        accuracy_level: 1 (exact) or 4 (activations in int8), if verification passed it; default the manifest's choice.
        adapter: "none" runs the base of an adapter-lane bundle, without its adapter.

    Returns:
        An object with the methods of the bundle's task: `generate`, `stream` and `chat`, `classify`, `tag`, `fill` or
        `embed`.

    Raises:
        BundleError: not a bundle, changed since it was written, or not runnable by this onnxruntime.
        UsageError: an adapter that the bundle does not have.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(Path(bundle))
    if bundle.task == "text2text-generation":
        sessions = [open_session(graph(accuracy_level), threads) for graph in (bundle.encoder_graph, bundle.graph)]
        return Seq2SeqGenerator(bundle, *((each, adapter_inputs(bundle, each, adapter)) for each in sessions))
    if bundle.task not in _ONE_GRAPH:
        raise BundleError(f"{bundle.path} is for the task {bundle.task}, which this release cannot run: update edge-ft")
    session = open_session(bundle.graph(accuracy_level), threads)
    return _ONE_GRAPH[bundle.task](bundle, session, adapter_inputs(bundle, session, adapter))
