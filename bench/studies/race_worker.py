"""The process of the `training`, `gpu` and `shipping` studies: prepares rows, measures the machine, trains or scores.

`python -m edge_ft.bench.studies.race_worker` is started by `edge_ft.bench.studies.kept_jobs`.
"""

import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_ft.bench.worker import answer_job, leave_openmp_alone
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
        job: `do` is prepare, sgemm, baseline, ours, bundle, gpu, or a function of `shipping_jobs`; the other keys are
            those that it reads, and `started` (`time.monotonic()`).

    Returns:
        Of a training also `peak_rss_bytes` and `process_seconds`.

    Raises:
        MissingExtra: torch or PEFT is not installed.
    """
    own = {"prepare": _prepare, "bundle": _bundle, "sgemm": _sgemm, "gpu": _gpu}
    own |= {"baseline": _baseline, "ours": _ours}
    result = own.get(job["do"], _shipping)(job)
    if job["do"] in ("prepare", "sgemm", "ours", "bundle"):
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
    """GFLOP/s of [M, K] x [K, N], a layer's product in a training step, in float32 and where there is hardware bf16."""
    import torch

    from edge_ft.models.products import choose_library
    from edge_ft.quant.devices import has_bf16

    torch.set_num_threads(job["threads"])
    choose_library(torch)  # the machine's limit is that of the faster library
    bf16 = _gflops(job["shape"], torch.bfloat16) if has_bf16(torch.device("cpu")) else None
    return {"sgemm_gflops": _gflops(job["shape"], torch.float32), "bf16_gflops": bf16}


def _gflops(shape: list[int], dtype: Any) -> float:
    """The best of many."""
    import torch

    m, k, n = shape
    x, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    best, ends = math.inf, time.perf_counter() + SGEMM_SECONDS
    while (began := time.perf_counter()) < ends:
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - began)
    return 2 * m * k * n / best / 1e9


def _baseline(job: dict[str, Any]) -> dict[str, Any]:
    leave_openmp_alone()
    import torch

    from edge_ft.bench.studies.baseline import Plain, train_baseline
    from edge_ft.models.logging import silence_libraries
    from edge_ft.tune.prepare import prepare_job

    torch.set_num_threads(job["threads"])
    settings = job["tune"] | {"seed": job["seed"], "epochs": job["epochs"], "eval_steps": job["eval_steps"]}
    prepared = prepare_job(TuneConfig(out=Path("unused"), **settings), Silent())
    config = prepared.config
    if config.eval_steps and not job["same_recipe"]:  # evaluated after as many rows as ours
        eval_steps = max(1, round(config.eval_steps * config.passes * config.rows_at_once / job["batch_size"]))
        prepared = replace(prepared, config=replace(config, eval_steps=eval_steps))
    plain = Plain(**{name: job[name] for name in ("learning_rate", "batch_size", "max_minutes")})
    with silence_libraries():
        recipe = {"weights": job["weights"]} if job["same_recipe"] else {"plain": plain}
        found = train_baseline(prepared, job["started"], **recipe)
    return _trained(job, {"learning_rate": job["learning_rate"], **found})


def _ours(job: dict[str, Any]) -> dict[str, Any]:
    _require_libraries()
    from edge_ft.bench.studies.ours import read_run

    return _trained(job, read_run(job))


def _bundle(job: dict[str, Any]) -> dict[str, Any]:
    """Export a model as it is to a bundle that can learn."""
    _require_libraries()
    from edge_ft.config import ExportConfig
    from edge_ft.export import export

    settings = ExportConfig(out=Path(job["out"]), weights=job["weights"], threads=job["threads"], trainable=True)
    return {"bytes": export(job["model"], settings, Silent()).size_bytes}


def _trained(job: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    return {"seed": job["seed"], **found, "wait_policy": os.environ.get("OMP_WAIT_POLICY")}


def _shipping(job: dict[str, Any]) -> dict[str, Any]:
    if job["do"] == "train_usual":
        leave_openmp_alone()
    _require_libraries()
    from edge_ft.bench.studies import shipping_jobs

    return dict(getattr(shipping_jobs, job["do"])(job))


def _gpu(job: dict[str, Any]) -> dict[str, Any]:
    _require_libraries()
    from edge_ft.bench.studies.gpu_training import train

    return train(job)


if __name__ == "__main__":
    main()
