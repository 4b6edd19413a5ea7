"""What a bundle that reads whole texts says of them, as plain values and as lines for people."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from edge_ft.data import Columns, Rendering, Row, record
from edge_ft.data.columns import fill_text
from edge_ft.errors import UsageError
from edge_ft.runtime.classify import TextClassifier
from edge_ft.runtime.embed import TextEmbedder
from edge_ft.runtime.fill_mask import MaskFiller
from edge_ft.runtime.tag import TextTagger

__all__ = ["Asked", "Reader", "ask", "asked_of", "asked_of_row", "lines_of", "ranked"]

Reader = TextClassifier | TextTagger | MaskFiller | TextEmbedder
"""An open bundle whose model reads a text at once."""
Asked = str | tuple[str, str] | Sequence[str]
"""A text; two of them for a model that was trained on pairs; the words of one to tag."""
SHOWN = 5
"""Classes that people are shown."""


def asked_of(opened: Reader, text: str, pair: str | None) -> Asked:
    """What is asked with a text that a person gave, in the model's own template where it has one column.

    Raises:
        UsageError: a second text that the model does not read, or none where it reads two.
    """
    columns = opened.rendering.columns
    if (pair is not None) != (columns.pair is not None):
        wants = "needs --text-pair" if pair is None else "reads one text: leave --text-pair out"
        raise UsageError(f"{opened.bundle.path} {wants}")
    if isinstance(opened, TextTagger | MaskFiller):
        return text
    first = fill_text(columns, text)
    return first if pair is None else (first, fill_text(Columns("template", columns.pair), pair))


def asked_of_row(row: Row, rendering: Rendering) -> Asked | None:
    """What is asked with a row that has the columns of the training rows; None where it has others."""
    if not rendering.columns.fits(list(row.fields), answer=False):
        return None
    found = record(row, rendering.columns, answer=False)
    if rendering.columns.kind == "tokens":
        return found.words
    return found.prompt if found.pair is None else (found.prompt, found.pair)


def ask(opened: Reader, asked: Sequence[Any], top_k: int = 0) -> list[dict[str, Any]]:
    """A JSON object for each of `asked`: `label` and `scores`, `tags` and `words`, `fills` and `text`, or `embedding`;
    and `prompt_tokens` and `cut`.

    Args:
        top_k: Tokens for each mask; 0 is 5.
    """
    if isinstance(opened, MaskFiller):
        return [asdict(found) for found in opened.fill(asked, top_k or SHOWN)]
    if isinstance(opened, TextEmbedder):
        read = opened.read(asked)
        return [
            {"embedding": vector.tolist(), "prompt_tokens": len(text.ids), "cut": text.cut}
            for vector, text in zip(opened.embed_framed(read), read, strict=True)
        ]
    if isinstance(opened, TextTagger):
        return [{"tags": found.tags, **asdict(found)} for found in opened.tag(asked)]
    return [asdict(found) for found in opened.classify(asked)]


def lines_of(opened: Reader, answer: dict[str, Any]) -> list[str]:
    """An answer of `ask` as a person reads it."""
    if isinstance(opened, TextTagger):
        return [
            f"{word['text']}\t{word['label'] or '-'}\t" + ("-" if word["score"] is None else f"{word['score']:.2%}")
            for word in answer["words"]
        ]
    if isinstance(opened, TextEmbedder):
        return [" ".join(f"{value:.6f}" for value in answer["embedding"])]
    if isinstance(opened, MaskFiller):
        ranks = [f"{fill['score']:7.2%}  {fill['token']}" for fills in answer["fills"] for fill in fills]
        return [*ranks, answer["text"]]
    scores: dict[str, float] = answer["scores"]
    if opened.problem == "regression":
        return [f"{score:.4g}  {label}" for label, score in scores.items()]
    marks = {label: "* " if label in answer["label"] else "  " for label in scores}
    if opened.problem == "single_label_classification":
        return ranked(scores)
    return ranked(scores, marks)


def ranked(scores: dict[str, float], marks: dict[str, str] | None = None) -> list[str]:
    """The likeliest few labels, each behind its probability and its mark."""
    best = sorted(scores.items(), key=lambda pair: -pair[1])[:SHOWN]
    return [f"{score:7.2%}  {(marks or {}).get(label, '')}{label}" for label, score in best]
