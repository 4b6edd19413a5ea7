"""Rows whose answers are few different ones: a decoder can choose among them instead of writing."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from edge_ft.data.columns import Columns, Record, answer_of, fill_answer
from edge_ft.data.encoding import encode_example
from edge_ft.data.example import IGNORED
from edge_ft.data.readers import Row
from edge_ft.data.rendering import Rendering
from edge_ft.data.tokenizer import TextTokenizer

__all__ = ["answer_ids", "find_answers"]

MOST, LONGEST, ROWS_EACH = 64, 16, 4
"""Different answers, tokens of one, and rows that each has on average: beyond these, answers are no classes."""


def find_answers(
    rows: Sequence[Row], columns: Columns, rendering: Rendering, tokenizer: TextTokenizer
) -> tuple[str, ...]:
    """The different answers of `rows` in the order of the alphabet, as `answer_of` gives them.

    Empty unless there are 2 to `MOST`, each of at most `LONGEST` tokens and with `ROWS_EACH` rows on average.
    """
    found: set[str] = set()
    for row in rows:
        answer = answer_of(row, columns)
        if answer is not None:
            found.add(answer)
        if len(found) > min(MOST, len(rows) // ROWS_EACH):
            return ()
    short = all(len(answer_ids(rendering, tokenizer, answer)) <= LONGEST for answer in found)
    return tuple(sorted(found)) if len(found) > 1 and short else ()


def answer_ids(rendering: Rendering, tokenizer: TextTokenizer, answer: str) -> list[int]:
    """The tokens that carry the loss of a row with this answer, the one that ends it included."""
    record = Record(0, None, "x", fill_answer(rendering.columns, answer), None)
    example = encode_example(replace(rendering, max_length=sys.maxsize), tokenizer, record)
    return [int(label) for label in example.labels[example.prompt_length :] if label != IGNORED]
