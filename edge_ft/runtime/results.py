"""Results of encoder bundles, as plain values and as lines for people."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from edge_ft.data import Columns, Rendering, Row, fill_text, record
from edge_ft.errors import UsageError
from edge_ft.runtime.classify import TextClassifier
from edge_ft.runtime.embed import TextEmbedder
from edge_ft.runtime.fill_mask import MaskFiller
from edge_ft.runtime.tag import TextTagger

__all__ = [
    "EncoderBundle",
    "EncoderInput",
    "format_result",
    "format_scores",
    "input_of_row",
    "input_of_text",
    "predict",
]

EncoderBundle = TextClassifier | TextTagger | MaskFiller | TextEmbedder
"""An open bundle whose model reads a text at once."""
EncoderInput = str | tuple[str, str] | Sequence[str]
"""A text; two texts for a model that was trained on pairs; the words of a text to tag."""
DEFAULT_TOP_K = 5
"""Classes that are shown, and candidates for a mask."""


def input_of_text(opened: EncoderBundle, text: str, pair: str | None) -> EncoderInput:
    """Turn a text, and a second one, into the model's input; a template of one column is applied.

    Args:
        opened: The bundle.
        text: The first text.
        pair: The second text, for a model that was trained on pairs.

    Returns:
        What `predict` takes.

    Raises:
        UsageError: a second text for a model that reads one, or none for a model that reads two.
    """
    columns = opened.rendering.columns
    if (pair is not None) != (columns.pair is not None):
        fix = "reads two texts: give --text-pair" if pair is None else "reads one text: leave --text-pair out"
        raise UsageError(f"{opened.bundle.path} {fix}")
    if isinstance(opened, TextTagger | MaskFiller):
        return text
    first = fill_text(columns, text)
    return first if pair is None else (first, fill_text(Columns("template", columns.pair), pair))


def input_of_row(row: Row, rendering: Rendering) -> EncoderInput | None:
    """Turn a row with the columns of the training rows into the model's input.

    Args:
        row: A row, with or without its label.
        rendering: The bundle's.

    Returns:
        What `predict` takes; None for a row with other columns.
    """
    if not rendering.columns.fits(list(row.fields), answer=False):
        return None
    found = record(row, rendering.columns, answer=False)
    if rendering.columns.kind == "tokens":
        return found.words
    return found.prompt if found.pair is None else (found.prompt, found.pair)


def predict(opened: EncoderBundle, inputs: Sequence[Any], top_k: int = 0) -> list[dict[str, Any]]:
    """Run a bundle on inputs of `input_of_text` or `input_of_row`.

    Args:
        opened: The bundle.
        inputs: Its inputs.
        top_k: Candidates for each mask; 0 is 5.

    Returns:
        A JSON object for each input: `label` and `scores`, `tags` and `words`, `fills` and `text`, or `embedding`; and
        `prompt_tokens` and `cut`.
    """
    if isinstance(opened, MaskFiller):
        return [asdict(found) for found in opened.fill(inputs, top_k or DEFAULT_TOP_K)]
    if isinstance(opened, TextEmbedder):
        texts = opened.tokenize(inputs)
        return [
            {"embedding": vector.tolist(), "prompt_tokens": len(text.ids), "cut": text.cut}
            for vector, text in zip(opened.embed_tokenized(texts), texts, strict=True)
        ]
    if isinstance(opened, TextTagger):
        return [{"tags": found.tags, **asdict(found)} for found in opened.tag(inputs)]
    return [asdict(found) for found in opened.classify(inputs)]


def format_result(opened: EncoderBundle, result: dict[str, Any]) -> list[str]:
    """Return a result of `predict` as lines for people."""
    if isinstance(opened, TextTagger):
        return [
            f"{word['text']}\t{word['label'] or '-'}\t" + ("-" if word["score"] is None else f"{word['score']:.2%}")
            for word in result["words"]
        ]
    if isinstance(opened, TextEmbedder):
        return [" ".join(f"{value:.6f}" for value in result["embedding"])]
    if isinstance(opened, MaskFiller):
        candidates = [f"{fill['score']:7.2%}  {fill['token']}" for fills in result["fills"] for fill in fills]
        return [*candidates, result["text"]]
    scores: dict[str, float] = result["scores"]
    if opened.problem == "regression":
        return [f"{score:.4g}  {label}" for label, score in scores.items()]
    if opened.problem == "single_label_classification":
        return format_scores(scores)
    return format_scores(scores, {label: "* " if label in result["label"] else "  " for label in scores})


def format_scores(scores: dict[str, float], marks: dict[str, str] | None = None) -> list[str]:
    """Return a line for each of the likeliest labels: its probability, its mark and its name."""
    best = sorted(scores.items(), key=lambda pair: -pair[1])[:DEFAULT_TOP_K]
    return [f"{score:7.2%}  {(marks or {}).get(label, '')}{label}" for label, score in best]
