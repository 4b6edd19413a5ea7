"""`export --format gguf`: write a model as a GGUF file, read the file back, and gate what was read."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ft.config import INT8_ACTIVATIONS, ExportConfig
from edge_ft.errors import GateRefused, ModelError, UsageError
from edge_ft.evaluate.gate import Limits, evaluate_gate, task_metric_for
from edge_ft.evaluate.scoring import RowScores, Scorer
from edge_ft.evaluate.verify import largest_difference
from edge_ft.export.figures import compared_figures, score_rows, test_scores
from edge_ft.export.finishing import load_finished
from edge_ft.export.foreign import adapter_provenance
from edge_ft.export.gguf_file import Blocks, file_tensors, write_gguf_file
from edge_ft.export.gguf_metadata import architecture_for, lost_settings
from edge_ft.export.gguf_model import GgufModel, write_gguf_model
from edge_ft.export.gguf_vocabulary import PROBES
from edge_ft.export.opening import open_export_source
from edge_ft.export.source import ExportSource
from edge_ft.export.verification import TorchScores, score_torch, with_rows_needed
from edge_ft.files import atomic_file, refuse_existing
from edge_ft.models.gguf import plan_conversion, write_checkpoint
from edge_ft.models.gguf_files import open_gguf
from edge_ft.models.gguf_names import Architecture, Heads
from edge_ft.progress import Progress, Silent, heartbeat
from edge_ft.quant.blockwise import Codes
from edge_ft.runtime.probes import SAME, probe_examples

__all__ = ["export_file"]

LORA = ".lora.gguf"
"""What replaces `.gguf` in the name of the adapter's file."""


def export_file(source: str, config: ExportConfig, progress: Progress) -> dict[str, Any]:
    """Write the file at `config.out` and verify what it holds; see `edge_ft.export.export_gguf`.

    Returns:
        What a bundle's manifest has, as far as it fits a file.
    """
    with heartbeat(progress, f"opening {source}"):
        opened = open_export_source(source, config, progress)
    architecture = _check_source(opened)
    for note in opened.notes:
        progress.say(note)
    return _export(opened, architecture, config, progress)


def _check_source(source: ExportSource) -> Architecture:
    """Return the architecture under which GGUF holds the model.

    Raises:
        UsageError: it cannot hold it.
    """
    architecture = architecture_for(source.base.family.name)
    if source.task != "text-generation":
        raise UsageError(f"--format gguf is for text-generation, and this is {source.task}: export a bundle instead")
    if source.weights == "int8" or source.weights in INT8_ACTIVATIONS:
        raise UsageError(f"--format gguf takes --weights int4, fp16 or fp32, not {source.weights}")
    return architecture


def _export(
    source: ExportSource, architecture: Architecture, config: ExportConfig, progress: Progress
) -> dict[str, Any]:
    """Write, read back, score and keep or refuse the file.

    Returns:
        What `export_file` returns.

    Raises:
        GateRefused: too much was lost, or nothing was learned.
    """
    out, lora = config.target, config.target.with_name(config.target.name.removesuffix(".gguf") + LORA)
    if source.lane == "adapter":
        refuse_existing(lora)
    model = load_finished(source, config, progress)
    source = with_rows_needed(source, model, progress)
    scores = score_torch(source, model, progress)
    adapter = _lora_tensors(model, source, architecture) if source.lane == "adapter" else {}
    shipped = model.unload() if source.lane == "adapter" else model
    with atomic_file(out) as temporary, tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        with heartbeat(progress, f"writing {out}"):
            described = GgufModel(
                *(Path(source.base.name).stem, source.base.license, shipped.config, source.tokenizer),
                *(source.special_ids, source.rendering.chat_template),
            )
            types = write_gguf_model(temporary, described, _weights(shipped, source.weights == "fp16"))
        del model, shipped
        files = {out.name: temporary.stat().st_size}
        scorer = _read_back(temporary, Path(folder), source, progress)
        verification = _verify(source, scorer, scores, config, progress)
        if reasons := verification["refused"]:
            rejected = out.with_name(out.name + ".rejected")
            temporary.rename(rejected)
            raise GateRefused(f"export refused, file kept as {rejected}: {'; '.join(reasons)}")
        if adapter:
            with atomic_file(lora) as beside:
                alpha = float(next(iter(adapter.values())).data.shape[0])  # B holds the scaling, and alpha / rank is 1
                kind = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha}
                write_gguf_file(beside, architecture.name, kind, adapter)
            files[lora.name] = lora.stat().st_size
    base = source.base
    provenance = {
        "base": {"model": base.name, "content_sha256": base.content_sha256, "license": base.license},
        "data_fingerprint": source.data_fingerprint,
        **adapter_provenance(source.adapter, source.notes),
    }
    manifest: dict[str, Any] = {"format": "gguf", "task": source.task, "family": base.family.name, "lane": source.lane}
    manifest |= {"files": files, "types": types, "verification": verification, "provenance": provenance}
    return manifest


def _weights(model: Any, half: bool) -> dict[str, Codes | NDArray[Any]]:
    """Return the weights of a model by parameter: codes, float32, or with `half` matrices in float16.

    A head that is tied to the embedding is left out, as in a file.
    """
    from edge_ft.models.lora import tied_layers
    from edge_ft.quant.layers import QuantEmbedding, QuantLinear
    from edge_ft.quant.serialization import frozen_layers

    tied = tied_layers(model)
    found: dict[str, Codes | NDArray[Any]] = {
        f"{name}.weight": layer.codes()
        for name, layer in frozen_layers(model).items()
        if name not in tied and isinstance(layer, QuantLinear | QuantEmbedding)
    }
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in tied or not name.endswith(".weight"):
            values = parameter.detach().float().cpu().numpy()
            found[name] = values.astype(np.float16) if half and values.ndim > 1 else values
    return found


def _lora_tensors(model: Any, source: ExportSource, architecture: Architecture) -> dict[str, Blocks]:
    """Return A and B of each adapted layer as llama.cpp names them; smaller ranks are filled with zeros.

    Raises:
        UsageError: the adapter changes the number of tokens.
    """
    from edge_ft.models.lora import lora_pairs

    if source.dims.vocabulary != source.base.dims.vocabulary:
        raise UsageError("the adapter has tokens of its own, which a GGUF LoRA file cannot add: use --lane merged")
    pairs, dims = lora_pairs(model), source.dims
    rank = max(len(a) for a, _ in pairs.values())
    heads = Heads(dims.heads, dims.kv_heads)
    tensors: dict[str, Blocks] = {}
    for name, (a, b) in pairs.items():
        ((tensor, rows),) = file_tensors(architecture.name, dims.layers, heads, {f"{name}.weight": b}).items()
        missing = rank - len(a)
        tensors[f"{tensor}.lora_a"] = Blocks(np.pad(a, ((0, missing), (0, 0))), "F32")
        tensors[f"{tensor}.lora_b"] = Blocks(np.pad(rows.data, ((0, 0), (0, missing))), "F32")
    return tensors


def _read_back(file: Path, folder: Path, source: ExportSource, progress: Progress) -> Scorer:
    """Open the file that was written as any other GGUF model, and compare what it says with the source.

    Args:
        file: The GGUF file.
        folder: Where its float weights may be kept while they are scored.
        source: What was written.
        progress: Receives the steps.

    Returns:
        The model of the file, with the adapter beside it where it is not merged.

    Raises:
        UsageError: the file is read as another model, or with another tokenizer.
    """
    from edge_ft.models.adapted import load_adapter
    from edge_ft.models.base_model import find_base
    from edge_ft.models.loading import ModelSpec, load_model
    from edge_ft.models.scorer import TorchScorer

    model = open_gguf(file)
    plan = plan_conversion(model.header)
    if lost := lost_settings(source.dims.config, plan.config):
        raise UsageError(f"a GGUF file cannot hold {source.base.name} as it is: {'; '.join(lost)}; export a bundle")
    with heartbeat(progress, "reading the file back"):
        try:
            write_checkpoint(model, plan, folder, Silent())
        except ModelError as error:
            raise UsageError(f"a GGUF file cannot hold {source.base.name} as it is: {error}") from error
        base = find_base(str(folder))
        tokenizer = base.open_tokenizer()
        if wrong := [text for text in PROBES if tokenizer.encode(text) != source.tokenizer.encode(text)]:
            raise UsageError(f"the tokenizer of {source.base.name} reads {wrong[0]!r} in another way from a GGUF file")
        loaded = load_model(ModelSpec(base, source.task))
        if source.lane == "adapter":
            assert source.adapter is not None
            loaded = load_adapter(loaded, source.adapter)
    return TorchScorer(loaded, source.task)


def _verify(
    source: ExportSource, scorer: Scorer, torch_scores: TorchScores, config: ExportConfig, progress: Progress
) -> dict[str, Any]:
    """Score the file and compare it with the weights that were written, with the base and with the model as trained.

    Returns:
        As a manifest's `verification`.
    """
    validation = source.rows.validation
    limits = Limits.of(config, over_float=source.rounds_what_was_float)
    probes = probe_examples(source.tokenizer, source.rendering)
    probe = score_rows(source, scorer, probes, progress, "probe, GGUF")
    untuned = torch_scores.untuned_probe
    changes = None if untuned is None else largest_difference(untuned, probe.nll) > SAME
    difference = largest_difference(probe, torch_scores.shipped_probe.nll)
    shipped = score_rows(source, scorer, validation, progress, "validation, GGUF") if validation else None
    figures, reasons = _gate(source, shipped, torch_scores, limits, bool(changes))
    if not np.isfinite(difference) or (shipped is None and difference > limits.max_tax):
        reasons.append(f"the file differs from the weights it was written from by {difference:.4f} nats per token")
    compared = {"base": torch_scores.base, "trained": torch_scores.trained, "shipped": shipped}
    return {
        **compared_figures(source, compared, limits),
        "adapter_changes_logits": changes,
        **figures,
        "shipped_minus_last_evaluated": difference,
        "test": test_scores(source, scorer, torch_scores.test, progress),
        "refused": reasons,
    }


def _gate(
    source: ExportSource, shipped: RowScores | None, scores: TorchScores, limits: Limits, changes: bool
) -> tuple[Mapping[str, Any], list[str]]:
    """Return the figures of the gate, and its reasons to refuse."""
    if shipped is None or scores.base is None:
        return {}, []
    if scores.trained is None:
        lost = shipped.mean_nll - scores.base.mean_nll
        above = [f"{lost:+.4f} nats per token against the codes with their own scales"] if lost > limits.max_tax else []
        return {"argmax_agreement": shipped.agreement(scores.base)}, above
    metric = task_metric_for(source.rows.validation, source.task, source.rendering.labels)
    verdict = evaluate_gate(scores.base, scores.trained, shipped, limits, changes, metric)
    return verdict.figures, list(verdict.reasons)
