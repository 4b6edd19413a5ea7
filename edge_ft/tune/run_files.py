"""What a tune writes into its run folder before and after the training."""

import platform
import time
from typing import Any

from edge_ft.artifacts import RunFolder
from edge_ft.config import as_plain
from edge_ft.evaluate.kept_scores import write_scores
from edge_ft.files import write_json, write_jsonl, write_text
from edge_ft.system import device_memory, peak_rss_bytes
from edge_ft.tune.backend import count_trained
from edge_ft.tune.checkpoint import remove_checkpoint
from edge_ft.tune.command import reproducing_command
from edge_ft.tune.engine import TrainableModel
from edge_ft.tune.loop import Fit
from edge_ft.tune.opening import OpenedRun
from edge_ft.tune.page import page_of_run
from edge_ft.tune.prepare import Job
from edge_ft.tune.processes import Processes
from edge_ft.utf8 import read_json, read_utf8

__all__ = ["begin", "write_report"]


def begin(run: RunFolder, job: Job, model: TrainableModel) -> None:
    """Write what the run folder holds before the first step; an interrupted run has the same already.

    Args:
        run: The folder, new or not.
        job: With all settings resolved.
        model: Its codes are written where they were chosen now.
    """
    config, base, prepared = job.config, job.base, job.prepared
    known = run.base() if run.base_path.is_file() else {}
    calibration = model.calibration.to_dict() if model.calibration is not None else known.get("calibration")
    for name, rows in prepared.rows.items():
        write_jsonl(run.split(name), [row.fields for row in rows])
    write_json(run.path / "rendering.json", prepared.rendering.to_dict())
    write_json(
        run.base_path,
        {
            "model": base.name,
            "path": str(base.path.resolve()),
            "model_type": base.family.name,
            "content_sha256": base.content_sha256,
            "class_names": config.class_names,
            "format": config.frozen_format,
            **model.grid.to_dict(),
            "calibration_rows": config.calibration_rows,
            "calibration": calibration,
            "codes_sha256": model.codes_sha256,
            "data_fingerprint": prepared.fingerprint,
        },
    )
    if config.vocabulary == "rows":  # with these the base can be cut again where it is gone
        write_text(run.vocabulary, read_utf8(base.path / run.vocabulary.name))
    for file in job.tokenizer.files():
        write_text(run.tokenizer / file.name, read_utf8(file))
    run.write_settings(as_plain(config))
    if model.calibration is not None:
        model.write_codes(run.codes)


def write_report(
    opened: OpenedRun,
    job: Job,
    model: TrainableModel,
    processes: Processes,
    fitted: Fit,
    evaluated: dict[str, Any],
    timings: dict[str, float],
) -> None:
    """Write scores and report.html, files.json, and report.json, which ends the run; remove the checkpoint.

    Args:
        opened: The run folder.
        job: With all settings resolved.
        model: What was trained.
        processes: Those that trained together.
        fitted: The loop's result.
        evaluated: What `edge_ft.tune.report.results` returned, and what else the report says of what was trained.
        timings: Seconds of each stage of this process; those of the interrupted run are added.
    """
    run, device = opened.folder, processes.device
    if opened.checkpoint is not None:
        timings = {"before resuming": opened.checkpoint.state.elapsed, **timings}
    on_device = device_memory(device)
    report = {
        "model": job.base.name,
        "family": job.base.family.name,
        "task": job.prepared.task,
        "rows": job.prepared.counts,
        "calibration": run.base()["calibration"],
        "findings": [*job.prepared.findings, *evaluated.get("findings", ())],
        "trainable_parameters": count_trained(model.backend),
        "seconds": round(sum(timings.values()), 2),
        "timings": {stage: round(seconds, 2) for stage, seconds in timings.items()},
        "eval_rows": job.config.eval_rows,
        "steps": fitted.steps,
        "best_step": fitted.best_step,
        "stopped": fitted.stopped,
        "resumed_from_step": opened.resumed_from,
        "tokens_per_second": round(fitted.tokens / fitted.seconds, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": on_device.peak_bytes if on_device else None,
        **{key: value for key, value in evaluated.items() if key != "findings"},
        "seed": job.config.seed,
        "command": reproducing_command(as_plain(job.config) | run.settings(), processes.count),
        "device": str(device),
        "threads": job.config.threads,
        "processes": processes.count,
        "machine": platform.platform(),
    }
    plan = read_json(run.plan_path) if run.plan_path.is_file() else None
    write_text(run.page_path, page_of_run(report, run.metrics(), plan, with_samples=job.config.include_samples))
    if job.config.compute == "fp32" and job.prepared.task != "feature-extraction":  # as the export computes
        scores = {"base": fitted.base, "tuned": fitted.best}
        write_scores(run.scores, job.prepared.examples["validation"], scores)
    run.seal_files(report)
    write_json(run.report_path, report)
    remove_checkpoint(run.path)
