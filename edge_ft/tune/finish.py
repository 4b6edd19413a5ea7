"""The finishing phase: after the adapter is trained, the merged model that ships is made here, and its scales trained.

The adapter is merged into the checkpoint's float weights, codes are chosen over train rows, and then the scales alone
are trained towards the next-token probabilities of the model as trained (docs/decisions/035). The adapter stays as it
was. Codes and scales lie in `merged/` of the run folder: an export of lane merged ships these bytes.

Until they do, `.finish/` holds the codes as they were chosen and a checkpoint of the loop, so that a run that is killed
resumes there.
"""

import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ft.artifacts import RunFolder
from edge_ft.config import TuneConfig
from edge_ft.errors import UsageError
from edge_ft.evaluate.scoring import RowScores
from edge_ft.files import atomic_folder, file_sha256, is_as_sealed, seal, write_json
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.lora import lora_pairs
from edge_ft.progress import Progress, heartbeat
from edge_ft.quant.calibration import make_calibration
from edge_ft.quant.devices import to_device
from edge_ft.quant.serialization import codes_sha256, write_codes
from edge_ft.stopping import held, requested
from edge_ft.system import release_memory
from edge_ft.tune.checkpoint import FINISH, Checkpoint, read_checkpoint, write_checkpoint
from edge_ft.tune.finish_backend import FinishBackend
from edge_ft.tune.loop import Callbacks, Fit, TrainingRows, fit
from edge_ft.tune.schedule import finishing_steps
from edge_ft.tune.trainable_model import TrainableModel
from edge_ft.utf8 import read_json

if TYPE_CHECKING:
    from edge_ft.tune.prepare import Job

__all__ = ["finish", "finishing_config"]

MINUTE = 60.0
RATE = 1e-3
"""Peak learning rate of the factors of the scales, which begin at 1."""


def finishing_config(config: TuneConfig, steps: int, minutes: float | None = None) -> TuneConfig:
    """Return the settings of the loop that trains the scales.

    Args:
        config: Those of the training.
        steps: Steps to take.
        minutes: What is left of --max-minutes.

    Returns:
        The settings.
    """
    return replace(
        config,
        learning_rate=RATE,
        schedule="cosine",
        warmup=0.0,
        weight_decay=0.0,
        max_grad_norm=0.0,
        patience=None,
        max_steps=steps,
        eval_steps=steps,
        max_minutes=minutes,
        finish_steps=0,
        seed=config.seed + 1,
    )


def finish(run: RunFolder, job: "Job", model: TrainableModel, fitted: Fit, progress: Progress) -> dict[str, Any] | None:
    """Make the merged model of a run whose adapter is trained, unless an interrupted process has.

    Args:
        run: Holds the adapter; gets `merged/`.
        job: With all settings resolved.
        model: As trained, with the best weights.
        fitted: The loop's result.
        progress: Receives the steps.

    Returns:
        `finish` of report.json; None where there is no finishing phase.

    Raises:
        KeyboardInterrupt: a signal came; a checkpoint was saved.
    """
    config, steps = job.config, finishing_steps(job.config)
    if steps == 0 or fitted.best_step == 0:
        return None
    if (known := run.finished()) is not None:
        figures: dict[str, Any] = known["figures"]
        return figures
    left = None if config.max_minutes is None else config.max_minutes - fitted.elapsed / MINUTE
    if left is not None and left <= 0:
        progress.say(f"no finishing steps: --max-minutes {config.max_minutes:g} are over; an export chooses the codes")
        return None
    work, adapter = run.path / FINISH, file_sha256(run.adapter_weights)
    release_memory()  # the merged model would come on top of what the steps took
    merged = _load_merged(run, adapter, job, model, progress)
    checkpoint = read_checkpoint(work)
    own = finishing_config(config, steps, left)
    backend = FinishBackend(merged, job.base.family, job.prepared.task, own, model.backend)
    examples = job.prepared.examples
    watched = [examples["validation"][row] for row in job.watched] or examples["validation"]
    rows = TrainingRows(examples["train"], watched, job.batching)
    trained = TrainingRows(examples["train"], examples["validation"], job.batching, job.watched).part(fitted.best)
    callbacks = _Callbacks(work, backend, adapter)
    with held():
        try:
            if checkpoint is not None:
                backend.restore(checkpoint.backend)
            finished = fit(backend, rows, own, progress, callbacks, checkpoint.state if checkpoint else None)
        except UsageError as error:  # too little time is left, or a loss is not finite: an export chooses the codes
            progress.say(f"no finishing steps: {error}")
            return None
    backend.release()
    figures = _figures(finished, trained, own)
    with heartbeat(progress, "writing the merged model"):
        shutil.rmtree(run.merged, ignore_errors=True)
        with atomic_folder(run.merged) as folder:
            write_codes(folder / run.merged_codes.name, merged)
            identity = {"adapter_sha256": adapter, "codes_sha256": codes_sha256(merged)}
            write_json(folder / "merged.json", seal({**identity, **model.grid.to_dict(), "figures": figures}))
        shutil.rmtree(work, ignore_errors=True)
    release_memory()
    _report(figures, progress)
    return figures


def _load_merged(run: RunFolder, adapter: str, job: "Job", model: TrainableModel, progress: Progress) -> Any:
    """Return the merged model with the codes as they were chosen, now or by a process that was killed."""
    work, prepared = run.path / FINISH, job.prepared
    codes, start = work / "codes.safetensors", work / "start.json"
    known = _is_of(adapter, start, codes)
    spec = ModelSpec.from_rendering(job.base, prepared.rendering, "int4", model.grid, job.config.seed, codes)
    with heartbeat(progress, f"{'loading' if known else 'choosing the codes of'} the merged model"):
        merged = load_model(spec, progress) if known else _merge(run, spec, job, model, progress)
    if not known:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        write_codes(codes, merged)
        write_json(start, seal({"adapter_sha256": adapter, "sha256": file_sha256(codes)}))
    return to_device(merged, model.backend.device)


def _merge(run: RunFolder, spec: ModelSpec, job: "Job", model: TrainableModel, progress: Progress) -> Any:
    """Return the merged model: the adapter is added to the float weights, and codes are chosen.

    Over int4 they are of the layers that the adapter changes, by less than rounding does: scales, zero points and
    8 bits stay those of the base.
    """
    prepared, count = job.prepared, job.config.calibration_rows
    calibration = make_calibration(
        prepared.examples["train"], count, job.tokenizer.pad_id, prepared.task, progress, packed=job.base.family.packs
    )
    start = run.codes if calibration is not None and run.codes.is_file() else None
    return load_model(replace(spec, codes=calibration, start=start, changes=lora_pairs(model.peft_model)), progress)


@dataclass
class _Callbacks(Callbacks):
    """Keeps checkpoints of the finishing loop."""

    work: Path
    backend: FinishBackend
    adapter: str
    stage = "finish"
    untuned = "merged"

    def save(self, state: Fit) -> None:
        write_checkpoint(self.work, Checkpoint({"adapter": self.adapter}, {}, 0, state, self.backend.state()))

    def poll(self) -> None:
        if requested():
            raise KeyboardInterrupt


def _figures(finished: Fit, trained: RowScores, config: TuneConfig) -> dict[str, Any]:
    """Return `finish` of report.json."""
    tax = finished.best.above(trained)
    return {
        "steps": finished.steps,
        "best_step": finished.best_step,
        "learning_rate": config.learning_rate,
        "rows": len(trained.nll),
        "nll": {"trained": trained.mean_nll, "merged": finished.base.mean_nll, "finished": finished.best.mean_nll},
        "quantization_tax": finished.best.mean_nll - trained.mean_nll,
        "tax_interval": [tax["low"], tax["high"]],
        "seconds": round(finished.elapsed, 2),
        "cpu_seconds": round(finished.cpu_seconds, 2),
    }


def _report(figures: dict[str, Any], progress: Progress) -> None:
    nll, (low, high) = figures["nll"], figures["tax_interval"]
    progress.say(
        f"merged model: loss {nll['merged']:.4f} as its codes were chosen, {nll['finished']:.4f} with trained scales, "
        f"{nll['trained']:.4f} as trained: tax {figures['quantization_tax']:+.4f} [{low:+.4f}, {high:+.4f}] on "
        f"{figures['rows']} validation rows"
    )


def _is_of(adapter: str, start: Path, codes: Path) -> bool:
    """Return whether the codes that an interrupted process chose are whole, and of this adapter."""
    if not (start.is_file() and codes.is_file()):
        return False
    with suppress(UsageError):
        known = read_json(start)
        whole = isinstance(known, dict) and is_as_sealed(start, known) and known.get("adapter_sha256") == adapter
        return bool(whole and known["sha256"] == file_sha256(codes))
    return False
