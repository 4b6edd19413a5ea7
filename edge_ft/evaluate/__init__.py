"""Score a run, a bundle or a model on rows: the same code for torch and ONNX."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_ft.artifacts import RunFolder, kind_of
from edge_ft.config import TEXT_TASKS, EvalConfig
from edge_ft.data import Row, answer_ids, encode_rows, longest_sequence, read_rows
from edge_ft.errors import UsageError
from edge_ft.evaluate.few_shot import encode_few_shot
from edge_ft.evaluate.generation import Chooser, answer_metrics, choice_metrics, generate_answers
from edge_ft.evaluate.loading import LoadedSource, open_source
from edge_ft.evaluate.scoring import Answerer, counted, score, summary
from edge_ft.progress import Progress, Silent

__all__ = ["evaluate", "evaluate_loaded"]


def evaluate(source: str, config: EvalConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Loss, perplexity and task metrics of `source` on the rows of `config.data`.

    Returns:
        `rows` that were scored, `dropped` ones with nothing to score, those `cut` to the longest sequence and
        the `cut_tokens` they lost; `nll` (nats per target token), `perplexity`, `metrics` ({name: {value, low,
        high}}, 95% intervals over rows; see `summary` and `answer_metrics`), `shots`, `seconds`.

    Raises:
        UsageError: rows, source or options that cannot be used.
        AuditRefused: no row has anything to score.
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
    """What `evaluate` returns, but for the source, of anything that is open."""
    started = time.monotonic()
    rendering, tokenizer = opened.rendering, opened.tokenizer
    if config.shots:
        # The training length was chosen for rows without shots.
        longest = longest_sequence(config.max_length or opened.model_limit, opened.model_limit)
        rendering = replace(rendering, max_length=longest)
        examples = encode_few_shot(rendering, tokenizer, rows, shots)
    else:
        examples = encode_rows(rendering, tokenizer, rows)
    examples, counts = counted(examples, config.data, rendering.max_length, progress)
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
    asks = rendering.columns.kind == "messages" or bool(rendering.columns.prompt)  # rows of text alone do not
    if rendering.task in TEXT_TASKS and config.generate and asks:
        assert isinstance(opened.scorer, Answerer)
        answers = generate_answers(
            opened.scorer, tokenizer.decode, examples, config.max_new_tokens, opened.model_limit, progress
        )
        result["metrics"] |= answer_metrics(answers, progress)
        if rendering.answers and isinstance(opened.scorer, Chooser):
            choices = [answer_ids(rendering, tokenizer, answer) for answer in rendering.answers]
            result["metrics"] |= choice_metrics(opened.scorer, examples, choices, opened.model_limit, progress)
    return {
        "task": rendering.task,
        **counts,
        **result,
        "shots": config.shots,
        "seconds": round(time.monotonic() - started, 2),
    }


def _shot_rows(source: str, config: EvalConfig) -> Sequence[Row]:
    if config.shots_from is not None:
        return read_rows(config.shots_from)
    if kind_of(source) == "run":
        return read_rows(str(RunFolder(Path(source)).split("train")))
    raise UsageError(
        "--shots needs --shots-from FILE, e.g. the splits/train.jsonl of its run: a bundle or model brings no rows"
    )
