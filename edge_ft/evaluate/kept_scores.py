"""Scores of rows that a run keeps, so that its export does not compute them again."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edge_ft.data import Example
from edge_ft.evaluate.scoring import RowScores, row_scores
from edge_ft.files import atomic_file

__all__ = ["find_scores", "write_scores"]


def write_scores(file: Path, examples: Sequence[Example], scores: Mapping[str, RowScores]) -> None:
    """Write scores in float32 of the same rows, atomically.

    Args:
        file: A safetensors file.
        examples: The rows as they were encoded.
        scores: By the model's name, its scores of them, without vectors.
    """
    arrays: dict[str, NDArray[Any]] = {"rows": np.stack([_digest(example) for example in examples])}
    for name, found in scores.items():
        arrays |= {f"{name}.{field}": values for field, values in found.to_arrays().items()}
    with atomic_file(file) as temporary:
        save_file(arrays, temporary)


def find_scores(file: Path, name: str, examples: Sequence[Example]) -> RowScores | None:
    """Find the scores of rows that are encoded as those of `write_scores`.

    Args:
        file: As for `write_scores`.
        name: Of the model.
        examples: The rows.

    Returns:
        Their scores; None where those of one are not there, or the file is not as `write_scores` writes it.
    """
    try:
        arrays = load_file(file)
        fields = ("nll", "tokens", "correct", "predicted")
        scored = RowScores.from_arrays({field: arrays[f"{name}.{field}"] for field in fields}).rows
        rows = dict(zip((row.tobytes() for row in arrays["rows"]), scored, strict=True))
        return row_scores([rows[_digest(example).tobytes()] for example in examples])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _digest(example: Example) -> NDArray[np.uint8]:
    """Return a hash of what a row's scores depend on, uint8 [16]."""
    return np.frombuffer(sha256(example.content).digest()[:16], np.uint8)
