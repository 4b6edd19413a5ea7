"""Turn a run, or a model with or without a PEFT adapter, into a bundle that a device can open, or into a GGUF file."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ft.artifacts import Bundle, RunFolder, kind_of
from edge_ft.config import ExportConfig
from edge_ft.errors import BundleError, GateRefused, Interrupted, UsageError, require
from edge_ft.files import atomic_folder, locked, refuse_existing
from edge_ft.models.libraries import import_libraries
from edge_ft.progress import Progress, Silent, heartbeat
from edge_ft.system import use_threads
from edge_ft.tune.stopwatch import Timings
from edge_ft.utf8 import read_json

if TYPE_CHECKING:
    from edge_ft.export.source import ExportSource

__all__ = ["GgufExport", "export", "export_gguf"]


def export(source: str, config: ExportConfig, progress: Progress | None = None) -> Bundle:
    """Export a run or a model to a bundle at `config.out`, or its adapter to the bundle `config.onto`; and verify it.

    Args:
        source: A run folder; or a model (hub id, folder, GGUF), with `config.adapter` a PEFT adapter for it; with
            `config.onto` a run folder or a PEFT adapter.
        config: Format, lane and the limits of the gate.
        progress: Receives the steps; None is silent.

    Returns:
        The bundle, opened.

    Raises:
        UsageError: a source or options that cannot be exported.
        GateRefused: too much was lost, or nothing was learned; the bundle is kept as `NAME.rejected`, that of
            `config.onto` as it was.
        Interrupted: a signal came when the bundle was whole.
    """
    if config.format != "bundle":
        raise UsageError(f"format {config.format} is no bundle: call edge_ft.export.export_gguf")
    progress = progress or Silent()
    if config.onto is not None:
        from edge_ft.export.onto import add_adapter

        with locked(config.onto):
            return add_adapter(Path(source), config.onto, config, progress)
    if kind_of(source) == "run":
        RunFolder.open(Path(source)).refuse_over_bundle()
    with locked(config.target):
        refuse_existing(config.target)
        try:
            _export(source, config, progress)
        except GateRefused as refused:
            if config.weights is not None or not _needs_more_bits(config.target):
                raise
            progress.say(f"{refused}. Trying 8 bits")
            _export(source, replace(config, weights="int8"), progress)
            shutil.rmtree(_rejected(config.target))  # of 4 bits
        try:
            with heartbeat(progress, f"checking {config.target}"):
                return Bundle.open(config.target)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; {config.target} is whole, edge-ft verify {config.target} checks it") from None


def _export(source: str, config: ExportConfig, progress: Progress) -> None:
    """Write the bundle.

    Raises:
        GateRefused: too much was lost, or nothing was learned; the bundle is kept as `NAME.rejected`.
    """
    timings = Timings()
    with timings.stage("import"):
        import_libraries(progress, "onnxscript", "peft", "optimum")
    from edge_ft.export.bundle import graph_files, lora_graph, make_manifest, write_bundle, write_genai
    from edge_ft.export.finishing import load_finished
    from edge_ft.export.opening import open_export_source
    from edge_ft.export.page import write_page
    from edge_ft.export.size import refuse_larger
    from edge_ft.export.train_graphs import add_training
    from edge_ft.export.verification import genai_level, score_torch, verify_graphs, with_rows_needed
    from edge_ft.quant.sensitivity import finer_layers

    use_threads(config.threads)
    with timings.stage("open"), heartbeat(progress, f"opening {source}"):
        opened = open_export_source(source, config, progress)
    for note in opened.notes:
        progress.say(note)
    rejected = _rejected(config.target)
    if not _is_rejected(rejected):
        refuse_existing(rejected)
    with atomic_folder(config.target) as folder:
        with timings.stage("weights"):
            shipped_model = load_finished(opened, config, progress)
        with timings.stage("scores"):
            opened = with_rows_needed(opened, shipped_model, progress)
            scores, finer = score_torch(opened, shipped_model, progress), finer_layers(shipped_model)
        with timings.stage("graphs"):
            graphs = write_bundle(folder, opened, shipped_model, progress)
        del shipped_model
        with timings.stage("verify"):
            verification, passed, main = verify_graphs(folder, opened, graphs, scores, config, progress)
        progress.say(f"seconds: {timings.text}")
        kept = {level: path for level, path in graphs.items() if level in passed}
        for level in graphs.keys() - kept.keys():
            for file in graph_files(graphs[level]):
                (folder / file).unlink()
                (folder / lora_graph(file)).unlink(missing_ok=True)
                (folder / file).with_suffix(".onnx_data").unlink(missing_ok=True)  # its weights, if it has its own
        if opened.base.family.decoder:
            level = genai_level(verification, kept, main) if config.genai_graph == "fast" else main
            if level == main and config.genai_graph == "fast":
                progress.say("no other graph passed with nearly the same loss: genai_config.json names the exact one")
            write_genai(folder, opened.base.family.name, opened.dims, opened.special_ids, kept[level])
        with heartbeat(progress, "writing the manifest"):
            train = add_training(folder, opened, kept.get(1, kept[main]), config.trainable)
            manifest = {**make_manifest(opened, kept, main, finer), "train": train, "verification": verification}
            Bundle.seal(folder, manifest)
            refuse_larger(folder, config.size_mb)
            write_page(source, config.target, read_json(folder / "manifest.json"))
        if reasons := verification["refused"]:
            shutil.rmtree(rejected, ignore_errors=True)
            folder.rename(rejected)
            fix = _way_out(opened, verification)
            raise GateRefused(f"export refused, bundle kept as {rejected}: {'; '.join(reasons)}{fix}")


def _way_out(opened: "ExportSource", verification: dict[str, Any]) -> str:
    """Return what helps against a refusal, as a sentence to add to it; "" if nothing is known."""
    lost = (verification["quantization_tax"] or 0) > verification["limits"]["max_tax"]
    gain = verification.get("gain")
    if gain is not None and gain["low"] <= 0:
        return ". Train with more rows, more --epochs or another --learning-rate, then export again"
    if "cosine" in verification and opened.weights == "int4":
        return ". --weights int8 keeps embeddings closer to those of the training"
    if lost and opened.trained_format == opened.weights and opened.weights in ("int4", "int8"):
        return f". --lane adapter ships the {opened.weights} weights of the training unchanged"
    if lost and opened.lane == "adapter" and opened.run is not None:
        return ". edge-ft tune --base-format int4 trains over the codes that this lane ships"
    if lost and opened.weights == "int4":
        takes_size = opened.run is not None and opened.task == "text-generation"  # no adapter lane: see above
        bits = "--size-mb with more megabytes loses less, " if takes_size else ""
        return f". {bits}--weights int8 loses least, in twice the size"
    return ""


@dataclass(frozen=True)
class GgufExport:
    """A GGUF file that passed its gate."""

    path: Path
    manifest: dict[str, Any]
    """`format`, `task`, `family`, `lane`, `files`, `types`, `verification` and `provenance`, as those of a bundle."""

    @property
    def task(self) -> str:
        """The task of the model."""
        return str(self.manifest["task"])

    @property
    def size_bytes(self) -> int:
        """Bytes of the file, and of the adapter's file."""
        return int(sum(self.manifest["files"].values()))


def export_gguf(source: str, config: ExportConfig, progress: Progress | None = None) -> GgufExport:
    """Export a run or a model to a GGUF file at `config.out`, and verify what the file holds.

    Args:
        source: A run folder; or a model (hub id, folder, GGUF), with `config.adapter` a PEFT adapter for it.
        config: Lane, weights and the limits of the gate.
        progress: Receives the steps; None is silent.

    Returns:
        The file and its figures.

    Raises:
        UsageError: a source or options that a GGUF file cannot hold.
        MissingExtra: gguf is not installed.
        GateRefused: too much was lost, or nothing was learned; the file is kept as `NAME.rejected`.
    """
    progress = progress or Silent()
    if config.target.suffix != ".gguf":
        raise UsageError(f"--out {config.target}: the name of a GGUF file ends in .gguf")
    with locked(config.target):
        refuse_existing(config.target)
        if kind_of(source) == "run":
            RunFolder.open(Path(source)).refuse_over_bundle()
        require("gguf", "train")
        import_libraries(progress, "peft")
        from edge_ft.export.gguf_export import export_file
        from edge_ft.export.page import write_page

        use_threads(config.threads)
        found = GgufExport(config.target, export_file(source, config, progress))
        write_page(source, config.target, found.manifest)
        return found


def _rejected(out: Path) -> Path:
    """Return where a bundle is kept that the gate refused."""
    return out.with_name(out.name + ".rejected")


def _needs_more_bits(out: Path) -> bool:
    """Return whether the gate refused an embedding model in int4 that has learned something."""
    manifest = Bundle.open(_rejected(out)).manifest
    found, gain = manifest["verification"], manifest["verification"].get("gain")
    learned = gain is not None and gain["low"] > 0 and found["adapter_changes_logits"]
    return bool(
        learned and "cosine" in found and manifest["quantization"]["bits"] == 4 and manifest["lane"] == "merged"
    )


def _is_rejected(folder: Path) -> bool:
    """Return whether `folder` is a bundle that an earlier export refused; the next export may replace it."""
    try:
        return bool(Bundle.open(folder).manifest["verification"].get("refused"))
    except BundleError:
        return False
