"""Which of a bundle's verified graphs runs on this machine, and with how many threads: measured once, then remembered.

The fastest kernel differs by processor and by phase: reading the prompt (prefill) multiplies many rows at a time and is
bound by arithmetic, generating (decode) one row and is bound by reading the weights.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import onnxruntime as ort

from edge_ft.artifacts import Bundle
from edge_ft.config import from_plain
from edge_ft.files import cache_folder, write_json
from edge_ft.runtime.trials import Trial
from edge_ft.runtime.ways import Engine, Way
from edge_ft.system import default_threads, free_memory_bytes, processor, thread_choices, usable_cpus

__all__ = ["candidates", "choose", "fastest", "fixed_engine"]

MAX_LOSS = 0.01
"""Nats per target token: a graph whose validation loss is further above the exact one's is not chosen."""
_WORTH_ROUNDING = 1.05
"""A graph that is not this many times as fast as the exact one is not chosen."""
_WORTH_MEMORY = 1.1
"""Two graphs hold the weights twice, so one phase must be this many times as fast with a graph of its own."""
_ROOM = 4
"""Free memory must be this many times a bundle's size before a further graph is opened beside the first."""
_PROMPT, _ANSWER = 256, 64
"""Tokens of the request by which single graphs are compared."""


def fixed_engine(bundle: Bundle, accuracy_level: int | None, threads: int | None) -> Engine:
    """Return the engine of one graph for both phases; None for the level is the manifest's model, the exact graph."""
    way = Way(_exact_level(bundle) if accuracy_level is None else accuracy_level, threads or default_threads())
    return Engine(way, way, _loss_above_exact(bundle, way.accuracy_level))


def candidates(bundle: Bundle, threads: int | None) -> list[Way]:
    """Return the ways that a bundle may run in, the exact graph with all threads first.

    Args:
        bundle: An open bundle.
        threads: CPU threads; None tries those of `edge_ft.system.thread_choices`.

    Returns:
        Each graph that verification passed with a loss at most `MAX_LOSS` above the exact one's, with each number of
        threads.
    """
    exact = _exact_level(bundle)
    others = [int(level) for level in bundle.manifest.get("graphs", {}) if int(level) != exact]
    close = [level for level in others if (loss := _loss_above_exact(bundle, level)) is not None and loss <= MAX_LOSS]
    counts = [threads] if threads else thread_choices()
    return [Way(level, count) for count in counts for level in [exact, *close]]


def fastest(trials: Sequence[Trial], roomy: bool) -> tuple[Way, Way]:
    """Choose a way for the prefill and one for the decode.

    Args:
        trials: Speeds, those of the exact graph with all threads first.
        roomy: Whether memory holds the weights twice.

    Returns:
        The same way twice, or two ways where the second graph makes a phase so much faster that it is worth its memory.
    """

    def seconds(trial: Trial) -> float:
        return _PROMPT / trial.prefill_tps + _ANSWER / trial.decode_tps

    one = min(trials, key=seconds)
    if seconds(trials[0]) <= seconds(one) * _WORTH_ROUNDING:
        one = trials[0]
    prefill = max(trials, key=lambda trial: trial.prefill_tps)
    decode = max(trials, key=lambda trial: trial.decode_tps)
    if prefill.prefill_tps < one.prefill_tps * _WORTH_MEMORY:
        prefill = one
    if decode.decode_tps < one.decode_tps * _WORTH_MEMORY:
        decode = one
    if not roomy:
        prefill = decode = one
    return prefill.way, decode.way


def choose(bundle: Bundle, threads: int | None, measure: Callable[[Sequence[Way], bool], Sequence[Trial]]) -> Engine:
    """Choose how a bundle runs, from speeds that were measured on this machine now or earlier.

    The speeds are kept in the user's cache by the bundle's files, the processor and the versions; where that cannot be
    written, they are measured again each time.

    Args:
        bundle: An open bundle.
        threads: CPU threads; None tries a few numbers.
        measure: Measures ways, all open together or, if memory is short, one after the other; see
            `edge_ft.runtime.trials.measure_ways`.

    Returns:
        The fastest engine; the exact one where nothing else may run or could be measured.
    """
    ways = candidates(bundle, threads)
    exact = fixed_engine(bundle, None, threads)
    if len(ways) == 1:
        return exact
    roomy = free_memory_bytes() >= _ROOM * bundle.size_bytes * (len(ways) - 1)
    file = _remembered(bundle, ways)
    trials = _read(file, ways)
    if trials is None:
        trials = list(measure(ways, roomy))
        with suppress(OSError):  # a read-only or full cache: measured again next time
            write_json(file, {"cpu": processor()[0], "trials": [asdict(trial) for trial in trials]})
    if not trials or trials[0].way.accuracy_level != ways[0].accuracy_level:
        return exact  # the exact graph itself could not be measured: there is nothing to compare with
    prefill, decode = fastest(trials, free_memory_bytes() >= _ROOM * bundle.size_bytes)
    losses = [_loss_above_exact(bundle, way.accuracy_level) for way in (prefill, decode)]
    return Engine(prefill, decode, max((loss for loss in losses if loss is not None), default=None))


def _read(file: Path, ways: Sequence[Way]) -> list[Trial] | None:
    """Return the trials of an earlier open; None where there are none of these ways."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        document = json.loads(file.read_text("utf-8"))
        trials = [from_plain(Trial, trial, "trial") for trial in document["trials"]]
        if all(trial.way in ways and min(trial.prefill_tps, trial.decode_tps) > 0 for trial in trials):
            return trials
    return None


def _remembered(bundle: Bundle, ways: Sequence[Way]) -> Path:
    """Return the file of a bundle's speeds on this machine."""
    files = sorted((name, entry["sha256"]) for name, entry in bundle.manifest["files"].items())
    key = json.dumps([files, processor(), usable_cpus(), [asdict(way) for way in ways], ort.__version__])
    return cache_folder() / "speeds" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _exact_level(bundle: Bundle) -> int:
    """Return the accuracy level of the manifest's model."""
    graphs = bundle.manifest.get("graphs", {})
    return next((int(level) for level, path in graphs.items() if path == bundle.manifest["model"]), 1)


def _loss_above_exact(bundle: Bundle, level: int) -> float | None:
    """Return by how many nats per token a level's validation loss is above that of level 1, the exact computation.

    A bundle without a score of level 1 is compared with its main graph.
    """
    scores = bundle.manifest.get("verification", {}).get("by_accuracy_level", {})
    found, exact = scores.get(str(level), {}), scores.get("1") or scores.get(str(_exact_level(bundle)), {})
    nll, best = found.get("nll"), exact.get("nll")
    return None if nll is None or best is None or not found.get("passed", False) else float(nll - best)
