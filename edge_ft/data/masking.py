"""Which tokens of a text are masked and learned (fill-mask)."""

import hashlib

import numpy as np

from edge_ft.data.example import IGNORED

__all__ = ["SHARE", "mask_tokens"]

SHARE = 0.15
"""Share of a text's tokens that are masked, as in BERT (arXiv:1810.04805)."""


def mask_tokens(input_ids: list[int], start: int, stop: int, mask_id: int) -> tuple[list[int], list[int]]:
    """Mask 15% of the tokens from `start` to `stop`, at least one.

    The choice depends only on the token ids, so that tune, export, verify and eval mask a row alike in every epoch.
    Every chosen token becomes the mask token, which learns no worse than BERT's 80/10/10 scheme (Wettig et al.,
    arXiv:2202.08005).

    Args:
        input_ids: Token ids of the text.
        start: First position that may be masked.
        stop: Position after the last one that may be masked.
        mask_id: Id of the mask token.

    Returns:
        The ids with masks, and the labels: the original ids where masked, -100 elsewhere.
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
