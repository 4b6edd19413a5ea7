"""What a run came to: losses, metrics, over-fitting, guards, and a few answers before and after."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from edge_ft.config import TEXT_TASKS, TuneConfig
from edge_ft.data import Example, Rendering, TextTokenizer, answer_ids
from edge_ft.evaluate.generation import Answer, Chooser, answer_metrics, choice_metrics, generate_answers
from edge_ft.evaluate.metrics import Metric
from edge_ft.evaluate.scoring import Answerer, RowScores, prediction_text, score, summary
from edge_ft.progress import Progress, Silent
from edge_ft.system import release_memory
from edge_ft.tune.loop import Fit
from edge_ft.tune.prepare import Prepared

__all__ = ["results"]

SAMPLES = 3
ANSWERS = 16
"""Rows whose generated answers are scored: one batch of the base, and one of the tuned model."""
BATCH_COST = 3
"""A batch of so many takes as long as this many answers alone (SmolLM2, one slow core: 13 s a batch)."""
SAMPLE_TOKENS = 32
PROMPT_TAIL = 400
"""Characters of a prompt that a sample shows: its end, where the question is."""
OVERFITTING_ROWS = 256
OVERFITTING_GAP = 0.25
"""Share of the train loss by which the validation loss may lie above it before it is said."""


def results(
    scorer: Answerer,
    base: Callable[[], AbstractContextManager[Any]],
    fitted: Fit,
    prepared: Prepared,
    tokenizer: TextTokenizer,
    model_limit: int,
    config: TuneConfig,
    progress: Progress,
) -> dict[str, Any]:
    """`nll`, `metrics`, `overfitting`, `guards`, `answers` and `samples` of report.json.

    Validation rows chose the weights that `scorer` holds; test rows are read here, once. Of those that a model
    answers in text, the answers to the first `ANSWERS` are scored (`answers`, else null).

    Args:
        scorer: The tuned model, in float32.
        base: Inside the context that this gives, `scorer` is the untuned base.
        model_limit: Positions that the model has.
    """

    def scored(examples: Sequence[Example], stage: str) -> RowScores:
        return score(
            scorer,
            examples,
            task=prepared.task,
            pad_id=tokenizer.pad_id,
            batch_size=config.rows_at_once,
            progress=progress,
            stage=stage,
        )

    scores = {"validation_base": fitted.base, "validation": fitted.best}
    embeds = prepared.task == "feature-extraction"  # a checkpoint keeps losses, not vectors
    if config.compute == "bf16" or (embeds and None in (fitted.base.vectors, fitted.best.vectors)):
        # The loop's own scores are in the numbers of its steps; reported is what export will be held to.
        with base():
            scores["validation_base"] = scored(prepared.examples["validation"], "validation rows, base, in float32")
        scores["validation"] = scored(prepared.examples["validation"], "validation rows, best, in float32")
    if prepared.examples["test"]:
        with base():
            scores["test_base"] = scored(prepared.examples["test"], "test rows, base")
        scores["test"] = scored(prepared.examples["test"], "test rows, tuned")
    metrics: dict[str, dict[str, Any]] = {}
    for column, found in scores.items():
        examples = prepared.examples[column.removesuffix("_base")]
        for name, value in summary(found, examples, prepared.task, prepared.rendering.labels)["metrics"].items():
            metrics.setdefault(name, {})[column] = value

    train = prepared.examples["train"]
    count = min(len(train), len(prepared.examples["validation"]), OVERFITTING_ROWS)
    chosen = sorted(np.random.default_rng(config.seed).permutation(len(train))[:count].tolist())
    train_nll = scored([train[index] for index in chosen], "train rows").mean_nll
    overfitting = _overfitting(train_nll, scores["validation"].mean_nll, fitted, len(train), config, progress)

    split = "test" if "test" in scores else "validation"
    answers: dict[str, Any] | None = None
    if prepared.task in TEXT_TASKS:
        examples = prepared.examples[split][:ANSWERS]
        samples, answers = _answers(scorer, base, examples, tokenizer, prepared.rendering, model_limit, progress)
        answers = None if answers is None else {"split": split, **answers}
    else:
        examples = prepared.examples[split][:SAMPLES]
        before, after = scores[f"{split}_base"], scores[split]
        samples = [
            {
                **_shown(example, tokenizer),
                "base": prediction_text(before.predicted[index], prepared.rendering, tokenizer),
                "tuned": prediction_text(after.predicted[index], prepared.rendering, tokenizer),
            }
            for index, example in enumerate(examples)
        ]
    return {
        "nll": {
            "base": scores["validation_base"].mean_nll,
            "best": scores["validation"].mean_nll,
            "last": fitted.last_nll if np.isfinite(fitted.last_nll) else None,
            **{name: scores[name].mean_nll if name in scores else None for name in ("test_base", "test")},
        },
        "metrics": metrics,
        "overfitting": overfitting,
        "guards": {"skipped": fitted.skipped, "rate_factor": fitted.rate_factor},
        "answers": answers,
        "samples": [{"split": split, **sample} for sample in samples],
    }


def _overfitting(
    train_nll: float, best: float, fitted: Fit, rows: int, config: TuneConfig, progress: Progress
) -> dict[str, Any]:
    """Train and validation loss of the best weights, said where they are far apart."""
    gap = best - train_nll
    epoch = fitted.best_step * config.rows_at_once * config.gradient_accumulation / rows
    if gap > OVERFITTING_GAP * train_nll:
        progress.say(
            f"over-fitted: at its best (epoch {epoch:.1f}) the train loss is {train_nll:.4f}, the validation loss "
            f"{best:.4f}: more rows, a lower --rank or --dropout may help"
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
    scorer: Answerer,
    base: Callable[[], AbstractContextManager[Any]],
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    rendering: Rendering,
    model_limit: int,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Greedy answers of the base and of the tuned model: a few as samples, and the figures of all."""
    examples = [example for example in examples if example.prompt_length and example.shared_positions < model_limit]
    if not examples:
        return [], None
    answers: dict[str, list[Answer]] = {}
    chosen: dict[str, dict[str, Metric]] = {}
    choices = [answer_ids(rendering, tokenizer, answer) for answer in rendering.answers]
    for name, context in (("base", base), ("tuned", nullcontext)):
        with context():
            answers[name] = generate_answers(
                scorer, tokenizer.decode, examples, SAMPLE_TOKENS, model_limit, progress, f"answers, {name}"
            )
            if choices and isinstance(scorer, Chooser):
                chosen[name] = choice_metrics(scorer, examples, choices, model_limit, progress, f"choices, {name}")
    release_memory()  # ROUGE brings libraries of 160 MB, which would come on top of what answers took
    metrics: dict[str, dict[str, Any]] = {}
    for name, texts in answers.items():
        found = answer_metrics(texts, progress if name == "base" else Silent()) | chosen.get(name, {})
        for metric, value in found.items():
            metrics.setdefault(metric, {"base": None, "tuned": None})[name] = value
    samples = []
    for index, example in enumerate(examples[:SAMPLES]):
        sample = {**_shown(example, tokenizer), **{name: texts[index].text for name, texts in answers.items()}}
        samples.append(sample)
        progress.say(
            f"row {example.row}: {sample['reference']!r} is right; base {sample['base']!r}, tuned {sample['tuned']!r}"
        )
    return samples, {"rows": len(examples), "max_new_tokens": SAMPLE_TOKENS, "metrics": metrics}


def _shown(example: Example, tokenizer: TextTokenizer) -> dict[str, Any]:
    """What was asked, and the right answer."""
    prompt = tokenizer.decode(example.input_ids[: example.prompt_length], skip_special_tokens=False)
    return {"row": example.row, "prompt": prompt[-PROMPT_TAIL:], "reference": example.reference}
