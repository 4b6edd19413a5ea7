"""Log-likelihoods of given answers: the prompt is read once, and so is what answers have in common."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_ft.runtime.cache import KVCache
from edge_ft.runtime.token_scores import log_softmax

__all__ = ["answer_nll"]


def answer_nll(cache: KVCache, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Score whole answers to one prompt.

    An answer's score is the sum over its tokens, stop token included, so that "no" and "not sure" compete as whole
    answers: dividing by their lengths would favour answers whose later tokens are certain.

    Args:
        cache: Empty, or holding a beginning of the prompt.
        prompt_ids: At least one token.
        answers: Token ids of each answer, at least one.

    Returns:
        Negative log-likelihood (nats) of each answer, [answers].
    """
    cache.rewind(prompt_ids)
    # Log-probabilities [vocab] after the prompt and after each cached token of an answer.
    after = [log_softmax(cache.extend(prompt_ids[len(cache.ids) :]))]
    nll = np.zeros(len(answers))
    # In the order of their tokens, answers with a common beginning follow each other, and it is read once.
    for index in sorted(range(len(answers)), key=lambda at: tuple(answers[at])):
        ids = answers[index]
        shared = cache.rewind([*prompt_ids, *ids]) - len(prompt_ids)
        del after[shared + 1 :]
        if rest := ids[shared:-1]:
            after.extend(log_softmax(cache.extend_each(rest)))
        nll[index] = -sum(float(after[at][token]) for at, token in enumerate(ids))
    return nll
