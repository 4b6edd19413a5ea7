"""What a tune writes into its run folder before and after the training."""

import importlib.util
import json
import platform
from importlib.metadata import version
from typing import Any

from edge_ft.artifacts import RunFolder
from edge_ft.config import as_plain
from edge_ft.files import write_json, write_jsonl, write_text
from edge_ft.progress import Progress
from edge_ft.quant.serialization import write_codes
from edge_ft.system import device_memory, peak_rss_bytes
from edge_ft.tune.checkpoint import OpenedRun, remove_checkpoint
from edge_ft.tune.command import reproducing_command
from edge_ft.tune.distributed import Processes
from edge_ft.tune.loop import Fit
from edge_ft.tune.prepare import Job
from edge_ft.tune.trainable_model import TrainableModel
from edge_ft.utf8 import read_utf8

__all__ = ["begin", "plot_losses", "write_report"]


def begin(run: RunFolder, job: Job, model: TrainableModel) -> None:
    """Write what the run folder holds before the first step; an interrupted run has the same already.

    Args:
        run: The folder, new or not.
        job: With all settings resolved.
        model: Its codes are written where they were chosen now.
    """
    config, base, prepared = job.config, job.base, job.prepared
    known = run.base() if (run.path / "base.json").is_file() else {}
    calibration = model.calibration.to_dict() if model.calibration is not None else known.get("calibration")
    for name, rows in prepared.rows.items():
        write_jsonl(run.split(name), [row.fields for row in rows])
    write_json(run.path / "rendering.json", prepared.rendering.to_dict())
    write_json(
        run.path / "base.json",
        {
            "model": base.name,
            "path": str(base.path.resolve()),
            "model_type": base.family.name,
            "content_sha256": base.content_sha256,
            "class_names": config.class_names,
            "format": config.base_format,
            "block_size": config.block_size,
            "calibration_rows": config.calibration_rows,
            "calibration": calibration,
            "codes_sha256": model.codes_sha256,
            "data_fingerprint": prepared.fingerprint,
        },
    )
    for file in job.tokenizer.files():
        write_text(run.tokenizer / file.name, read_utf8(file))
    run.write_settings(as_plain(config))
    if model.calibration is not None:
        write_codes(run.codes, model.peft_model.get_base_model())


def plot_losses(run: RunFolder, progress: Progress) -> None:
    """Draw loss.png: training and validation loss (nats per target token) over steps.

    Args:
        run: Its metrics.jsonl is read.
        progress: Gets a note if matplotlib is not installed; then nothing is drawn.
    """
    if importlib.util.find_spec("matplotlib") is None:
        progress.say("no loss.png: it needs pip install 'edge-ft[metrics]'")
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in read_utf8(run.path / "metrics.jsonl").splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, style in (("loss", "-"), ("validation_nll", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        axes.plot([step for step, _ in points], [loss for _, loss in points], style, label=key)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per target token")
    axes.legend()
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(run.path / "loss.png"))


def write_report(
    opened: OpenedRun,
    job: Job,
    model: TrainableModel,
    processes: Processes,
    fitted: Fit,
    evaluated: dict[str, Any],
    timings: dict[str, float],
) -> None:
    """Write files.json and report.json, which makes the run a finished one, and remove the checkpoint.

    Args:
        opened: The run folder.
        job: With all settings resolved.
        model: What was trained.
        processes: Those that trained together.
        fitted: The loop's result.
        evaluated: What `evaluate` returned.
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
        "trainable_parameters": sum(parameter.numel() for parameter in model.backend.parameters),
        "seconds": round(sum(timings.values()), 2),
        "timings": {stage: round(seconds, 2) for stage, seconds in timings.items()},
        "eval_rows": job.config.eval_rows,
        "steps": fitted.steps,
        "best_step": fitted.best_step,
        "stopped": fitted.stopped,
        "resumed_from_step": opened.resumed_from,
        "tokens_per_second": round(fitted.tokens / fitted.seconds, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": on_device.peak_bytes if on_device else None,
        **{key: value for key, value in evaluated.items() if key != "findings"},
        "seed": job.config.seed,
        "command": reproducing_command(as_plain(job.config) | run.settings(), processes.count),
        "device": str(device),
        "threads": job.config.threads,
        "processes": processes.count,
        "versions": {name: version(name) for name in ("edge-ft", "torch", "transformers", "peft")},
        "machine": platform.platform(),
    }
    run.seal_files(report)
    write_json(run.report_path, report)
    remove_checkpoint(run.path)
