"""The process of the `training` and `gpu` studies: prepares rows, measures the machine, or trains once.

`python -m edge_ft.bench.studies.race_worker` is started by `edge_ft.bench.studies.kept_jobs`.
"""

import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_ft.bench.worker import answer_job
from edge_ft.config import TuneConfig
from edge_ft.errors import require
from edge_ft.progress import Silent
from edge_ft.system import peak_rss_bytes

__all__ = ["main", "work"]

SGEMM_SECONDS = 1.5


def main() -> None:
    """Answer one job; see `edge_ft.bench.worker.answer_job`."""
    answer_job(work)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job.

    Args:
        job: `do` is prepare, sgemm, baseline, ours or gpu; the other keys are those that its function reads, and
            `started` (`time.monotonic()`).

    Returns:
        Of a training also `peak_rss_bytes` and `process_seconds`.

    Raises:
        MissingExtra: torch or PEFT is not installed.
    """
    result = {"prepare": _prepare, "sgemm": _sgemm, "baseline": _baseline, "ours": _ours, "gpu": _gpu}[job["do"]](job)
    if job["do"] in ("prepare", "sgemm"):
        return result
    return result | {"peak_rss_bytes": peak_rss_bytes(), "process_seconds": time.monotonic() - job["started"]}


def _require_libraries() -> None:
    """Name the missing extra before a module imports torch or PEFT."""
    require("torch", "train")
    from edge_ft.models.logging import silence_libraries

    with silence_libraries():
        require("peft", "train")


def _prepare(job: dict[str, Any]) -> dict[str, Any]:
    _require_libraries()
    from edge_ft.bench.studies.race_case import prepare_race

    return prepare_race(job)


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


def _baseline(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from edge_ft.bench.studies.baseline import train_baseline
    from edge_ft.models.logging import silence_libraries
    from edge_ft.tune.prepare import prepare_job

    torch.set_num_threads(job["threads"])
    settings = job["tune"] | {"seed": job["seed"], "epochs": job["epochs"]}
    prepared = prepare_job(TuneConfig(out=Path("unused"), **settings), Silent())
    config = prepared.config
    if config.eval_steps and not job["same_recipe"]:  # evaluated after as many rows as ours
        eval_steps = max(1, round(config.eval_steps * config.rows_at_once / job["batch_size"]))
        prepared = replace(prepared, config=replace(config, eval_steps=eval_steps))
    settings = {name: job[name] for name in ("learning_rate", "batch_size", "same_recipe", "weights")}
    with silence_libraries():
        return _trained(job, job["learning_rate"], train_baseline(prepared, **settings))


def _ours(job: dict[str, Any]) -> dict[str, Any]:
    import yaml

    from edge_ft.tune import tune

    run = tune(TuneConfig(**job["tune"], seed=job["seed"], out=Path(job["out"]), threads=job["threads"]))
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [line for line in lines if "validation_nll" in line]
    # The time to a loss includes that of choosing the codes.
    before = run.report()["calibration"] or {"seconds": 0.0, "cpu_seconds": 0.0}
    curve = [
        {"step": line["step"], **{key: line[key] + before[key] for key in ("seconds", "cpu_seconds")}}
        | {"nll": line["validation_nll"]}
        for line in evaluations
    ]
    tokens = sum(line.get("tokens", 0) for line in lines)
    settings = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
    found = {"curve": curve, "steps": evaluations[-1]["step"], "tokens": tokens, "config": settings}
    return _trained(job, settings["learning_rate"], found)


def _trained(job: dict[str, Any], learning_rate: float, found: dict[str, Any]) -> dict[str, Any]:
    wait_policy = os.environ.get("OMP_WAIT_POLICY")
    return {"seed": job["seed"], "learning_rate": learning_rate, **found, "wait_policy": wait_policy}


def _gpu(job: dict[str, Any]) -> dict[str, Any]:
    _require_libraries()
    from edge_ft.bench.studies.gpu_training import train

    return train(job)


if __name__ == "__main__":
    main()
