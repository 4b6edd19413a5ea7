"""Scores that say less than they seem to: a finding, by name, for each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_ft.config import TEXT_TASKS
from edge_ft.data import (
    IGNORED,
    Example,
    Rendering,
    TextTokenizer,
    absent_class,
    answer_tokens,
    count_classes,
    untrained_references,
)
from edge_ft.evaluate.generation import Answer
from edge_ft.evaluate.metrics import MaybeMetric
from edge_ft.evaluate.scoring import RowScores
from edge_ft.families import CLASSIFIERS

__all__ = ["CODES", "Scored", "answer_findings", "row_findings", "score_findings"]

CODES = ("perfect-before-training", "constant-metric", "constant-answers", "undefined-metric", "cut-answers")
"""Every code; all are warnings."""

NO_QUALITY = ("eos_rate", "distinct_1", "distinct_2", "repetition_4")
"""Metrics of the form of answers, for which 1 is not perfect."""


@dataclass(frozen=True)
class Scored:
    """Rows that a model has scored."""

    split: str
    """What the rows are called in messages."""
    model: str
    """base: before training; tuned: after it; model: of an evaluation."""
    examples: Sequence[Example]
    metrics: Mapping[str, MaybeMetric]
    scores: RowScores | None = None
    """None of generated answers."""

    @property
    def when(self) -> str:
        """Return how a message begins."""
        return {"base": "before training ", "tuned": "after training "}.get(self.model, "")

    def finding(self, code: str, message: str, **more: Any) -> dict[str, Any]:
        """Return JSON values of a warning."""
        where = {"split": self.split, "model": self.model}
        return {"code": code, "severity": "warning", **where, "rows": [], "message": message, "example": "", **more}


def row_findings(
    examples: Sequence[Example], rendering: Rendering, tokenizer: TextTokenizer, file: str
) -> list[dict[str, Any]]:
    """Return the findings about rows to score, as JSON values: `untrained-reference` and `absent-class`."""
    findings = [finding.plain(file=file) for finding in untrained_references(examples, rendering, tokenizer)]
    if rendering.task in CLASSIFIERS and rendering.problem_type != "regression":
        seen = count_classes(examples, rendering)
        if absent := [name for name in rendering.labels if not seen[name]]:
            findings.append(absent_class(absent, file, "scored", "class"))
    return findings


def score_findings(scored: Scored, rendering: Rendering) -> list[dict[str, Any]]:
    """Return the findings about the scores of rows, as JSON values.

    Args:
        scored: Scores with their metrics.
        rendering: Task and classes.

    Returns:
        `perfect-before-training`: the base has a metric that cannot be better. `constant-metric`: it does not depend on
        the model. `constant-answers`: the model answers the same to every row. `undefined-metric`: it has no value.
    """
    count = len(scored.examples)
    findings = [*_find_perfect(scored, constant := _constant_recalls(scored)), *_find_undefined(scored)]
    if scored.model != "tuned":  # once for base and tuned model
        findings += [
            scored.finding(
                "constant-metric",
                f"{name} is 1 whatever the model does: there are only {texts} texts to find the right one among",
                metrics=[name],
            )
            for name, texts in constant.items()
        ]
    right = _the_same([_right_answer(example, rendering) for example in scored.examples])
    if count > 1 and right is not None:
        if scored.model != "tuned":
            name = _name(right, rendering)
            message = f"all {count} {scored.split} rows have the same right answer {name}: no metric on them says much"
            findings.append(scored.finding("constant-metric", message, metrics=sorted(scored.metrics)))
    elif count > 1 and scored.scores is not None and rendering.task in CLASSIFIERS:
        predicted = _the_same([_prediction(one, rendering) for one in scored.scores.predicted])
        if predicted is not None:
            findings.append(_constant_answers(scored, _name(predicted, rendering)))
    return findings


def answer_findings(
    scored: Scored, answers: Sequence[Answer], max_new_tokens: int, advice: str
) -> list[dict[str, Any]]:
    """Return the findings about generated answers, as JSON values.

    Args:
        scored: The rows, and the metrics of the answers.
        answers: To these rows.
        max_new_tokens: Longest answer allowed.
        advice: What to do if right answers are longer; `{tokens}` is the length of the longest.

    Returns:
        Those of `score_findings`, and `cut-answers`: answers that did not end (finish_reason length), or right answers
        that are longer than the limit.
    """
    findings = [*_find_perfect(scored, {}), *_find_undefined(scored)]
    texts, count = {answer.text.strip() for answer in answers}, len(answers)
    if count > 1 and len(texts) == 1 and len({answer.reference for answer in answers}) > 1:
        findings.append(_constant_answers(scored, "the same text"))  # not which: a page has no text of rows
    if scored.model == "base":
        return findings  # a base seldom ends its answers
    cut = sum(not answer.ended for answer in answers)
    lengths = [len(answer_tokens(example)) + example.cut_targets for example in scored.examples]
    longer = sum(length > max_new_tokens for length in lengths)
    if cut or longer:
        end = advice.format(tokens=max(lengths)) if longer else "the model did not end where the right answers do"
        message = (
            f"{cut} of {count} answers to {scored.split} rows were cut after {max_new_tokens} tokens, and {longer} of "
            f"{len(lengths)} right answers are longer: {end}"
        )
        share = round(cut / max(count, 1), 4)
        findings.append(scored.finding("cut-answers", message, share=share, longer_references=longer))
    return findings


def _find_perfect(scored: Scored, constant: Mapping[str, int]) -> list[dict[str, Any]]:
    if scored.model != "base":
        return []
    known = {name: metric["value"] for name, metric in scored.metrics.items() if name not in (*NO_QUALITY, *constant)}
    names = [name for name, value in known.items() if value is not None and _is_perfect(name, value)]
    if not names:
        return []
    message = (
        f"before training {', '.join(names)} cannot be better on {len(scored.examples)} {scored.split} rows: look "
        "whether the answer stands in the prompt and whether labels are read as you mean them"
    )
    return [scored.finding("perfect-before-training", message, metrics=names)]


def _find_undefined(scored: Scored) -> list[dict[str, Any]]:
    names = [name for name, metric in scored.metrics.items() if metric["value"] is None]
    if not names:
        return []
    message = (
        f"{scored.when}{', '.join(names)} has no value on {len(scored.examples)} {scored.split} rows: a correlation "
        "needs right answers and predictions that differ, F1 needs a row with a class or a span"
    )
    return [scored.finding("undefined-metric", message, metrics=names)]


def _constant_answers(scored: Scored, answer: str) -> dict[str, Any]:
    message = (
        f"{scored.when}the model answers {answer} to all {len(scored.examples)} {scored.split} rows: its metrics say "
        "how often that is right"
    )
    return scored.finding("constant-answers", message)


def _constant_recalls(scored: Scored) -> dict[str, int]:
    """Return the recalls that are 1 because there are so few texts, with their number."""
    texts = len({tuple(example.pair_ids) for example in scored.examples})
    recalls = {name: int(name.removeprefix("recall_at_")) for name in scored.metrics if name.startswith("recall_at_")}
    return {name: texts for name, nearest in recalls.items() if texts <= nearest}


def _right_answer(example: Example, rendering: Rendering) -> tuple[Any, ...] | None:
    """Return the label of a row, the tag of all its words, or its reference; None where it has several tags."""
    if rendering.task == "token-classification":
        tags = {int(label) for label in example.labels if label != IGNORED}
        return tuple(tags) if len(tags) == 1 else None
    if rendering.task == "text-classification":
        return tuple(example.labels)
    return (example.reference,) if rendering.task in TEXT_TASKS and example.prompt_length else None


def _prediction(predicted: Any, rendering: Rendering) -> tuple[Any, ...] | None:
    """Return a prediction in the form of `_right_answer`."""
    if rendering.task == "token-classification":
        tags = {int(index) for index in predicted}
        return tuple(tags) if len(tags) == 1 else None
    digits = 5 if rendering.problem_type == "regression" else 17
    return tuple(float(f"{float(value):.{digits}g}") for value in predicted)


def _the_same(answers: Sequence[tuple[Any, ...] | None]) -> tuple[Any, ...] | None:
    """Return the answer if all are the same, else None."""
    first = answers[0] if answers else None
    return first if first is not None and all(answer == first for answer in answers) else None


def _name(answer: tuple[Any, ...], rendering: Rendering) -> str:
    """Return an answer as a message writes it."""
    if rendering.problem_type == "regression":
        return f"{float(answer[0]):g}"
    if rendering.problem_type == "multi_label_classification":
        names = [label for label, holds in zip(rendering.labels, answer, strict=True) if holds > 0]
        return repr(", ".join(names)) if names else "no class"
    if rendering.task in CLASSIFIERS:
        return ", ".join(repr(rendering.labels[int(index)]) for index in answer)
    return repr(answer[0][:40])


def _is_perfect(name: str, value: float) -> bool:
    return bool(np.isclose(value, 0.0 if name == "mse" else 1.0, rtol=0, atol=1e-6))
