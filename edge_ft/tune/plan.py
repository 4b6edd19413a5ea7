"""What a tune will take, found out before its first step: time, memory and disk, from a few steps that are measured."""

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from edge_ft.artifacts import RunFolder
from edge_ft.config import TEXT_TASKS, Memory, TuneConfig, last_layers
from edge_ft.data import Example, TextTokenizer, eval_batches
from edge_ft.errors import UsageError, WillNotFit
from edge_ft.evaluate.scoring import Answerer
from edge_ft.models.libraries import import_libraries
from edge_ft.progress import Progress, Silent
from edge_ft.system import Available, PeakMemory, peak_rss_bytes, release_memory, resident_bytes, use_threads
from edge_ft.tune.job import prepare_job
from edge_ft.tune.loop import EVALUATIONS, Backend, planned_steps
from edge_ft.tune.measure import Measured, batches_of, measure, padded
from edge_ft.tune.prepare import SPLITS, Prepared
from edge_ft.tune.report import BATCH_COST, OVERFITTING_ROWS, SAMPLE_TOKENS

if TYPE_CHECKING:
    import torch

    from edge_ft.models.base_model import Base

__all__ = ["make_plan", "plan", "refuse_at_sight", "resolve_memory"]

SHORT_STEP = 512
"""Padded tokens of a step up to which keeping the frozen weights in bfloat16 saves a sixth of its time and more."""
PLENTY = 1 / 8
"""Share of the memory that they may take for it without being asked for."""
MARGIN = 0.9
"""Share of the free memory and disk that a run may take."""
BYTES_PER_WEIGHT = {"int4": 0.65, "nf4": 1.3, "int8": 1.15, "bf16": 2.05, "fp32": 4.0}
"""What a frozen weight takes in memory, with its scale and zero point at blocks of 32."""
CHECKPOINT = 4
"""A checkpoint's size in adapters: the weights, the best ones, and AdamW's two moments."""
PIECES = 1.08
"""Memory that stays with the process because batches of other sizes leave it in pieces: 3 to 18% were seen."""
LAST_SECONDS = 1.5
"""The plot and the report."""


def plan(config: TuneConfig, progress: Progress | None = None, available: Available | None = None) -> dict[str, Any]:
    """What tuning with these settings would take, and what the few others worth choosing between would.

    Args:
        available: What there is, in place of what this machine has free.

    Returns:
        `rows` of each split; `tokens` of the train rows (`p50`, `p95`, `max`, `total`); `trainable_parameters`;
        `steps`; the audit's `findings`; `available` memory and disk; `choices` with `layers`, `memory`, `seconds`,
        `peak_rss_bytes`, `disk_bytes` and whether it `fits`; the `recommended` one of them and the `reason`; the
        rows `shown` as --show asks.

    Raises:
        UsageError: a model, rows or options that cannot be used.
        AuditRefused: the rows would train nothing, or overlap between splits.
        WillNotFit: no choice fits into memory and disk.
    """
    progress = progress or Silent()
    torch = import_libraries(progress, "peft")
    from edge_ft.tune.distributed import Processes
    from edge_ft.tune.trainable_model import load_trainable_model

    available = available or Available.here(config.out)
    started = time.monotonic()
    use_threads(config.threads)
    job = prepare_job(config, progress)
    base, tokenizer, prepared = job.base, job.tokenizer, job.prepared
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = resolve_memory(base, job.config, prepared, available, device)
    ready = time.monotonic() - started
    weights = _weights(base)
    choices: list[dict[str, Any]] = []
    loaded: list[float] = []
    most: dict[Memory | None, int] = {}
    for option in _options(config, base):
        refuse_at_sight(base, option, available)
        progress.say(f"measuring layers {option.layers}, memory {option.memory}")
        began = time.monotonic()
        with PeakMemory() as loading:
            # The codes do not change what a step takes: they are chosen for the time and the memory that takes.
            chosen = option if option.memory not in most else replace(option, calibration_rows=0)
            try:
                model = load_trainable_model(replace(job, config=chosen), Processes(device), progress)
            except UsageError:
                if option.layers == config.layers:
                    raise
                continue  # --target-modules names no layer of so few
        most[option.memory] = max(most.get(option.memory, 0), loading.bytes)
        loaded.append(time.monotonic() - began)
        option = replace(option, compute=model.compute)
        held = most[option.memory]
        measured = measure(model.backend, model.scorer, prepared, option, tokenizer.pad_id, available, held)
        # The first time is also that of what a tune imports.
        before = ready + loaded[0] + time.monotonic() - began - loaded[-1]
        kept = int(weights * BYTES_PER_WEIGHT["int4"]) if option.base_calibration_rows else 0
        choices.append(_choice(option, prepared, measured, tokenizer, before, kept, available))
        del model
        release_memory()
    recommended = next((choice for choice in choices if choice["fits"]), None)
    if recommended is None:
        raise WillNotFit(_too_much(min(choices, key=lambda choice: choice["peak_rss_bytes"]), available))
    return _result(config, prepared, available, choices, recommended)


def make_plan(
    config: TuneConfig,
    prepared: Prepared,
    backend: Backend,
    scorer: Answerer,
    tokenizer: TextTokenizer,
    progress: Progress,
    before: float,
    available: Available | None = None,
) -> dict[str, Any]:
    """The plan of the one setting that a tune is about to train with, as `plan` returns it; also said.

    `backend` is left as it was: gradients are forgotten, and every step of a run seeds its own random numbers.

    Args:
        before: Seconds that the tune has been going on.

    Raises:
        WillNotFit: it takes more memory or disk than there is.
    """
    available, began = available or Available.here(config.out), time.monotonic()
    measured = measure(backend, scorer, prepared, config, tokenizer.pad_id, available, peak_rss_bytes())
    before += time.monotonic() - began
    codes = RunFolder(config.out).codes
    kept = codes.stat().st_size if codes.is_file() else 0
    choice = _choice(config, prepared, measured, tokenizer, before, kept, available)
    for text in prepared.shown:
        progress.say(text)
    result = _result(config, prepared, available, [choice], choice)
    tokens = result["tokens"]
    progress.say(
        f"plan: {tokens['total']} tokens in {result['rows']['train']} train rows (half have up to {tokens['p50']}, the "
        f"longest {tokens['max']}), {result['trainable_parameters'] / 1e6:.2f} M trainable parameters, "
        f"{result['steps']} steps; about {duration(choice['seconds'])}, {megabytes(choice['peak_rss_bytes'])} "
        f"of memory, {megabytes(choice['disk_bytes'])} of disk"
    )
    if not choice["fits"]:
        raise WillNotFit(_too_much(choice, available))
    return result


def resolve_memory(
    base: "Base",
    config: TuneConfig,
    prepared: Prepared,
    available: Available,
    device: "torch.device",
    processes: int = 1,
) -> TuneConfig:
    """`config` with what memory is used for, where it leaves that open; each of the processes has its own weights."""
    from edge_ft.quant.bf16 import has_bf16

    if config.memory is not None:
        return config
    train = prepared.examples["train"]
    tokens = statistics.fmean(padded(batch, train, prepared.task) for batch in batches_of(config, train))
    narrow = device.type == "cpu" and config.compute != "fp32" and has_bf16(device)
    saves = narrow and config.base_format in ("int4", "int8", "nf4")
    fits = 2 * _weights(base) * processes <= PLENTY * available.memory_bytes
    return replace(config, memory="high" if saves and fits and tokens <= SHORT_STEP else "normal")


def refuse_at_sight(base: "Base", config: TuneConfig, available: Available) -> None:
    """Refuse a base whose weights alone are more than there is, before they are loaded.

    Raises:
        WillNotFit: so it is.
    """
    weights = _weights(base)
    size, less = BYTES_PER_WEIGHT[config.base_format], ""
    if config.memory == "high":
        size += BYTES_PER_WEIGHT["fp32" if config.compute == "fp32" else "bf16"]
        less = "give --memory normal, or "
    needed = int(weights * size) + resident_bytes()
    if needed > MARGIN * available.memory_bytes:
        raise WillNotFit(
            f"{base.name} has {weights / 1e6:.0f} M weights, which take {megabytes(needed)} of memory as "
            f"{config.base_format}{' beside floats' if less else ''}: {megabytes(available.memory_bytes)} are free; "
            f"{less}take a smaller model"
        )


def _weights(base: "Base") -> int:
    """How many weights the files of a base hold."""
    weights = 0
    for file in base.path.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            weights += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return weights


def duration(seconds: float) -> str:
    """`45 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def megabytes(size: float) -> str:
    """Bytes as `1234 MB`."""
    return f"{size / 1e6:.0f} MB"


def _options(config: TuneConfig, base: "Base") -> list[TuneConfig]:
    """The settings worth choosing between, the best first: fewer layers learn less, less memory only costs time."""
    layers = base.dims.layers
    own = min(last_layers(config.layers) or layers, layers)
    counts = [own] if base.dims.repeats_layers else sorted({layers, max(layers // 2, 1), own}, reverse=True)
    named = [config.layers if count == own else "all" if count == layers else f"last:{count}" for count in counts]
    uses: tuple[Memory, ...] = ("high" if config.memory == "high" else "normal", "low")
    return [replace(config, layers=name, memory=memory) for name in named for memory in uses]


def _choice(
    config: TuneConfig,
    prepared: Prepared,
    measured: Measured,
    tokenizer: TextTokenizer,
    before: float,
    codes_bytes: int,
    available: Available,
) -> dict[str, Any]:
    """What a run with these settings takes, after so many seconds `before` it and with codes of such a size."""
    train = prepared.examples["train"]
    sizes = [padded(batch, train, prepared.task) for batch in batches_of(config, train)]
    steps = planned_steps(len(train), config)
    passes = steps * config.gradient_accumulation * statistics.fmean(map(measured.step.at, sizes))

    def look(examples: Sequence[Example]) -> float:
        lengths = [len(example.input_ids) for example in examples]
        return sum(
            measured.look.at(padded(batch, examples, prepared.task))
            for batch in eval_batches(lengths, config.rows_at_once)
        )

    validation = prepared.examples["validation"]
    looks = math.ceil(steps / (config.eval_steps or math.ceil(steps / EVALUATIONS)))
    loop = passes + (1 + looks) * look(validation)
    if config.max_minutes is not None:
        loop = min(loop, config.max_minutes * 60)
    after = 2 * look(prepared.examples["test"]) + look(train[: min(len(validation), OVERFITTING_ROWS)])
    after += 2 * look(validation) if config.compute == "bf16" else 0.0
    after *= measured.report
    if prepared.task in TEXT_TASKS:
        answer = statistics.median(len(example.labels) - example.shared_positions for example in train)
        after += BATCH_COST * (SAMPLE_TOKENS + min(answer, SAMPLE_TOKENS)) * measured.token
    state = 4 * measured.trainable  # bytes of all trained weights
    # AdamW's two moments and the best weights come on top of what was measured. What a step took is given back before
    # the report is made.
    most = max(measured.memory.at(max(sizes)), measured.memory.values[0] + measured.answering)
    peak = max(measured.held, round((most + 3 * state) * PIECES))
    rows = sum(len(json.dumps(row.fields, default=str)) for name in SPLITS for row in prepared.rows[name])
    texts = sum(file.stat().st_size for file in tokenizer.files())
    # Adapter and checkpoint are written beside what they replace.
    disk = codes_bytes + rows + texts + 2 * state + 2 * CHECKPOINT * state + 1_000_000
    return {
        "layers": config.layers,
        "memory": config.memory,
        "trainable_parameters": measured.trainable,
        "seconds": round(before + loop + after + LAST_SECONDS, 1),
        "peak_rss_bytes": peak,
        "disk_bytes": disk,
        "fits": peak <= MARGIN * available.memory_bytes and disk <= MARGIN * available.disk_bytes,
    }


def _result(
    config: TuneConfig,
    prepared: Prepared,
    available: Available,
    choices: list[dict[str, Any]],
    recommended: dict[str, Any],
) -> dict[str, Any]:
    train = prepared.examples["train"]
    lengths = [len(example.input_ids) for example in train]
    what = f"layers {recommended['layers']} with {recommended['memory']} memory"
    better = "the only setting asked for" if len(choices) == 1 else "the best of the choices"
    if recommended is not choices[0]:
        better = "the best of the choices that fit"
    memory, disk = megabytes(recommended["peak_rss_bytes"]), megabytes(recommended["disk_bytes"])
    reason = (
        f"{what} is {better}: it takes {memory} of {megabytes(available.memory_bytes)} free memory, "
        f"{disk} of {megabytes(available.disk_bytes)} free disk and {duration(recommended['seconds'])}"
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
        "steps": planned_steps(len(train), config),
        "findings": prepared.findings,
        "available": {"memory_bytes": available.memory_bytes, "disk_bytes": available.disk_bytes},
        "choices": choices,
        "recommended": recommended,
        "reason": reason,
        **({"shown": prepared.shown} if prepared.shown else {}),
    }


def _too_much(choice: dict[str, Any], available: Available) -> str:
    what = f"layers {choice['layers']} with {choice['memory']} memory"
    if choice["disk_bytes"] > MARGIN * available.disk_bytes:
        disk = megabytes(choice["disk_bytes"])
        return f"{what} takes {disk} of disk and {megabytes(available.disk_bytes)} are free: free some"
    less = {"high": ["--memory normal or low"], "normal": ["--memory low"], "low": []}
    others = [*less[choice["memory"]], "a smaller --batch-size or --max-length"]
    memory = megabytes(choice["peak_rss_bytes"])
    return (
        f"{what} takes {memory} of memory and {megabytes(available.memory_bytes)} are free: give {', or '.join(others)}"
    )
