"""What an export may lose: the arithmetic of the gate, on scores of the same rows."""

from dataclasses import dataclass
from typing import Any

from edge_ft.evaluate.metrics import paired, paired_bootstrap
from edge_ft.evaluate.scoring import RowScores
from edge_ft.evaluate.task_metric import ACCURACY, TaskMetric

__all__ = ["Limits", "Verdict", "evaluate_gate"]


@dataclass(frozen=True)
class Limits:
    """When an export is refused."""

    max_tax: float
    """Nats per target token that shipping may cost."""
    min_retained: float
    """Share of what was learned that must be left."""
    max_metric_drop: float
    """Drop of the task metric (0 to 1) that is allowed."""


@dataclass(frozen=True)
class Verdict:
    """Figures of the gate, and why it refuses (empty: it does not)."""

    figures: dict[str, Any]
    reasons: tuple[str, ...]


def evaluate_gate(
    base: RowScores,
    trained: RowScores,
    shipped: RowScores,
    limits: Limits,
    adapter_changes_logits: bool,
    metric: TaskMetric = ACCURACY,
) -> Verdict:
    """Compare the untuned base, the model as trained and the graph as shipped.

    The quantization tax is shipped − trained; the retained gain (base − shipped) / (base − trained), both
    in nats per target token. That something was learned is a paired bootstrap over rows: the lower end of
    its 95% interval of base − trained must be above 0. The task's metric that fell by more than its limit refuses
    only where the lower end of its paired interval is above 0 too: a few rows prove no fall.
    """
    gain = base.mean_nll - trained.mean_nll
    gain_low, gain_high = paired_bootstrap(base.nll / base.tokens, trained.nll / trained.tokens, base.tokens)
    tax = shipped.mean_nll - trained.mean_nll
    retained = (base.mean_nll - shipped.mean_nll) / gain if gain > 0 else None
    before, after = metric.value(trained), metric.value(shipped)
    drop = before - after
    drop_low, drop_high = paired(metric.of(trained), metric.of(shipped), len(trained.nll))
    reasons = []
    if not adapter_changes_logits:
        reasons.append("the adapter does not change the logits of the graph: what ships is the base")
    if gain_low <= 0:
        reasons.append(
            f"nothing was learned: base - trained is {gain:+.4f} nats per token, 95% interval "
            f"[{gain_low:+.4f}, {gain_high:+.4f}] on {len(base.nll)} validation rows"
        )
    if tax > limits.max_tax:
        reasons.append(f"quantization tax {tax:+.4f} nats per token is above --max-tax {limits.max_tax:g}")
    if retained is not None and retained < limits.min_retained:
        reasons.append(f"retained gain {retained:.1%} is under --min-retained {limits.min_retained:.0%}")
    if drop > limits.max_metric_drop and drop_low > 0:
        reasons.append(
            f"{metric.name} fell from {before:.4f} to {after:.4f} (95% interval of the drop "
            f"[{drop_low:+.4f}, {drop_high:+.4f}]), more than --max-metric-drop {limits.max_metric_drop:g}"
        )
    figures = {
        "rows": len(base.nll),
        "nll": {"base": base.mean_nll, "trained": trained.mean_nll, "shipped": shipped.mean_nll},
        "gain": {"value": gain, "low": gain_low, "high": gain_high},
        "quantization_tax": tax,
        "retained_gain": retained,
        "metric_drop": {"metric": metric.name, "value": drop, "low": drop_low, "high": drop_high},
        "argmax_agreement": shipped.agreement(trained),
        "adapter_changes_logits": adapter_changes_logits,
    }
    return Verdict(figures, tuple(reasons))
