"""Estimate time, memory and disk of a training before its first step, from a few measured batches."""

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_ft.artifacts import RunFolder
from edge_ft.config import TEXT_TASKS, Memory, TuneConfig, last_layers
from edge_ft.data import Example, batch_tokens, eval_batches
from edge_ft.errors import UsageError, WillNotFit
from edge_ft.files import write_json
from edge_ft.models.libraries import import_libraries
from edge_ft.progress import Progress, Silent, heartbeat
from edge_ft.system import Available, PeakMemory, peak_rss_bytes, release_memory, resident_bytes, use_threads
from edge_ft.tune.loop import EVALUATIONS
from edge_ft.tune.measure import Measured, measure
from edge_ft.tune.prepare import Job, prepare_job
from edge_ft.tune.report import BATCH_COST, OVERFITTING_ROWS, SAMPLE_TOKENS
from edge_ft.tune.splits import SPLITS

if TYPE_CHECKING:
    import torch

    from edge_ft.models.base_model import Base
    from edge_ft.tune.trainable_model import TrainableModel

__all__ = ["estimate", "plan", "refuse_large_base", "resolve_memory"]

SHORT_STEP_TOKENS = 512
"""Up to this many tokens a step, keeping the dequantized weights in bfloat16 saves at least a sixth of its time."""
HIGH_MEMORY_SHARE = 1 / 8
"""Share of the available memory that these weights may take unless --memory high is given."""
USABLE_SHARE = 0.9
"""Share of the available memory and disk that a run may take."""
BYTES_PER_WEIGHT = {"int4": 0.65, "nf4": 1.3, "int8": 1.15, "bf16": 2.05, "fp32": 4.0}
"""Memory of a frozen weight, with its scale and zero point at a block size of 32."""
CHECKPOINT_STATES = 4
"""What a checkpoint holds, in sizes of the trained weights: these, the best ones, and the two moments of AdamW."""
FRAGMENTATION = 1.08
"""Resident memory over that in use, because batches have many sizes; 1.03 to 1.18 were measured."""
FINAL_SECONDS = 1.5
"""Seconds for the plot and the report."""


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
    torch = import_libraries(progress, "peft")
    available = available or Available.here(config.out)
    started = time.monotonic()
    use_threads(config.threads)
    job = prepare_job(config, progress)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job = resolve_memory(job, available, device)
    choices = _measure_choices(job, device, available, time.monotonic() - started, progress)
    recommended = next((choice for choice in choices if choice["fits"]), None)
    if recommended is None:
        raise WillNotFit(_does_not_fit(min(choices, key=lambda choice: choice["peak_rss_bytes"]), available))
    return _result(job, available, choices, recommended)


def estimate(
    run: RunFolder, job: Job, model: "TrainableModel", available: Available, progress: Progress, started: float
) -> None:
    """Estimate the training that `tune` is about to begin, report the estimate and write it to plan.json.

    Args:
        run: The run folder; its codes are written.
        job: The training.
        model: Its weights and optimizer stay as they are; each step of a run seeds its own random numbers.
        available: Memory and disk to plan for.
        progress: Receives the plan.
        started: `time.monotonic()` when the tune began.

    Raises:
        WillNotFit: it takes more memory or disk than is available.
    """
    with heartbeat(progress, "measuring a few batches"), model.backend.unshared():
        measured = measure(job, model, available, peak_rss_bytes())
    codes = run.codes.stat().st_size if run.codes.is_file() else 0
    choice = _choice(job, measured, time.monotonic() - started, codes, available)
    for text in job.prepared.shown:
        progress.say(text)
    result = _result(job, available, [choice], choice)
    tokens = result["tokens"]
    progress.say(
        f"plan: {tokens['total']} tokens in {result['rows']['train']} train rows (median {tokens['p50']}, "
        f"longest {tokens['max']}), {result['trainable_parameters'] / 1e6:.2f} M trainable parameters, "
        f"{result['steps']} steps; about {duration(choice['seconds'])}, {megabytes(choice['peak_rss_bytes'])} "
        f"of memory, {megabytes(choice['disk_bytes'])} of disk"
    )
    if not choice["fits"]:
        raise WillNotFit(_does_not_fit(choice, available))
    write_json(run.path / "plan.json", result)


def resolve_memory(job: Job, available: Available, device: "torch.device", processes: int = 1) -> Job:
    """The job with --memory chosen if the user left it open.

    It becomes high if steps are short, so that dequantizing takes much of their time, and if the dequantized weights
    take little of the available memory.

    Args:
        job: Its settings leave nothing else open.
        available: Shared by the processes.
        device: Where the training runs.
        processes: How many train together; each holds all weights.

    Returns:
        The job.
    """
    from edge_ft.quant.layers import has_bf16

    config = job.config
    if config.memory is not None:
        return job
    tokens = statistics.fmean(job.batch_tokens)
    bf16 = device.type == "cpu" and config.compute != "fp32" and has_bf16(device)
    saves_time = bf16 and config.base_format in ("int4", "int8", "nf4") and tokens <= SHORT_STEP_TOKENS
    fits = 2 * _count_weights(job.base) * processes <= HIGH_MEMORY_SHARE * available.memory_bytes
    return job.with_settings(memory="high" if saves_time and fits else "normal")


def refuse_large_base(base: "Base", config: TuneConfig, available: Available) -> None:
    """Refuse a base whose weights alone exceed the available memory, before they are loaded.

    Raises:
        WillNotFit: they do.
    """
    weights = _count_weights(base)
    size, held, advice = BYTES_PER_WEIGHT[config.base_format], str(config.base_format), "take a smaller model"
    if config.memory == "high":
        size += BYTES_PER_WEIGHT["fp32" if config.compute == "fp32" else "bf16"]
        held, advice = f"{held} and dequantized", f"give --memory normal, or {advice}"
    needed = int(weights * size) + resident_bytes()
    if needed > USABLE_SHARE * available.memory_bytes:
        raise WillNotFit(
            f"{base.name} has {weights / 1e6:.0f} M weights, which take {megabytes(needed)} of memory as {held}: "
            f"{megabytes(available.memory_bytes)} are available; {advice}"
        )


def _count_weights(base: "Base") -> int:
    """Number of weights in the files of a base."""
    return sum(math.prod(stored.shape) for stored in base.checkpoint.tensors.values())


def duration(seconds: float) -> str:
    """`45 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def megabytes(size: float) -> str:
    """Bytes as `1234 MB`."""
    return f"{size / 1e6:.0f} MB"


def _options(config: TuneConfig, base: "Base") -> list[TuneConfig]:
    """The settings to choose from, the best first: fewer layers learn less, less memory only takes more time."""
    layers = base.dims.layers
    own = min(last_layers(config.layers) or layers, layers)
    counts = [own] if base.dims.shares_layers else sorted({layers, max(layers // 2, 1), own}, reverse=True)
    named = [config.layers if count == own else "all" if count == layers else f"last:{count}" for count in counts]
    modes: tuple[Memory, ...] = ("high" if config.memory == "high" else "normal", "low")
    return [replace(config, layers=name, memory=memory) for name in named for memory in modes]


def _measure_choices(
    job: Job, device: "torch.device", available: Available, before: float, progress: Progress
) -> list[dict[str, Any]]:
    """Load and measure each of `_options`; `before` are the seconds that a tune takes until it loads the model.

    Returns:
        The `choices` of the plan.

    Raises:
        WillNotFit: the weights alone exceed the available memory.
        UsageError: --target-modules names no layer.
    """
    from edge_ft.tune.distributed import Processes
    from edge_ft.tune.trainable_model import load_trainable_model

    choices: list[dict[str, Any]] = []
    loading_seconds: list[float] = []
    peaks: dict[Memory | None, int] = {}
    for option in _options(job.config, job.base):
        refuse_large_base(job.base, option, available)
        name = f"layers {option.layers}, memory {option.memory}"
        began = time.monotonic()
        # GPTQ does not change what a step takes; it runs once in each memory mode, for its own time and memory.
        loaded = option if option.memory not in peaks else replace(option, calibration_rows=0)
        with PeakMemory() as loading, heartbeat(progress, f"loading {name}"):
            try:
                model = load_trainable_model(replace(job, config=loaded), Processes(device), progress)
            except UsageError:
                if option.layers == job.config.layers:
                    raise
                continue  # --target-modules names no layer among these few
        peaks[option.memory] = max(peaks.get(option.memory, 0), loading.bytes)
        loading_seconds.append(time.monotonic() - began)
        began = time.monotonic()
        measured_job = replace(job, config=replace(option, compute=model.compute))
        with heartbeat(progress, f"measuring {name}"):
            measured = measure(measured_job, model, available, peaks[option.memory])
        # The first loading is like that of a tune: it imports libraries and chooses the codes.
        seconds = before + loading_seconds[0] + time.monotonic() - began
        codes = int(_count_weights(job.base) * BYTES_PER_WEIGHT["int4"]) if option.base_calibration_rows else 0
        choices.append(_choice(measured_job, measured, seconds, codes, available))
        del model
        release_memory()
    return choices


def _choice(job: Job, measured: Measured, before: float, codes_bytes: int, available: Available) -> dict[str, Any]:
    """One of the `choices` of a plan, `before` seconds into its run and with codes of this size."""
    peak, disk = _peak_bytes(job, measured), codes_bytes + _disk_bytes(job, measured)
    fits = peak <= USABLE_SHARE * available.memory_bytes and disk <= USABLE_SHARE * available.disk_bytes
    return {
        "layers": job.config.layers,
        "memory": job.config.memory,
        "trainable_parameters": measured.trainable,
        "seconds": round(before + _seconds(job, measured) + FINAL_SECONDS, 1),
        "peak_rss_bytes": peak,
        "disk_bytes": disk,
        "fits": fits,
    }


def _seconds(job: Job, measured: Measured) -> float:
    """Seconds of the training loop, with its evaluations, and of the scores of the report."""
    config, examples, task = job.config, job.prepared.examples, job.prepared.task
    train, validation = examples["train"], examples["validation"]

    def evaluation(rows: Sequence[Example]) -> float:
        batches = eval_batches([len(row.input_ids) for row in rows], config.rows_at_once)
        return sum(measured.evaluation.at(batch_tokens(batch, rows, task)) for batch in batches)

    training = job.steps * config.gradient_accumulation * statistics.fmean(map(measured.step.at, job.batch_tokens))
    evaluations = 1 + math.ceil(job.steps / (config.eval_steps or math.ceil(job.steps / EVALUATIONS)))
    loop = training + evaluations * evaluation(validation)
    if config.max_minutes is not None:
        loop = min(loop, config.max_minutes * 60)
    report = 2 * evaluation(examples["test"]) + evaluation(train[: min(len(validation), OVERFITTING_ROWS)])
    report += 2 * evaluation(validation) if config.compute == "bf16" else 0.0
    report *= measured.report
    if task in TEXT_TASKS:
        answer = statistics.median(len(example.labels) - example.shared_positions for example in train)
        report += BATCH_COST * (SAMPLE_TOKENS + min(answer, SAMPLE_TOKENS)) * measured.token
    return loop + report


def _peak_bytes(job: Job, measured: Measured) -> int:
    """Peak of the resident memory: of loading, of a step with the longest batch, or of the report."""
    # What a step takes is released before the report is made.
    most = max(measured.memory.at(max(job.batch_tokens)), measured.memory.values[0] + measured.answering)
    # The two moments of AdamW and the best weights come on top of what was measured.
    return max(measured.loading, round((most + 3 * 4 * measured.trainable) * FRAGMENTATION))


def _disk_bytes(job: Job, measured: Measured) -> int:
    """Size of the run folder without its codes."""
    rows = sum(len(json.dumps(row.fields, default=str)) for name in SPLITS for row in job.prepared.rows[name])
    tokenizer = sum(file.stat().st_size for file in job.tokenizer.files())
    # Adapter and checkpoint are written beside those that they replace.
    return rows + tokenizer + 2 * (1 + CHECKPOINT_STATES) * 4 * measured.trainable + 1_000_000


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
        "available": {"memory_bytes": available.memory_bytes, "disk_bytes": available.disk_bytes},
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
    others = [*less[choice["memory"]], "a smaller --batch-size or --max-length"]
    return (
        f"{what} takes {memory} of memory and {megabytes(available.memory_bytes)} are free: give {', or '.join(others)}"
    )
