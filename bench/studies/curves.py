"""What a race of two trainers comes to: times at which losses were reached, ratios with intervals, table, picture.

A curve is a list of `{step, seconds, cpu_seconds, nll}`, one a look at the held-out rows, the first at step 0;
`nll` is None where the loss was no number.
"""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from edge_ft.errors import UsageError

__all__ = ["best_nll", "interval", "largest_difference", "plot_curves", "race", "table", "time_to"]

GAINS = (0.25, 0.5, 0.75)
"""Shares of the rival's gain (untuned - best) at which both are timed, beside its best."""
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantile of Student's t for 1, 2, … degrees of freedom."""

Curve = list[dict[str, Any]]
Result = dict[str, Any]
"""One training: `seed, learning_rate, curve, steps, tokens, peak_rss_bytes, process_seconds`."""


def time_to(curve: Curve, nll: float, clock: str) -> float | None:
    """When a loss was first reached, linear between two looks; None where it never was.

    Args:
        clock: `seconds` or `cpu_seconds`.
    """
    before = None
    for look in curve:
        if look["nll"] is not None and look["nll"] <= nll:
            if before is None or before["nll"] is None:
                return float(look[clock])
            share = (before["nll"] - nll) / (before["nll"] - look["nll"])
            return float(before[clock] + share * (look[clock] - before[clock]))
        before = look
    return None


def best_nll(curve: Curve) -> float:
    """The lowest held-out loss of a curve."""
    return float(min(look["nll"] for look in curve if look["nll"] is not None))


def largest_difference(first: Curve, second: Curve) -> float:
    """Between two curves at the same steps, nats; infinite where they have other steps, or one is no number."""
    if [look["step"] for look in first] != [look["step"] for look in second]:
        return math.inf
    pairs = [(a["nll"], b["nll"]) for a, b in zip(first, second, strict=True)]
    return max(math.inf if None in pair else abs(pair[0] - pair[1]) for pair in pairs)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95% interval of the mean (Student's t); None of a single value."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    quantile = _T95[freedom - 1] if freedom <= len(_T95) else 1.96 + 2.5 / freedom
    half = quantile * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def race(
    rival: Sequence[Result],
    unswept: Sequence[Result],
    ours: Sequence[Result],
    work: dict[str, float],
    *,
    same_recipe: bool = False,
) -> Result:
    """`rival`, `rival_unswept`, `ours`, and `ratio` (rival ÷ ours) with `ratio_interval` and `ratio_per_seed`.

    Each seed's target is the swept rival's best loss of that seed. A ratio is the mean over the seeds, and None
    when one of them never reached the target: what did not happen has no time. Speeds are ratios of the time a
    token takes.

    Args:
        work: `flops_per_token` and `sgemm_gflops`, which give the percentage of the machine's limit.
        same_recipe: The curves are the same but for rounding: only speed and memory are compared.
    """
    curves = {result["seed"]: result["curve"] for result in rival}
    report: Result = {
        name: [_timed(result, curves[result["seed"]], work) for result in results]
        for name, results in (("rival", rival), ("rival_unswept", unswept), ("ours", ours))
    }
    pairs = list(zip(report["rival"], report["ours"], strict=True))
    timed = (
        ("time_to_rival_best", "seconds_to_rival_best"),
        ("cpu_time_to_rival_best", "cpu_seconds_to_rival_best"),
        *((f"time_to_{gain:.0%}_of_gain", f"seconds_to_{gain:.0%}_of_gain") for gain in GAINS),
    )
    per_seed = {
        name: [] if same_recipe else [_divide(first[key], second[key]) for first, second in pairs]
        for name, key in timed
    }
    per_seed["peak_rss"] = [_divide(first["peak_rss_bytes"], second["peak_rss_bytes"]) for first, second in pairs]
    speed = [_divide(second["tokens_per_second"], first["tokens_per_second"]) for first, second in pairs]
    per_seed |= {"speed": [] if same_recipe else speed, "same_recipe_speed": speed if same_recipe else []}
    per_seed["cpu_speed"] = [
        _divide(second["tokens_per_cpu_second"], first["tokens_per_cpu_second"]) for first, second in pairs
    ]
    ratio: dict[str, float | None] = {}
    intervals: dict[str, tuple[float, float] | None] = {}
    for name, values in per_seed.items():
        known = [value for value in values if value is not None]
        complete = bool(values) and len(known) == len(values)
        ratio[name] = mean(known) if complete else None
        intervals[name] = interval(known) if complete else None
    return report | {"ratio": ratio, "ratio_interval": intervals, "ratio_per_seed": per_seed}


def _timed(result: Result, rival: Curve, work: dict[str, float]) -> Result:
    """A training with all that is told of it, its target taken from the rival's curve."""
    curve: Curve = result["curve"]
    untuned, target = float(rival[0]["nll"]), best_nll(rival)
    tokens_per_second = _divide(result["tokens"], curve[-1]["seconds"])
    limit = work["sgemm_gflops"] * 1e9 / work["flops_per_token"]
    found = {
        "base_nll": curve[0]["nll"],
        "best_nll": best_nll(curve),
        "final_nll": curve[-1]["nll"],
        "seconds_to_rival_best": time_to(curve, target, "seconds"),
        "cpu_seconds_to_rival_best": time_to(curve, target, "cpu_seconds"),
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


def table(report: Result) -> str:
    """The report for people."""
    rows = [("", "seed", "rate", "s to rival's best", "CPU s", "50% gain", "best", "final", "tok/s", "% sgemm", "MB")]
    for name, title in (("rival", "rival"), ("rival_unswept", "rival, library's rate"), ("ours", "ours")):
        for result in report[name]:
            peak = result["peak_rss_bytes"]
            rows.append(
                (
                    title,
                    str(result["seed"]),
                    f"{result['learning_rate']:.2g}",
                    _figure(result["seconds_to_rival_best"], ".1f", "not reached"),
                    _figure(result["cpu_seconds_to_rival_best"], ".1f", "not reached"),
                    _figure(result["seconds_to_50%_of_gain"], ".1f", "not reached"),
                    f"{result['best_nll']:.4f}",
                    _figure(result["final_nll"], ".4f"),
                    _figure(result["tokens_per_second"], ".0f"),
                    _figure(result["percent_of_sgemm"], ".0f"),
                    _figure(None if peak is None else peak / 1e6, ".0f"),
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width) for at, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    lines.append("")
    for name, values in report["ratio_per_seed"].items():
        if not values:
            continue
        bounds = report["ratio_interval"].get(name)
        spread = f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else ""
        missing = f"not reached by {values.count(None)} of {len(values)} seeds"
        lines.append(f"rival ÷ ours, {name}: {_figure(report['ratio'][name], '.2f', missing)}{spread}")
    machine, case = report["machine"], report["case"]
    lines.append(
        f"sgemm {machine['sgemm_gflops']:.1f} GFLOP/s with {machine['threads']} thread(s) at {machine['sgemm_shape']}; "
        f"{case['flops_per_token'] / 1e6:.0f} MFLOP a token"
    )
    if report["sweep"]:
        swept = ", ".join(f"{run['learning_rate']:.2g}: {run['best_nll']:.4f}" for run in report["sweep"])
        lines.append(f"rival's sweep, best loss: {swept}")
    if report["sweep_at_edge"]:
        lines.append("its best rate is the lowest or highest one tried: give --rival-rates beyond it")
    if (agreement := report["same_recipe"]) is not None:
        difference = _figure(agreement["max_difference"], ".5f", "not comparable")
        what = f"base {agreement['base_format']}, ours in {agreement['compute']}"
        lines.append(f"same recipe, {what}: the curves differ by at most {difference} nats")
    return "\n".join(lines)


def _figure(value: float | None, form: str, absent: str = "-") -> str:
    return absent if value is None else format(value, form)


def plot_curves(report: Result, picture: Path) -> None:
    """Draw held-out loss over seconds of training, all seeds of all trainers.

    Raises:
        UsageError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'edge-ft[metrics]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, colour in (("rival_unswept", "C7"), ("rival", "C1"), ("ours", "C0")):
        for at, result in enumerate(report[name]):
            looks = [look for look in result["curve"] if look["nll"] is not None]
            label = f"{name.replace('_', ', ')} ({result['learning_rate']:.2g})" if at == 0 else None
            points = [look["seconds"] for look in looks], [look["nll"] for look in looks]
            axes.plot(*points, "o-", color=colour, markersize=3, label=label)
    for result in report["rival"]:
        axes.axhline(result["best_nll"], color="C1", linewidth=0.7, linestyle=":")
    axes.set_xlabel("seconds of training, looks left out")
    axes.set_ylabel("held-out nats per target")
    axes.legend()
    axes.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(picture))
