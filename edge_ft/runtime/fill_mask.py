"""Predicted tokens for masks, from a fill-mask bundle."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_ft.data import Filled, Framed
from edge_ft.errors import BundleError, UsageError
from edge_ft.runtime.encoder import Encoder
from edge_ft.runtime.token_scores import log_softmax

__all__ = ["Fill", "FilledText", "MaskFiller"]


@dataclass(frozen=True)
class Fill:
    """A candidate token for a mask."""

    token: str
    score: float
    """Its probability."""


@dataclass(frozen=True)
class FilledText:
    """The likeliest tokens for every mask of a text."""

    fills: list[list[Fill]]
    """The candidates of each mask, in the order of the text; the likeliest comes first."""
    text: str
    """The text with the likeliest token at each mask, as the tokenizer decodes it."""
    prompt_tokens: int
    cut: int
    """Tokens of the text that exceeded `max_length` and were not read."""


class MaskFiller(Encoder):
    """An open fill-mask bundle."""

    def fill(self, texts: Sequence[str], top_k: int = 5) -> list[FilledText]:
        """Predict the tokens at the masks of texts.

        Args:
            texts: Texts with the model's own mask token, such as [MASK], at least one in each.
            top_k: Candidates for each mask.

        Returns:
            The candidates of each text, in order.

        Raises:
            UsageError: a text without a mask, or with a mask that exceeds `max_length`.
            BundleError: the tokenizer has no mask token.
        """
        encoded = [self._encode(text) for text in texts]

        def read(row: int, logits: NDArray[np.float32]) -> FilledText:
            ids, fills = list(encoded[row].ids), []
            for place in [place for place, token in enumerate(ids) if token == self.tokenizer.mask_id]:
                probabilities = np.exp(log_softmax(logits[place]))
                best = np.argsort(-probabilities, kind="stable")[:top_k].tolist()
                fills.append(
                    [
                        Fill(self.tokenizer.decode([token], skip_special_tokens=False), float(probabilities[token]))
                        for token in best
                    ]
                )
                ids[place] = best[0]
            return FilledText(fills, self.tokenizer.decode(ids), len(ids), encoded[row].cut)

        return self.map_outputs(read, encoded)

    def _encode(self, text: str) -> Framed:
        """Return the tokens of a text with masks.

        Raises:
            UsageError: a mask is missing or cut off.
            BundleError: the tokenizer has no mask token.
        """
        mask, mask_id = self.tokenizer.special_tokens.get("mask_token"), self.tokenizer.mask_id
        if mask is None or mask_id is None:
            raise BundleError(f"{self.bundle.path}: its tokenizer has no mask_token; export the model again")
        parts = text.split(mask)
        # Between two values stands what the template itself writes: the mask, which is then read as a special token.
        template = ["", *[part for value in parts for part in (value, mask)][:-1], ""]
        encoded = self.tokenizer.encode_framed(Filled(template), self.rendering.max_length)
        if encoded.ids.count(mask_id) != len(parts) - 1 or len(parts) == 1:
            problem = (
                f"is beyond the {self.rendering.max_length} tokens that the model reads"
                if len(parts) > 1
                else "is missing"
            )
            raise UsageError(f"a mask {problem} in {text[:60]!r}: write {mask} where a token is to be predicted")
        return encoded
