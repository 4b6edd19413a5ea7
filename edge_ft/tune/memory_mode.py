"""The base format and memory mode of a training by torch, by what fits; and a base that is too large."""

import math
import time
from typing import TYPE_CHECKING

from edge_ft.config import TuneConfig
from edge_ft.data import collate
from edge_ft.errors import WillNotFit
from edge_ft.system import Available, resident_bytes
from edge_ft.tune.prepare import Job
from edge_ft.tune.units import megabytes

if TYPE_CHECKING:
    import torch

    from edge_ft.models.base_model import Base
    from edge_ft.tune.trainable_model import TrainableModel

__all__ = [
    "BYTES_PER_WEIGHT",
    "USABLE_SHARE",
    "count_weights",
    "refuse_large_base",
    "resolve_base_format",
    "resolve_memory",
    "settle_memory",
]

WORTH_CACHING = 0.05
"""Share of a step's time that cached weights must save."""
HIGH_MEMORY_SHARE = 1 / 8
"""Share of the available memory that weights may take in float32, unless --base-format or --memory high is given."""
BYTES_PER_WEIGHT = {"int4": 0.65, "nf4": 1.3, "int8": 1.15, "bf16": 2.05, "fp32": 4.0}
"""Memory of a frozen weight, with its scale and zero point at a block size of 32."""
USABLE_SHARE = 0.9
"""Share of the available memory and disk that a run may take."""


def resolve_base_format(job: Job, available: Available, device: "torch.device", processes: int = 1) -> Job:
    """The job with --base-format chosen if the user left it open: float for decoders if the weights take little memory.

    An adapter that is trained over float weights loses less when it is merged and rounded than one that is trained over
    the base's codes, and a step need not dequantize (docs/decisions/045). The merged model is int4 either way, and its
    scales are trained either way.

    Args:
        job: Its settings leave nothing else open but the memory mode.
        available: Shared by the processes.
        device: Where the training runs.
        processes: How many train together; each holds all weights.

    Returns:
        The job.
    """
    from edge_ft.quant.devices import has_bf16

    config = job.config
    if config.base_format is not None:
        return job
    wanted = job.prepared.task == "text-generation" and device.type == "cpu" and config.memory in (None, "high")
    if not (wanted and _floats_are_cheap(job, available, processes)):
        return job.with_settings(base_format="int4")
    narrow = config.compute != "fp32" and has_bf16(device)
    return job.with_settings(base_format="bf16" if narrow else "fp32")


def resolve_memory(job: Job, available: Available, device: "torch.device", processes: int = 1) -> Job:
    """The job with --memory chosen if the user left it open: high if the dequantized weights take little memory.

    `settle_memory` then finds out whether that saves time.

    Args:
        job: Its settings leave nothing else open.
        available: Shared by the processes.
        device: Where the training runs.
        processes: How many train together; each holds all weights.

    Returns:
        The job.
    """
    config = job.config
    if config.memory is not None:
        return job
    quantized = device.type == "cpu" and config.frozen_format in ("int4", "int8", "nf4")
    return job.with_settings(memory="high" if quantized and _floats_are_cheap(job, available, processes) else "normal")


def _floats_are_cheap(job: Job, available: Available, processes: int) -> bool:
    """Whether the weights in float32, once for each process, take little of the memory."""
    return 4 * count_weights(job.base) * processes <= HIGH_MEMORY_SHARE * available.memory_bytes


def settle_memory(job: Job, model: "TrainableModel") -> Job:
    """The job with --memory normal in place of high if cached weights would save little of a step's time.

    A few rows of a batch of median size are trained on without them, and each weight is dequantized once: a step does
    that twice, whatever its number of rows.

    Args:
        job: The training; `resolve_memory` chose its memory mode.
        model: Its weights and optimizer stay as they are.

    Returns:
        The job.
    """
    if job.config.memory != "high":
        return job
    compute, examples = model.backend.compute, job.prepared.examples["train"]
    order = sorted(range(len(job.batches)), key=job.batch_tokens.__getitem__)
    typical = job.batches[order[len(order) // 2]]
    compute.cache_weights(None)
    with model.backend.unshared():
        few = typical[: max(1, len(typical) // 4)]
        for rows in (typical[:1], few):  # the first pass pays for what later ones find ready
            batch = collate([examples[index] for index in rows], job.tokenizer.pad_id, job.prepared.task)
            began = time.perf_counter()
            model.backend.gradient(batch, 1)
            step = time.perf_counter() - began
    model.backend.discard()
    began = time.perf_counter()
    compute.dequantize()
    twice = 2 * (time.perf_counter() - began)
    step = twice + max(step - twice, 0.0) * len(typical) / len(few)
    if twice < WORTH_CACHING * step:
        compute.stop_caching()
        return job.with_settings(memory="normal")
    compute.cache_weights(model.backend.dtype)
    return job


def refuse_large_base(base: "Base", config: TuneConfig, available: Available) -> None:
    """Refuse a base whose weights alone exceed the available memory, before they are loaded.

    Raises:
        WillNotFit: they do.
    """
    weights = count_weights(base)
    size, held, advice = BYTES_PER_WEIGHT[config.frozen_format], str(config.frozen_format), "take a smaller model"
    if config.memory == "high":
        size += BYTES_PER_WEIGHT["fp32" if config.compute == "fp32" else "bf16"]
        held, advice = f"{held} and dequantized", f"give --memory normal, or {advice}"
    needed = int(weights * size) + resident_bytes()
    if needed > USABLE_SHARE * available.memory_bytes:
        raise WillNotFit(
            f"{base.name} has {weights / 1e6:.0f} M weights, which take {megabytes(needed)} of memory as {held}: "
            f"{megabytes(available.memory_bytes)} are available; {advice}"
        )
    on_card = int(weights * size)
    if available.device_bytes is not None and on_card > USABLE_SHARE * available.device_bytes:
        raise WillNotFit(
            f"{base.name} has {weights / 1e6:.0f} M weights, which take {megabytes(on_card)} of the GPU as {held}: "
            f"{megabytes(available.device_bytes)} are available; {advice}"
        )


def count_weights(base: "Base") -> int:
    """Number of weights in the files of a base."""
    return sum(math.prod(stored.shape) for stored in base.checkpoint.tensors.values())
