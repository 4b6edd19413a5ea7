"""Whether the text that answers are compared with is the text that is trained."""

from collections.abc import Sequence

from edge_ft.config import TEXT_TASKS
from edge_ft.data.audit import Finding, format_rows, shorten
from edge_ft.data.batches import IGNORED, Example
from edge_ft.data.rendering import Rendering
from edge_ft.data.special_ids import stop_ids
from edge_ft.data.tokenizer import TextTokenizer

__all__ = ["answer_tokens", "untrained_references"]


def answer_tokens(example: Example) -> list[int]:
    """Return the token ids of the last completion that carry loss, with the one that ends it."""
    start = 0 if example.separate_target else example.prompt_length
    return [int(label) for label in example.labels[start:] if label != IGNORED]


def untrained_references(examples: Sequence[Example], rendering: Rendering, tokenizer: TextTokenizer) -> list[Finding]:
    """Return a finding about the rows whose reference is not what is trained, if there are any.

    A chat template can add to an answer or leave parts of it out. Spaces do not count, and neither do special tokens.
    Rows that are cut are left out: they are a finding of their own.
    """
    if rendering.task not in TEXT_TASKS:
        return []
    ends = stop_ids(rendering, tokenizer)
    found: list[int] = []
    example = ""
    for one in examples:
        ids = answer_tokens(one)
        while ids and ids[-1] in ends:
            ids.pop()
        trained = tokenizer.decode(ids)
        if (
            one.targets
            and not one.cut
            and _letters(trained) != _letters(tokenizer.decode(tokenizer.encode(one.reference)))
        ):
            example = example or shorten(f"compared with {one.reference!r}, trained {trained.strip()!r}")
            found.append(one.row)
    if not found:
        return []
    message = (
        f"{len(found)} of {len(examples)} rows are compared with another answer than the one that is trained "
        f"({format_rows(found)}): the chat template adds to answers, or leaves parts of them out"
    )
    return [Finding("untrained-reference", "warning", found, message, example)]


def _letters(text: str) -> str:
    return "".join(text.split())
