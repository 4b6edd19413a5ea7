"""Evaluate a run, a bundle or a model on rows: the same code for torch and ONNX."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_ft.artifacts import RunFolder, kind_of
from edge_ft.config import TEXT_TASKS, EvalConfig
from edge_ft.data import Example, Row, answer_ids, encode_rows, longest_sequence, read_rows
from edge_ft.errors import UsageError
from edge_ft.evaluate.few_shot import encode_few_shot
from edge_ft.evaluate.generation import Chooser, answer_metrics, choice_metrics, generate_answers
from edge_ft.evaluate.loading import LoadedSource, open_source
from edge_ft.evaluate.metrics import Metric
from edge_ft.evaluate.scoring import Answerer, drop_unscorable, score, summary
from edge_ft.progress import Progress, Silent

__all__ = ["evaluate", "evaluate_loaded"]


def evaluate(source: str, config: EvalConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Evaluate `source` on the rows of `config.data`.

    Args:
        source: Folder of a run or bundle, or a model: hub id, folder or GGUF file.
        config: Rows and options.
        progress: Receives the steps.

    Returns:
        `source`, and the fields of `evaluate_loaded`.

    Raises:
        UsageError: the rows, the source or the options cannot be used.
        AuditRefused: no row has an answer to score.
    """
    progress = progress or Silent()
    progress.say(f"reading {config.data}")
    rows = read_rows(config.data)[: config.limit]
    shots = _shot_rows(source, config)[: config.shots] if config.shots else []
    return {
        "source": source,
        **evaluate_loaded(open_source(source, config, rows, progress), rows, config, progress, shots),
    }


def evaluate_loaded(
    opened: LoadedSource, rows: Sequence[Row], config: EvalConfig, progress: Progress, shots: Sequence[Row] = ()
) -> dict[str, Any]:
    """Evaluate an opened source on rows.

    Args:
        opened: The model, and how it reads rows.
        rows: Rows to score.
        config: Options; `config.data` only names the rows in messages.
        progress: Receives the steps.
        shots: Solved rows that are put before each prompt.

    Returns:
        `task`; the number of scored `rows`, of `dropped` and `cut` ones, and of `cut_tokens`; `nll` (nats per target
        token), `perplexity` and their intervals; `metrics` ({name: {value, low, high}}, 95% intervals over rows, see
        `summary` and `answer_metrics`); the number of `shots`; `seconds`.

    Raises:
        AuditRefused: no row has an answer to score.
    """
    started = time.monotonic()
    rendering, tokenizer = opened.rendering, opened.tokenizer
    if config.shots:
        # The training's longest sequence was chosen for rows without shots.
        longest = longest_sequence(config.max_length or opened.model_limit, opened.model_limit)
        rendering = replace(rendering, max_length=longest)
        examples = encode_few_shot(rendering, tokenizer, rows, shots)
    else:
        examples = encode_rows(rendering, tokenizer, rows)
    examples, counts = drop_unscorable(examples, config.data, rendering.max_length, progress)
    scores = score(
        opened.scorer,
        examples,
        task=rendering.task,
        pad_id=tokenizer.pad_id,
        batch_size=config.batch_size,
        progress=progress,
        stage="score",
    )
    result = summary(scores, examples, rendering.task, rendering.labels)
    has_prompts = rendering.columns.kind == "messages" or bool(rendering.columns.prompt)
    if rendering.task in TEXT_TASKS and config.generate and has_prompts:
        result["metrics"] |= _metrics_of_answers(opened, examples, config.max_new_tokens, progress)
    return {
        "task": rendering.task,
        **counts,
        **result,
        "shots": config.shots,
        "seconds": round(time.monotonic() - started, 2),
    }


def _metrics_of_answers(
    opened: LoadedSource, examples: Sequence[Example], max_new_tokens: int, progress: Progress
) -> dict[str, Metric]:
    """Return the metrics of generated answers, and of choices where the training rows had few different answers."""
    scorer, tokenizer, limit = opened.scorer, opened.tokenizer, opened.model_limit
    assert isinstance(scorer, Answerer)
    answers = generate_answers(scorer, tokenizer.decode, examples, max_new_tokens, limit, progress)
    metrics = answer_metrics(answers, progress)
    if opened.rendering.answers and isinstance(scorer, Chooser):
        choices = [answer_ids(opened.rendering, tokenizer, answer) for answer in opened.rendering.answers]
        metrics |= choice_metrics(scorer, examples, choices, limit, progress)
    return metrics


def _shot_rows(source: str, config: EvalConfig) -> Sequence[Row]:
    if config.shots_from is not None:
        return read_rows(config.shots_from)
    if kind_of(source) == "run":
        return read_rows(str(RunFolder(Path(source)).split("train")))
    raise UsageError(
        "--shots needs --shots-from FILE, e.g. the splits/train.jsonl of its run: a bundle or model has no rows"
    )
