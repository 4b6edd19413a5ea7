"""Which of a few given answers a decoder would write: the prompt is read once, each answer goes on from there."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_ft.runtime.cache import KVCache

__all__ = ["answer_nll"]


def answer_nll(cache: KVCache, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Negative log-likelihood (nats) of each whole answer.

    An answer is the sum over its tokens, the one that ends it included, so that "no" and "not sure" compete as whole
    answers: dividing by their lengths would favour those whose later tokens are certain.

    Args:
        cache: Empty, or holding a beginning of the prompt.
        prompt_ids: At least one token.
        answers: Token ids of each, at least one.

    Returns:
        nll [answers].
    """
    cache.rewind(prompt_ids)
    after = [_log_softmax(cache.extend(prompt_ids[len(cache.ids) :]))]  # [vocab] after each token of the path
    nll = np.zeros(len(answers))
    # In the order of their tokens, answers that begin alike follow each other and that beginning is read once.
    for index in sorted(range(len(answers)), key=lambda at: tuple(answers[at])):
        ids = answers[index]
        shared = cache.rewind([*prompt_ids, *ids]) - len(prompt_ids)
        del after[shared + 1 :]
        if rest := ids[shared:-1]:
            after += [_log_softmax(logits) for logits in cache.extend_each(rest)]
        nll[index] = -sum(float(after[at][token]) for at, token in enumerate(ids))
    return nll


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy: the cache overwrites its logits."""
    shifted = logits - logits.max()
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum())
    return result
