"""Lay out a bundle: the graphs and, beside them, all that a device and a stranger's runtime need."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edge_ft.artifacts import write_json, write_text
from edge_ft.config import INT8_ACTIVATIONS, ExportConfig, Weights
from edge_ft.data import collate, eval_batches
from edge_ft.export.activations import Feed, quantize_activations
from edge_ft.export.lowering import add_lora_inputs, has_linear, lower, store_in_fp16
from edge_ft.export.packing import write, write_graphs
from edge_ft.export.source import Source
from edge_ft.export.trace import trace
from edge_ft.export.trace_seq2seq import trace_seq2seq
from edge_ft.models.loading import BITS
from edge_ft.models.lora import lora_pairs
from edge_ft.progress import Progress

__all__ = ["describe", "graph_files", "lane", "write_bundle"]

NAMES: dict[Weights, tuple[str, str]] = {
    "int4": ("model_q4", "q4"),
    "int8": ("model_int8", "int8"),
    "int8-dynamic": ("model_quantized", "q8"),
    "int8-static": ("model_quantized", "q8"),
    "fp16": ("model_fp16", "fp16"),
    "fp32": ("model", "fp32"),
}
"""The graph's file and its `dtype`, both as transformers.js says them."""
ENCODER, FIRST, DECODER = "encoder_", "decoder_", "decoder_with_past_"
"""What the graphs of an encoder-decoder have before that name, as optimum calls graphs with these inputs."""

METHODS: dict[Weights, str] = {"int8-dynamic": "dynamic", "int8-static": "static"}
"""Whose ranges of activations: each batch's, or those of calibration rows."""


def write_bundle(folder: Path, source: Source, model: Any, config: ExportConfig, progress: Progress) -> dict[int, str]:
    """Trace `model` and write everything but the manifest into `folder`; an adapter on `model` is taken off it.

    Where activations are int8, level 1 is the float graph that was rounded, by which the trace can be proven.

    Returns:
        The graph of each accuracy level, relative to `folder`.
    """
    progress.say(f"tracing {source.base.name} ({source.weights}, {lane(source, config)} lane)")
    pairs = {}
    if lane(source, config) == "adapter":
        pairs = lora_pairs(model)
        model = model.unload()  # the base alone, its trained head in place: 2 x 210 LoRA inputs would triple the trace
    name, dtype = NAMES[source.weights]
    parts = _parts(source, model, name)
    # Each of several graphs has some of the layers; one that none of them has is an error.
    lost = [layer for layer in pairs if not any(has_linear(graph, layer) for graph in parts.values())]
    if lost:
        raise ValueError(f"the adapter changes {lost[0]!r}, but no graph holds a linear layer of that name")
    for graph in parts.values():
        add_lora_inputs(graph, {layer: pair for layer, pair in pairs.items() if has_linear(graph, layer)})
        lower(graph)
        if source.weights == "fp16":
            store_in_fp16(graph)
    if source.weights in INT8_ACTIVATIONS:
        (graph,) = parts.values()
        graphs = write(graph, folder, NAMES["fp32"][0], (1,))
        keep = source.base.family.heads[source.task]
        graphs |= write(quantize_activations(graph, keep, _calibration(source, graph)), folder, name, (4,))
    else:
        levels = (1, 4) if source.weights in BITS else (1,)
        graphs = list(write_graphs(parts, folder, name, levels).values())[-1]
    for file in source.tokenizer.files():
        shutil.copyfile(file, folder / file.name)
    if source.rendering.chat_template is not None:
        write_text(folder / "chat_template.jinja", source.rendering.chat_template)
    model_config = json.loads(model.config.to_json_string(use_diff=False))
    if len(parts) == 1:
        # Read by transformers.js: which file to take, and that its weights lie beside it.
        model_config["transformers.js_config"] = {"use_external_data_format": True, "dtype": dtype}
    write_json(folder / "config.json", model_config)
    if source.base.family.kind != "encoder" and not (folder / "generation_config.json").exists():
        write_text(folder / "generation_config.json", model.generation_config.to_json_string())
    return graphs


def _parts(source: Source, model: Any, name: str) -> dict[str, ir.Model]:
    """The graphs by the stems of their files, the one that a bundle is known by at the end."""
    if source.base.family.kind == "encoder-decoder":
        encoder, decoder, first = trace_seq2seq(model)
        return {f"{ENCODER}{name}": encoder, f"{FIRST}{name}": first, f"{DECODER}{name}": decoder}
    return {name: trace(model, source.base.family, source.task)}


def graph_files(graph: str) -> tuple[str, ...]:
    """The files that go together: a graph, and before an encoder-decoder's its encoder and that of its first tokens."""
    if not Path(graph).name.startswith(DECODER):
        return (graph,)
    return tuple(graph.replace(DECODER, part) for part in (ENCODER, FIRST, DECODER))


def _calibration(source: Source, graph: ir.Model) -> list[Feed] | None:
    """Inputs of `graph` made of the rows that int8-static measures its ranges on, or None."""
    if not source.calibration:
        return None
    names = [str(value.name) for value in graph.graph.inputs]
    feeds = []
    for rows in eval_batches([len(example.input_ids) for example in source.calibration], 8):
        batch: Any = collate([source.calibration[row] for row in rows], source.tokenizer.pad_id, source.task)
        feeds.append({name: batch.get(name, np.zeros_like(batch["input_ids"])) for name in names})
    return feeds


def lane(source: Source, config: ExportConfig) -> str:
    """`base` for a model without an adapter, else what was asked for."""
    return "base" if source.adapter is None else config.lane


def _method(source: Source) -> str | None:
    """How weights became what the bundle holds; None for floats."""
    if source.weights in BITS:
        return "gptq" if source.weights == "int4" and source.calibration else "rtn"
    return METHODS.get(source.weights)


def describe(source: Source, config: ExportConfig, graphs: dict[int, str], main: int) -> dict[str, Any]:
    """The manifest, without its files and its verification; `main` is the level of the graph that runs by default."""
    rounded = source.weights in BITS
    base = source.base
    manifest: dict[str, Any] = {
        "task": source.task,
        "family": base.family.name,
        "model": graphs[main],
        "graphs": {str(level): path for level, path in graphs.items()},
        "quantization": {
            "method": _method(source),
            "bits": {"int4": 4, "fp16": 16, "fp32": 32}.get(source.weights, 8),
            "block_size": source.block_size if rounded else None,
            "symmetric": source.weights in METHODS,
        },
        "lane": lane(source, config),
        "max_length": base.max_length,
        "tokenization": {"bos": source.rendering.bos, "appended_eos": source.rendering.appended_eos},
        "rendering": source.rendering.to_dict(),
        "provenance": {
            "base": {"model": base.name, "content_sha256": base.content_sha256, "license": base.license},
            "data_fingerprint": source.data_fingerprint,
            "versions": {
                name: version(name) for name in ("edge-ft", "torch", "transformers", "peft", "onnx", "onnxruntime")
            },
        },
    }
    if base.family.kind == "encoder-decoder":
        settings = base.dims.config
        manifest["encoder_graphs"] = {str(level): graph_files(path)[0] for level, path in graphs.items()}
        manifest["tokenization"]["decoder_start"] = int(settings.decoder_start_token_id)
        manifest["cache"] = {
            "layers": int(settings.num_decoder_layers),
            "kv_heads": int(settings.num_attention_heads),
            "head_dim": int(settings.head_dim),
        }
    if base.family.decoder:
        sizes = base.dims
        manifest["cache"] = {"layers": sizes.layers, "kv_heads": sizes.kv_heads, "head_dim": sizes.head_dim}
    return manifest
