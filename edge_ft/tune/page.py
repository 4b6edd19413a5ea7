"""The report of a run as one HTML page: what was learned, on what, and what it took."""

from collections.abc import Sequence
from typing import Any

from edge_ft.artifacts import RunFolder
from edge_ft.config import TEXT_TASKS
from edge_ft.page import NO_PLOTS, Plot, Section, Table, html_page, interval
from edge_ft.plots import Curve, can_plot, curves

__all__ = ["losses_of_run", "page_of_run", "unit_of"]

COLUMNS = ("before", "after")
"""The whole vocabulary and the cut one."""


def page_of_run(
    report: dict[str, Any], steps: Sequence[dict[str, Any]], plan: dict[str, Any] | None, *, with_samples: bool
) -> str:
    """Write the page.

    Args:
        report: The content of report.json.
        steps: The lines of metrics.jsonl.
        plan: The content of plan.json; None where nothing was planned.
        with_samples: Show rows of the user's data.

    Returns:
        HTML that needs no other file and no network.
    """
    nll, rows, unit = report["nll"], report["rows"], unit_of(report["task"])
    lead = (
        f"{report['task']} with {report['model'].rsplit('/', 1)[-1]}: the validation loss fell from "
        f"{nll['base']:.4f} to {nll['best']:.4f} {unit} by step {report['best_step']} of "
        f"{report['steps']}, on {rows['train']} rows, in {report['seconds']:.0f} s."
    )
    sections = [
        _scores(report),
        _losses(report, steps),
        _slices(report),
        _samples(report, with_samples),
        _rows(report, plan),
        _vocabulary(report.get("vocabulary")),
        _cost(report, plan),
        _conditions(report),
    ]
    return html_page("edge-ft tune", lead, [section for section in sections if section is not None])


def losses_of_run(run: RunFolder) -> Section | None:
    """The curves of a finished run, for the page of its export; None of a run that has no log."""
    steps = run.metrics()
    if not steps or not run.report_path.is_file() or "overfitting" not in (report := run.report()):
        return None
    return _losses(report, steps)


def unit_of(task: str) -> str:
    """The unit of a loss: text is scored by token, other tasks by row."""
    return "nats per target token" if task in (*TEXT_TASKS, "fill-mask") else "nats per row"


def _scores(report: dict[str, Any]) -> Section:
    nll, unit = report["nll"], unit_of(report["task"])
    rows = [[f"validation loss, {unit}", f"{nll['base']:.4f}", f"{nll['best']:.4f}"]]
    if nll["test"] is not None:
        rows.append([f"test loss, {unit}", f"{nll['test_base']:.4f}", f"{nll['test']:.4f}"])
    for name, columns in report["metrics"].items():
        split = "test" if "test" in columns else "validation"
        rows.append([f"{split} {name}", interval(columns[f"{split}_base"]), interval(columns[split])])
    tables = [Table(["", "before", "after"], rows, note="Brackets are 95% intervals over rows.")]
    if answers := report["answers"]:
        shown = [[name, interval(two["base"]), interval(two["tuned"])] for name, two in answers["metrics"].items()]
        note = f"Of {answers['rows']} {answers['split']} rows, answers of up to {answers['max_new_tokens']} tokens."
        tables.append(Table(["generated answers", "before", "after"], shown, note=note))
    texts = []
    if report["best_step"] == 0:
        texts.append("Nothing was learned: no step lowered the validation loss.")
    return Section("Scores", texts=texts, tables=tables)


def _losses(report: dict[str, Any], steps: Sequence[dict[str, Any]]) -> Section:
    """Training and validation loss over the steps, and the learning rate."""
    unit = unit_of(report["task"])
    trained = [(line["step"], line["loss"]) for line in steps if line.get("loss") is not None]
    validated = [(line["step"], line["validation_nll"]) for line in steps if line.get("validation_nll") is not None]
    rates = [(line["step"], line["learning_rate"]) for line in steps if line.get("learning_rate") is not None]
    rows = [[str(step), f"{loss:.4f}"] for step, loss in validated]
    tables = [Table(["step", f"validation loss, {unit}"], rows)]
    overfitting = report["overfitting"]
    texts = [
        f"With the best weights the loss of train rows is {overfitting['train_nll']:.4f} and that of validation rows "
        f"{overfitting['validation_nll']:.4f}: a large gap is over-fitting."
    ]
    if skipped := report.get("guards", {}).get("skipped"):
        texts.append(f"{skipped} updates were skipped because a loss or gradient was not a number.")
    if not can_plot():
        return Section("Loss", texts=[*texts, NO_PLOTS], tables=tables)
    lines = [Curve(trained, "train, each step"), Curve(validated, "validation", 1, marked=True)]
    shown = [line for line in lines if line.points]
    plots = [Plot(curves(shown, "step", unit), "loss over the steps")] if shown else []
    if rates:
        plots.append(Plot(curves([Curve(rates, "learning rate", 2)], "step", "learning rate"), "learning rate"))
    return Section("Loss", texts=texts, plots=plots, tables=tables)


def _slices(report: dict[str, Any]) -> Section | None:
    """Whether long answers were learned as short ones were."""
    if not report.get("slices"):
        return None
    rows = [
        [
            "{} to {} tokens".format(*one["tokens"]),
            str(one["rows"]),
            *(f"{one['nll'][name]:.4f}" for name in ("base", "tuned")),
            f"{one['nll']['tuned'] - one['nll']['base']:+.4f}",
        ]
        for one in report["slices"]
    ]
    header = ["length of the answer", f"{report['slices'][0]['split']} rows", "loss before", "after", "difference"]
    return Section("By length", tables=[Table(header, rows)])


def _samples(report: dict[str, Any], with_samples: bool) -> Section | None:
    if not report["samples"]:
        return None
    if not with_samples:
        text = "Rows of your data are shown only with --include-samples; report.json has three answers."
        return Section("Samples", texts=[text])
    rows = [
        [sample["prompt"], *(str(sample[name]) for name in ("reference", "base", "tuned"))]
        for sample in report["samples"]
    ]
    header = ["prompt", "right answer", "before", "after"]
    return Section("Samples", tables=[Table(header, rows, kind="texts")])


def _rows(report: dict[str, Any], plan: dict[str, Any] | None) -> Section:
    """How many rows there were, how long, and what was left out or looks wrong."""
    counts = [[name, str(count)] for name, count in report["rows"].items()]
    tables = [Table(["split", "rows"], counts)]
    if plan is not None:
        lengths = [[name, str(plan["tokens"][name])] for name in ("p50", "p95", "max", "total")]
        tables.append(Table(["tokens of train rows", ""], [*lengths, ["--max-length", str(plan["max_length"])]]))
    found = [
        [finding["code"], finding["severity"], str(len(finding.get("rows", ())) or "–"), finding["message"]]
        for finding in report["findings"]
    ]
    if found:
        tables.append(Table(["finding", "severity", "rows", "what"], found, kind="texts"))
    texts = [] if found else ["Nothing was dropped or cut, and the audit found nothing to say."]
    return Section("Rows, and what was dropped", texts=texts, tables=tables)


def _vocabulary(cut: dict[str, Any] | None) -> Section | None:
    """What a smaller vocabulary saves and costs; None of a run with the whole one."""
    if cut is None:
        return None
    rows = [
        ["tokens in the vocabulary", str(cut["of"]), str(cut["kept"])],
        ["weights of the base, MB", *(f"{cut['bytes'][name] / 1e6:.1f}" for name in COLUMNS)],
    ]
    for split, figures in cut["tokens_per_row"].items():
        rows.append([f"tokens of a {split} row", *(f"{figures[name]:.1f}" for name in COLUMNS)])
    if figures := cut.get("tokens_of_other_text"):
        rows.append(["tokens of text of another domain", *(str(figures[name]) for name in COLUMNS)])
    for text, figures in cut.get("nats_per_byte", {}).items():
        shown = ("–" if figures[name] is None else f"{figures[name]:.4f}" for name in COLUMNS)
        rows.append([f"untuned loss, nats per byte of {text} text", *shown])
    note = "Losses are of the untuned base, rounded to nearest. The other text is from the manual of Python."
    return Section("Vocabulary", tables=[Table(["", "whole", "cut to the rows"], rows, note=note)])


def _cost(report: dict[str, Any], plan: dict[str, Any] | None) -> Section:
    """Time by stage, processors and memory; beside what the plan had foreseen."""
    foreseen = (plan or {}).get("recommended") or {}
    stages = [
        [
            name,
            f"{seconds:.1f}",
            f"{seconds / max(report['seconds'], 1e-9):.0%}",
            _seconds(foreseen.get("stages", {}), name),
        ]
        for name, seconds in report["timings"].items()
    ]
    cores = report["cpu_seconds"] / max(report["seconds"], 1e-9)
    figures = [
        ["device", report["device"]],
        ["CPU time", f"{report['cpu_seconds']:.0f} s: {cores:.1f} of {report['threads']} threads on average"],
        ["peak memory", f"{report['peak_rss_bytes'] / 1e6:.0f} MB"],
        *([["energy of the processor", f"{report['energy_joules']:.0f} J"]] if "energy_joules" in report else []),
        ["speed of the training", f"{report['tokens_per_second']:.0f} tokens/s"],
    ]
    if report["peak_device_bytes"] is not None:
        figures.append(["peak memory of the card", f"{report['peak_device_bytes'] / 1e6:.0f} MB"])
    if "peak_rss_bytes" in foreseen:
        figures.append(["peak memory as planned", f"{foreseen['peak_rss_bytes'] / 1e6:.0f} MB"])
    note = "Seconds of this process; those of an interrupted one stand in one line."
    tables = [Table(["stage", "s", "share", "planned, s"], stages, note=note), Table(["", ""], figures)]
    return Section("Time and memory", tables=tables)


def _seconds(stages: dict[str, float], name: str) -> str:
    return f"{stages[name]:.1f}" if name in stages else "–"


def _conditions(report: dict[str, Any]) -> Section:
    versions = [[name, version] for name, version in report["versions"].items()]
    rows = [["seed", str(report["seed"])], ["machine", report["machine"]], *versions]
    return Section("Again", texts=[report["command"]], tables=[Table(["", ""], rows)])
