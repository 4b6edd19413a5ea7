"""Estimate time, memory and disk of a training before its first step, from a few measured batches."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_ft.artifacts import RunFolder
from edge_ft.config import TEXT_TASKS, Memory, TuneConfig, last_layers
from edge_ft.data import Example, batch_tokens, eval_batches
from edge_ft.errors import UsageError, WillNotFit
from edge_ft.files import write_json
from edge_ft.progress import Progress, Silent, heartbeat
from edge_ft.system import Available, PeakMemory, peak_rss_bytes, release_memory
from edge_ft.tune.engine import Engine, TrainableModel, engine_of
from edge_ft.tune.measure import Measured, measure
from edge_ft.tune.memory_mode import BYTES_PER_WEIGHT, USABLE_SHARE, count_weights
from edge_ft.tune.prepare import Job, prepare_job
from edge_ft.tune.processes import Processes
from edge_ft.tune.report import BATCH_COST, OVERFITTING_ROWS, answer_limit, answered_rows
from edge_ft.tune.schedule import EVALUATIONS, FINISHING_STEP, finishing_steps
from edge_ft.tune.splits import SPLITS
from edge_ft.tune.stopwatch import Timings
from edge_ft.tune.units import duration, megabytes

if TYPE_CHECKING:
    from edge_ft.models.base_model import Base

__all__ = ["estimate", "measure_batches", "plan"]

CHECKPOINT_STATES = 4
"""What a checkpoint holds, in sizes of the trained weights: these, the best ones, and the two moments of AdamW."""
FRAGMENTATION = 1.08
"""Resident memory over that in use, because batches have many sizes; 1.03 to 1.18 were measured."""
FINISHING_BYTES = 1.3
"""Memory of the merged model by its weights: codes, and of each scale a factor, its first value and what trains it."""
DEVICE_FRAGMENTATION = 1.1
"""Memory that a GPU's allocator holds over that of the tensors."""
FINAL_SECONDS = 1.5
"""Seconds to write the report and its page."""


def plan(config: TuneConfig, progress: Progress | None = None, available: Available | None = None) -> dict[str, Any]:
    """Estimate a training with these settings, and with fewer layers or less memory.

    Args:
        config: The settings of the training.
        progress: Receives the steps; None is silent.
        available: Memory and disk to plan for; None is what this machine has free.

    Returns:
        `rows` of each split; `tokens` of the train rows (`p50`, `p95`, `max`, `total`); `trainable_parameters`;
        `steps`; the audit's `findings`; `available` memory and disk; `choices` with `layers`, `memory`, `seconds`,
        `peak_rss_bytes`, `disk_bytes` and whether it `fits`; the `recommended` choice and the `reason`; the rows
        `shown` for --show.

    Raises:
        UsageError: a model, rows or options that cannot be used.
        AuditRefused: the rows would train nothing, or overlap between splits.
        WillNotFit: no choice fits into memory and disk.
    """
    progress = progress or Silent()
    engine = engine_of(config.model, progress)
    config = engine.resolve(config)
    available = available or Available.here(config.out)
    timings = Timings()
    config = replace(config, threads=engine.use_threads(config.threads))
    with timings.stage("rows"):
        job = prepare_job(config, progress)
    alone = engine.alone()
    job, available = engine.choose_memory(job, available, alone), available.on(alone.device)
    choices = _measure_choices(job, (engine, alone), available, timings, progress, may_settle=config.memory is None)
    recommended = next((choice for choice in choices if choice["fits"]), None)
    if recommended is None:
        raise WillNotFit(_does_not_fit(min(choices, key=lambda choice: choice["peak_rss_bytes"]), available))
    return _result(job, available, choices, recommended)


def measure_batches(job: Job, model: TrainableModel, available: Available, progress: Progress) -> Measured:
    """Measure a few batches of the training that `tune` is about to begin.

    Args:
        job: The training.
        model: Its weights and optimizer stay as they are; each step of a run seeds its own random numbers.
        available: Memory to plan for.
        progress: Receives that it takes seconds.

    Returns:
        The measurements.
    """
    with heartbeat(progress, "measuring a few batches"), model.backend.unshared():
        return measure(job, model, available, peak_rss_bytes())


def estimate(
    run: RunFolder, job: Job, measured: Measured, available: Available, progress: Progress, spent: dict[str, float]
) -> None:
    """Estimate the training that `tune` is about to begin, report the estimate and write it to plan.json.

    Args:
        run: The run folder.
        job: The training.
        measured: What its batches take.
        available: Memory and disk to plan for.
        progress: Receives the plan.
        spent: Seconds of the stages until now.

    Raises:
        WillNotFit: it takes more memory or disk than is available.
    """
    choice = _choice(job, measured, spent, available)
    for text in job.prepared.shown:
        progress.say(text)
    result = _result(job, available, [choice], choice)
    tokens = result["tokens"]
    progress.say(
        f"plan: {tokens['total']} tokens in {result['rows']['train']} train rows (median {tokens['p50']}, "
        f"longest {tokens['max']}), {result['trainable_parameters'] / 1e6:.2f} M trainable parameters, "
        f"{result['steps']} steps; about {duration(choice['seconds'])}, {megabytes(choice['peak_rss_bytes'])} "
        f"of memory, {megabytes(choice['disk_bytes'])} of disk"
        + ("" if choice["peak_device_bytes"] is None else f", {megabytes(choice['peak_device_bytes'])} of the GPU")
    )
    if not choice["fits"]:
        raise WillNotFit(_does_not_fit(choice, available))
    write_json(run.plan_path, result)


def _options(config: TuneConfig, base: "Base") -> list[TuneConfig]:
    """The settings to choose from, the best first: fewer layers learn less, less memory only takes more time."""
    layers = base.dims.layers
    own = min(last_layers(config.layers) or layers, layers)
    counts = [own] if base.dims.shares_layers else sorted({layers, max(layers // 2, 1), own}, reverse=True)
    named = [config.layers if count == own else "all" if count == layers else f"last:{count}" for count in counts]
    modes: tuple[Memory, ...] = ("high" if config.memory == "high" else "normal", "low")
    return [replace(config, layers=name, memory=memory) for name in named for memory in modes]


def _measure_choices(
    job: Job,
    engine: tuple[Engine, Processes],
    available: Available,
    timings: Timings,
    progress: Progress,
    *,
    may_settle: bool,
) -> list[dict[str, Any]]:
    """Load and measure each of `_options`.

    Args:
        job: The training.
        engine: What trains, and this process as it sees it.
        available: Memory and disk to plan for.
        timings: Has the seconds of the stages that a tune goes through until it loads the model.
        progress: Receives the steps.
        may_settle: `settle_memory` chooses the memory mode.

    Returns:
        The `choices` of the plan.

    Raises:
        WillNotFit: the weights alone exceed the available memory.
        UsageError: --target-modules names no layer.
    """
    trainer, alone = engine
    choices: list[dict[str, Any]] = []
    first: dict[str, float] = {}  # loading, which imports libraries and chooses the codes as that of a tune does
    choosing: float | None = None
    peaks: dict[Memory | None, int] = {}
    for option in _options(job.config, job.base):
        trainer.refuse_large(replace(job, config=option), available)
        name = f"layers {option.layers}, memory {option.memory}"
        stages = Timings()
        # GPTQ does not change what a step takes; it runs once in each memory mode, for its own time and memory.
        loaded = option if option.memory not in peaks else replace(option, calibration_rows=0)
        with PeakMemory() as loading, stages.stage("load"), heartbeat(progress, f"loading {name}"):
            try:
                model = trainer.load(replace(job, config=loaded), alone, progress)
            except UsageError:
                if option.layers == job.config.layers:
                    raise
                continue  # --target-modules names no layer among these few
        peaks[option.memory] = max(peaks.get(option.memory, 0), loading.bytes)
        if model.calibration is not None:
            stages.move(model.calibration.seconds, "load", "calibrate")
        first = first or stages.seconds
        measured_job, measuring = replace(job, config=replace(option, compute=model.compute)), Timings()
        with measuring.stage("measure"), heartbeat(progress, f"measuring {name}"):
            if may_settle and option.memory == "high":
                measured_job = trainer.settle_memory(measured_job, model)
            measured = measure(measured_job, model, available, peaks[option.memory])
        choosing = measured.choosing if choosing is None else choosing
        seconds = timings.seconds | first | measuring.seconds
        choices.append(_choice(measured_job, replace(measured, choosing=choosing), seconds, available))
        del model
        release_memory()
    return choices


def _choice(job: Job, measured: Measured, spent: dict[str, float], available: Available) -> dict[str, Any]:
    """One of the `choices` of a plan, after these seconds of the stages before training."""
    stages = spent | _seconds(job, measured)
    if "finish" in stages:
        stages["finish"] += spent.get("load", 0.0) if measured.choosing is None else measured.choosing
    stages["write"] = stages.get("write", 0.0) + FINAL_SECONDS
    peak, disk = _peak_bytes(job, measured), _disk_bytes(job, measured)
    card = _device_bytes(job, measured)
    fits = peak <= USABLE_SHARE * available.memory_bytes and disk <= USABLE_SHARE * available.disk_bytes
    batch = job.config.rows_at_once
    if card is not None and available.device_bytes is not None and measured.device is not None:
        usable = USABLE_SHARE * available.device_bytes
        fits = fits and card <= usable
        fixed = _device_bytes(job, measured, 0) or 0
        batch = max(int(batch * (usable - fixed) / max(card - fixed, 1)), 0)
    return {
        "layers": job.config.layers,
        "memory": job.config.memory,
        "trainable_parameters": measured.trainable,
        "seconds": round(sum(stages.values()), 1),
        "stages": {stage: round(seconds, 1) for stage, seconds in stages.items()},
        "peak_rss_bytes": peak,
        "disk_bytes": disk,
        "peak_device_bytes": card,
        "largest_batch": batch if card is not None else None,
        "fits": fits,
    }


def _seconds(job: Job, measured: Measured) -> dict[str, float]:
    """Seconds of the stages that are to come: `train`, `validation`, `scores` and `answers`."""
    config, examples, task = job.config, job.prepared.examples, job.prepared.task
    train, validation = examples["train"], examples["validation"]

    def evaluation(rows: Sequence[Example]) -> float:
        batches = eval_batches([len(row.input_ids) for row in rows], job.batching.size)
        return sum(measured.evaluation.at(batch_tokens(batch, rows, task)) for batch in batches)

    training = job.steps * config.passes * statistics.fmean(map(measured.step.at, job.batch_tokens))
    evaluations = math.ceil(job.steps / (config.eval_steps or math.ceil(job.steps / EVALUATIONS))) - 1
    watched = [validation[index] for index in job.watched] or validation
    unwatched = [validation[index] for index in job.unwatched]
    validating = (1 + evaluations) * evaluation(watched) + evaluation(validation)  # first the base, the last on all
    if config.max_minutes is not None and training + validating > config.max_minutes * 60:
        training = max(0.0, config.max_minutes * 60 - validating)
    seconds = {"train": training, "validation": validating}
    if steps := finishing_steps(job.config):
        seconds["finish"] = FINISHING_STEP * steps * training / job.steps + 2 * evaluation(watched)
    compared = train[: min(len(validation), OVERFITTING_ROWS)]
    seconds["scores"] = 2 * measured.report * evaluation(examples["test"]) + evaluation(compared)
    seconds["scores"] += evaluation(unwatched)  # by the base
    if task in TEXT_TASKS:
        answered = answered_rows(examples)
        longest = answer_limit(answered)
        ended = min(longest, statistics.median(example.targets for example in train))
        prompts = 2 * measured.report * evaluation(answered)
        seconds["answers"] = prompts + BATCH_COST * (longest + ended) * measured.token
    return seconds


def _peak_bytes(job: Job, measured: Measured) -> int:
    """Peak of the resident memory: of loading, of a step (the last ones are the merged model's), or of the report."""
    # The last steps have the merged model beside the trained one; what they take is released before the report is made.
    merged = FINISHING_BYTES * count_weights(job.base) if finishing_steps(job.config) else 0.0
    stepping = measured.memory.at(max(job.batch_tokens)) + merged
    most = max(stepping, measured.memory.values[0] + measured.answering)
    # The two moments of AdamW and the best weights come on top of what was measured.
    return max(measured.loading, round((most + 3 * 4 * measured.trainable) * FRAGMENTATION))


def _device_bytes(job: Job, measured: Measured, tokens: int | None = None) -> int | None:
    """Peak of the GPU's memory in a step: what was measured, and the two moments of AdamW; None on a CPU.

    The weights in their format, the activations and the head's peak are in what was measured; `tokens` are those of
    the batch, by default of the longest one.

    Returns:
        Bytes.
    """
    if measured.device is None:
        return None
    step = measured.device.at(max(job.batch_tokens) if tokens is None else tokens)
    return round((step + 2 * 4 * measured.trainable) * DEVICE_FRAGMENTATION)


def _disk_bytes(job: Job, measured: Measured) -> int:
    """Largest size of the run folder: the merged codes as they were chosen lie beside those that are written."""
    copies = bool(job.config.base_calibration_rows) + (2 if finishing_steps(job.config) else 0)
    codes = round(copies * BYTES_PER_WEIGHT["int4"] * count_weights(job.base)) if copies else 0
    rows = sum(len(json.dumps(row.fields, default=str)) for name in SPLITS for row in job.prepared.rows[name])
    tokenizer = sum(file.stat().st_size for file in job.tokenizer.files())
    # Adapter and checkpoint are written beside those that they replace.
    return codes + rows + tokenizer + 2 * (1 + CHECKPOINT_STATES) * 4 * measured.trainable + 1_000_000


def _result(
    job: Job, available: Available, choices: list[dict[str, Any]], recommended: dict[str, Any]
) -> dict[str, Any]:
    """What `plan` returns."""
    prepared = job.prepared
    lengths = [len(example.input_ids) for example in prepared.examples["train"]]
    why = "fits, with the most layers and the faster memory mode"
    if len(choices) == 1:
        why = "is the only setting requested"
    elif recommended is not choices[0]:
        why = "is the first choice that fits, of those with the most layers first"
    memory, disk = megabytes(recommended["peak_rss_bytes"]), megabytes(recommended["disk_bytes"])
    reason = (
        f"--layers {recommended['layers']} --memory {recommended['memory']} {why}: it takes {memory} of "
        f"{megabytes(available.memory_bytes)} available memory, {disk} of {megabytes(available.disk_bytes)} available "
        f"disk and {duration(recommended['seconds'])}"
    )
    if recommended.get("peak_device_bytes") is not None and available.device_bytes is not None:
        reason += (
            f"; {megabytes(recommended['peak_device_bytes'])} of {megabytes(available.device_bytes)} of the GPU, on "
            f"which --batch-size {recommended['largest_batch']} is the most that fits"
        )
    return {
        "rows": {name: len(prepared.examples[name]) for name in SPLITS},
        "tokens": {
            **{
                name: int(np.quantile(lengths, share, method="inverted_cdf"))
                for name, share in (("p50", 0.5), ("p95", 0.95), ("max", 1.0))
            },
            "total": sum(lengths),
        },
        "max_length": prepared.rendering.max_length,
        "trainable_parameters": recommended["trainable_parameters"],
        "steps": job.steps,
        "findings": prepared.findings,
        "available": asdict(available),
        "choices": choices,
        "recommended": recommended,
        "reason": reason,
        **({"shown": prepared.shown} if prepared.shown else {}),
    }


def _does_not_fit(choice: dict[str, Any], available: Available) -> str:
    """The message about a choice that does not fit, and what to change."""
    what = f"layers {choice['layers']} with {choice['memory']} memory"
    disk, memory = megabytes(choice["disk_bytes"]), megabytes(choice["peak_rss_bytes"])
    if choice["disk_bytes"] > USABLE_SHARE * available.disk_bytes:
        return f"{what} takes {disk} of disk and {megabytes(available.disk_bytes)} are free: free some"
    less = {"high": ["--memory normal or low"], "normal": ["--memory low"], "low": []}
    card, room = choice.get("peak_device_bytes"), available.device_bytes
    if card is not None and room is not None and card > USABLE_SHARE * room:
        batch = f"--batch-size {choice['largest_batch']}" if choice["largest_batch"] else "a smaller model"
        others = [*less[choice["memory"]], f"{batch} or a smaller --max-length"]
        return f"{what} takes {megabytes(card)} of the GPU and {megabytes(room)} are free: give {', or '.join(others)}"
    others = [*less[choice["memory"]], "a smaller --batch-size or --max-length"]
    return (
        f"{what} takes {memory} of memory and {megabytes(available.memory_bytes)} are free: give {', or '.join(others)}"
    )
