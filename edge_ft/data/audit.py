"""What the rows would do to training, said before it starts, with row numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edge_ft.data.render import IGNORED, Example

__all__ = ["Finding", "audit"]


@dataclass(frozen=True)
class Finding:
    """Something about the data that the user should know."""

    code: str
    """nothing-to-learn, truncated, empty-completion, unlearned-turns or one-class."""
    severity: Literal["error", "warning"]
    """error: training on these rows makes no sense, the caller refuses."""
    rows: list[int]
    """Numbers of all rows it holds for."""
    message: str


def audit(examples: Sequence[Example], max_length: int) -> list[Finding]:
    """Findings over encoded rows of one split; an empty list is good news."""
    findings = []

    def find(code: str, found: list[Example], message: str, refuse: bool = False) -> None:
        if found:
            rows = [example.row for example in found]
            named = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            text = f"{len(rows)} of {len(examples)} rows {message} (rows {named})"
            findings.append(Finding(code, "error" if refuse else "warning", rows, text))

    untrained = [example for example in examples if all(label == IGNORED for label in example.labels)]
    find(
        "nothing-to-learn",
        untrained,
        f"have no token to learn within {max_length} tokens",
        refuse=len(untrained) == len(examples),
    )
    cut = [example for example in examples if example.cut]
    lost = sum(example.cut for example in cut)
    find("truncated", cut, f"are longer than {max_length} tokens and lose {lost} tokens at their end")
    find("empty-completion", [example for example in examples if not example.reference], "have an empty answer")
    find(
        "unlearned-turns",
        [example for example in examples if example.unlearned_turns],
        "have assistant turns without loss, since the chat template would write them differently at run time",
    )
    classes = {example.reference for example in examples}
    # A class index alone is what tells an example of text-classification.
    if len(classes) == 1 and all(len(example.labels) == 1 < len(example.input_ids) for example in examples):
        find(
            "one-class",
            list(examples),
            f"are of the one class {classes.pop()!r}: there is nothing to tell apart",
            True,
        )
    return findings
