"""The steps of a tune, in their order; `edge_ft.tune.tune` calls them."""

import platform
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from torch import OutOfMemoryError

from edge_ft.artifacts import RunFolder, disk_full, write_json, write_text
from edge_ft.config import TuneConfig, as_plain
from edge_ft.errors import Interrupted, UsageError, WillNotFit, require
from edge_ft.models.base_model import find_base
from edge_ft.progress import Progress, heartbeat
from edge_ft.quant.serialization import write_codes
from edge_ft.system import Available, device_memory, peak_rss_bytes, release_memory, use_threads
from edge_ft.tune.checkpoint import Checkpoint, has_checkpoint, read_checkpoint, remove_checkpoint, write_checkpoint
from edge_ft.tune.distributed import Processes
from edge_ft.tune.interrupt import Interruption
from edge_ft.tune.job import Job, prepare_job
from edge_ft.tune.loop import Backend, Callbacks, Fit, TrainingRows, fit
from edge_ft.tune.metrics_log import Metrics
from edge_ft.tune.opening import OpenedRun, identity_of
from edge_ft.tune.plan import make_plan, refuse_large_base, resolve_memory
from edge_ft.tune.prepare import write_splits
from edge_ft.tune.report import results
from edge_ft.tune.trainable_model import TrainableModel, load_trainable_model

__all__ = ["begin", "estimate", "evaluate", "explain_stop", "load", "prepare", "train", "write_report"]


def prepare(config: TuneConfig, opened: OpenedRun, processes: Processes, progress: Progress) -> Job:
    """Find the base and prepare the rows: those of the interrupted run, if there is one.

    Args:
        config: As the user gave it.
        opened: The run folder.
        processes: Those that train together.
        progress: Gets what was found in the rows.

    Returns:
        The job.

    Raises:
        UsageError: model, rows or settings are not those of the interrupted run, or do not fit each other.
        ModelError: no such model, or one that is not supported.
        DataError: rows that cannot be read or mapped.
        AuditRefused: the rows would train nothing, or overlap between splits.
    """
    completed = opened.complete(config)
    completed = replace(completed, threads=use_threads(completed.threads))
    with processes.main_first():  # a GGUF file is converted once
        # For the requested task, not the saved one: another model is to be refused as such.
        base = find_base(config.model, config.task)
    opened.refuse_other({"content_sha256": base.content_sha256})
    job = prepare_job(completed, progress, base)
    if job.prepared.task == "feature-extraction" and processes.count > 1:
        raise UsageError("feature-extraction compares the texts of a whole batch: train it in one process")
    opened.refuse_other(identity_of(job))
    return job


def load(job: Job, opened: OpenedRun, processes: Processes, progress: Progress) -> tuple[Job, TrainableModel]:
    """Load the model that is trained, unless its weights alone exceed the available memory.

    Args:
        job: What was prepared.
        opened: The run folder: an interrupted run has chosen the int4 codes already.
        processes: Those that train together.
        progress: Gets what is loaded.

    Returns:
        The job with all settings resolved, and the model.

    Raises:
        WillNotFit: the weights exceed the available memory.
        ModelError: the weights cannot be loaded.
        UsageError: --target-modules names no layer, or the codes are not those of the interrupted run.
    """
    base, prepared, available = job.base, job.prepared, Available.here(opened.folder.path)
    config = resolve_memory(job, available, processes.device, processes.count)
    refuse_large_base(base, config, available)
    codes = opened.folder.codes if opened.folder.codes.is_file() else None
    with heartbeat(progress, f"loading {base.name} as {config.base_format} on {processes.device}"):
        model = load_trainable_model(replace(job, config=config), processes, progress, codes)
        opened.refuse_other({"codes_sha256": model.codes_sha256})
    config = replace(config, task=prepared.task, max_length=prepared.rendering.max_length, compute=model.compute)
    processes.wait()  # the main process is about to write: all have seen what was there
    return replace(job, config=config), model


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
    run.path.mkdir(parents=True, exist_ok=True)
    write_splits(prepared, run.path / "splits")
    write_json(run.path / "rendering.json", prepared.rendering.to_dict())
    write_json(
        run.path / "base.json",
        {
            "model": base.name,
            "path": str(base.path.resolve()),
            "model_type": base.family.name,
            "content_sha256": base.content_sha256,
            "format": config.base_format,
            "block_size": config.block_size,
            "calibration_rows": config.calibration_rows,
            "calibration": calibration,
            "codes_sha256": model.codes_sha256,
            "data_fingerprint": prepared.fingerprint,
        },
    )
    for file in job.tokenizer.files():
        write_text(run.tokenizer / file.name, file.read_text(encoding="utf-8"))
    _write_settings(run, config)
    if model.calibration is not None:
        write_codes(run.codes, model.peft_model.get_base_model())


def estimate(run: RunFolder, job: Job, model: TrainableModel, progress: Progress, seconds: float) -> None:
    """Write plan.json: time, memory and disk of the run, from a few measured steps.

    Args:
        run: The run folder.
        job: With all settings resolved.
        model: It is left as it was.
        progress: Gets the plan.
        seconds: How long the tune has run so far.

    Raises:
        WillNotFit: it takes more memory or disk than is available.
    """
    with model.backend.unshared():
        plan = make_plan(job, model, progress, seconds)
    write_json(run.path / "plan.json", plan)


def train(opened: OpenedRun, job: Job, model: TrainableModel, processes: Processes, progress: Progress) -> Fit:
    """Train, from the checkpoint if there is one, and write the adapter with the best weights.

    Args:
        opened: The run folder.
        job: With all settings resolved.
        model: Ends with the best weights.
        processes: Those that train together; the main one writes.
        progress: Gets the steps and the evaluations.

    Returns:
        The loop's result.

    Raises:
        UsageError: loss or gradient was too often not finite, or --max-minutes leaves no step.
        KeyboardInterrupt: a signal came; a checkpoint was saved.
    """
    run, checkpoint, backend = opened.folder, opened.checkpoint, model.backend
    if checkpoint is not None:
        backend.restore(checkpoint.backend)
    interruption = Interruption(processes.any)
    log = run.path / "metrics.jsonl" if processes.is_main else None
    examples, task = job.prepared.examples, job.prepared.task
    rows = TrainingRows(examples["train"], examples["validation"], task, job.tokenizer.pad_id)
    identity = {**identity_of(job), "codes_sha256": model.codes_sha256}
    with Metrics(log, checkpoint.metrics_bytes if checkpoint else 0) as metrics, interruption.watched():
        callbacks = _RunCallbacks(run, identity, job.config, backend, metrics, interruption, processes)
        fitted = fit(backend, rows, job.config, progress, callbacks, checkpoint.state if checkpoint else None)
    backend.save(run.adapter)
    return fitted


@dataclass
class _RunCallbacks(Callbacks):
    """Writes the run folder while the loop trains; only the main process does."""

    run: RunFolder
    identity: dict[str, Any]
    config: TuneConfig
    backend: Backend
    metrics: Metrics
    interruption: Interruption
    processes: Processes

    def on_plan(self, steps: int) -> None:
        self.config = replace(self.config, max_steps=self.config.max_steps or steps)
        if self.processes.is_main:
            _write_settings(self.run, self.config)

    def on_metrics(self, line: dict[str, Any]) -> None:
        self.metrics.log(line)

    def on_best(self) -> None:
        self.backend.save(self.run.adapter)

    def save(self, state: Fit) -> None:
        if self.processes.is_main:
            settings, size = as_plain(self.config), self.metrics.sync()
            checkpoint = Checkpoint(self.identity, settings, size, state, self.backend.state())
            write_checkpoint(self.run.path, checkpoint)

    def poll(self) -> None:
        self.interruption.poll()

    def agree(self, value: float) -> float:
        return self.processes.broadcast(value)


def evaluate(job: Job, model: TrainableModel, fitted: Fit, progress: Progress) -> dict[str, Any]:
    """Score the best weights in float32; the test rows are read here, once.

    Args:
        job: With all settings resolved.
        model: With the best weights.
        fitted: What the loop scored.
        progress: Gets what is scored.

    Returns:
        What `edge_ft.tune.report.results` returns.
    """
    model.backend.compute.cache_weights(None)
    release_memory()  # the answers of the report would come on top of what the steps took
    return results(job, model.scorer, model.peft_model.disable_adapter, fitted, progress)


def write_report(
    opened: OpenedRun,
    job: Job,
    model: TrainableModel,
    processes: Processes,
    fitted: Fit,
    evaluated: dict[str, Any],
    seconds: float,
) -> None:
    """Write report.json, which makes the run a finished one, and remove the checkpoint.

    Args:
        opened: The run folder.
        job: With all settings resolved.
        model: What was trained.
        processes: Those that trained together.
        fitted: The loop's result.
        evaluated: What `evaluate` returned.
        seconds: How long this process has run; those of the interrupted run are added.
    """
    run, device = opened.folder, processes.device
    on_device = device_memory(device)
    report = {
        "model": job.base.name,
        "family": job.base.family.name,
        "task": job.prepared.task,
        "rows": job.prepared.counts,
        "calibration": run.base()["calibration"],
        "findings": job.prepared.findings,
        "trainable_parameters": sum(parameter.numel() for parameter in model.backend.parameters),
        "seconds": round(opened.elapsed + seconds, 2),
        "steps": fitted.steps,
        "best_step": fitted.best_step,
        "stopped": fitted.stopped,
        "resumed_from_step": opened.resumed_from,
        "tokens_per_second": round(fitted.tokens / fitted.seconds, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": on_device.peak_bytes if on_device else None,
        **evaluated,
        "seed": job.config.seed,
        "device": str(device),
        "threads": job.config.threads,
        "processes": processes.count,
        "versions": {name: version(name) for name in ("edge-ft", "torch", "transformers", "peft")},
        "machine": platform.platform(),
    }
    write_json(run.report_path, report)
    remove_checkpoint(run.path)


@contextmanager
def explain_stop(opened: OpenedRun, is_main: bool) -> Iterator[None]:
    """If this block is interrupted or fails, say which files are saved and how to resume.

    A new folder is removed if nothing was learned: the same command can then be given again.

    Args:
        opened: The run folder.
        is_main: Whether this is the main process, which alone says and removes something: it may still be writing
            when another process stops.

    Yields:
        Nothing.

    Raises:
        Interrupted: in place of a KeyboardInterrupt.
        WillNotFit: the disk or the GPU's memory is full.
    """
    run = opened.folder
    resume = f"edge-ft tune --config {shlex.quote(str(run.config_path))} --resume"
    try:
        yield
    except KeyboardInterrupt:
        if not is_main:
            raise Interrupted("stopped") from None
        saved = f"the best adapter so far is in {run.adapter}" if run.adapter.is_dir() else "no adapter is saved yet"
        checkpoint = read_checkpoint(run.path)
        where = f"resume from step {checkpoint.step}" if checkpoint else "start again from step 0, without a checkpoint"
        raise Interrupted(f"stopped; {saved}; to {where}: {resume}") from None
    except Exception as error:
        learned = run.adapter.is_dir() or has_checkpoint(run.path)
        if opened.is_new and is_main and not learned:
            shutil.rmtree(run.path, ignore_errors=True)
        if disk_full(error):
            again = f"run {resume}" if run.path.is_dir() else "run the same command again"
            raise WillNotFit(f"the disk is full and training stopped: free some space, then {again}") from error
        if isinstance(error, OutOfMemoryError):
            raise WillNotFit(
                "the GPU's memory is too small for this run: give a smaller --batch-size or --max-length, or "
                "--memory low"
            ) from error
        raise


def _write_settings(run: RunFolder, config: TuneConfig) -> None:
    """Write config.yaml, which gives the same run again: with --resume, or with another --out."""
    yaml = require("yaml", "train")
    write_text(run.config_path, yaml.safe_dump({**as_plain(config), "resume": False}, sort_keys=False))
