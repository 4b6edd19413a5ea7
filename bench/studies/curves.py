"""The figures of a race of two trainers: times to a loss, ratios with intervals, table and picture.

A curve is a list of `{step, seconds, cpu_seconds, whole_seconds, nll}`, the first point before any step. `seconds` are
of the training alone, `whole_seconds` since the process began; `nll` is of the held-out rows, and None where the loss
was not a number or not measured.
"""

import math
from collections.abc import Mapping, Sequence
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
"""One training: `seed, learning_rate, curve, steps, tokens, test_nll, peak_rss_bytes` and seconds of the whole."""


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
    others: Mapping[str, Sequence[Result]] | None = None,
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
        others: Further trainings of ours, by the name that the report has for them.
        same_recipe: The curves are the same but for rounding: only speed and memory are compared.

    Returns:
        `baseline`, `baseline_unswept`, `ours`, and `ratio` (ours ÷ baseline: a speed above 1 is better, time and bytes
        below 1 are; `share_of_steps` is of ours alone) with `ratio_interval` and `ratio_per_seed`; and `others`, whose
        trainings are there, too, and whose ratios to the baseline are in `ratio_others`.

    Raises:
        MissingExtra: scipy is not installed.
    """
    curves = {result["seed"]: result["curve"] for result in baseline}
    trained = {"baseline": baseline, "baseline_unswept": unswept, "ours": ours, **(others or {})}
    report: Result = {
        name: [_timed(result, curves[result["seed"]], work) for result in results] for name, results in trained.items()
    }
    pairs = list(zip(report["ours"], report["baseline"], strict=True))

    def ratios(key: str, wanted: bool = True) -> list[float | None]:
        return [_divide(our[key], its[key]) for our, its in pairs] if wanted else []

    def whole(our_key: str, its_key: str) -> list[float | None]:
        return [] if same_recipe else [_divide(our[our_key], its[its_key]) for our, its in pairs]

    per_seed = {
        # The whole command, report included, against the other one's training alone.
        "whole_time_to_baseline_best": whole("whole_seconds_to_baseline_best", "seconds_to_baseline_best"),
        "whole_time_reached_or_not": whole("seconds_whole", "seconds_to_baseline_best"),
        "whole_time": whole("seconds_whole", "seconds_whole"),
        "whole_time_without_evaluation": whole("seconds_whole", "seconds_whole_without_evaluation"),
        "share_of_steps": [our["share_of_steps"] for our in report["ours"]],
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
    further = {name: _ratios(report[name], report["baseline"]) for name in others or {}}
    figures = {"ratio": ratio, "ratio_interval": intervals, "ratio_per_seed": per_seed, "ratio_others": further}
    return report | figures


def _ratios(ours: Sequence[Result], baseline: Sequence[Result]) -> dict[str, float]:
    """The means of the ratios of further trainings to the baseline, as far as they are known."""
    compared = {
        "speed": "tokens_per_second",
        "cpu_speed": "tokens_per_cpu_second",
        "peak_rss": "peak_rss_bytes",
        "whole_time": "seconds_whole",
    }
    its = {result["seed"]: result for result in baseline}
    found = {name: [_divide(our[key], its[our["seed"]][key]) for our in ours] for name, key in compared.items()}
    known = {name: [value for value in values if value is not None] for name, values in found.items()}
    return {name: mean(values) for name, values in known.items() if values}


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
        "share_of_steps": _divide(result["seconds_steps"], result["seconds_whole"]),
        **_whole(result, target),
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


def _whole(result: Result, target: float) -> Result:
    """Whether a finished training, with the weights it ends with, reached a loss: then it took the whole time."""
    test_nll = result["test_nll"]
    if test_nll is None:  # the same recipe is scored on the validation rows
        return {"whole_seconds_to_baseline_best": None, "nll_above_baseline_best": None}
    reached = test_nll <= target
    return {
        "whole_seconds_to_baseline_best": result["seconds_whole"] if reached else None,
        "nll_above_baseline_best": test_nll - target,
    }


def _divide(first: float | None, second: float | None) -> float | None:
    return None if first is None or not second else first / second


TITLES = {
    "baseline": "baseline",
    "baseline_unswept": "baseline, library's rate",
    "ours": "ours",
    "ours_fp32": "ours in fp32",
    "ours_onnx": "ours over a bundle, without torch",
}


def text_of(report: Result) -> str:
    """Write the report for people: two Markdown tables, and a line for each ratio."""
    times = ("s to baseline's best", "CPU s", "50% gain")
    header = ("training alone", "seed", "rate", *times, "best", "final", "tok/s", "% sgemm", "MB")
    rows = [(title, *_cells(result)) for name, title in TITLES.items() for result in report.get(name, ())]
    seconds = ("s in all", "without evaluation", "steps", "scoring", "the rest", "% steps")
    ends = ("loss at the end", "above baseline's best")
    wholes = [(title, *_whole_cells(result)) for name, title in TITLES.items() for result in report.get(name, ())]
    lines = [markdown_table(header, rows), markdown_table(("the whole process", "seed", *seconds, *ends), wholes)]
    for name, values in report["ratio_per_seed"].items():
        if not values:
            continue
        bounds = report["ratio_interval"].get(name)
        spread = f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else ""
        missing = f"not reached by {values.count(None)} of {len(values)} seeds"
        of = "ours" if name == "share_of_steps" else "ours ÷ baseline"
        lines.append(f"{of}, {name}: {_figure(report['ratio'][name], '.2f', missing)}{spread}")
    for name, ratios in report.get("ratio_others", {}).items():
        if ratios:
            found = ", ".join(f"{ratio} {value:.2f}" for ratio, value in ratios.items())
            lines.append(f"{TITLES[name]} ÷ baseline: {found}")
    return "\n".join([*lines, *_notes(report)])


def _notes(report: Result) -> list[str]:
    """Lines on the machine, the sweep, and whether the same recipe gave the same curve."""
    machine, case = report["machine"], report["case"]
    bf16 = "" if machine["bf16_gflops"] is None else f", bf16 {machine['bf16_gflops']:.1f}"
    lines = [
        f"sgemm {machine['sgemm_gflops']:.1f} GFLOP/s{bf16} with {machine['threads']} thread(s) at "
        f"{machine['sgemm_shape']}; {case['flops_per_token'] / 1e6:.0f} MFLOP a token"
    ]
    if any(result.get("stopped") == "minutes" for name in TITLES for result in report.get(name, ())):
        lines.append(f"some trainings took fewer steps, for --max-minutes {case['max_minutes']:g}")
    if report["sweep"]:
        swept = ", ".join(f"{run['learning_rate']:.2g}: {run['best_nll']:.4f}" for run in report["sweep"])
        lines.append(f"baseline's sweep, best loss: {swept}")
    if report["sweep_at_edge"]:
        lines.append("its best rate is the lowest or highest one tried: give --baseline-rates beyond it")
    if (agreement := report["same_recipe"]) is not None:
        difference = _figure(agreement["max_difference"], ".5f", "not comparable")
        what = f"base {agreement['base_format']}, ours in {agreement['compute']}"
        lines.append(f"same recipe, {what}: the curves differ by at most {difference} nats")
        if (onnx := agreement.get("max_difference_onnx")) is not None:
            lines.append(
                f"over a bundle, with other random numbers for A: that curve differs by at most {onnx:.5f} nats"
            )
    return lines


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


def _whole_cells(result: Result) -> tuple[str, ...]:
    share = result["share_of_steps"]
    return (
        str(result["seed"]),
        f"{result['seconds_whole']:.1f}",
        _figure(result.get("seconds_whole_without_evaluation"), ".1f"),
        f"{result['seconds_steps']:.1f}",
        _figure(result["seconds_scoring"], ".1f"),
        _figure(result["seconds_other"], ".1f"),
        _figure(None if share is None else 100 * share, ".0f"),
        _figure(result["test_nll"], ".4f"),
        _figure(result["nll_above_baseline_best"], "+.4f"),
    )


def _figure(value: float | None, form: str, absent: str = "-") -> str:
    return absent if value is None else format(value, form)


def plot_curves(report: Result, picture: Path) -> None:
    """Draw held-out loss over seconds of training and of the whole process, all seeds of all trainers.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require("matplotlib", "metrics")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5), layout="constrained")
    titles = {"seconds": "seconds of training alone", "whole_seconds": "seconds since the process began"}
    for axes, (clock, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for name, colour in zip(TITLES, ("C1", "C7", "C0", "C2", "C3"), strict=True):
            for at, result in enumerate(report.get(name, ())):
                label = f"{name.replace('_', ', ')} ({result['learning_rate']:.2g})" if at == 0 else None
                _draw(axes, result, clock, "o-", {"color": colour, "label": label})
                if clock == "whole_seconds":
                    label = "baseline without its users' evaluations" if name == "baseline" and at == 0 else None
                    _draw(axes, result, f"{clock}_without_evaluation", ":", {"color": colour, "label": label})
                    if result["test_nll"] is not None:
                        axes.plot(result["seconds_whole"], result["test_nll"], "s", color=colour)
        for result in report["baseline"]:
            axes.axhline(result["best_nll"], color="C1", linewidth=0.7, linestyle=":")
        axes.set_xlabel(title)
        axes.legend()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out nats per target")
    picture.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(picture))


def _draw(axes: Any, result: Result, clock: str, style: str, look: Result) -> None:
    """Draw the points of a curve that are known, where it has this clock."""
    known = [point for point in result["curve"] if point["nll"] is not None and clock in point]
    if known:
        axes.plot([point[clock] for point in known], [point["nll"] for point in known], style, markersize=3, **look)
