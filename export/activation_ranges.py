"""Ranges of int8 activations, chosen by the error of the products that read them.

A range from minimum to maximum is as wide as its largest value, and in many encoders a few channels are tens of times
larger than the others, for which few steps are left. So every input is measured over rows, without their padding, and
some ways to read it are compared on a sample of tokens: narrower ranges, and channels divided by a factor that their
weights are multiplied by (SmoothQuant, arXiv:2211.10438). The way with the smallest error of the outputs is taken.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

__all__ = ["Reading", "choose_reading", "read_inputs"]

Feed = dict[str, NDArray[np.int64]]
Floats = NDArray[np.float32]

TOKENS = 512
"""Tokens of an input on which ways are compared."""
RANGES = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Multiples of the range from minimum to maximum that are tried."""
SMOOTHINGS = (0.0, 0.5, 0.75)
"""Powers of an input's largest value that its channels are divided by; 0: they stay."""
WORTH = 0.8
"""A smoothing costs a product for each value: it is taken where it leaves less than this share of the squared error."""
WEIGHT_STEPS = 63
"""Largest code of a 7-bit weight."""


@dataclass(frozen=True)
class Reading:
    """How an input becomes 8-bit codes."""

    divisor: Floats | None
    """[channels], what the input is divided by and its weights are multiplied by; None: nothing."""
    low: float
    high: float
    error: float
    """Squared error of the outputs over their squared size."""


def read_inputs(model: ir.Model, names: Sequence[str], feeds: Sequence[Feed], threads: int) -> dict[str, Floats]:
    """Run a graph, and return a sample of some of its values without the positions of padding.

    Args:
        model: A float graph, which is not changed.
        names: Of the values, each [batch, seq, channels].
        feeds: Inputs of the graph.
        threads: CPU threads.

    Returns:
        By name, [tokens, channels]: the tokens with the largest values of every batch, and others at even distances.
    """
    wanted = set(names)
    read = model.clone()
    known = {value.name for value in read.graph.outputs}
    for node in read.graph:
        read.graph.outputs.extend(value for value in node.outputs if value.name in wanted and value.name not in known)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(ir.to_proto(read).SerializeToString(), options, providers=["CPUExecutionProvider"])
    asked = [name for name in (output.name for output in session.get_outputs()) if name in wanted]
    found: dict[str, list[Floats]] = {name: [] for name in asked}
    for feed in feeds:
        real = feed["attention_mask"].astype(bool) if "attention_mask" in feed else None
        for name, value in zip(asked, session.run(asked, feed), strict=True):
            fits = real is not None and value.shape[:-1] == real.shape
            tokens = value[real] if fits else value.reshape(-1, value.shape[-1])
            found[name].append(_sample(tokens, -(-TOKENS // len(feeds))))
    return {name: np.concatenate(samples) for name, samples in found.items()}


def _sample(tokens: Floats, count: int) -> Floats:
    """Return so many tokens [tokens, channels]: the largest value of each channel decides the range, so it is in."""
    if len(tokens) <= count:
        return tokens
    largest = np.argsort(np.abs(tokens).max(1))[-(count // 4 + 1) :]
    even = np.linspace(0, len(tokens) - 1, count - len(largest)).astype(int)
    return tokens[np.unique(np.concatenate([largest, even]))]


def choose_reading(inputs: Floats, weight: Floats) -> Reading:
    """Choose how products read an input.

    Args:
        inputs: [tokens, channels].
        weight: [channels, outputs] of all products that read it.

    Returns:
        The way with the smallest squared error of the outputs.
    """
    right = inputs @ weight
    size = max(float(np.square(right, dtype=np.float64).sum()), 1e-30)
    plain, *smoothed = (
        min(_readings(inputs, weight, right, size, power), key=lambda reading: reading.error) for power in SMOOTHINGS
    )
    best = min(smoothed, key=lambda reading: reading.error)
    return best if best.error < WORTH * plain.error else plain


def _readings(inputs: Floats, weight: Floats, right: Floats, size: float, power: float) -> Iterator[Reading]:
    """Yield the ranges of one smoothing with their errors."""
    divisor = None
    if power:
        largest, widest = (np.maximum(np.abs(values).max(axis), 1e-5) for values, axis in ((inputs, 0), (weight, 1)))
        divisor = (largest**power / widest ** (1 - power)).astype(np.float32)
        divisor /= np.exp(np.log(divisor).mean())  # around 1
        inputs, weight = inputs / divisor, weight * divisor[:, None]
    scale = np.maximum(np.abs(weight).max(0), 1e-30) / WEIGHT_STEPS
    weight = np.rint(weight / scale) * scale
    low, high = min(float(inputs.min()), 0.0), max(float(inputs.max()), 0.0)
    for factor in RANGES:
        step = max((high - low) * factor / 255, 1e-30)
        zero = np.rint(-low * factor / step)
        codes = np.clip(np.rint(inputs / step) + zero, 0, 255)
        error = np.square((codes - zero) * step @ weight - right, dtype=np.float64).sum() / size
        yield Reading(divisor, low * factor, high * factor, float(error))
