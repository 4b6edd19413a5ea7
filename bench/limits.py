"""The machine's own limits, measured in the same run, and each speed as a share of its limit (a roofline)."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from edge_ft.artifacts import Bundle
from edge_ft.bench.subjects import Subject

__all__ = ["WeightReads", "add_shares", "measure_limits", "weight_reads"]

_READ_BYTES = 2**28
"""More than the caches of a processor hold."""
_SIDE = 1536
"""Rows and columns of the matrices that are multiplied."""
_TRIES = 5

WeightReads = tuple[float, float | None]
"""Bytes of weights that are read for each decoded token, and operations for each token of a prompt (None: unknown)."""


def measure_limits(job: dict[str, Any]) -> dict[str, float]:
    """Measure what no engine on this machine exceeds, with numpy alone; the best of some tries counts.

    Args:
        job: `threads`, which the process's BLAS was started with.

    Returns:
        `read_bytes_per_s`: memory read by a maximum over 256 MB, or by a dot product with itself, the faster one;
        `sgemm_flop_per_s`: float32 operations of a product of square matrices.
    """
    import numpy as np

    values = np.ones(_READ_BYTES // 4, np.float32)
    parts = np.array_split(values, job["threads"])
    with ThreadPoolExecutor(job["threads"]) as pool:
        reads = (np.max, lambda part: np.dot(part, part))
        read_s = min(_seconds(lambda read=read: list(pool.map(read, parts))) for read in reads)  # type: ignore[misc]
    matrix = np.ones((_SIDE, _SIDE), np.float32)
    return {
        "read_bytes_per_s": values.nbytes / read_s,
        "sgemm_flop_per_s": 2 * _SIDE**3 / _seconds(lambda: matrix @ matrix),
    }


def _seconds(work: Any) -> float:
    """The shortest of some runs."""
    found = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def weight_reads(subject: Subject) -> WeightReads | None:
    """What a decoder's weights cost.

    An untied embedding is not read (a row of it is), and the head is computed for the last token of a prompt only.
    The weights of a bundle are counted from their bytes and bits; attention is left out.

    Args:
        subject: A decoder.

    Returns:
        Bytes and operations a token; None for other tasks and for engines whose weights are not known here.
    """
    if subject.task != "text-generation" or "file" in subject.job:  # llama.cpp's blocks have other sizes
        return None
    if subject.engine in ("edge-ft", "openvino", "genai"):  # they run the graph of the bundle
        bundle = Bundle.open(Path(subject.job["bundle"]))
        quantization, settings = bundle.manifest.get("quantization"), bundle.path / "config.json"
        if quantization is None or not settings.is_file():
            return None
        config = json.loads(settings.read_text(encoding="utf-8"))
        bits, block = quantization["bits"], quantization["block_size"]
        # Each block of 4-bit or 8-bit codes has a scale in float16 and, where it is not symmetric, a zero point. Where
        # some layers have 8 bits, those took what scales in float32 would (docs/decisions/034).
        scale, zero = 32 if quantization.get("overrides") else 16, 0 if quantization["symmetric"] else bits
        bytes_each = (bits + ((scale + zero) / block if block and bits < 16 else 0)) / 8
        files: dict[str, dict[str, Any]] = bundle.manifest["files"]
        stored = sum(entry["bytes"] for name, entry in files.items() if name.endswith("_data"))
        parameters = stored / bytes_each
    elif "parameters" in subject.job:
        config, parameters, bytes_each = subject.job["base"]["config"], subject.job["parameters"], 4.0
    else:
        return None
    vocabulary = config.get("vocab_size", 0) * config.get("hidden_size", 0)
    read = parameters - (0 if config.get("tie_word_embeddings", False) else vocabulary)
    if read <= vocabulary:  # so small, or so unusual, that these counts say nothing
        return None
    return read * bytes_each, 2 * (read - vocabulary)


def add_shares(records: list[dict[str, Any]], reads: WeightReads | None, limits: dict[str, float]) -> None:
    """Add `share` to the records of speed of one decoder.

    Decoding is limited by reading the weights for every token, prefill by multiplying.

    Args:
        records: Of one subject; `share` is added in place, `{of, value}`: 1 is the limit.
        reads: As `weight_reads` returns them.
        limits: As `measure_limits` returns them.
    """
    if reads is None:
        return
    read_bytes, operations = reads
    for record in records:
        if record["value"] is None:
            continue
        if record["metric"].startswith("decode_tps"):
            share = record["value"] * read_bytes / limits["read_bytes_per_s"]
            record["share"] = {"of": "read_bytes_per_s", "value": share}
        elif record["metric"].startswith("prefill_tps") and operations is not None:
            share = record["value"] * operations / limits["sgemm_flop_per_s"]
            record["share"] = {"of": "sgemm_flop_per_s", "value": share}
