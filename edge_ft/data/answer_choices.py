"""Decoder rows with few different answers: the model can choose among them instead of generating one."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from edge_ft.data.columns import Columns
from edge_ft.data.encoding import encode_example
from edge_ft.data.example import IGNORED
from edge_ft.data.readers import Row
from edge_ft.data.records import Record, answer_of, fill_answer
from edge_ft.data.rendering import Rendering
from edge_ft.data.tokenizer import TextTokenizer

__all__ = ["answer_ids", "find_answers"]

MAX_ANSWERS, MAX_TOKENS, MIN_ROWS = 64, 16, 4
"""Most different answers, longest answer in tokens, and fewest rows per answer on average."""


def find_answers(
    rows: Sequence[Row], columns: Columns, rendering: Rendering, tokenizer: TextTokenizer
) -> tuple[str, ...]:
    """Return the different answers of `rows` in alphabetical order, as `answer_of` returns them.

    Empty unless there are 2 to `MAX_ANSWERS`, each of at most `MAX_TOKENS` tokens and with `MIN_ROWS` rows on average.
    """
    found: set[str] = set()
    for row in rows:
        answer = answer_of(row, columns)
        if answer is not None:
            found.add(answer)
        if len(found) > min(MAX_ANSWERS, len(rows) // MIN_ROWS):
            return ()
    short = all(len(answer_ids(rendering, tokenizer, answer)) <= MAX_TOKENS for answer in found)
    return tuple(sorted(found)) if len(found) > 1 and short else ()


def answer_ids(rendering: Rendering, tokenizer: TextTokenizer, answer: str) -> list[int]:
    """Return the token ids that carry the loss of a row with this answer, including the one that ends it."""
    record = Record(0, None, "x", fill_answer(rendering.columns, answer), None)
    example = encode_example(replace(rendering, max_length=sys.maxsize), tokenizer, record)
    return [int(label) for label in example.labels[example.prompt_length :] if label != IGNORED]
