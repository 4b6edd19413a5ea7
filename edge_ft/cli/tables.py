"""What commands print: tables and sentences from reports, plans and manifests."""

from pathlib import Path
from typing import Any

from edge_ft.config import TOKEN_TASKS

__all__ = [
    "evaluation_lines",
    "evaluation_table",
    "export_line",
    "export_table",
    "plan_lines",
    "plan_table",
    "report_lines",
    "report_table",
    "vocabulary_line",
]

Table = list[tuple[str, ...]]
"""Rows of cells, the header first."""


def report_table(report: dict[str, Any]) -> Table:
    """Return losses and metrics of the base and the tuned model, from report.json."""
    nll, unit = report["nll"], _unit(report["task"])
    table: Table = [
        ("", "base", "tuned"),
        (f"validation loss ({unit})", _figure(nll["base"]), _figure(nll["best"])),
    ]
    if nll["test"] is not None:
        table.append((f"test loss ({unit})", _figure(nll["test_base"]), _figure(nll["test"])))
    for name, values in report["metrics"].items():
        split = "test" if "test" in values else "validation"
        table.append((f"{split} {name} [95%]", _interval(values[f"{split}_base"]), _interval(values[split])))
    if answers := report["answers"]:
        table.append(
            (f"{answers['rows']} {answers['split']} answers, up to {answers['max_new_tokens']} tokens:", "", "")
        )
        table += [
            (name, _interval(found["base"]), _interval(found["tuned"])) for name, found in answers["metrics"].items()
        ]
    return table


def report_lines(run: Path, report: dict[str, Any], advice: str) -> str:
    """Return what a training took, its warnings, and `advice` on what to do next if anything was learned."""
    if report["best_step"] == 0:
        advice = (
            "nothing was learned: no step lowered the validation loss. Try more rows, more --epochs or another "
            "--learning-rate"
        )
    took = (
        f"{run}: best at step {report['best_step']} of {report['steps']}, {report['seconds']:.0f} s, "
        f"{report['tokens_per_second']:.0f} tok/s, peak {report['peak_rss_bytes'] / 1e6:.0f} MB"
    )
    cut = [vocabulary_line(report["vocabulary"])] if report.get("vocabulary") else []
    return "\n".join([took, *cut, *_warnings(report), advice])


def vocabulary_line(cut: dict[str, Any]) -> str:
    """Return what a smaller vocabulary saves and costs, from `vocabulary` of report.json."""

    def both(name: str, figures: dict[str, Any], unit: str = "", form: str = ".1f") -> str:
        return f"{name} {figures['before']:{form}} → {figures['after']:{form}}{unit}"

    size = {name: found / 1e6 for name, found in cut["bytes"].items()}
    parts = [both("tokens a validation row", cut["tokens_per_row"]["validation"])]
    for name, figures in cut.get("nats_per_byte", {}).items():
        if None not in figures.values():
            parts.append(both(f"untuned nats a byte of {name} text", figures, form=".3f"))
    return f"vocabulary: {cut['of']} → {cut['kept']} tokens, {both('weights', size, ' MB')}, {', '.join(parts)}"


def plan_table(plan: dict[str, Any]) -> Table:
    """Return a plan's choices: time, memory and disk of each."""
    from edge_ft.tune.units import duration, megabytes

    table: Table = [("layers", "memory mode", "trained", "time", "memory", "disk", "")]
    for choice in plan["choices"]:
        mark = "recommended" if choice == plan["recommended"] else "" if choice["fits"] else "does not fit"
        memory = megabytes(choice["peak_rss_bytes"])
        if choice["peak_device_bytes"] is not None:
            memory += f", GPU {megabytes(choice['peak_device_bytes'])}"
        trained = f"{choice['trainable_parameters'] / 1e6:.2f} M"
        disk = megabytes(choice["disk_bytes"])
        table.append((choice["layers"], choice["memory"], trained, duration(choice["seconds"]), memory, disk, mark))
    return table


def plan_lines(plan: dict[str, Any]) -> str:
    """Return the rows and steps of a plan, its warnings and its recommendation."""
    tokens, rows = plan["tokens"], ", ".join(f"{count} {name}" for name, count in plan["rows"].items())
    lines = [
        f"{rows} rows; a train row has {tokens['p50']} tokens (p50), {tokens['p95']} (p95), {tokens['max']} (max), "
        f"all have {tokens['total']}; {plan['steps']} steps",
        *_warnings(plan),
        f"recommended: {plan['reason']}",
        *plan.get("shown", []),
    ]
    return "\n".join(lines)


def export_table(manifest: dict[str, Any]) -> Table:
    """Return losses and metrics of the base, trained and shipped model; nothing if no rows were scored."""
    columns = ("base", "trained", "shipped")
    found, unit = manifest["verification"], _unit(manifest["task"])
    table: Table = []
    for name, part in (("validation", found), ("test", found["test"])):
        if part is not None and part["rows"]:
            table.append((f"{name} loss ({unit})", *(_figure(part["nll"][key]) for key in columns)))
            table += [
                (f"{name} {metric} [95%]", *(_interval(values.get(key)) for key in columns))
                for metric, values in part["metrics"].items()
            ]
    return [("", *columns), *table] if table else []


def export_line(path: Path, size_bytes: int, manifest: dict[str, Any]) -> str:
    """Return size and lane of what was exported, and what the export lost."""
    found = manifest["verification"]
    line = f"{path}: {size_bytes / 1e6:.1f} MB, lane {manifest['lane']}"
    if "cosine" in found:
        line += ", cosine of the vectors with those as trained " + _interval(found["cosine"])
    elif found["quantization_tax"] is not None:
        low, high = found["tax_interval"]
        known = f"[{low:+.4f}, {high:+.4f}] on {found['rows']} rows"
        line += f", quantization tax {found['quantization_tax']:+.4f} {_unit(manifest['task'])} {known}"
        line += f", retained gain {found['retained_gain']:.1%}" if found["retained_gain"] is not None else ""
    elif not found["rows"]:
        line += ", not scored (no --data)"
    return line


def evaluation_table(result: dict[str, Any]) -> Table:
    """Return loss, perplexity and metrics."""
    return [
        ("metric", "value [95%]"),
        (f"loss ({_unit(result['task'])})", _figure(result["nll"])),
        ("perplexity", _figure(result["perplexity"])),
        *((name, _interval(value)) for name, value in result["metrics"].items()),
    ]


def evaluation_lines(source: str, result: dict[str, Any]) -> str:
    """Return how many rows were scored, and the warnings."""
    left_out = (
        f" ({result['dropped']} without an answer, {result['cut']} cut)" if result["dropped"] or result["cut"] else ""
    )
    return "\n".join([f"{source}: {result['rows']} rows{left_out}, {result['seconds']:.0f} s", *_warnings(result)])


def _warnings(result: dict[str, Any]) -> list[str]:
    return [f"{found['severity']}: {found['message']} [{found['code']}]" for found in result["findings"]]


def _unit(task: str) -> str:
    """Unit of the loss: a target is a token only where tokens are predicted."""
    return "nats/token" if task in TOKEN_TASKS else "nats/target"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(value: dict[str, float | None] | None) -> str:
    if value is None or value["value"] is None:
        return "-"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
