"""The report of an export as one HTML page: what was lost between training and device, and what ships."""

from pathlib import Path
from typing import Any

from edge_ft.artifacts import RunFolder, kind_of
from edge_ft.files import write_text
from edge_ft.page import NO_PLOTS, Plot, Section, Table, html_page, interval
from edge_ft.plots import Curve, can_plot, curves
from edge_ft.tune.page import losses_of_run, unit_of

__all__ = ["page_beside", "page_of_export", "write_page"]

COLUMNS = ("base", "trained", "shipped")
STAGES = ("base, as it would ship", "as trained", "as shipped")


def page_beside(out: Path) -> Path:
    """Where the page of an export lies: beside the bundle, which holds only what its manifest lists."""
    return out.with_name(f"{out.name}.report.html")


def write_page(source: str, out: Path, manifest: dict[str, Any]) -> None:
    """Write the page beside what was exported, or refused.

    Args:
        source: A run folder, whose losses the page shows too, or a model.
        out: The bundle or file.
        manifest: Of a bundle, or what a GGUF export says of its file.
    """
    run = RunFolder(Path(source)) if kind_of(source) == "run" else None
    write_text(page_beside(out), page_of_export(out.name, manifest, run))


def page_of_export(name: str, manifest: dict[str, Any], run: RunFolder | None) -> str:
    """Write the page.

    Args:
        name: Of the bundle.
        manifest: Of a bundle, or what a GGUF export says of its file.
        run: What was exported, if it was trained here.

    Returns:
        HTML that needs no other file and no network.
    """
    found = manifest["verification"]
    unit = unit_of(manifest["task"])
    if reasons := found.get("refused"):
        lead = f"{name} was refused: {'; '.join(reasons)}."
    elif found["quantization_tax"] is not None:
        kept = "" if found["retained_gain"] is None else f", {found['retained_gain']:.1%} of what was learned is kept"
        lead = f"Shipping {name} cost {found['quantization_tax']:+.4f} {unit} on {found['rows']} validation rows{kept}."
    elif found["rows"]:
        lead = f"{name} is a base without an adapter, scored on {found['rows']} rows."
    else:
        lead = f"{name} was not scored: an export with --data ROWS says what was lost."
    sections = [_lost(found, unit), _levels(found, unit)]
    if run is not None:
        sections.append(losses_of_run(run))
    sections.append(_shipped(manifest))
    return html_page("edge-ft export", lead, [section for section in sections if section is not None])


def _lost(found: dict[str, Any], unit: str) -> Section | None:
    """The same rows scored by the base, the trained model and the shipped graph."""
    tables: list[Table] = []
    plots: list[Curve] = []
    texts: list[str] = []
    for split, part in (("validation", found), ("test", found.get("test"))):
        if not part or not part["rows"]:
            continue
        nll = part["nll"]
        rows = [[f"loss, {unit}", *("–" if nll[key] is None else f"{nll[key]:.4f}" for key in COLUMNS)]]
        rows += [
            [metric, *(interval(values.get(key)) for key in COLUMNS)] for metric, values in part["metrics"].items()
        ]
        tables.append(Table([f"{part['rows']} {split} rows", *STAGES], rows))
        if can_plot() and None not in nll.values():
            points = [(at, nll[key]) for at, key in enumerate(COLUMNS)]
            plots.append(Curve(points, split, len(plots), marked=True))
    if not tables:
        return None
    limits = found.get("limits", {})
    if found["quantization_tax"] is not None and limits:
        texts.append(
            f"Quantization tax (shipped less trained) {found['quantization_tax']:+.4f}, at most "
            f"{limits['max_tax']:g} allowed; retained gain {_percent(found['retained_gain'])}, at least "
            f"{limits['min_retained']:.0%} required."
        )
    if gain := found.get("gain"):
        texts.append(f"The training lowered the loss by {interval(gain)}, 95% interval in brackets.")
    if plots:
        svg = curves(plots, "", unit, ("base", "as trained", "as shipped"))
        drawn = [Plot(svg, "loss on the way from the base to what ships")]
    else:
        drawn = []
        texts += [] if can_plot() else [NO_PLOTS]
    return Section("What was lost on the way", texts=texts, plots=drawn, tables=tables)


def _levels(found: dict[str, Any], unit: str) -> Section | None:
    """Each graph of a bundle: 1 computes in float, 4 with int8 activations."""
    levels = found.get("by_accuracy_level") or {}
    rows = [
        [
            level,
            "yes" if one.get("passed") else "no",
            f"{one['shipped_minus_last_evaluated']:+.6f}",
            *(_figure(one.get(key)) for key in ("nll", "quantization_tax", "argmax_agreement")),
        ]
        for level, one in levels.items()
    ]
    if not rows:
        return None
    header = ["accuracy level", "ships", "graph less torch", f"loss, {unit}", "tax", "same likeliest token"]
    note = "Level 1 computes in float, level 4 with int8 activations. Agreement is with the model that was traced."
    return Section("Graphs", tables=[Table(header, rows, note=note)])


def _shipped(manifest: dict[str, Any]) -> Section:
    """Files, format and origin."""
    files = {name: entry if isinstance(entry, int) else entry["bytes"] for name, entry in manifest["files"].items()}
    rows = [[name, f"{size / 1e6:.2f}"] for name, size in sorted(files.items(), key=lambda file: -file[1])]
    sizes = Table(["file", "MB"], [["all", f"{sum(files.values()) / 1e6:.2f}"], *rows], note="MB are 10⁶ bytes.")
    facts = [["task", manifest["task"]], ["family", manifest["family"]], ["lane", manifest["lane"]]]
    if quantization := manifest.get("quantization"):
        facts += [
            [f"weights, {name}", str(value)] for name, value in quantization.items() if not isinstance(value, dict)
        ]
    base = manifest["provenance"]["base"]
    facts += [["base", Path(str(base["model"])).name], ["license of the base", str(base["license"] or "not named")]]
    versions = [[name, version] for name, version in manifest["provenance"].get("versions", {}).items()]
    return Section("What ships", tables=[sizes, Table(["", ""], [*facts, *versions])])


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
