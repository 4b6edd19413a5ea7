"""Hidden tokens from a fill-mask bundle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ft.data import Batch
from edge_ft.data.tokenizer import Filled
from edge_ft.errors import BundleError, UsageError
from edge_ft.runtime.encoder import Encoder, log_softmax
from edge_ft.runtime.tag import nll_at_targets

__all__ = ["Fill", "FilledText", "MaskFiller"]

_LOGITS_AT_ONCE = 1 << 24
"""Logits held while scoring: 64 MB; larger batches are scored in parts."""


@dataclass(frozen=True)
class Fill:
    """A token that may stand at a masked place."""

    token: str
    score: float
    """Its probability."""


@dataclass(frozen=True)
class FilledText:
    """The likeliest tokens of every masked place of a text."""

    fills: list[list[Fill]]
    """For each mask in its order, the likeliest first."""
    text: str
    """The text with the likeliest token in each place, as the tokenizer writes it."""
    prompt_tokens: int
    cut: int
    """Tokens of the text that were beyond what the model reads."""


class MaskFiller(Encoder):
    """An open fill-mask bundle."""

    def fill(self, texts: Sequence[str], top_k: int = 5) -> list[FilledText]:
        """The `top_k` likeliest tokens at each mask of every text, in order; the mask is written as the model's own.

        Raises:
            UsageError: a text without a mask, or one that lies beyond what the model reads.
            BundleError: its tokenizer has no mask.
        """
        mask, mask_id = self.tokenizer.special_tokens.get("mask_token"), self.tokenizer.mask_id
        if mask is None or mask_id is None:
            raise BundleError(f"{self.bundle.path} has a tokenizer without a mask_token: export the model again")
        read = []
        for text in texts:
            parts = text.split(mask)
            # Between two values stands what the template itself writes: the mask, which is then read as such.
            own = ["", *[part for value in parts for part in (value, mask)][:-1], ""]
            read.append(self.tokenizer.encode_classifier(Filled(own), self.rendering.max_length))
            if read[-1].ids.count(mask_id) != len(parts) - 1 or len(parts) == 1:
                where = "is beyond what the model reads" if len(parts) > 1 else "is missing"
                raise UsageError(f"a mask {where} in {text[:60]!r}: write {mask} where a token is to be found")
        found: dict[int, FilledText] = {}
        for row, logits in self.of_texts(read):
            ids = list(read[row].ids)
            places = [place for place, token in enumerate(ids) if token == mask_id]
            fills = []
            for place in places:
                probabilities = np.exp(log_softmax(logits[place]))
                best = np.argsort(-probabilities, kind="stable")[:top_k].tolist()
                fills.append(
                    [
                        Fill(self.tokenizer.decode([token], skip_special_tokens=False), float(probabilities[token]))
                        for token in best
                    ]
                )
                ids[place] = best[0]
            found[row] = FilledText(fills, self.tokenizer.decode(ids), len(ids), read[row].cut)
        return [found[row] for row in range(len(texts))]

    def token_nll(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Negative log-likelihood (nats) and likeliest token at each hidden place, both [batch, seq]."""
        size = batch["labels"].shape[1] * self.tokenizer.vocab_size
        step = max(1, _LOGITS_AT_ONCE // size)
        parts = []
        for start in range(0, len(batch["rows"]), step):
            rows = slice(start, start + step)
            logits = self.logits(batch["input_ids"][rows], batch["attention_mask"][rows])
            parts.append(nll_at_targets(logits, batch["labels"][rows], "fill-mask"))
        return np.concatenate([nll for nll, _ in parts]), np.concatenate([token for _, token in parts])
