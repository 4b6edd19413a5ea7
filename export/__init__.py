"""Turn a run, or a model with or without a PEFT adapter, into a bundle that a device can open."""

import shutil
from pathlib import Path

from edge_ft.artifacts import Bundle, atomic_folder, refuse_existing
from edge_ft.config import ExportConfig
from edge_ft.errors import BundleError, GateRefused, require
from edge_ft.progress import Progress, Silent
from edge_ft.system import use_threads

__all__ = ["export"]


def export(source: str, config: ExportConfig, progress: Progress | None = None) -> Bundle:
    """Export `source` to a bundle at `config.out`, scored on the way.

    Args:
        source: A run folder; or a model (hub id, folder, GGUF), with `config.adapter` a PEFT adapter for it.
        config: Format, lane and the limits of the gate.

    Raises:
        UsageError: a source or options that cannot be exported.
        GateRefused: too much was lost, or nothing was learned; the bundle is kept as `NAME.rejected`.
    """
    require("torch", "train")
    from edge_ft.models.logging import silence_libraries

    with silence_libraries():
        for module in ("onnxscript", "peft", "optimum"):
            require(module, "train")
    from edge_ft.export.bundle import describe, graph_files, write_bundle
    from edge_ft.export.genai import write_genai
    from edge_ft.export.source import open_export_source
    from edge_ft.export.verification import check_bundle, score_torch

    progress = progress or Silent()
    refuse_existing(config.out)
    use_threads(config.threads)
    opened = open_export_source(source, config)
    rejected = config.out.with_name(config.out.name + ".rejected")
    if not _is_rejected(rejected):
        refuse_existing(rejected)
    with atomic_folder(config.out) as folder:
        shipped_model = opened.load_shipped(config.lane, progress)
        scores = score_torch(opened, shipped_model, config, progress)
        graphs = write_bundle(folder, opened, shipped_model, config, progress)
        del shipped_model
        checked = check_bundle(folder, opened, graphs, scores, config, progress)
        kept = {level: path for level, path in graphs.items() if level in checked.levels}
        for level in graphs.keys() - kept.keys():
            for file in graph_files(graphs[level]):
                (folder / file).unlink()
                (folder / file).with_suffix(".onnx_data").unlink(missing_ok=True)  # weights of its own
        if opened.base.family.decoder:
            write_genai(folder, opened.base.family.name, opened.base.dims, opened.tokenizer, kept[checked.main])
        Bundle.seal(
            folder,
            {
                **describe(opened, config, kept, checked.main),
                "verification": {**checked.verification, "refused": checked.reasons},
            },
        )
        if checked.reasons:
            shutil.rmtree(rejected, ignore_errors=True)
            folder.rename(rejected)
            lost = (checked.verification.get("quantization_tax") or 0) > config.max_tax
            codes_are_held = opened.trained_format == opened.weights and opened.weights in ("int4", "int8")
            mend = ". --lane adapter ships the codes that were trained over" if lost and codes_are_held else ""
            raise GateRefused(f"refused, kept as {rejected}: {'; '.join(checked.reasons)}{mend}")
    return Bundle.open(config.out)


def _is_rejected(folder: Path) -> bool:
    """Whether `folder` is what an earlier export was refused with, which the next one may replace."""
    try:
        return bool(Bundle.open(folder).manifest["verification"].get("refused"))
    except BundleError:
        return False
