"""Generated answers and their metrics: similarity to the right answers, whether they end, how often they repeat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edge_ft.data import IGNORED, Example, answer_ids, eval_batches
from edge_ft.errors import MissingExtra, require
from edge_ft.evaluate.loading import LoadedSource
from edge_ft.evaluate.metrics import Metric, exact_match, macro_f1, mean, proportion, token_f1, verbatim_match
from edge_ft.evaluate.scoring import Answerer
from edge_ft.progress import Progress, heartbeat, track

__all__ = ["Answer", "Chooser", "answer_metrics", "choice_metrics", "generate_answers"]

REPEATED = 4
"""Words of a phrase that counts as a repetition when it occurs again (seq-rep-4, arXiv:1908.04319)."""
BATCH = 16
"""Prompts answered together: torch needs a third of the time of single prompts."""


@runtime_checkable
class BatchAnswerer(Answerer, Protocol):
    """A model that answers several prompts at once, faster than one after the other."""

    def answer_batch(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Return `answer` for each of the prompts."""


@runtime_checkable
class Chooser(Protocol):
    """A model that can choose among given answers."""

    def answer_nll(self, prompt_ids: list[int], answers: Sequence[list[int]]) -> NDArray[np.float64]:
        """Return the negative log-likelihood (nats) of each whole answer, including the token that ends it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer and the right one."""

    text: str
    reference: str
    ended: bool
    """The model ended it with a stop token, before the longest answer allowed."""


def generate_answers(
    opened: LoadedSource, examples: Sequence[Example], max_new_tokens: int, progress: Progress, stage: str = "answer"
) -> list[Answer]:
    """Generate greedy answers to the prompts of `examples`.

    Args:
        opened: The model; its scorer is an `Answerer`.
        examples: Rows; those without a prompt, or without a free position for an answer, are left out.
        max_new_tokens: Longest answer in tokens.
        progress: Receives the state of the generation.
        stage: Name of the stage for `progress`.

    Returns:
        The answers, in the order of `examples`.
    """
    answerer = opened.scorer
    assert isinstance(answerer, Answerer)
    longest = [min(max_new_tokens, opened.model_limit - example.shared_positions) for example in examples]
    prompted = [row for row, example in enumerate(examples) if example.prompt_length and longest[row] > 0]
    prompts = {row: examples[row].input_ids[: examples[row].prompt_length] for row in prompted}
    # A row near the model's limit has a shorter longest answer than the others: it is answered by itself.
    together = isinstance(answerer, BatchAnswerer)
    free = [row for row in prompted if together and longest[row] == max_new_tokens]
    chunks = eval_batches([len(prompts[row]) for row in free], BATCH)
    alone = sorted(set(prompted) - set(free))
    batches = [*([free[index] for index in chunk] for chunk in chunks), *([row] for row in alone)]
    found: dict[int, Answer] = {}
    with heartbeat(progress, stage):  # a batch may take longer than a reader waits
        for batch in track(progress, stage, batches, len(batches)):
            if len(batch) > 1 and isinstance(answerer, BatchAnswerer):
                written = answerer.answer_batch([prompts[row] for row in batch], max_new_tokens)
            else:
                written = [answerer.answer(prompts[row], longest[row]) for row in batch]
            for row, ids in zip(batch, written, strict=True):
                found[row] = Answer(opened.tokenizer.decode(ids), examples[row].reference, len(ids) < longest[row])
    return [found[row] for row in prompted]


def answer_metrics(answers: Sequence[Answer], progress: Progress) -> dict[str, Metric]:
    """Return the metrics of generated answers, each 0 to 1 with its 95% interval over answers.

    - `exact_match` compares the meaning, `verbatim_match` the exact text, `token_f1` the words (SQuAD).
    - `rouge1`, `rouge2`, `rougeL` (F-measure, rouge-score without stemming) and `chrf` (sacrebleu, divided by 100) are
      means over answers. Without `edge-ft[metrics]` they are left out, with a message to `progress`.
    - `eos_rate` is the share of answers that ended by themselves.
    - `distinct_1` and `distinct_2` are the shares of different words and pairs of words of an answer, `repetition_4`
      is the share of its phrases of four words that occurred before: means over the answers that have any.
    """
    if not answers:
        return {}
    pairs = [(answer.text, answer.reference) for answer in answers]
    metrics = {
        "exact_match": proportion([exact_match(*pair) for pair in pairs]),
        "verbatim_match": proportion([verbatim_match(*pair) for pair in pairs]),
        "token_f1": mean(np.array([token_f1(*pair) for pair in pairs])),
    }
    try:
        metrics |= _overlaps(pairs)
    except MissingExtra as error:
        progress.say(f"ROUGE and chrF are left out: {error}")
    metrics["eos_rate"] = proportion([answer.ended for answer in answers])
    for name, size in (("distinct_1", 1), ("distinct_2", 2), ("repetition_4", REPEATED)):
        shares = np.array([share for answer in answers if (share := _distinct(answer.text, size)) is not None])
        if len(shares):
            metrics[name] = mean(1 - shares if name.startswith("repetition") else shares)
    return metrics


def choice_metrics(
    opened: LoadedSource, examples: Sequence[Example], progress: Progress, stage: str = "choose"
) -> dict[str, Metric]:
    """Return `choice_accuracy` and `choice_macro_f1` of the likeliest of the possible answers.

    Args:
        opened: The model, with the few answers of its training rows.
        examples: Rows; those whose prompt leaves too few positions for the longest answer are left out, and those
            with another answer count as wrong.
        progress: Receives the state of the scoring.
        stage: Name of the stage for `progress`.

    Returns:
        The metrics; none if the training rows had many answers, the model is no `Chooser`, or no row is left.
    """
    chooser, rendering = opened.scorer, opened.rendering
    if not rendering.answers or not isinstance(chooser, Chooser):
        return {}
    answers = [answer_ids(rendering, opened.tokenizer, answer) for answer in rendering.answers]
    longest_prompt = opened.model_limit - max(map(len, answers))
    prompted = [example for example in examples if 0 < example.prompt_length <= longest_prompt]
    if not prompted:
        return {}
    right = [
        [int(label) for label in example.labels[example.prompt_length :] if label != IGNORED] for example in prompted
    ]
    gold = np.array([answers.index(ids) if ids in answers else len(answers) for ids in right])
    prompts = (example.input_ids[: example.prompt_length] for example in prompted)
    losses = [chooser.answer_nll(prompt, answers) for prompt in track(progress, stage, prompts, len(prompted))]
    predicted = np.array(losses).argmin(1)
    return {
        "choice_accuracy": proportion(predicted == gold),
        "choice_macro_f1": macro_f1(predicted, gold, len(answers) + 1),
    }


def _overlaps(pairs: Sequence[tuple[str, str]]) -> dict[str, Metric]:
    """Return ROUGE and chrF of (answer, reference) pairs.

    Raises:
        MissingExtra: rouge-score or sacrebleu is not installed.
    """
    rouge, sacrebleu = require("rouge_score.rouge_scorer", "metrics"), require("sacrebleu.metrics", "metrics")
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer, chrf = rouge.RougeScorer(kinds), sacrebleu.CHRF()
    found = [scorer.score(reference, answer) for answer, reference in pairs]
    metrics = {kind: mean(np.array([scores[kind].fmeasure for scores in found])) for kind in kinds}
    metrics["chrf"] = mean(np.array([chrf.sentence_score(answer, [right]).score / 100 for answer, right in pairs]))
    return metrics


def _distinct(text: str, size: int) -> float | None:
    """Return the share of different phrases among a text's phrases of `size` words; None if it has no such phrase."""
    words = text.split()
    phrases = [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]
    return len(set(phrases)) / len(phrases) if phrases else None
