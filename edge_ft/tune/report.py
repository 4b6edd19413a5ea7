"""The results of a run: losses, metrics, over-fitting, guards, and a few answers before and after."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_ft.config import TEXT_TASKS
from edge_ft.data import Example, TextTokenizer
from edge_ft.evaluate.findings import Scored, answer_findings, score_findings
from edge_ft.evaluate.generation import Answer, answer_metrics, choice_metrics, generate_answers
from edge_ft.evaluate.loading import LoadedSource
from edge_ft.evaluate.metrics import Metric
from edge_ft.evaluate.scoring import (
    Answerer,
    Batching,
    RowScores,
    ScoredRow,
    format_prediction,
    row_scores,
    score,
    summary,
)
from edge_ft.progress import Progress, Silent
from edge_ft.system import release_memory
from edge_ft.tune.loop import Fit, refuse_odd_base
from edge_ft.tune.report_parts import ReportParts
from edge_ft.tune.stopwatch import Timings

if TYPE_CHECKING:
    from edge_ft.tune.engine import TrainableModel
    from edge_ft.tune.prepare import Job, Prepared

__all__ = ["answer_limit", "answered_rows", "complete_base", "results"]

SAMPLES = 3
SLICES = 4
"""Groups of rows by the length of their answers, whose losses are reported apart."""
ANSWERS = 8
"""Rows whose generated answers are scored: one batch of the base, and one of the tuned model."""
BATCH_COST = 2
"""Time of a token of ANSWERS answers at once, over that of a token of a single answer."""
SAMPLE_TOKENS = 32
"""Longest answer in tokens, however long right ones are."""
CUT_ADVICE = "these metrics are of shortened answers; edge-ft eval --max-new-tokens {tokens} compares whole ones"
PROMPT_TAIL = 400
"""Characters of a prompt that a sample shows: its end, where the question is."""
OVERFITTING_ROWS = 32
"""Train rows whose loss is compared with that of the validation rows."""
OVERFITTING_GAP = 0.25
"""The run is reported as over-fitted if the validation loss is above the train loss by more than this share of it."""

Base = Callable[[], AbstractContextManager[Any]]
"""Gives a context in which the tuned model answers as the untuned base."""


def complete_base(
    job: "Job", model: "TrainableModel", fitted: Fit, progress: Progress, parts: ReportParts, timings: Timings
) -> Fit:
    """Score the validation rows that the loop did not score with the untuned base, as it did the watched ones.

    Args:
        job: The resolved settings and the rows.
        model: With an adapter that can be disabled.
        fitted: The loop's result.
        progress: Gets the rows that are done.
        parts: What an earlier process of the run has found already; gets what is found.
        timings: Gets the seconds of `scores`: the report needs them, the training does not.

    Returns:
        The same result, with the base's scores of all validation rows.

    Raises:
        UsageError: one is not a number.
    """
    validation, watched = job.prepared.examples["validation"], fitted.base.rows
    if len(watched) == len(validation):
        return fitted
    scorer = _KeptScorer(model.backend, parts, job.batching, progress)
    with timings.stage("scores"), model.backend.unshared(), model.untuned():
        rest = scorer.score([validation[row] for row in job.unwatched], "validation rows, base")
    rows = dict(zip(job.watched, watched, strict=True)) | dict(zip(job.unwatched, rest.rows, strict=True))
    scores = row_scores([rows[row] for row in range(len(validation))])
    refuse_odd_base(scores, validation)
    return replace(fitted, base=scores)


def results(
    job: "Job",
    model: "TrainableModel",
    fitted: Fit,
    progress: Progress,
    parts: ReportParts = ReportParts(None),
    timings: Timings | None = None,
) -> dict[str, Any]:
    """Score the tuned model and compare it with its base.

    The validation rows chose the weights that `model` holds, in the precision of the steps; their scores are the
    loop's. The test rows are read here, once, and scored in float32, as `edge-ft eval` and the export score.

    Args:
        job: The resolved settings and the rows.
        model: With the best weights.
        fitted: The loop's result.
        progress: Gets over-fitting and sample answers.
        parts: What an earlier process of the run has found already; gets what is found.
        timings: Gets the seconds of `scores` and of `answers`.

    Returns:
        `scored_in`, `slices` (losses of a quarter of the rows each, from the shortest answers to the longest), `nll`,
        `metrics`, `overfitting`, `guards`, `answers` and `samples` of report.json, and more of its `findings`;
        `answers` scores the answers to the first `ANSWERS` rows of a model that writes text; None for others.
    """
    timings = timings or Timings()
    release_memory()  # what is scored here would come on top of what the steps took
    scorer, base = _KeptScorer(model.backend, parts, job.batching, progress), model.untuned
    prepared, examples = job.prepared, job.prepared.examples
    split = "test" if examples["test"] else "validation"
    answers: dict[str, Any] | None = None
    with model.backend.unshared():  # the processes have found different parts, and do not wait for each other
        with timings.stage("scores"):
            overfitting = _overfitting(job, scorer, fitted)
        with model.backend.in_float32():
            with timings.stage("scores"):
                scores = _scores(job, scorer, base, fitted)
            if prepared.task in TEXT_TASKS:
                with timings.stage("answers"):
                    samples, answers = _answers(job, scorer, base, split)
            else:
                samples = _predictions(job, split, scores)
    metrics: dict[str, dict[str, Any]] = {}
    for column, found in scores.items():
        rows = examples[column.removesuffix("_base")]
        for name, value in summary(found, rows, prepared.task, prepared.rendering.labels)["metrics"].items():
            metrics.setdefault(name, {})[column] = value
    findings = [*_score_findings(prepared, scores, metrics), *(answers or {}).pop("findings", ())]
    for finding in findings:
        progress.say(f"{finding['message']} [{finding['code']}]")
    return {
        "findings": findings,
        "scored_in": {"validation": job.config.compute, "test": "fp32"},
        "slices": _slices(split, scores),
        "nll": {
            "base": scores["validation_base"].mean_nll,
            "best": scores["validation"].mean_nll,
            "last": fitted.last_nll if np.isfinite(fitted.last_nll) else None,
            **{name: scores[name].mean_nll if name in scores else None for name in ("test_base", "test")},
        },
        "metrics": metrics,
        "overfitting": overfitting,
        "guards": {"skipped": fitted.skipped, "rate_factor": fitted.rate_factor},
        "answers": answers and {"split": split, **answers},
        "samples": [{"split": split, **sample} for sample in samples],
    }


def _predictions(job: "Job", split: str, scores: dict[str, RowScores]) -> list[dict[str, Any]]:
    """What the base and the tuned model predict for a few rows of a task without written answers."""
    columns = {"base": scores[f"{split}_base"], "tuned": scores[split]}
    return [
        {
            **_shown(example, job.tokenizer),
            **{
                name: format_prediction(column.predicted[index], job.prepared.rendering, job.tokenizer)
                for name, column in columns.items()
            },
        }
        for index, example in enumerate(job.prepared.examples[split][:SAMPLES])
    ]


def _slices(split: str, scores: dict[str, RowScores]) -> list[dict[str, Any]]:
    """Losses of rows with short and with long answers; nothing where all rows have one target."""
    base, tuned = scores[f"{split}_base"], scores[split]
    if len(set(tuned.tokens.tolist())) < SLICES:
        return []
    order = np.argsort(tuned.tokens, kind="stable")
    found = []
    for rows in np.array_split(order, SLICES):
        tokens = tuned.tokens[rows]
        losses = {name: float(of.nll[rows].sum() / tokens.sum()) for name, of in (("base", base), ("tuned", tuned))}
        found.append(
            {"split": split, "rows": len(rows), "tokens": [int(tokens.min()), int(tokens.max())], "nll": losses}
        )
    return found


def _score_findings(
    prepared: "Prepared", scores: dict[str, RowScores], metrics: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return what makes the scores say less than they seem to."""
    findings = []
    for column, found in scores.items():
        split, model = column.removesuffix("_base"), "base" if column.endswith("_base") else "tuned"
        values = {name: columns[column] for name, columns in metrics.items()}
        scored = Scored(split, model, prepared.examples[split], values, found)
        findings += score_findings(scored, prepared.rendering)
    return findings


@dataclass(frozen=True)
class _KeptScorer:
    """Scores what is not among the kept parts of the report, and keeps it."""

    scorer: Answerer
    parts: ReportParts
    batching: Batching
    progress: Progress

    def score(self, examples: Sequence[Example], stage: str) -> RowScores:
        """Score examples; `stage` names the part."""

        def rest(found: dict[int, ScoredRow], poll: Callable[[], None]) -> RowScores:
            return score(self.scorer, examples, self.batching, self.progress, stage, poll, found)

        return self.parts.scores(stage, rest)


def _scores(job: "Job", scorer: _KeptScorer, base: Base, fitted: Fit) -> dict[str, RowScores]:
    """`validation_base`, `validation`, and where there are test rows `test_base` and `test`."""
    examples = job.prepared.examples
    scores = {"validation_base": fitted.base, "validation": fitted.best}
    embeds = job.prepared.task == "feature-extraction"  # a checkpoint keeps losses, not vectors
    again = embeds and None in (fitted.base.vectors, fitted.best.vectors)
    for split in ["validation"] * again + ["test"] * bool(examples["test"]):
        with base():
            scores[f"{split}_base"] = scorer.score(examples[split], f"{split} rows, base")
        scores[split] = scorer.score(examples[split], f"{split} rows, tuned")
    return scores


def _overfitting(job: "Job", scorer: _KeptScorer, fitted: Fit) -> dict[str, Any]:
    """Train and validation loss of the best weights; a message where they are far apart."""
    best = fitted.best.mean_nll
    train, config, progress = job.prepared.examples["train"], job.config, scorer.progress
    count = min(len(train), len(job.prepared.examples["validation"]), OVERFITTING_ROWS)
    chosen = sorted(np.random.default_rng(config.seed).permutation(len(train))[:count].tolist())
    train_nll = scorer.score([train[index] for index in chosen], "train rows").mean_nll
    gap = best - train_nll
    epoch = fitted.best_step * config.rows_at_once * config.passes / len(train)
    if gap > OVERFITTING_GAP * train_nll:
        progress.say(
            f"over-fitted: with the best weights (epoch {epoch:.1f}) the train loss is {train_nll:.4f} and the "
            f"validation loss {best:.4f}: more rows, a lower --rank or a higher --dropout may help"
        )
    if fitted.best_step < fitted.steps and fitted.last_nll > best:
        progress.say(f"the validation loss was best at epoch {epoch:.1f} and is {fitted.last_nll:.4f} at the end")
    return {
        "train_nll": train_nll,
        "validation_nll": best,
        "gap": gap,
        "best_step": fitted.best_step,
        "best_epoch": round(epoch, 3),
    }


def _answers(
    job: "Job", scorer: _KeptScorer, base: Base, split: str
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Greedy answers of the base and of the tuned model to rows of a split: a few as samples, and metrics of all."""
    tokenizer, model_limit, progress, parts = job.tokenizer, job.base.max_length, scorer.progress, scorer.parts
    first = answered_rows(job.prepared.examples)
    examples = [row for row in first if row.prompt_length and row.shared_positions < model_limit]
    if not examples:
        return [], None
    answers: dict[str, list[Answer]] = {}
    chosen: dict[str, dict[str, Metric]] = {}
    opened = LoadedSource(scorer.scorer, tokenizer, job.prepared.rendering, model_limit)
    longest = answer_limit(examples)

    def answer(stage: str) -> list[dict[str, Any]]:
        return [asdict(answer) for answer in generate_answers(opened, examples, longest, progress, stage)]

    for name, context in (("base", base), ("tuned", nullcontext)):
        answering, choosing = f"answers, {name}", f"choices, {name}"
        with context():
            answers[name] = [Answer(**found) for found in parts.value(answering, partial(answer, answering))]
            chosen[name] = parts.value(choosing, partial(choice_metrics, opened, examples, progress, choosing))
    release_memory()  # ROUGE imports libraries of 160 MB, on top of what the answers took
    metrics: dict[str, dict[str, Any]] = {}
    for name, texts in answers.items():
        found = answer_metrics(texts, progress if name == "base" else Silent()) | chosen[name]
        for metric, value in found.items():
            metrics.setdefault(metric, {"base": None, "tuned": None})[name] = value
    samples = []
    for index, example in enumerate(examples[:SAMPLES]):
        sample = {**_shown(example, tokenizer), **{name: texts[index].text for name, texts in answers.items()}}
        samples.append(sample)
        progress.say(
            f"row {example.row}: reference {sample['reference']!r}, base {sample['base']!r}, tuned {sample['tuned']!r}"
        )
    findings: list[dict[str, Any]] = []
    for name, texts in answers.items():
        values = {metric: columns[name] for metric, columns in metrics.items() if columns[name] is not None}
        findings += answer_findings(Scored(split, name, examples, values), texts, longest, CUT_ADVICE)
    figures = {"rows": len(examples), "max_new_tokens": longest, "metrics": metrics, "findings": findings}
    return samples, figures


def answered_rows(examples: Mapping[str, Sequence[Example]]) -> Sequence[Example]:
    """Rows whose generated answers are scored: the first `ANSWERS` test rows, without any the first validation rows."""
    return (examples["test"] or examples["validation"])[:ANSWERS]


def answer_limit(examples: Sequence[Example]) -> int:
    """Tokens of the longest answer: twice the longest right one, so that a base that does not end takes less time."""
    return min(SAMPLE_TOKENS, max(8, 2 * max(example.targets for example in examples)))


def _shown(example: Example, tokenizer: TextTokenizer) -> dict[str, Any]:
    """The prompt and the reference answer of a row."""
    prompt = tokenizer.decode(example.input_ids[: example.prompt_length], skip_special_tokens=False)
    return {"row": example.row, "prompt": prompt[-PROMPT_TAIL:], "reference": example.reference}
