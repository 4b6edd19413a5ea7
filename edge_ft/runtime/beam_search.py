"""Beam search over log-probabilities: which answers are followed, and which one is given."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["beam_search"]

_NEVER = np.float32(-1e9)
"""Score of a beam that is not there."""

Step = Callable[[NDArray[np.int64], NDArray[np.int64] | None], NDArray[np.float32]]
"""order [beams] of the beams that go on, their last tokens [beams] (None at the start) -> logits [beams, vocab]"""


def beam_search(
    step: Step, beams: int, longest: int, stop_ids: frozenset[int], length_penalty: float = 1.0
) -> list[int]:
    """The best of the answers found, with its stop token if it has one.

    As transformers' `generate(num_beams=…, early_stopping=False)`: a finished answer scores its log-probability /
    tokens ** length_penalty, the stop token among them; of each step's candidates the best `beams` may finish. It
    ends when as many have finished, and the best unfinished one, by its length so far, is no better than the worst of
    them; or at `longest` tokens, where unfinished answers count as finished.

    Args:
        step: Makes the model read one token for each beam.
        beams: Answers followed at a time, at least 2.
        longest: Tokens, at least 1.
        stop_ids: What ends an answer.
        length_penalty: Above 0 favours longer answers.
    """
    running: list[list[int]] = [[] for _ in range(beams)]
    scores = np.full(beams, _NEVER, np.float32)
    scores[0] = 0  # at the start all beams are the same
    finished: list[tuple[float, list[int]]] = []
    order, tokens = np.arange(beams), None
    # So many that enough go on when every stop token is among the best of every beam.
    kept = max(2, 1 + len(stop_ids)) * beams
    for length in range(1, longest + 1):
        log_probabilities = _log_softmax(step(order, tokens)) + scores[:, None]
        vocab = log_probabilities.shape[1]
        flat = log_probabilities.ravel()
        best = np.argpartition(-flat, min(kept, flat.size) - 1)[:kept]
        best = best[np.argsort(-flat[best], kind="stable")]
        going: list[tuple[int, int, np.float32]] = []
        for place, candidate in enumerate(best):
            beam, token = divmod(int(candidate), vocab)
            if token in stop_ids or length == longest:
                if place < beams:
                    finished.append((float(flat[candidate]) / length**length_penalty, [*running[beam], token]))
            elif len(going) < beams:
                going.append((beam, token, flat[candidate]))
        finished = sorted(finished, key=lambda pair: -pair[0])[:beams]
        if len(going) < beams:
            break
        order = np.array([beam for beam, _, _ in going])
        tokens = np.array([token for _, token, _ in going])
        scores = np.array([score for _, _, score in going], np.float32)
        running = [[*running[beam], token] for beam, token, _ in going]
        if len(finished) == beams and float(scores[0]) / length**length_penalty <= finished[-1][0]:
            break
    return finished[0][1]


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
