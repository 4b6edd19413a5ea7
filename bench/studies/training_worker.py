"""The training process: prepares the rows of a race, measures the machine, or trains one of the two, once.

`python -m edge_ft.bench.studies.training_worker` is started by `edge_ft.bench.subprocess_job` for the `training` study.
"""

import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from edge_ft.artifacts import atomic_file, write_text
from edge_ft.bench.worker import answer_job
from edge_ft.config import TuneConfig
from edge_ft.errors import UsageError, require
from edge_ft.progress import Silent
from edge_ft.system import peak_rss_bytes

if TYPE_CHECKING:
    from edge_ft.models.base_model import Base
    from edge_ft.tune.job import Job
    from edge_ft.tune.prepare import Prepared

__all__ = ["main", "work"]

LOOKS = 12
"""Looks at the held-out rows in a training, unless told otherwise."""
SGEMM_SECONDS = 1.5


def main() -> None:
    """Answer one job; see `edge_ft.bench.worker.answer_job`."""
    answer_job(work)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """What `job["do"]` names: prepare, sgemm, rival or ours."""
    return {"prepare": _prepare, "sgemm": _sgemm, "rival": _rival, "ours": _ours}[job["do"]](job)


def _config(job: dict[str, Any], **more: Any) -> TuneConfig:
    return TuneConfig(**{"out": Path("unused"), **job["tune"], **more})


def _job(config: TuneConfig) -> "Job":
    """What `tune` prepares before it loads weights."""
    from edge_ft.tune.job import prepare_job

    return prepare_job(config, Silent())


def _prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Write the rows that every training reads, and say what a training over them computes.

    Each seed trains on the same rows and is measured on the same ones, so that their curves compare.
    """
    import numpy as np

    from edge_ft.tune.loop import planned_steps
    from edge_ft.tune.prepare import write_splits

    require("torch", "train")
    from edge_ft.models.logging import silence_libraries

    with silence_libraries():
        require("peft", "train")
    from edge_ft.bench.studies.baseline import MODEL_CLASSES

    split = (1.0, 0.0, 0.0) if job["validation"] else (0.8, 0.2, 0.0)
    whole = _job(_config(job, data=job["data"], validation=job["validation"], split=split, seed=0)).prepared
    problem = whole.rendering.problem_type
    if whole.task not in MODEL_CLASSES or problem not in (None, "single_label_classification"):
        raise UsageError(f"the rival learns {' and '.join(MODEL_CLASSES)} of one label, not {problem or whole.task}")
    chosen = {}
    for name, wanted in (("train", job["train_rows"]), ("validation", job["eval_rows"])):
        order = np.random.default_rng(0).permutation(len(whole.rows[name]))[:wanted]
        chosen[name] = [whole.rows[name][index] for index in sorted(order)]
    write_splits(replace(whole, rows=chosen | {"test": []}), Path(job["rows"]))
    ours = _job(_config(job, task=whole.task))
    config, base, prepared = ours.config, ours.base, ours.prepared
    examples = prepared.examples["train"]
    tokens = sum(len(example.input_ids) for example in examples)
    targets = sum(sum(label != -100 for label in example.labels) for example in examples)
    model = base.path
    if job["same_recipe"]:
        model = _without_dropout(base.path, Path(job["folder"]) / "model")
        if job["weights"]:
            _write_weights(base, config, prepared, Path(job["weights"]))
    body, head = _linear_weights(base, prepared)
    hidden, wide = base.dims.hidden, base.dims.intermediate
    length = round(median(len(example.input_ids) for example in examples))
    return {
        "task": whole.task,
        "model": str(model.resolve()),
        "fingerprint": prepared.fingerprint,
        "rows": {name: len(prepared.examples[name]) for name in ("train", "validation")},
        "tokens_per_epoch": tokens,
        "targets_per_epoch": targets,
        "flops_per_token": 4 * (body + head * targets / tokens),
        "sgemm_shape": [config.rows_at_once * length, hidden, wide],
        "eval_steps": job["eval_steps"] or max(1, math.ceil(planned_steps(len(examples), config) / LOOKS)),
    }


def _linear_weights(base: "Base", prepared: "Prepared") -> tuple[int, int]:
    """Weights of the frozen linear layers that every token passes, and of those that only a target does."""
    import torch
    from transformers import AutoConfig
    from transformers.pytorch_utils import Conv1D

    from edge_ft.bench.studies.baseline import MODEL_CLASSES
    from edge_ft.quant.layers import is_within

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
    """The same model whose layers drop nothing out: two trainers draw other random numbers, and their curves part."""
    from transformers import AutoConfig

    settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    known = AutoConfig.from_pretrained(path).to_dict()  # with what its class has by default
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


def _write_weights(base: "Base", config: TuneConfig, prepared: "Prepared", file: Path) -> None:
    """What the codes of our base stand for, in float: the rival then trains over the very same model."""
    from safetensors.numpy import save_file

    from edge_ft.models.loading import ModelSpec, load_model
    from edge_ft.quant.blockwise import dequantize
    from edge_ft.quant.layers import QuantEmbedding, QuantLinear

    model = load_model(
        ModelSpec(base, prepared.task, config.base_format, config.block_size, prepared.rendering.labels, 0)
    )
    weights = {
        f"{name}.weight": dequantize(module.codes())
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear | QuantEmbedding)
    }
    with atomic_file(file) as temporary:
        save_file(weights, temporary)


def _sgemm(job: dict[str, Any]) -> dict[str, Any]:
    """float32 GFLOP/s of [M, K] x [K, N], a layer's product in a training step: the best of many."""
    import torch

    torch.set_num_threads(job["threads"])
    m, k, n = job["shape"]
    x, weight = torch.randn(m, k), torch.randn(n, k)
    best, ends = math.inf, time.perf_counter() + SGEMM_SECONDS
    while (began := time.perf_counter()) < ends:
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - began)
    return {"sgemm_gflops": 2 * m * k * n / best / 1e9}


def _rival(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from edge_ft.bench.studies.baseline import train_rival

    torch.set_num_threads(job["threads"])
    ours = _job(_config(job, seed=job["seed"], epochs=job["epochs"]))
    config = ours.config
    if config.eval_steps and not job["same_recipe"]:  # it is looked at after as many rows as ours
        eval_steps = max(1, round(config.eval_steps * config.rows_at_once / job["batch_size"]))
        config = replace(config, eval_steps=eval_steps)
    found = train_rival(
        ours.base, ours.prepared, ours.tokenizer.pad_id, config, learning_rate=job["learning_rate"], job=job
    )
    return _result(job, job["learning_rate"], found)


def _ours(job: dict[str, Any]) -> dict[str, Any]:
    import yaml

    from edge_ft.tune import tune

    config = _config(job, seed=job["seed"], out=Path(job["out"]), threads=job["threads"])
    run = tune(config)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    looks = [line for line in lines if "validation_nll" in line]
    # What choosing the codes took is part of getting to a loss.
    before = run.report()["calibration"] or {"seconds": 0.0, "cpu_seconds": 0.0}
    curve = [
        {"step": look["step"], **{key: look[key] + before[key] for key in ("seconds", "cpu_seconds")}}
        | {"nll": look["validation_nll"]}
        for look in looks
    ]
    tokens = sum(line.get("tokens", 0) for line in lines)
    settings = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
    found = {"curve": curve, "steps": looks[-1]["step"], "tokens": tokens, "config": settings}
    return _result(job, settings["learning_rate"], found)


def _result(job: dict[str, Any], learning_rate: float, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "seed": job["seed"],
        "learning_rate": learning_rate,
        **found,
        "peak_rss_bytes": peak_rss_bytes(),
        "process_seconds": time.monotonic() - job["started"],
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }


if __name__ == "__main__":
    main()
