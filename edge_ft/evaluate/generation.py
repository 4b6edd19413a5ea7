"""What generated answers are worth: how near they are to the right ones, whether they end, how they repeat."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edge_ft.data import Example, eval_batches
from edge_ft.data.example import IGNORED
from edge_ft.errors import MissingExtra, require
from edge_ft.evaluate.metrics import Metric, accuracy, exact_match, macro_f1, mean, proportion, token_f1, verbatim_match
from edge_ft.evaluate.scoring import Answerer
from edge_ft.progress import Progress, track

__all__ = ["Answer", "Chooser", "answer_metrics", "choice_metrics", "generate_answers"]

REPEATED = 4
"""Words of a phrase whose return counts as repetition (seq-rep-4, arXiv:1908.04319)."""
BATCH = 16
"""Prompts answered together; torch takes a third of a single answer's time for each."""


@runtime_checkable
class BatchAnswerer(Answerer, Protocol):
    """What answers several prompts at once, at less than several times the cost."""

    def answer_batch(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """As `answer`, for each of the prompts."""


@runtime_checkable
class Chooser(Protocol):
    """What choosing among given answers needs of a model."""

    def answer_nll(self, prompt_ids: list[int], answers: Sequence[list[int]]) -> NDArray[np.float64]:
        """Negative log-likelihood (nats) of each whole answer, its end included."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote, and what would have been right."""

    text: str
    reference: str
    ended: bool
    """It stopped by itself, before the longest answer that was asked for."""


def generate_answers(
    answerer: Answerer,
    decode: Callable[[list[int]], str],
    examples: Sequence[Example],
    max_new_tokens: int,
    model_limit: int,
    progress: Progress,
    stage: str = "answer",
) -> list[Answer]:
    """Greedy answers to the prompts of `examples`, in order; rows without a prompt, or with no room for an answer, have
    none."""
    rooms = [min(max_new_tokens, model_limit - example.shared_positions) for example in examples]
    asked = [at for at, example in enumerate(examples) if example.prompt_length and rooms[at] > 0]
    prompts = {at: examples[at].input_ids[: examples[at].prompt_length] for at in asked}
    together: list[list[int]] = []
    if isinstance(answerer, BatchAnswerer):
        # Near the model's limit a row may write less than others: it goes alone.
        free = [at for at in asked if rooms[at] == max_new_tokens]
        chunks = eval_batches([len(prompts[at]) for at in free], BATCH)
        together = [[free[place] for place in chunk] for chunk in chunks]
    batched = {at for batch in together for at in batch}
    batches = together + [[at] for at in asked if at not in batched]
    found: dict[int, Answer] = {}
    for batch in track(progress, stage, batches, len(batches)):
        if len(batch) > 1 and isinstance(answerer, BatchAnswerer):
            written = answerer.answer_batch([prompts[at] for at in batch], max_new_tokens)
        else:
            written = [answerer.answer(prompts[at], rooms[at]) for at in batch]
        for at, ids in zip(batch, written, strict=True):
            found[at] = Answer(decode(ids), examples[at].reference, len(ids) < rooms[at])
    return [found[at] for at in asked]


def answer_metrics(answers: Sequence[Answer], progress: Progress) -> dict[str, Metric]:
    """Every figure of generated answers with its 95% interval over answers; all are from 0 to 1.

    - `exact_match` by what they say, `verbatim_match` to the letter, `token_f1` by their words (SQuAD);
    - `rouge1`, `rouge2`, `rougeL` (F-measure, rouge-score without stemming) and `chrf` (sacrebleu, hundredths): means
      over answers. Where `edge-ft[metrics]` is not installed they are left out, and that is said;
    - `eos_rate`: share of answers that ended by themselves;
    - `distinct_1`, `distinct_2`: share of an answer's words and pairs of words that are there for the first time,
      `repetition_4` the share of its phrases of four words that are not: means over the answers that have any.
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
    chooser: Chooser,
    examples: Sequence[Example],
    answers: Sequence[list[int]],
    model_limit: int,
    progress: Progress,
    stage: str = "choose",
) -> dict[str, Metric]:
    """`choice_accuracy` and `choice_macro_f1` of the likeliest of the `answers` that rows of these few may have.

    Rows whose prompt leaves no room for the longest answer are left out; a row with another answer than these is wrong.
    """
    room = model_limit - max(map(len, answers))
    asked = [example for example in examples if 0 < example.prompt_length <= room]
    if not asked:
        return {}
    gold, predicted = np.full(len(asked), len(answers)), np.zeros(len(asked), np.int64)
    for row, example in enumerate(track(progress, stage, asked, len(asked))):
        right = [int(label) for label in example.labels[example.prompt_length :] if label != IGNORED]
        if right in answers:
            gold[row] = list(answers).index(right)
        predicted[row] = chooser.answer_nll(example.input_ids[: example.prompt_length], answers).argmin()
    classes = len(answers) + 1
    return {"choice_accuracy": accuracy(predicted, gold), "choice_macro_f1": macro_f1(predicted, gold, classes)}


def _overlaps(pairs: Sequence[tuple[str, str]]) -> dict[str, Metric]:
    """ROUGE and chrF of (answer, reference) pairs.

    Raises:
        MissingExtra: rouge-score or sacrebleu is not installed.
    """
    rouge, sacrebleu = require("rouge_score.rouge_scorer", "metrics"), require("sacrebleu.metrics", "metrics")
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer, chrf = rouge.RougeScorer(kinds), sacrebleu.CHRF()
    found = [scorer.score(reference, answer) for answer, reference in pairs]
    metrics = {kind: mean(np.array([scores[kind].fmeasure for scores in found])) for kind in kinds}
    near = [chrf.sentence_score(answer, [reference]).score / 100 for answer, reference in pairs]
    return {**metrics, "chrf": mean(np.array(near))}


def _distinct(text: str, size: int) -> float | None:
    """Share of a text's phrases of `size` words that are different ones; None where it has no such phrase."""
    words = text.split()
    phrases = [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]
    return len(set(phrases)) / len(phrases) if phrases else None
