"""Rows for people, as the model reads them: what is trained stands between ⟦ and ⟧."""

from edge_ft.data.batches import IGNORED, Example
from edge_ft.data.rendering import Rendering
from edge_ft.data.tokenizer import TextTokenizer

__all__ = ["show_example"]


def show_example(example: Example, rendering: Rendering, tokenizer: TextTokenizer) -> str:
    """Return a heading with the numbers of tokens, and below it the text with the trained parts marked.

    Args:
        example: A row in token ids.
        rendering: How it was encoded.
        tokenizer: With which it was.
    """
    ids = example.input_ids
    if rendering.task == "text2text-generation":
        labels = [int(label) for label in example.labels]
        source, target = (tokenizer.decode(part, skip_special_tokens=False) for part in (ids, labels))
        return f"row {example.row}: {len(ids)} tokens read, {example.targets} trained\n{source} → ⟦{target}⟧"
    if rendering.task in ("text-classification", "feature-extraction"):
        text, paired = (tokenizer.decode(part, skip_special_tokens=False) for part in (ids, example.pair_ids))
        what = f"{example.targets} label{'s' if example.targets > 1 else ''}" if not paired else "the second text"
        read = len(ids) + len(example.pair_ids)
        return f"row {example.row}: {read} tokens read, {what} trained\n{text} → ⟦{paired or example.reference}⟧"
    if rendering.task == "token-classification":
        return _show_tags(example, rendering, tokenizer)
    if rendering.task == "fill-mask":
        # Show the trained tokens instead of the masks that the model reads.
        ids = [token if label == IGNORED else int(label) for token, label in zip(ids, example.labels, strict=True)]
    edges = [at for at in range(1, len(ids)) if (example.labels[at] == IGNORED) != (example.labels[at - 1] == IGNORED)]
    text, before = "", ""
    for start, stop in zip([0, *edges], [*edges, len(ids)], strict=True):
        # Parts are cut from the whole text: at the start of a text a tokenizer may decode a token differently.
        whole = tokenizer.decode(ids[:stop], skip_special_tokens=False)
        part, before = whole[len(before) :], whole
        text += part if example.labels[start] == IGNORED else f"⟦{part}⟧"
    return f"row {example.row}: {len(ids)} tokens read, {example.targets} of them trained\n{text}"


def _show_tags(example: Example, rendering: Rendering, tokenizer: TextTokenizer) -> str:
    """The tokens, each first token of a word with its tag behind it."""
    parts = [
        tokenizer.decode([token], skip_special_tokens=False)
        + ("" if label == IGNORED else f"⟦{rendering.labels[int(label)]}⟧")
        for token, label in zip(example.input_ids, example.labels, strict=True)
    ]
    return f"row {example.row}: {len(parts)} tokens read, {example.targets} tags trained\n{' '.join(parts)}"
