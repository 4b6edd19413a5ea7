"""Beam search over log-probabilities."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edge_ft.runtime.token_scores import log_softmax

__all__ = ["beam_search"]

_UNUSED = np.float32(-1e9)
"""Score of a beam that is not in use."""

Step = Callable[[NDArray[np.int64], NDArray[np.int64] | None], NDArray[np.float32]]
"""Indices [beams] of the beams to continue, their last tokens [beams] (None at the start) -> logits [beams, vocab]."""


def beam_search(
    step: Step, beams: int, max_tokens: int, stop_ids: frozenset[int], length_penalty: float = 1.0
) -> list[int]:
    """Find the best answer, as transformers' `generate(num_beams=…, early_stopping=False)` does.

    A finished answer scores its log-probability / tokens ** length_penalty, the stop token included; of each step's
    candidates, the best `beams` may finish. The search ends when `beams` answers have finished and the best unfinished
    one, scored by its length so far, is no better than the worst of them; or at `max_tokens`, where unfinished answers
    count as finished.

    Args:
        step: Runs the model on one token of each beam.
        beams: Answers followed in parallel, at least 2.
        max_tokens: At least 1.
        stop_ids: Tokens that end an answer.
        length_penalty: Above 0 favours longer answers.

    Returns:
        The answer's token ids, with its stop token if it has one.
    """
    running: list[list[int]] = [[] for _ in range(beams)]
    scores = np.full(beams, _UNUSED, np.float32)
    scores[0] = 0  # at the start all beams are the same
    finished: list[tuple[float, list[int]]] = []
    order, tokens = np.arange(beams), None
    # Enough candidates for `beams` unfinished answers even if every stop token is among the best of every beam.
    kept = max(2, 1 + len(stop_ids)) * beams
    for length in range(1, max_tokens + 1):
        log_probabilities = log_softmax(step(order, tokens)) + scores[:, None]
        vocab = log_probabilities.shape[1]
        flat = log_probabilities.ravel()
        best = np.argpartition(-flat, min(kept, flat.size) - 1)[:kept]
        best = best[np.argsort(-flat[best], kind="stable")]
        continued: list[tuple[int, int, np.float32]] = []
        for rank, candidate in enumerate(best):
            beam, token = divmod(int(candidate), vocab)
            if token in stop_ids or length == max_tokens:
                if rank < beams:
                    finished.append((float(flat[candidate]) / length**length_penalty, [*running[beam], token]))
            elif len(continued) < beams:
                continued.append((beam, token, flat[candidate]))
        finished = sorted(finished, key=lambda pair: -pair[0])[:beams]
        if len(continued) < beams:
            break
        order = np.array([beam for beam, _, _ in continued])
        tokens = np.array([token for _, token, _ in continued])
        scores = np.array([score for _, _, score in continued], np.float32)
        running = [[*running[beam], token] for beam, token, _ in continued]
        if len(finished) == beams and float(scores[0]) / length**length_penalty <= finished[-1][0]:
            break
    return finished[0][1]
