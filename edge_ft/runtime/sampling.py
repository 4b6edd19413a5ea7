"""The next token from the logits of the last position: pure functions over them, and a seeded draw."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_ft.config import RunConfig

__all__ = ["Sampler", "candidates", "penalize"]


def penalize(logits: NDArray[np.float32], seen: NDArray[np.bool_], penalty: float) -> NDArray[np.float32]:
    """Make seen tokens less likely: l / penalty where l > 0, l * penalty elsewhere (arXiv:1909.05858).

    Args:
        logits: [vocab].
        seen: [vocab], True for tokens of the prompt and of the answer so far.
        penalty: Above 1 discourages, below 1 encourages.
    """
    factor = np.where(logits > 0, np.float32(1 / penalty), np.float32(penalty))
    return np.where(seen, logits * factor, logits)


def candidates(
    logits: NDArray[np.float32], *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may be drawn, and their probabilities.

    The options apply in the order of the arguments, as in transformers: each sees what the one before left.

    Args:
        logits: [vocab].
        temperature: Divides the logits; above 0.
        top_k: Keep the k likeliest, with all that tie with the k-th; 0 keeps all.
        top_p: Keep the fewest likeliest tokens that hold this probability, at least one.
        min_p: Drop tokens less likely than this share of the likeliest.

    Returns:
        ids [candidates] and probabilities [candidates] that sum to 1.
    """
    ids = np.arange(logits.size)
    if 0 < top_k < logits.size:
        ids = np.flatnonzero(logits >= np.partition(logits, -top_k)[-top_k])
    kept = logits[ids]
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the likeliest to -inf, as it should
        weights = np.exp((kept - kept.max()) / np.float64(temperature))
    weights /= weights.sum()
    if top_p < 1:
        order = np.argsort(-kept, kind="stable")  # of logits: near ones may weigh the same
        order = order[: int(np.searchsorted(np.cumsum(weights[order]), top_p)) + 1]
        ids, weights = ids[order], weights[order]
    if min_p > 0:
        likely = weights >= min_p * weights.max()
        ids, weights = ids[likely], weights[likely]
    return ids, weights / weights.sum()


class Sampler:
    """Chooses the tokens of one answer; the same config and logits give the same tokens."""

    def __init__(self, config: RunConfig, prompt_ids: Sequence[int], vocab: int) -> None:
        self._config = config
        self._random = np.random.default_rng(config.seed)
        self._seen = np.zeros(vocab, np.bool_)
        self._seen[list(prompt_ids)] = True

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token's id; greedy at temperature 0.

        Args:
            logits: [vocab] of the last position.
        """
        config = self._config
        if config.repetition_penalty != 1:
            logits = penalize(logits, self._seen, config.repetition_penalty)
        if config.temperature == 0:
            token = int(logits.argmax())
        else:
            ids, probabilities = candidates(
                logits,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                min_p=config.min_p,
            )
            drawn = int(np.searchsorted(np.cumsum(probabilities), self._random.random(), side="right"))
            token = int(ids[min(drawn, ids.size - 1)])  # rounding may leave the sum below the draw
        self._seen[token] = True
        return token
