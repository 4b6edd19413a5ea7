"""Which tokens of a text are hidden and learned (fill-mask)."""

import hashlib

import numpy as np

from edge_ft.data.example import IGNORED

__all__ = ["SHARE", "mask_tokens"]

SHARE = 0.15
"""Of a text's tokens, as BERT (arXiv:1810.04805)."""


def mask_tokens(input_ids: list[int], start: int, stop: int, mask_id: int) -> tuple[list[int], list[int]]:
    """Hide 15% of the tokens from `start` to `stop`, one at least, and learn them.

    Which ones follows from the tokens themselves: tune, export, verify and eval ask the same of a row, in every
    epoch. Each is replaced by the mask, which learns no worse than BERT's 80/10/10 (Wettig et al.,
    arXiv:2202.08005).

    Returns:
        The ids with masks, and the labels: the hidden ids at their places, -100 elsewhere.
    """
    labels = [IGNORED] * len(input_ids)
    if stop <= start:
        return list(input_ids), labels
    digest = hashlib.sha256(np.array(input_ids, np.int64).tobytes()).digest()
    random = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    count = max(1, round(SHARE * (stop - start)))
    masked = list(input_ids)
    for place in (start + random.permutation(stop - start)[:count]).tolist():
        labels[place], masked[place] = input_ids[place], mask_id
    return masked, labels
