"""Writes the real rows of the tutorials, and prints the path of a model for them."""

from pathlib import Path
from typing import Literal

from edge_ft.bench.studies.datasets import (
    decoder_weights,
    department_rows,
    encoder_weights,
    support_rows,
    transcript_rows,
    write_splits,
)

__all__ = ["main"]

KINDS = {
    "support": (support_rows, decoder_weights),
    "transcripts": (transcript_rows, decoder_weights),
    "departments": (department_rows, encoder_weights),
}


def main(
    kind: Literal["support", "transcripts", "departments"],
    *,
    out: Path = Path("rows"),
    train: int = 380,
    validation: int = 40,
    test: int = 60,
) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl; stdout gets the path of the model alone.

    Args:
        kind: support and transcripts are for a decoder, departments for an encoder.
        out: Folder of the files.
        train: Rows to train on.
        validation: Rows that choose the best weights.
        test: Rows that are scored once.
    """
    rows, weights = KINDS[kind]
    model = weights()
    write_splits(rows(), out, train=train, validation=validation, test=test)
    print(model)
