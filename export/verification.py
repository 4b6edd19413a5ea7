"""The verification that ends an export: base, trained and shipped model on the same rows, and the gate."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_ft.artifacts import Bundle
from edge_ft.config import INT8_ACTIVATIONS, ExportConfig
from edge_ft.data import Example
from edge_ft.errors import ModelError
from edge_ft.evaluate.gate import (
    FEWEST_ROWS,
    PILOT_ROWS,
    TAX_PRECISION,
    Limits,
    cosine_reasons,
    evaluate_gate,
    rows_needed,
    task_metric_for,
    vector_cosine,
)
from edge_ft.evaluate.scoring import RowScores
from edge_ft.evaluate.verify import largest_difference
from edge_ft.export.bundle import make_manifest
from edge_ft.export.figures import compared_figures, score_rows, test_scores
from edge_ft.export.source import ExportSource
from edge_ft.models.scorer import TorchScorer
from edge_ft.progress import Progress, heartbeat
from edge_ft.runtime import load
from edge_ft.runtime.engine import MAX_LOSS
from edge_ft.runtime.probes import SAME, probe_examples, score_scale

__all__ = ["TorchScores", "genai_level", "score_torch", "verify_graphs", "with_rows_needed"]


@dataclass(frozen=True)
class TorchScores:
    """Scores by torch; each of the last three is None if there are no rows or no adapter."""

    shipped_probe: RowScores
    """The weights that ship, on the probe texts."""
    untuned_probe: RowScores | None
    """The base on the probe texts, with the trained head if there is one: what would ship if the adapter were lost."""
    base: RowScores | None
    """The untuned base in the shipped format, on the validation rows."""
    trained: RowScores | None
    """The model as trained, on the validation rows."""
    test: dict[str, RowScores] = field(default_factory=dict)
    """`base` and `trained` on the test rows of a model; those of a run are in its report."""


@dataclass(frozen=True)
class GraphScores:
    """Scores of the graph of one accuracy level."""

    probe: RowScores
    """On the probe texts."""
    validation: RowScores | None
    """On the validation rows; None without rows."""


@dataclass(frozen=True)
class LevelResult:
    """The verification of one accuracy level."""

    figures: dict[str, Any]
    """Entry of the manifest's `by_accuracy_level`, without `passed`."""
    gate: dict[str, Any]
    """Figures of the gate; empty without a trained model or rows."""
    problem: str
    """Why the level fails; empty if it passes."""


def with_rows_needed(source: ExportSource, shipped_model: Any, progress: Progress) -> ExportSource:
    """Return the source with as many validation rows as the gate needs: all, unless there are more than a few.

    Args:
        source: What is exported.
        shipped_model: The model that ships.
        progress: Receives the steps.

    Returns:
        The source; its rows are the first ones of those that were read.
    """
    available = len(source.rows.validation)
    if source.adapter is None or available <= FEWEST_ROWS or source.task == "feature-extraction":
        return source  # recall is among all rows, and embedding them takes little
    pilot = source.rows.validation[:PILOT_ROWS]
    trained = _score_trained(source, pilot, progress, "a few validation rows")
    shipped = score_rows(source, TorchScorer(shipped_model, source.task), pilot, progress, "a few validation rows")
    count = rows_needed(trained, shipped, available)
    if count < available:
        progress.say(f"{count} of {available} validation rows are enough for a tax of ±{TAX_PRECISION} nats")
    return replace(source, rows=source.rows.first(count))


def score_torch(source: ExportSource, shipped_model: Any, progress: Progress) -> TorchScores:
    """Score the torch models that verification compares with, one at a time beside `shipped_model`.

    Args:
        source: What is exported.
        shipped_model: The model that ships.
        progress: Receives the steps.

    Returns:
        The scores.

    Raises:
        ModelError: the loss of the probe texts is not finite.
    """

    def scored(model: Any, examples: list[Example], stage: str) -> RowScores:
        return score_rows(source, TorchScorer(model, source.task), examples, progress, stage)

    validation = source.rows.validation
    probes = probe_examples(source.tokenizer, source.rendering)
    shipped_probe = scored(shipped_model, probes, "probe, torch")
    if not np.isfinite(shipped_probe.nll).all():
        raise ModelError(
            f"the weights of {source.base.name} give no finite loss of the probe texts: they are damaged or too large, "
            "or those of its adapter are"
        )
    if source.adapter is None and not validation:
        return TorchScores(shipped_probe, None, None, None)
    base = source.known_scores("base", validation) if validation else None
    own_test = source.rows.test if source.run is None else []
    head = source.base.family.trained_head(source.task)
    switched_off = source.lane == "adapter" and not head  # then the base is what ships, its adapter switched off
    base_model: Any = None
    if not switched_off or own_test or (validation and base is None):
        with heartbeat(progress, "loading the base"):
            base_model = source.load_untuned()
    if validation and base is None:
        base = scored(base_model, validation, "validation, base")
    test = {"base": scored(base_model, own_test, "test rows, base")} if own_test else {}
    if source.adapter is None:
        return TorchScores(shipped_probe, None, base, None, test)
    if switched_off:
        with shipped_model.disable_adapter():
            untuned_probe = scored(shipped_model, probes, "probe, base")
    else:
        whole = shipped_model.get_base_model() if hasattr(shipped_model, "get_base_model") else shipped_model
        for name in head:
            base_model.set_submodule(name, whole.get_submodule(name))
        untuned_probe = scored(base_model, probes, "probe, base")
    del base_model
    if not validation:
        return TorchScores(shipped_probe, untuned_probe, base, None)
    trained = _score_trained(source, validation, progress, "validation, as trained")
    if own_test:
        test["trained"] = _score_trained(source, own_test, progress, "test rows, as trained")
    return TorchScores(shipped_probe, untuned_probe, base, trained, test)


def _score_trained(source: ExportSource, examples: list[Example], progress: Progress, stage: str) -> RowScores:
    """Return the scores of the model as trained, which its run may have computed already."""
    if (known := source.known_scores("tuned", examples)) is not None:
        return known
    with heartbeat(progress, "loading the model as trained"):
        trained_model = source.load_trained()
    return score_rows(source, TorchScorer(trained_model, source.task), examples, progress, stage)


def verify_graphs(
    folder: Path,
    source: ExportSource,
    graphs: dict[int, str],
    torch_scores: TorchScores,
    config: ExportConfig,
    progress: Progress,
) -> tuple[dict[str, Any], set[int], int]:
    """Score the graphs of a bundle and compare them with torch and with the limits of the gate.

    Args:
        folder: The bundle, which has no manifest yet.
        source: What is exported.
        graphs: By accuracy level, the graph's path relative to `folder`; level 1 is the exact one.
        torch_scores: What to compare with.
        config: Limits and threads.
        progress: Receives the steps.

    Returns:
        The manifest's `verification`, in which `refused` lists why the export is refused; the accuracy levels whose
        graph passed; and the one that runs by default.
    """
    bundle = Bundle(folder, make_manifest(source, graphs, 1))
    limits = Limits.of(config, over_float=source.rounds_what_was_float)
    # A level that may ship is left out if it fails; the one that was requested by its weights is refused.
    may_ship = {4} if source.weights in INT8_ACTIVATIONS else set(graphs)
    requested = min(may_ship)
    scores = {level: _score_graph(bundle, source, level, config.threads, progress) for level in sorted(graphs)}
    untuned = torch_scores.untuned_probe
    same = SAME * score_scale(source.rendering, torch_scores.shipped_probe.nll)
    changes = None if untuned is None else largest_difference(untuned, scores[1].probe.nll) > same
    results = {
        level: _check_level(source, found, scores[1], torch_scores, limits, bool(changes))
        for level, found in scores.items()
    }
    passed = {requested}
    if source.rows.validation:
        passed |= {level for level in may_ship if not results[level].problem}
        for level in sorted(may_ship - passed):
            progress.say(f"accuracy level {level} is left out: {results[level].problem}")
    reasons = []
    difference = results[1].figures["shipped_minus_last_evaluated"]
    if difference > same:
        reasons.append(f"the graph differs from the torch model it was traced from by {difference:.4f} nats per token")
    if results[requested].problem:
        reasons.append(results[requested].problem)
    if changes is False and not source.rows.validation:
        reasons.append("the adapter does not change the logits of the graph, which answers as the base")
    # Exact int8 takes 15 times as long for a token: ONNX Runtime 1.32 multiplies 8-bit codes fast only with int8
    # activations. The adapter lane is for those who want exactly what was trained.
    main = 4 if source.weights == "int8" and source.lane != "adapter" and 4 in passed else requested
    compared = {"base": torch_scores.base, "trained": torch_scores.trained, "shipped": scores[main].validation}
    verification = {
        **compared_figures(source, compared, limits),
        "adapter_changes_logits": changes,
        **results[main].gate,
        "by_accuracy_level": {
            str(level): {**result.figures, "passed": level in passed} for level, result in results.items()
        },
        "test": _test(bundle, source, main, torch_scores, config.threads, progress),
        "refused": reasons,
    }
    return verification, passed, main


def genai_level(verification: dict[str, Any], kept: Iterable[int], main: int) -> int:
    """Return the accuracy level that computes in int8 if it passed, with a loss at most `MAX_LOSS` above the exact one.

    Args:
        verification: What `verify_graphs` returned.
        kept: Levels that passed.
        main: The level that runs by default.

    Returns:
        Level 4, or `main`.
    """
    scores = verification["by_accuracy_level"]
    nll = [scores.get(str(level), {}).get("nll") for level in (4, main)]
    close = None not in nll and nll[0] <= nll[1] + MAX_LOSS
    return 4 if 4 in kept and close else main


def _score_graph(
    bundle: Bundle, source: ExportSource, level: int, threads: int | None, progress: Progress
) -> GraphScores:
    """Return the scores of the graph of one accuracy level."""
    with heartbeat(progress, f"opening the graph of accuracy level {level}"):
        scorer = load(bundle, accuracy_level=level, threads=threads)

    probes, validation = probe_examples(source.tokenizer, source.rendering), source.rows.validation
    probe = score_rows(source, scorer, probes, progress, f"probe, level {level}")
    stage = f"validation, level {level}"
    return GraphScores(probe, score_rows(source, scorer, validation, progress, stage) if validation else None)


def _check_level(
    source: ExportSource,
    scores: GraphScores,
    exact: GraphScores,
    torch_scores: TorchScores,
    limits: Limits,
    adapter_changes_logits: bool,
) -> LevelResult:
    """Return how one accuracy level compares with the model as trained, or else with the exact level."""
    figures: dict[str, Any] = {
        "probe_nll": scores.probe.nll.tolist(),
        "shipped_minus_last_evaluated": largest_difference(scores.probe, torch_scores.shipped_probe.nll),
    }
    if scores.validation is None or exact.validation is None:
        return LevelResult(figures, {}, "")
    figures |= {
        "nll": scores.validation.mean_nll,
        "accuracy": scores.validation.accuracy,
        "argmax_agreement": scores.validation.agreement(exact.validation),
    }
    if torch_scores.trained is None or torch_scores.base is None:
        cosine = vector_cosine(exact.validation, scores.validation)
        if cosine is not None:
            return LevelResult({**figures, "cosine": cosine}, {}, "; ".join(cosine_reasons(cosine, limits)))
        lost = scores.validation.mean_nll - exact.validation.mean_nll
        above = lost > limits.max_tax
        return LevelResult(figures, {}, f"{lost:+.4f} nats per token against level 1" if above else "")
    verdict = evaluate_gate(
        *(torch_scores.base, torch_scores.trained, scores.validation, limits, adapter_changes_logits),
        task_metric_for(source.rows.validation, source.task, source.rendering.labels),
    )
    figures |= {name: verdict.figures[name] for name in ("quantization_tax", "cosine") if name in verdict.figures}
    return LevelResult(figures, verdict.figures, "; ".join(verdict.reasons))


def _test(
    bundle: Bundle,
    source: ExportSource,
    level: int,
    torch_scores: TorchScores,
    threads: int | None,
    progress: Progress,
) -> dict[str, Any] | None:
    """Return the scores of one graph on the test rows, beside those of base and trained model."""
    if not source.rows.test:
        return None
    return test_scores(source, load(bundle, accuracy_level=level, threads=threads), torch_scores.test, progress)
