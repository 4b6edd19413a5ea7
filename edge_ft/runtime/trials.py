"""Short measurements of how fast a bundle's graphs run here, and whether they compute what they did at the export."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from edge_ft.artifacts import Bundle
from edge_ft.errors import BundleError
from edge_ft.runtime.open_bundle import GenerativeBundle
from edge_ft.runtime.probes import probe_examples, score_probes, score_tolerance
from edge_ft.runtime.ways import Way

__all__ = ["Trial", "agrees", "measure_ways"]

_BUDGET = 2.0
"""Seconds of measuring, without opening the graphs."""
_LONGEST = 10.0
"""Seconds after which no further graph is opened."""
_PROMPT, _ANSWER = 128, 8
"""Most tokens of a run; a slow machine reads and generates fewer."""
_WARM = 8
"""Tokens of the first run, which is slower than later ones and says how long they may be."""


@dataclass(frozen=True)
class Trial:
    """The speed of a way here, in tokens per second."""

    way: Way
    prefill_tps: float
    decode_tps: float
    """Of a model that reads whole texts, the same as `prefill_tps`."""


def measure_ways(
    ways: Sequence[Way], together: bool, open_way: Callable[[Way], Any], clock: Callable[[], float] = perf_counter
) -> list[Trial]:
    """Measure how fast a bundle runs in several ways; a graph that computes something else here is left out.

    Args:
        ways: What to measure, in the order of importance: a machine that is too slow measures only the first ones.
        together: Keep all graphs open and measure them in turn; else open one after the other.
        open_way: Opens the bundle.
        clock: Seconds, for tests.

    Returns:
        A trial of each way that was measured, in the order of `ways`.
    """
    began = clock()
    speeds: dict[Way, list[tuple[float, float]]] = {}
    for group in [list(ways)] if together else [[way] for way in ways]:
        # In a function of its own, after which nothing holds the sessions.
        speeds |= _measure_group(group, _BUDGET / len(ways), open_way, began + _LONGEST, clock)
    return [Trial(way, *map(max, zip(*found, strict=True))) for way, found in speeds.items()]


def _measure_group(
    ways: Sequence[Way], share: float, open_way: Callable[[Way], Any], until: float, clock: Callable[[], float]
) -> dict[Way, list[tuple[float, float]]]:
    """Open ways, measure them in turn for `share` seconds each, and close them.

    Args:
        ways: What to measure.
        share: Seconds.
        open_way: Opens the bundle.
        until: When no further way is opened.
        clock: Seconds.

    Returns:
        The speeds of prefill and decode of each run.
    """
    runs = {}
    for way in ways:
        if clock() >= until:
            break
        with suppress(BundleError):  # this onnxruntime cannot run the graph
            opened = open_way(way)
            if agrees(opened, way.accuracy_level):
                runs[way] = _runs(opened, share / 2, clock)
    speeds: dict[Way, list[tuple[float, float]]] = {way: [] for way in runs}
    measured_s = 0.0
    # In turn, run by run: a moment in which the machine is busy hits all of them alike.
    while runs and measured_s < share * len(ways):
        started = clock()
        for way, run in runs.items():
            speeds[way].append(next(run))
        measured_s += clock() - started
    return speeds


def agrees(opened: Any, level: int) -> bool:
    """Whether an open bundle scores the probe texts as its graph of this accuracy level did at the export."""
    bundle: Bundle = opened.bundle
    verification = bundle.manifest.get("verification", {})
    examples = probe_examples(opened.tokenizer, opened.rendering)
    exported = np.array(verification.get("by_accuracy_level", {}).get(str(level), {}).get("probe_nll", []), np.float64)
    if exported.shape != (len(examples),):
        return False
    nll, targets = score_probes(opened, examples, opened.tokenizer.pad_id, bundle.task)
    max_tax = verification.get("limits", {}).get("max_tax", 0.0)
    tolerance = score_tolerance(str(level), max_tax, opened.rendering, exported)
    return bool((np.abs(nll - exported) <= tolerance * targets).all())


def _runs(opened: Any, seconds: float, clock: Callable[[], float]) -> Iterator[tuple[float, float]]:
    """Run an open bundle again and again, about `seconds` each; yields the tokens per second of prefill and decode."""
    return _decoder_runs(opened, seconds) if isinstance(opened, GenerativeBundle) else _encoder_runs(opened, clock)


def _decoder_runs(opened: GenerativeBundle, seconds: float) -> Iterator[tuple[float, float]]:
    """See `_runs`; a run reads a prompt and generates an answer."""
    ids = _some_ids(opened, min(_PROMPT, opened.max_length - _ANSWER - 1))
    warm = opened.time_decode(ids[:_WARM], 2)
    length = _within(seconds / 2, warm.prefill_s / len(ids[:_WARM]), _WARM, len(ids))
    new = _within(seconds / 2, warm.decode_s[0], 1, _ANSWER)
    while True:
        timings = opened.time_decode(ids[:length], new + 1)
        # Another process that takes the core for a moment slows single tokens, which the median leaves out.
        yield length / timings.prefill_s, 1 / float(np.median(timings.decode_s))


def _encoder_runs(opened: Any, clock: Callable[[], float]) -> Iterator[tuple[float, float]]:
    """See `_runs`; a run reads one text, so both speeds are the same."""
    ids = np.array([_some_ids(opened, min(_PROMPT, opened.rendering.max_length))], np.int64)
    opened.logits(ids, np.ones_like(ids))
    while True:
        started = clock()
        opened.logits(ids, np.ones_like(ids))
        yield (ids.size / (clock() - started),) * 2


def _some_ids(opened: Any, length: int) -> list[int]:
    """Return the tokens of the probe texts, repeated to a length."""
    ids = [token for example in probe_examples(opened.tokenizer, opened.rendering) for token in example.input_ids]
    return (ids * (length // len(ids) + 1))[: max(length, 1)]


def _within(seconds: float, each_s: float, least: int, most: int) -> int:
    """Return how many things that take `each_s` fit into `seconds`, from `least` to `most`."""
    return max(min(int(seconds / max(each_s, 1e-6)), most), min(least, most))
