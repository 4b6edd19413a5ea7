"""Evaluate a run, a bundle or a model on rows: the same code for torch and ONNX."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_ft.artifacts import RunFolder, kind_of
from edge_ft.config import TEXT_TASKS, EvalConfig
from edge_ft.data import Row, Rows, encode_rows, find_unused, longest_sequence, read_rows
from edge_ft.errors import UsageError
from edge_ft.evaluate.few_shot import encode_few_shot
from edge_ft.evaluate.findings import Scored, answer_findings, row_findings, score_findings
from edge_ft.evaluate.generation import answer_metrics, choice_metrics, generate_answers
from edge_ft.evaluate.loading import LoadedSource, open_source
from edge_ft.evaluate.scoring import Batching, drop_unscorable, score, summary
from edge_ft.progress import Progress, Silent

__all__ = ["evaluate", "evaluate_loaded"]

CUT_ADVICE = "give --max-new-tokens {tokens} to compare whole answers"


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
    read = read_rows(config.data)
    if isinstance(read, Rows) and read.comments:
        progress.say(f"{config.data}: {len(read.comments)} lines are comments and are left out")
    rows = read[: config.limit]
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
        `summary` and `answer_metrics`); the `findings` (see `find_unused` and `score_findings`); the number of `shots`;
        `seconds`.

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
    unused = find_unused(rows, rendering.columns, {example.row: example.unread for example in examples})
    examples, counts = drop_unscorable(examples, config.data, rendering.max_length, progress)
    scores = score(
        opened.scorer, examples, Batching(rendering.task, tokenizer.pad_id, config.batch_size), progress, "score"
    )
    result = summary(scores, examples, rendering.task, rendering.labels)
    findings = [
        *(finding.plain(file=config.data) for finding in unused),
        *row_findings(examples, rendering, tokenizer, config.data),
        *score_findings(Scored("scored", "model", examples, result["metrics"], scores), rendering),
    ]
    has_prompts = rendering.columns.kind == "messages" or bool(rendering.columns.prompt)
    if rendering.task in TEXT_TASKS and config.generate and has_prompts:
        limit = config.max_new_tokens
        answers = generate_answers(opened, examples, limit, progress)
        found = answer_metrics(answers, progress) | choice_metrics(opened, examples, progress)
        findings += answer_findings(Scored("scored", "model", examples, found), answers, limit, CUT_ADVICE)
        result["metrics"] |= found
    return {
        "task": rendering.task,
        **counts,
        **result,
        "findings": findings,
        "shots": config.shots,
        "seconds": round(time.monotonic() - started, 2),
    }


def _shot_rows(source: str, config: EvalConfig) -> Sequence[Row]:
    if config.shots_from is not None:
        return read_rows(config.shots_from)
    if kind_of(source) == "run":
        return read_rows(str(RunFolder(Path(source)).split("train")))
    raise UsageError(
        "--shots needs --shots-from FILE, e.g. the splits/train.jsonl of its run: a bundle or model has no rows"
    )
