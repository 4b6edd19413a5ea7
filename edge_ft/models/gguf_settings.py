"""Values in the header of a GGUF file, checked when they are read."""

import math
from typing import Any

import numpy as np

from edge_ft.errors import ModelError
from edge_ft.models.gguf_header import GgufHeader

__all__ = ["Settings"]

LARGEST = 2**31 - 1


class Settings:
    """Values of a header that must be there, or have a type."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive whole number; an array of equal ones counts as one.

        Raises:
            ModelError: it is missing, or another value.
        """
        value = self._single(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST:
            raise self.wrong(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number.

        Raises:
            ModelError: it is missing, or another value.
        """
        value = self._single(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(key, value)
        return float(value)

    def token(self, key: str, tokens: int) -> int | None:
        """Return an id of one of so many tokens, or None where the file has none.

        Raises:
            ModelError: another value.
        """
        value = self.header.get(f"tokenizer.ggml.{key}")
        if value is None or value == 2**32 - 1:  # -1 in 32 bits: none
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < tokens:
            raise self.wrong(f"tokenizer.ggml.{key}", value)
        return value

    def wrong(self, key: str, value: Any) -> ModelError:
        """Return the error of a key with an unusable value."""
        name = f"{self.header.architecture}{key}" if key.startswith(".") else key
        return ModelError(f"{self.header.file}: {name} is {value!r} in its header, which does not describe a model")

    def _single(self, key: str, default: Any) -> Any:
        value = self.header.get(key, default)
        if value is None:
            raise ModelError(
                f"{self.header.file} says that it holds a {self.header.architecture} model, but lacks "
                f"{self.header.architecture}{key} in its header: convert the model again, or take another file"
            )
        if isinstance(value, np.ndarray):
            if not value.size or (value != value[0]).any():
                raise ModelError(
                    f"{self.header.file} has layers of different sizes ({self.header.architecture}{key}), which are "
                    "not supported"
                )
            return value[0].item()
        return value
