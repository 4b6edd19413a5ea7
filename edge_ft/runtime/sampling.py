"""Choosing the next token from the logits of the last position."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_ft.config import RunConfig

__all__ = ["Sampler", "candidates", "penalize"]


def penalize(logits: NDArray[np.float32], seen: NDArray[np.bool_], penalty: float) -> NDArray[np.float32]:
    """Apply the repetition penalty of CTRL (arXiv:1909.05858): l / penalty where l > 0, l * penalty elsewhere.

    Args:
        logits: [vocab].
        seen: [vocab], True for tokens of the prompt and of the answer so far.
        penalty: Above 1 makes seen tokens less likely, below 1 more likely.

    Returns:
        New logits [vocab].
    """
    factor = np.where(logits > 0, np.float32(1 / penalty), np.float32(penalty))
    return np.where(seen, logits * factor, logits)


def candidates(
    logits: NDArray[np.float32], *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the tokens that may be sampled, and their probabilities.

    The options apply in the order of the arguments, as in transformers: each filters what the one before left.

    Args:
        logits: [vocab].
        temperature: Divides the logits; above 0.
        top_k: Keep the k likeliest tokens and all that tie with the k-th; 0 keeps all.
        top_p: Keep the smallest set of likeliest tokens with this total probability, at least one token.
        min_p: Drop tokens whose probability is below this share of the highest one.

    Returns:
        ids [candidates] and probabilities [candidates] that sum to 1.
    """
    ids = np.arange(logits.size)
    if 0 < top_k < logits.size:
        ids = np.flatnonzero(logits >= np.partition(logits, -top_k)[-top_k])
    kept = logits[ids]
    with np.errstate(over="ignore"):  # a tiny temperature is meant to send all but the likeliest to -inf
        weights = np.exp((kept - kept.max()) / np.float64(temperature))
    weights /= weights.sum()
    if top_p < 1:
        order = np.argsort(-kept, kind="stable")  # by logits: close ones may have equal weights
        order = order[: int(np.searchsorted(np.cumsum(weights[order]), top_p)) + 1]
        ids, weights = ids[order], weights[order]
    if min_p > 0:
        likely = weights >= min_p * weights.max()
        ids, weights = ids[likely], weights[likely]
    return ids, weights / weights.sum()


class Sampler:
    """Chooses the tokens of one answer; the same config and logits give the same tokens."""

    def __init__(self, config: RunConfig, prompt_ids: Sequence[int], vocab: int) -> None:
        """Start an answer.

        Args:
            config: Sampling options and the seed.
            prompt_ids: Tokens that the repetition penalty counts as seen.
            vocab: Size of the logits.
        """
        self._config = config
        self._random = np.random.default_rng(config.seed)
        self._seen = np.zeros(vocab, np.bool_)
        self._seen[list(prompt_ids)] = True

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Choose the next token: the likeliest at temperature 0, else a random one.

        Args:
            logits: [vocab] of the last position.

        Returns:
            The token's id.
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
            token = int(ids[min(drawn, ids.size - 1)])  # rounding may leave the sum below the random number
        self._seen[token] = True
        return token
