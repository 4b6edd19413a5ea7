"""The figures of a race of two trainers: times to a loss, ratios with intervals, table and picture.

A curve is a list of `{step, seconds, cpu_seconds, nll}`, one for each evaluation of the held-out rows, the first before
any step; `nll` is None where the loss was not a number.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from edge_ft.bench.report import markdown_table
from edge_ft.errors import require

__all__ = ["best_nll", "compare", "interval", "largest_difference", "plot_curves", "text_of", "time_to"]

GAINS = (0.25, 0.5, 0.75)
"""Shares of the baseline's gain (untuned - best) to which both are timed, besides its best."""

Curve = list[dict[str, Any]]
Result = dict[str, Any]
"""One training: `seed, learning_rate, curve, steps, tokens, peak_rss_bytes, process_seconds`."""


def time_to(curve: Curve, nll: float, clock: str) -> float | None:
    """When a loss was first reached, linear between two evaluations.

    Args:
        curve: Of one training.
        nll: The loss.
        clock: `seconds` or `cpu_seconds`.

    Returns:
        The time; None if the loss was never reached.
    """
    before = None
    for point in curve:
        if point["nll"] is not None and point["nll"] <= nll:
            if before is None or before["nll"] is None:
                return float(point[clock])
            share = (before["nll"] - nll) / (before["nll"] - point["nll"])
            return float(before[clock] + share * (point[clock] - before[clock]))
        before = point
    return None


def best_nll(curve: Curve) -> float:
    """The lowest held-out loss of a curve."""
    return float(min(point["nll"] for point in curve if point["nll"] is not None))


def largest_difference(first: Curve, second: Curve) -> float:
    """Largest difference of two curves in nats; infinite where their steps differ or a loss is not a number."""
    if [point["step"] for point in first] != [point["step"] for point in second]:
        return math.inf
    pairs = [(a["nll"], b["nll"]) for a, b in zip(first, second, strict=True)]
    return max(math.inf if None in pair else abs(pair[0] - pair[1]) for pair in pairs)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Estimate the 95% interval of a mean by Student's t.

    Returns:
        Its bounds; None of a single value.

    Raises:
        MissingExtra: scipy is not installed.
    """
    if len(values) < 2:
        return None
    quantile = float(require("scipy.stats", "metrics").t.ppf(0.975, len(values) - 1))
    half = quantile * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def compare(
    baseline: Sequence[Result],
    unswept: Sequence[Result],
    ours: Sequence[Result],
    work: dict[str, float],
    *,
    same_recipe: bool = False,
) -> Result:
    """Compare trainings seed by seed.

    Each seed's target is the best loss of the swept baseline with that seed. A ratio is the mean over the seeds, and
    None when one of them never reached the target and so has no time.

    Args:
        baseline: A training for each seed, at the best rate of the sweep.
        unswept: The same at the library's own rate; may be of fewer seeds.
        ours: A training for each seed.
        work: `flops_per_token` and `sgemm_gflops`, which give the percentage of the machine's limit.
        same_recipe: The curves are the same but for rounding: only speed and memory are compared.

    Returns:
        `baseline`, `baseline_unswept`, `ours`, and `ratio` (ours ÷ baseline: a speed above 1 is better, time and bytes
        below 1 are) with `ratio_interval` and `ratio_per_seed`.

    Raises:
        MissingExtra: scipy is not installed.
    """
    curves = {result["seed"]: result["curve"] for result in baseline}
    report: Result = {
        name: [_timed(result, curves[result["seed"]], work) for result in results]
        for name, results in (("baseline", baseline), ("baseline_unswept", unswept), ("ours", ours))
    }
    pairs = list(zip(report["ours"], report["baseline"], strict=True))

    def ratios(key: str, wanted: bool = True) -> list[float | None]:
        return [_divide(our[key], its[key]) for our, its in pairs] if wanted else []

    per_seed = {
        "time_to_baseline_best": ratios("seconds_to_baseline_best", not same_recipe),
        "cpu_time_to_baseline_best": ratios("cpu_seconds_to_baseline_best", not same_recipe),
        **{f"time_to_{gain:.0%}_of_gain": ratios(f"seconds_to_{gain:.0%}_of_gain", not same_recipe) for gain in GAINS},
        "peak_rss": ratios("peak_rss_bytes"),
        "speed": ratios("tokens_per_second", not same_recipe),
        "same_recipe_speed": ratios("tokens_per_second", same_recipe),
        "cpu_speed": ratios("tokens_per_cpu_second"),
    }
    ratio: dict[str, float | None] = {}
    intervals: dict[str, tuple[float, float] | None] = {}
    for name, values in per_seed.items():
        known = [value for value in values if value is not None]
        complete = bool(values) and len(known) == len(values)
        ratio[name] = mean(known) if complete else None
        intervals[name] = interval(known) if complete else None
    return report | {"ratio": ratio, "ratio_interval": intervals, "ratio_per_seed": per_seed}


def _timed(result: Result, baseline: Curve, work: dict[str, float]) -> Result:
    """A training with its figures; the baseline's curve gives its targets."""
    curve: Curve = result["curve"]
    untuned, target = float(baseline[0]["nll"]), best_nll(baseline)
    tokens_per_second = _divide(result["tokens"], curve[-1]["seconds"])
    limit = work["sgemm_gflops"] * 1e9 / work["flops_per_token"]
    found = {
        "base_nll": curve[0]["nll"],
        "best_nll": best_nll(curve),
        "final_nll": curve[-1]["nll"],
        "seconds_to_baseline_best": time_to(curve, target, "seconds"),
        "cpu_seconds_to_baseline_best": time_to(curve, target, "cpu_seconds"),
    }
    for gain in GAINS:
        for clock in ("seconds", "cpu_seconds"):
            found[f"{clock}_to_{gain:.0%}_of_gain"] = time_to(curve, untuned - gain * (untuned - target), clock)
    return (
        result
        | found
        | {
            "seconds": curve[-1]["seconds"],
            "cpu_seconds": curve[-1]["cpu_seconds"],
            "tokens_per_second": tokens_per_second,
            "tokens_per_cpu_second": _divide(result["tokens"], curve[-1]["cpu_seconds"]),
            "percent_of_sgemm": None if tokens_per_second is None else 100 * tokens_per_second / limit,
        }
    )


def _divide(first: float | None, second: float | None) -> float | None:
    return None if first is None or not second else first / second


def text_of(report: Result) -> str:
    """Write the report for people: a Markdown table, and a line for each ratio."""
    times = ("s to baseline's best", "CPU s", "50% gain")
    header = ("", "seed", "rate", *times, "best", "final", "tok/s", "% sgemm", "MB")
    titles = {"baseline": "baseline", "baseline_unswept": "baseline, library's rate", "ours": "ours"}
    rows = [(title, *_cells(result)) for name, title in titles.items() for result in report[name]]
    lines = [markdown_table(header, rows)]
    for name, values in report["ratio_per_seed"].items():
        if not values:
            continue
        bounds = report["ratio_interval"].get(name)
        spread = f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else ""
        missing = f"not reached by {values.count(None)} of {len(values)} seeds"
        lines.append(f"ours ÷ baseline, {name}: {_figure(report['ratio'][name], '.2f', missing)}{spread}")
    machine, case = report["machine"], report["case"]
    lines.append(
        f"sgemm {machine['sgemm_gflops']:.1f} GFLOP/s with {machine['threads']} thread(s) at {machine['sgemm_shape']}; "
        f"{case['flops_per_token'] / 1e6:.0f} MFLOP a token"
    )
    if report["sweep"]:
        swept = ", ".join(f"{run['learning_rate']:.2g}: {run['best_nll']:.4f}" for run in report["sweep"])
        lines.append(f"baseline's sweep, best loss: {swept}")
    if report["sweep_at_edge"]:
        lines.append("its best rate is the lowest or highest one tried: give --baseline-rates beyond it")
    if (agreement := report["same_recipe"]) is not None:
        difference = _figure(agreement["max_difference"], ".5f", "not comparable")
        what = f"base {agreement['base_format']}, ours in {agreement['compute']}"
        lines.append(f"same recipe, {what}: the curves differ by at most {difference} nats")
    return "\n".join(lines)


def _cells(result: Result) -> tuple[str, ...]:
    peak = result["peak_rss_bytes"]
    return (
        str(result["seed"]),
        f"{result['learning_rate']:.2g}",
        _figure(result["seconds_to_baseline_best"], ".1f", "not reached"),
        _figure(result["cpu_seconds_to_baseline_best"], ".1f", "not reached"),
        _figure(result["seconds_to_50%_of_gain"], ".1f", "not reached"),
        f"{result['best_nll']:.4f}",
        _figure(result["final_nll"], ".4f"),
        _figure(result["tokens_per_second"], ".0f"),
        _figure(result["percent_of_sgemm"], ".0f"),
        _figure(None if peak is None else peak / 1e6, ".0f"),
    )


def _figure(value: float | None, form: str, absent: str = "-") -> str:
    return absent if value is None else format(value, form)


def plot_curves(report: Result, picture: Path) -> None:
    """Draw held-out loss over seconds of training, all seeds of all trainers.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require("matplotlib", "metrics")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, colour in (("baseline_unswept", "C7"), ("baseline", "C1"), ("ours", "C0")):
        for at, result in enumerate(report[name]):
            known = [point for point in result["curve"] if point["nll"] is not None]
            label = f"{name.replace('_', ', ')} ({result['learning_rate']:.2g})" if at == 0 else None
            seconds, losses = [point["seconds"] for point in known], [point["nll"] for point in known]
            axes.plot(seconds, losses, "o-", color=colour, markersize=3, label=label)
    for result in report["baseline"]:
        axes.axhline(result["best_nll"], color="C1", linewidth=0.7, linestyle=":")
    axes.set_xlabel("seconds of training, without evaluations")
    axes.set_ylabel("held-out nats per target")
    axes.legend()
    axes.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(picture))
