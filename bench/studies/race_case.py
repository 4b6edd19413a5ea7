"""The rows of a race of two trainers, and what a training over them computes."""

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from edge_ft.bench.studies.baseline import MODEL_CLASSES
from edge_ft.config import TuneConfig
from edge_ft.errors import UsageError
from edge_ft.files import atomic_file, write_jsonl, write_text
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.progress import Silent
from edge_ft.quant.blockwise import Grid, dequantize
from edge_ft.quant.conversion import is_within
from edge_ft.quant.layers import QuantEmbedding, QuantLinear
from edge_ft.tune.prepare import Job, prepare_job
from edge_ft.tune.schedule import planned_steps
from edge_ft.tune.splits import SPLITS

__all__ = ["prepare_race"]

EVALUATIONS = 12
"""Points of the baseline's curve, without --eval-steps."""
SHARES = {
    (True, True): (1.0, 0.0, 0.0),
    (True, False): (0.9, 0.0, 0.1),
    (False, True): (0.9, 0.1, 0.0),
    (False, False): (0.8, 0.1, 0.1),
}
"""Shares of --data, by whether --validation and --test are given."""


def prepare_race(job: dict[str, Any]) -> dict[str, Any]:
    """Write the rows that every training reads, and count what a training over them computes.

    Each seed trains on the same rows and is scored on the same ones, so that their curves compare. The validation
    rows are those that a trainer may choose by, the test rows those that both are scored on.

    Args:
        job: `tune` (our settings), `data`, `validation`, `test`, `train_rows`, `validation_rows`, `eval_rows`,
            `eval_steps`, `rows` (folder to write to) and `same_recipe`; with the same recipe also `folder`, for a base
            without dropout, and `weights`, the file for the float weights that our codes stand for, or None.

    Returns:
        `task`, `model` (path), `fingerprint`, `rows`, `tokens_per_epoch`, `targets_per_epoch`, `flops_per_token`,
        `sgemm_shape` ([M, K, N] of a layer's product in a step) and `eval_steps`.

    Raises:
        UsageError: the baseline does not learn this task, or no row is left to hold out.
    """
    split = SHARES[job["validation"] is not None, job["test"] is not None]
    settings = {"split": split, "seed": 0} | {name: job[name] for name in ("data", "validation", "test")}
    whole = prepare_job(TuneConfig(out=Path("unused"), **job["tune"] | settings), Silent()).prepared
    problem = whole.rendering.problem_type
    if whole.task not in MODEL_CLASSES or problem not in (None, "single_label_classification"):
        raise UsageError(f"the baseline learns {' and '.join(MODEL_CLASSES)} of one label, not {problem or whole.task}")
    if not all(whole.counts[name] for name in SPLITS):
        raise UsageError(f"{job['data']} has too few rows to hold out some: give more, or --validation and --test")
    chosen = job["validation_rows"] or job["eval_rows"]
    for name, wanted in zip(SPLITS, (job["train_rows"], chosen, job["eval_rows"]), strict=True):
        order = np.random.default_rng(0).permutation(len(whole.rows[name]))[:wanted]
        write_jsonl(Path(job["rows"]) / f"{name}.jsonl", [whole.rows[name][index].fields for index in sorted(order)])
    ours = prepare_job(TuneConfig(out=Path("unused"), **job["tune"] | {"task": whole.task}), Silent())
    model = ours.base.path
    if job["same_recipe"]:
        model = _without_dropout(model, Path(job["folder"]) / "model")
        if job["weights"]:
            _write_weights(ours, Path(job["weights"]))
    return {
        "task": whole.task,
        "model": str(model.resolve()),
        "fingerprint": ours.prepared.fingerprint,
        "rows": ours.prepared.counts,
        **_work(ours),
        "eval_steps": job["eval_steps"] or _eval_steps(ours),
    }


def _eval_steps(job: Job) -> int:
    return max(1, math.ceil(planned_steps(len(job.prepared.examples["train"]), job.config) / EVALUATIONS))


def _work(job: Job) -> dict[str, Any]:
    """Count the tokens of an epoch, and the FLOPs of a token in LoRA training.

    Returns:
        The figures. A frozen weight costs 2 FLOP forward and 2 for the gradient of its input.
    """
    examples = job.prepared.examples["train"]
    tokens = sum(len(example.input_ids) for example in examples)
    targets = sum(sum(label != -100 for label in example.labels) for example in examples)
    body, head = _linear_weights(job)
    length = round(median(len(example.input_ids) for example in examples))
    return {
        "tokens_per_epoch": tokens,
        "targets_per_epoch": targets,
        "flops_per_token": 4 * (body + head * targets / tokens),
        "sgemm_shape": [job.config.rows_at_once * length, job.base.dims.hidden, job.base.dims.intermediate],
    }


def _linear_weights(job: Job) -> tuple[int, int]:
    """How many weights the frozen linear layers have that every token passes, and those that only a target does."""
    base, prepared = job.base, job.prepared
    settings = AutoConfig.from_pretrained(base.path)
    if not base.family.decoder:
        settings.num_labels = len(prepared.rendering.labels)
    with torch.device("meta"):
        model = MODEL_CLASSES[prepared.task].from_config(settings)
    sizes = {False: 0, True: 0}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            sizes[is_within(name, base.family.heads[prepared.task])] += module.weight.numel()
    return sizes[False], sizes[True]


def _without_dropout(path: Path, folder: Path) -> Path:
    """Copy a model, with all dropout set to 0: the trainers draw other random numbers, so dropout moves their curves.

    Returns:
        `folder`, where the weights are linked to; `path` if the model has no dropout.
    """
    settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    known = AutoConfig.from_pretrained(path).to_dict()  # with the defaults of its class
    dropouts = {
        key: 0.0
        for key, value in known.items()
        if isinstance(value, float) and value and key.endswith(("dropout", "pdrop", "dropout_prob", "dropout_rate"))
    }
    if not dropouts:
        return path
    for file in path.iterdir():
        if file.name != "config.json" and not (folder / file.name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file.name).symlink_to(file.resolve())
    write_text(folder / "config.json", json.dumps(settings | dropouts, indent=2))
    return folder


def _write_weights(job: Job, file: Path) -> None:
    """Write the float weights that our codes stand for, so that the baseline trains over the very same function."""
    config, prepared = job.config, job.prepared
    model = load_model(
        ModelSpec(job.base, prepared.task, config.frozen_format, Grid(config.block_size), prepared.rendering.labels, 0)
    )
    weights = {
        f"{name}.weight": dequantize(module.codes())
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear | QuantEmbedding)
    }
    with atomic_file(file) as temporary:
        save_file(weights, temporary)
