"""The verification that ends an export: base, trained and shipped on the same rows, and the gate's verdict."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_ft.artifacts import Bundle
from edge_ft.config import INT8_ACTIVATIONS, ExportConfig
from edge_ft.data import Example
from edge_ft.evaluate.gate import Limits, Verdict, evaluate_gate
from edge_ft.evaluate.scoring import RowScores, summary
from edge_ft.evaluate.task_metric import task_metric_for
from edge_ft.evaluate.verify import SAME, largest_difference, probe_examples, score_examples
from edge_ft.export.bundle import describe, lane
from edge_ft.export.source import Source
from edge_ft.models.scorer import TorchScorer
from edge_ft.progress import Progress
from edge_ft.runtime import load

__all__ = ["Checked", "TorchScores", "check_bundle", "score_torch"]


@dataclass(frozen=True)
class TorchScores:
    """What torch scores; each of the last three is None where there are no rows or no adapter."""

    shipped_probe: RowScores
    """The weights that ship, on the probe texts."""
    untuned_probe: RowScores | None
    """The base, with the trained head where there is one: what would ship if the adapter were lost."""
    base: RowScores | None
    """The untuned base on the grid that ships, on the validation rows."""
    trained: RowScores | None
    """The model as trained, on the validation rows."""


@dataclass(frozen=True)
class Checked:
    """The outcome of an export's verification."""

    verification: dict[str, Any]
    """As the manifest holds it."""
    levels: set[int]
    """Accuracy levels whose graph passed."""
    main: int
    """The one that a client gets unless it asks for another."""
    reasons: list[str]
    """Why the export is refused; empty when it is not."""


def score_torch(source: Source, shipped_model: Any, config: ExportConfig, progress: Progress) -> TorchScores:
    """Torch's scores, with one model in memory at a time besides `shipped_model`."""

    def scored(model: Any, examples: list[Example], stage: str) -> RowScores:
        scorer = TorchScorer(model, source.task)
        return score_examples(scorer, examples, source.tokenizer, source.rendering, progress, stage)

    probes = probe_examples(source.tokenizer, source.rendering)
    shipped_probe = scored(shipped_model, probes, "probe, torch")
    if source.adapter is None and not source.validation:
        return TorchScores(shipped_probe, None, None, None)
    base_model = source.load(source.weights)
    base = scored(base_model, source.validation, "validation, base") if source.validation else None
    if source.adapter is None:
        return TorchScores(shipped_probe, None, base, None)
    if head := source.base.family.trained_head(source.task):
        whole = shipped_model.get_base_model() if hasattr(shipped_model, "get_base_model") else shipped_model
        for name in head:
            base_model.set_submodule(name, whole.get_submodule(name))
    untuned_probe = scored(base_model, probes, "probe, base")
    del base_model
    trained = scored(source.load_trained(), source.validation, "validation, as trained") if source.validation else None
    return TorchScores(shipped_probe, untuned_probe, base, trained)


def check_bundle(
    folder: Path,
    source: Source,
    graphs: dict[int, str],
    torch_scores: TorchScores,
    config: ExportConfig,
    progress: Progress,
) -> Checked:
    """Score the graphs in `folder`, which has no manifest yet, and judge them."""
    bundle = Bundle(folder, describe(source, config, graphs, 1))
    limits = Limits(config.max_tax, config.min_retained, config.max_metric_drop)
    levels: dict[int, dict[str, Any]] = {}
    verdicts: dict[int, Verdict] = {}
    reasons: list[str] = []
    changes: bool | None = None
    by_level: dict[int, RowScores] = {}
    ships = {4} if source.weights in INT8_ACTIVATIONS else set(graphs)
    """Levels that may leave; what was asked for by name is not left out, but refused."""
    for level in sorted(graphs):
        scorer = load(bundle, accuracy_level=level, threads=config.threads)

        def scored(examples: list[Example], stage: str, scorer: Any = scorer, level: int = level) -> RowScores:
            name = f"{stage}, level {level}"
            return score_examples(scorer, examples, source.tokenizer, source.rendering, progress, name)

        probe = scored(probe_examples(source.tokenizer, source.rendering), "probe")
        levels[level] = {
            "probe_nll": probe.nll.tolist(),
            "shipped_minus_last_evaluated": largest_difference(torch_scores.shipped_probe, probe),
        }
        if level == 1:
            if levels[1]["shipped_minus_last_evaluated"] > SAME:
                reasons.append(
                    f"the graph differs from the torch model it was traced from by "
                    f"{levels[1]['shipped_minus_last_evaluated']:.4f} nats per token"
                )
            if torch_scores.untuned_probe is not None:
                changes = largest_difference(torch_scores.untuned_probe, probe) > SAME
        if not source.validation:
            levels[level]["passed"] = level == min(ships)
            continue
        scores = by_level[level] = scored(source.validation, "validation")
        exact = by_level[1]
        assert torch_scores.base is not None
        levels[level] |= {
            "nll": scores.mean_nll,
            "accuracy": scores.accuracy,
            "argmax_agreement": scores.agreement(exact),
        }
        if torch_scores.trained is not None:
            verdicts[level] = evaluate_gate(
                *(torch_scores.base, torch_scores.trained, scores, limits, bool(changes)),
                task_metric_for(source.validation, source.task, source.rendering.labels),
            )
            levels[level]["quantization_tax"] = verdicts[level].figures["quantization_tax"]
            why = "; ".join(verdicts[level].reasons)
        else:
            lost = scores.mean_nll - exact.mean_nll
            why = f"{lost:+.4f} nats per token against level 1" if lost > limits.max_tax else ""
        levels[level]["passed"] = level == min(ships) or (level in ships and not why)
        if why and level == min(ships):
            reasons.append(why)
        elif why and level in ships:
            progress.say(f"accuracy level {level} is left out: {why}")
    if changes is False and not source.validation:
        reasons.append("the adapter does not change the logits of the graph: what ships is the base")
    passed = {level for level, figures in levels.items() if figures["passed"]}
    # Exact, a token takes 15 times as long: ONNX Runtime 1.32 multiplies 8-bit codes fast only with activations
    # in int8. The adapter lane is asked for by who wants exactly what was trained.
    main = 4 if source.weights == "int8" and lane(source, config) != "adapter" and 4 in passed else min(ships)
    shipped = by_level.get(main)
    verification = {
        "rows": len(source.validation),
        "rows_sha256": source.rows_sha256,
        "nll": {
            name: None if scores is None else scores.mean_nll
            for name, scores in (("base", torch_scores.base), ("trained", torch_scores.trained), ("shipped", shipped))
        },
        "quantization_tax": None,
        "retained_gain": None,
        "argmax_agreement": None,
        "adapter_changes_logits": changes,
        **(verdicts[main].figures if main in verdicts else {}),
        "metrics": _metrics(source, base=torch_scores.base, trained=torch_scores.trained, shipped=shipped),
        "limits": {
            "max_tax": limits.max_tax,
            "min_retained": limits.min_retained,
            "max_metric_drop": limits.max_metric_drop,
        },
        "by_accuracy_level": {str(level): figures for level, figures in levels.items()},
        "test": _test(bundle, source, config, main, progress),
    }
    return Checked(verification, passed, main, reasons)


def _metrics(source: Source, **columns: RowScores | None) -> dict[str, dict[str, Any]]:
    """Each task metric on the validation rows: base, trained, shipped."""
    metrics: dict[str, dict[str, Any]] = {}
    for column, scores in columns.items():
        if scores is not None:
            summed = summary(scores, source.validation, source.task, source.rendering.labels)
            for name, value in summed["metrics"].items():
                metrics.setdefault(name, {})[column] = value
    return metrics


def _test(
    bundle: Bundle, source: Source, config: ExportConfig, level: int, progress: Progress
) -> dict[str, Any] | None:
    """The graph of `level` on the run's test rows, beside what the run reported for its base and as trained."""
    if source.run is None or not source.test:
        return None
    report = source.run.report()
    scorer = load(bundle, accuracy_level=level, threads=config.threads)
    scores = score_examples(scorer, source.test, source.tokenizer, source.rendering, progress, "test rows, as shipped")
    shipped = summary(scores, source.test, source.task, source.rendering.labels)
    return {
        "rows": len(source.test),
        "nll": {"base": report["nll"]["test_base"], "trained": report["nll"]["test"], "shipped": shipped["nll"]},
        "metrics": {
            name: {
                "base": report["metrics"][name]["test_base"],
                "trained": report["metrics"][name]["test"],
                "shipped": value,
            }
            for name, value in shipped["metrics"].items()
        },
    }
