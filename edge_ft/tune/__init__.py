"""Train a LoRA adapter over a frozen base: model and rows in, run folder out."""

import platform
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from edge_ft.artifacts import RunFolder, disk_full, refuse_existing, write_json, write_text
from edge_ft.config import TuneConfig, as_plain
from edge_ft.data import TextTokenizer
from edge_ft.errors import Interrupted, UsageError, WillNotFit, require
from edge_ft.models.libraries import import_libraries
from edge_ft.progress import Progress, Silent
from edge_ft.system import Available, device_memory, peak_rss_bytes, release_memory, use_threads
from edge_ft.tune.checkpoint import (
    Checkpoint,
    examples_sha256,
    has_checkpoint,
    read_checkpoint,
    refuse_other,
    remove_checkpoint,
    same_settings,
    write_checkpoint,
)
from edge_ft.tune.interrupt import Interruption
from edge_ft.tune.job import prepare_job
from edge_ft.tune.loop import Backend, Fit, fit
from edge_ft.tune.metrics_log import Metrics
from edge_ft.tune.plan import make_plan, refuse_at_sight, resolve_memory
from edge_ft.tune.plot import plot_losses
from edge_ft.tune.prepare import Prepared, write_splits
from edge_ft.tune.report import results

if TYPE_CHECKING:
    from edge_ft.models.base_model import Base
    from edge_ft.tune.distributed import Ranks

__all__ = ["tune"]


def tune(config: TuneConfig, progress: Progress | None = None) -> RunFolder:
    """Train a LoRA adapter and write the run folder, or go on with one that was stopped.

    The test rows are read once, after the best weights were chosen on the validation rows.

    Returns:
        The finished run folder at `config.out`.

    Raises:
        UsageError: a model, rows or options that cannot be used, or other ones than the run to go on with has.
        AuditRefused: the rows would train nothing, or overlap between splits.
        WillNotFit: it would take more memory or disk than there is, or the disk is full; what was saved is whole.
        Interrupted: stopped by Ctrl-C or SIGTERM; a checkpoint and the best adapter so far are in the folder.
    """
    progress = progress or Silent()
    import_libraries(progress, "peft")
    from edge_ft.models.base_model import find_base
    from edge_ft.quant.layers import codes_sha256
    from edge_ft.quant.serialization import write_codes
    from edge_ft.tune.distributed import RankedBackend, Ranks
    from edge_ft.tune.trainable_model import load_trainable_model

    started = time.monotonic()
    ranks = Ranks.here(progress)
    if not ranks.first:
        progress = Silent()
    run = RunFolder(config.out)
    if config.resume and run.report_path.is_file():
        progress.say(f"{run.path} is finished: nothing was changed")
        return run
    asked_task = config.task
    config, checkpoint = _settings(run, config)
    threads = use_threads(config.threads)
    with ranks.one_after_the_other():  # a GGUF file is converted once
        base = find_base(config.model, asked_task)  # another model is named as such, not by what it cannot do
    identity: dict[str, Any] = {}

    def identify(**found: Any) -> None:
        identity.update(found)
        if checkpoint is not None:
            refuse_other(checkpoint.identity, found, run.path)

    identify(model=base.name, data=config.data, content_sha256=base.content_sha256)
    job = prepare_job(config, progress, base)
    prepared, tokenizer = job.prepared, job.tokenizer
    if prepared.task == "feature-extraction" and ranks.world > 1:
        raise UsageError("feature-extraction tells apart the texts of a whole batch: train it in one process")
    counts = {name: len(examples) for name, examples in prepared.examples.items()}
    identify(data_fingerprint=prepared.fingerprint, rows=counts, examples_sha256=examples_sha256(prepared.examples))
    device, available = ranks.device, Available.here(run.path)
    config = resolve_memory(base, job.config, prepared, available, device, ranks.world)
    refuse_at_sight(base, config, available)
    progress.say(f"loading {base.name} as {config.base_format} on {device}")
    codes = run.codes if run.codes.is_file() else None  # chosen before this process began
    model = load_trainable_model(replace(job, config=config), ranks, progress, codes)
    backend = model.backend
    identify(codes_sha256=codes_sha256(model.peft_model) if config.base_format != "fp32" else None)
    calibration = model.calibration.to_dict() if model.calibration else None
    if codes is not None:
        calibration = run.base().get("calibration")
    config = replace(
        config,
        task=prepared.task,
        threads=threads,
        max_length=prepared.rendering.max_length,
        compute=model.compute,
    )

    new = not run.path.exists()
    before, resumed_from = 0.0, None if new else 0
    if checkpoint is not None:  # its state goes on with the loop
        before, resumed_from = checkpoint.state.elapsed, checkpoint.step
    ranks.wait()  # all have seen what was there
    with _kept(run, new, ranks.first):
        if ranks.first:
            _begin(run, config, base, prepared, tokenizer, identity, calibration)
            if model.calibration is not None:
                write_codes(run.codes, model.peft_model.get_base_model())
        if checkpoint is not None:
            backend.restore(checkpoint.backend)
        elif ranks.first:
            with backend.alone() if isinstance(backend, RankedBackend) else nullcontext():
                found_plan = make_plan(
                    config, prepared, backend, model.scorer, tokenizer, progress, time.monotonic() - started
                )
            write_json(run.path / "plan.json", found_plan)
        result = _train(run, config, backend, prepared, tokenizer, identity, checkpoint, ranks, progress)
        backend.save(run.adapter)
        backend.compute.keep(None)
        release_memory()  # the answers of the report would come on top of what steps took
        found = results(
            *(model.scorer, model.peft_model.disable_adapter, result, prepared, tokenizer, base.max_length),
            *(config, progress),
        )
        report = {
            "model": base.name,
            "family": base.family.name,
            "task": prepared.task,
            "rows": counts,
            "calibration": calibration,
            "findings": prepared.findings,
            "trainable_parameters": sum(p.numel() for p in backend.parameters),
            "seconds": round(before + time.monotonic() - started, 2),
            "steps": result.steps,
            "best_step": result.best_step,
            "stopped": result.stopped,
            "resumed_from_step": resumed_from,
            "tokens_per_second": round(result.tokens / result.seconds, 1),
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_device_bytes": on_device.peak_bytes if (on_device := device_memory(device)) else None,
            **found,
            "seed": config.seed,
            "device": str(device),
            "threads": threads,
            "processes": ranks.world,
            "versions": {name: version(name) for name in ("edge-ft", "torch", "transformers", "peft")},
            "machine": platform.platform(),
        }
        if ranks.first:
            plot_losses(run.path / "metrics.jsonl", run.path / "loss.png", progress)
            write_json(run.report_path, report)
            remove_checkpoint(run.path)
        ranks.wait()
    return run


def _begin(
    run: RunFolder,
    config: TuneConfig,
    base: "Base",
    prepared: Prepared,
    tokenizer: TextTokenizer,
    identity: dict[str, Any],
    calibration: dict[str, float] | None,
) -> None:
    """What a run folder holds before the first step; a run that is gone on with has the same already."""
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
            "codes_sha256": identity["codes_sha256"],
            "data_fingerprint": prepared.fingerprint,
        },
    )
    for file in tokenizer.files():
        write_text(run.tokenizer / file.name, file.read_text(encoding="utf-8"))
    _write_settings(run, config)


def _settings(run: RunFolder, config: TuneConfig) -> tuple[TuneConfig, Checkpoint | None]:
    """The settings, with what they leave open as the run to go on with has resolved it, and its checkpoint.

    Raises:
        UsageError: --out is there and not to be gone on with, or its settings are others.
    """
    yaml = require("yaml", "train")
    if not config.resume:
        if has_checkpoint(run.path) and not run.report_path.is_file():
            raise UsageError(
                f"{run.path} exists already and holds an unfinished run: --resume goes on with it; "
                "else give another --out"
            )
        refuse_existing(run.path)
    if not run.path.exists():
        return config, None
    if not run.is_begun():
        raise UsageError(f"--resume: {run.path} is not a run folder: give another --out")
    for left in run.path.glob(".*.tmp"):  # of a process that was killed while it wrote
        if left.is_file():
            left.unlink(missing_ok=True)
    checkpoint = read_checkpoint(run.path)
    if checkpoint is not None:
        return same_settings(config, checkpoint.config, run.path), checkpoint
    # Stopped before its first checkpoint: what was learned is lost, what was resolved is not.
    for folder in (run.adapter, run.path / "checkpoint"):
        shutil.rmtree(folder, ignore_errors=True)
    if run.config_path.is_file():
        saved = yaml.safe_load(run.config_path.read_text(encoding="utf-8"))
        config = same_settings(config, saved, run.path)
    return config, None


def _write_settings(run: RunFolder, config: TuneConfig) -> None:
    """config.yaml, which opens the same run again: with --resume, or with another --out."""
    yaml = require("yaml", "train")
    plain = {**as_plain(config), "resume": False}
    write_text(run.config_path, yaml.safe_dump(plain, sort_keys=False))


def _train(
    run: RunFolder,
    config: TuneConfig,
    backend: Backend,
    prepared: Prepared,
    tokenizer: TextTokenizer,
    identity: dict[str, Any],
    checkpoint: Checkpoint | None,
    ranks: "Ranks",
    progress: Progress,
) -> Fit:
    """The loop, with its log, its checkpoints and its signals; of several processes the first one writes."""
    settings = config

    def on_plan(steps: int) -> None:
        nonlocal settings
        settings = replace(config, max_steps=config.max_steps or steps)
        if ranks.first:
            _write_settings(run, settings)

    interruption = Interruption(ranks.any)
    log = run.path / "metrics.jsonl" if ranks.first else None
    with Metrics(log, checkpoint.metrics_bytes if checkpoint else 0) as metrics:

        def save(state: Fit) -> None:
            if not ranks.first:
                return
            write_checkpoint(run.path, Checkpoint(identity, as_plain(settings), metrics.sync(), state, backend.state()))

        with interruption.watched():
            return fit(
                backend,
                prepared.examples["train"],
                prepared.examples["validation"],
                config,
                task=prepared.task,
                pad_id=tokenizer.pad_id,
                progress=progress,
                log=metrics.log,
                on_best=lambda: backend.save(run.adapter),
                on_plan=on_plan,
                save=save,
                poll=interruption.poll,
                agree=ranks.of_first,
                state=checkpoint.state if checkpoint else None,
            )


@contextmanager
def _kept(run: RunFolder, new: bool, first: bool) -> Iterator[None]:
    """Say what is left of a run that stops in this block, and how to go on; leave nothing where nothing was learned.

    Of several processes the first one says and does so: it may still be writing when another one stops.
    """
    go_on = f"edge-ft tune --config {shlex.quote(str(run.config_path))} --resume"
    try:
        yield
    except KeyboardInterrupt:
        if not first:
            raise Interrupted("stopped") from None
        kept = f"the best adapter so far is in {run.adapter}" if run.adapter.is_dir() else "nothing was better yet"
        checkpoint = read_checkpoint(run.path)
        where = f"from step {checkpoint.step}" if checkpoint is not None else "at step 0, there is no checkpoint yet"
        raise Interrupted(f"stopped; {kept}; to go on {where}: {go_on}") from None
    except Exception as error:
        from torch import OutOfMemoryError

        learned = run.adapter.is_dir() or has_checkpoint(run.path)
        if new and first and not learned:
            shutil.rmtree(run.path, ignore_errors=True)  # the same command can be given again
        if disk_full(error):
            again = f"then {go_on}" if run.path.is_dir() else "and run again"
            raise WillNotFit(f"the disk is full, training cannot go on: free some space, {again}") from error
        if isinstance(error, OutOfMemoryError):
            raise WillNotFit(
                "the GPU's memory is too small for this: take a smaller --batch-size or --max-length, or --memory low"
            ) from error
        raise
