"""Lay out a bundle: the graphs, and beside them everything that a device and other runtimes need."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from edge_ft.config import INT8_ACTIVATIONS, Weights
from edge_ft.data import SpecialIds, collate, eval_batches
from edge_ft.errors import ModelError
from edge_ft.export.activations import Feed, quantize_activations
from edge_ft.export.foreign import adapter_provenance
from edge_ft.export.lora_defaults import adapter_name, write_default_graph, write_values
from edge_ft.export.lora_graph import add_head_inputs, add_lora_inputs
from edge_ft.export.lowering import lower, store_in_fp16
from edge_ft.export.packing import write_graphs
from edge_ft.export.source import ExportSource
from edge_ft.export.trace import trace
from edge_ft.export.trace_seq2seq import trace_seq2seq
from edge_ft.files import write_json, write_text
from edge_ft.models.dims import ModelDims
from edge_ft.models.loading import BITS
from edge_ft.models.lora import lora_pairs, tied_layers
from edge_ft.progress import Progress, heartbeat
from edge_ft.quant.conversion import is_within
from edge_ft.runtime.adapters import is_adapter_input, neutral_shape
from edge_ft.utf8 import read_json

__all__ = ["graph_files", "lora_graph", "make_manifest", "write_bundle", "write_genai"]

NAMES: dict[Weights, tuple[str, str]] = {
    "int4": ("model_q4", "q4"),
    "int8": ("model_int8", "int8"),
    "int8-dynamic": ("model_quantized", "q8"),
    "int8-static": ("model_quantized", "q8"),
    "fp16": ("model_fp16", "fp16"),
    "fp32": ("model", "fp32"),
}
"""Name of the graph's file and its `dtype`, both as in transformers.js."""
LORA = "lora_"
"""Prefix of that name for the graph with inputs for an adapter, before other prefixes."""
ENCODER, FIRST, DECODER = "encoder_", "decoder_", "decoder_with_past_"
"""Prefixes of that name for the graphs of an encoder-decoder, as in optimum."""

ACTIVATION_RANGES: dict[Weights, str] = {"int8-dynamic": "dynamic", "int8-static": "static"}
"""Where int8 activations get their ranges: from each batch, or from calibration rows."""
LOCAL_PATHS = ("name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file", "merges_file")
"""Keys of tokenizer_config.json that hold paths of the machine where it was saved."""
Pair = tuple[NDArray[np.float32], NDArray[np.float32]]
"""A [rank, in_features] and B [out_features, rank] of a layer."""
GENAI_FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""Families that onnxruntime-genai supports under transformers' name."""


def write_bundle(folder: Path, source: ExportSource, model: Any, progress: Progress) -> dict[int, str]:
    """Trace a model and write everything but the manifest.

    If activations are int8, level 1 is the float graph before rounding, which verification compares with torch.

    Args:
        folder: The bundle.
        source: What is exported.
        model: The model that ships; an adapter beside its weights is removed from it.
        progress: Receives the steps.

    Returns:
        By accuracy level, the graph's path relative to `folder`.
    """
    pairs = {}
    if source.lane == "adapter":
        pairs = lora_pairs(model)
        model = model.unload()  # the base with its trained head: 2 x 210 LoRA inputs would triple the time of a trace
    with heartbeat(progress, f"tracing {source.base.name} ({source.weights}, {source.lane} lane)"):
        graphs = _trace(source, model)
    with heartbeat(progress, "converting to ONNX Runtime's operators"):
        for graph in graphs.values():
            lower(graph)
        head = _head_layers(source, model, pairs)
        lora = _lora_graphs(source, model, graphs, pairs, head)
        for graph in (*graphs.values(), *lora.values()):
            if source.weights not in ("fp32", *INT8_ACTIVATIONS):
                store_in_fp16(graph)
    with heartbeat(progress, "writing the graphs and their weights"):
        if source.lane == "adapter":
            write_values(folder / _values_file(source), _adapter_values(pairs, head))
            paths = _write_defaults(folder, source, lora, _write_graphs(folder, source, lora))
        else:
            paths = _write_graphs(folder, source, lora | graphs)
        _write_model_files(folder, source, model, one_graph=len(graphs) == 1)
    return paths


def _trace(source: ExportSource, model: Any) -> dict[str, ir.Model]:
    """Return the graphs by the names of their files; the bundle's main graph is the last one."""
    name, _ = NAMES[source.weights]
    if source.base.family.kind == "encoder-decoder":
        encoder, decoder, first = trace_seq2seq(model)
        return {f"{ENCODER}{name}": encoder, f"{FIRST}{name}": first, f"{DECODER}{name}": decoder}
    return {name: trace(model, source.base.family, source.task)}


def _head_layers(source: ExportSource, model: Any, pairs: Mapping[str, Pair]) -> dict[str, nn.Linear | nn.LayerNorm]:
    """Return linear layers and norms of a head that is trained in full, by name; not those with LoRA inputs."""
    head = source.base.family.trained_head(source.task)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.LayerNorm) and is_within(name, head) and name not in pairs
    }


def _lora_graphs(
    source: ExportSource,
    model: Any,
    graphs: dict[str, ir.Model],
    pairs: Mapping[str, Pair],
    head: Mapping[str, nn.Linear | nn.LayerNorm],
) -> dict[str, ir.Model]:
    """Return the graphs once more, with inputs for an adapter, by the names of their files; none in the merged lane.

    Raises:
        ModelError: the adapter has a layer that no graph has.
    """
    if source.lane == "merged" or source.weights in INT8_ACTIVATIONS:
        return {}
    heads = source.base.family.heads[source.task]
    sizes = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_within(name, heads)
    } | {name: (a.shape[1], b.shape[0]) for name, (a, b) in pairs.items()}
    found = {f"{LORA}{name}": graph.clone() for name, graph in graphs.items()}
    tied = tied_layers(model)
    held = set().union(*(add_lora_inputs(graph, sizes, tied) for graph in found.values()))
    if lost := [module for module in pairs if module not in held]:
        raise ModelError(f"the adapter has {lost[0]}, but no graph has a linear layer of that name: use --lane merged")
    norms = [name for name, module in head.items() if isinstance(module, nn.LayerNorm)]
    for graph in found.values():
        add_head_inputs(graph, [name for name in head if name not in norms], norms)
    return found


def _adapter_values(
    pairs: Mapping[str, Pair], head: Mapping[str, nn.Linear | nn.LayerNorm]
) -> dict[str, NDArray[np.float32]]:
    """Return the values of an adapter's inputs by their names."""
    values = {
        f"lora_{side}.{name}": part for name, pair in pairs.items() for side, part in zip("AB", pair, strict=True)
    }
    for name, layer in head.items():
        values |= {f"head.{name}.{kind}": each.detach().numpy() for kind, each in layer.named_parameters()}
    return values


def _write_defaults(
    folder: Path, source: ExportSource, lora: dict[str, ir.Model], paths: dict[int, str]
) -> dict[int, str]:
    """Write the graphs that answer with the adapter, beside those with inputs for any, and return the main ones."""
    values = folder / _values_file(source)
    for level, path in paths.items():
        for file in map(Path, graph_files(path)):
            graph = lora[file.stem.removesuffix(f"_a{level}")].graph
            found = {str(value.name): value.shape for value in graph.inputs if value.shape is not None}
            inputs = {name: neutral_shape(list(shape)) for name, shape in found.items() if is_adapter_input(name)}
            target = folder / file.with_name(file.name.removeprefix(LORA))
            write_default_graph(folder / file, target, inputs, values)
    return {level: path.replace(LORA, "", 1) for level, path in paths.items()}


def _write_graphs(folder: Path, source: ExportSource, graphs: dict[str, ir.Model]) -> dict[int, str]:
    """Return the main graph's path of each accuracy level, after writing graphs and weights."""
    name, _ = NAMES[source.weights]
    if source.weights in INT8_ACTIVATIONS:
        (graph,) = graphs.values()
        float_name, _ = NAMES["fp32"]
        float_paths = write_graphs({float_name: graph}, folder, float_name, (1,))
        head = source.base.family.heads[source.task]
        rounded = quantize_activations(graph, head, _calibration(source, graph), torch.get_num_threads())
        return float_paths | write_graphs({name: rounded}, folder, name, (4,))
    return write_graphs(graphs, folder, name, (1, 4) if source.weights in BITS else (1,))


def _write_model_files(folder: Path, source: ExportSource, model: Any, one_graph: bool) -> None:
    """Write the tokenizer's files, the chat template, config.json and generation_config.json."""
    for file in source.tokenizer.files():
        shutil.copyfile(file, folder / file.name)
    template = source.rendering.chat_template
    if template is not None:
        write_text(folder / "chat_template.jinja", template)
    tokenizer_config = folder / "tokenizer_config.json"
    if tokenizer_config.exists():
        write_json(tokenizer_config, _shipped_tokenizer_config(read_json(tokenizer_config), template))
    model_config = json.loads(model.config.to_json_string(use_diff=False))
    model_config.pop("_name_or_path", None)  # a path of this machine
    if one_graph:
        # For transformers.js: which file to load, and that its weights are in a file beside it.
        model_config["transformers.js_config"] = {"use_external_data_format": True, "dtype": NAMES[source.weights][1]}
    if source.base.family.kind != "encoder":
        generation, special = folder / "generation_config.json", source.special_ids.settings()
        own = read_json(generation) if generation.exists() else json.loads(model.generation_config.to_json_string())
        write_json(generation, {**own, **special})
        model_config |= special
    write_json(folder / "config.json", model_config)


def _shipped_tokenizer_config(config: dict[str, Any], template: str | None) -> dict[str, Any]:
    """Return a tokenizer_config.json without paths of this machine, and with no other chat template than the bundle's.

    Args:
        config: Content of the file of the base.
        template: The bundle's chat template; None: the base's own stays.
    """
    kept = {name: value for name, value in config.items() if name not in LOCAL_PATHS}
    if template is not None:
        kept.pop("chat_template", None)
    return kept


def graph_files(graph: str) -> tuple[str, ...]:
    """Return the files that belong to a graph: itself, and before an encoder-decoder's main graph its other two."""
    if DECODER not in graph:
        return (graph,)
    return tuple(graph.replace(DECODER, part) for part in (ENCODER, FIRST, DECODER))


def _calibration(source: ExportSource, graph: ir.Model) -> list[Feed] | None:
    """Return inputs of `graph` from the rows that int8-static measures ranges on; None without such rows."""
    examples = source.rows.calibration
    if not examples:
        return None
    names = [str(value.name) for value in graph.graph.inputs]
    batches: Iterable[Any] = (
        collate([examples[row] for row in rows], source.tokenizer.pad_id, source.task)
        for rows in eval_batches([len(example.input_ids) for example in examples], 8)
    )
    return [{name: batch.get(name, np.zeros_like(batch["input_ids"])) for name in names} for batch in batches]


def make_manifest(
    source: ExportSource, graphs: dict[int, str], main: int, finer: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Describe a bundle, without its files and its verification.

    Args:
        source: What is exported.
        graphs: By accuracy level, the graph's path relative to the bundle.
        main: Accuracy level that runs by default.
        finer: Rows with 8 bits by layer.

    Returns:
        The manifest's other keys.
    """
    base, rendering = source.base, source.rendering
    packages = ("edge-ft", "torch", "transformers", "peft", "onnx", "onnxruntime")
    manifest: dict[str, Any] = {
        "task": source.task,
        "family": base.family.name,
        "model": graphs[main],
        "graphs": {str(level): path for level, path in graphs.items()},
        "quantization": _quantization(source, finer or {}),
        "lane": source.lane,
        "max_length": base.max_length,
        "tokenization": {"bos": rendering.bos, "appended_eos": rendering.appended_eos},
        "rendering": rendering.to_dict(),
        "provenance": {
            "base": {"model": base.name, "content_sha256": base.content_sha256, "license": base.license},
            "data_fingerprint": source.data_fingerprint,
            **adapter_provenance(source.adapter, source.notes),
            "versions": {name: version(name) for name in packages},
        },
    }
    if source.lane != "merged" and source.weights not in INT8_ACTIVATIONS:
        manifest["adapters"] = _adapters(source, manifest["graphs"])
    sizes = base.dims
    if base.family.kind == "encoder-decoder":
        manifest["encoder_graphs"] = {str(level): graph_files(path)[0] for level, path in graphs.items()}
        manifest["tokenization"]["decoder_start"] = int(sizes.config.decoder_start_token_id)
    if base.family.kind != "encoder":
        manifest["special_ids"] = asdict(source.special_ids)
        layers = int(getattr(sizes.config, "num_decoder_layers", sizes.layers))
        manifest["cache"] = {"layers": layers, "kv_heads": sizes.kv_heads, "head_dim": sizes.head_dim}
    return manifest


def _adapters(source: ExportSource, graphs: dict[str, str]) -> dict[str, Any]:
    """Return the graphs that take any adapter, and the adapter that the bundle answers with, if it has one."""
    lora = {level: lora_graph(path) for level, path in graphs.items()}
    found: dict[str, Any] = {"graphs": lora, "default": None, "names": {}}
    if source.lane == "adapter":
        name = _adapter_name(source)
        found |= {"default": name, "names": {name: {"file": _values_file(source)}}}
    if source.base.family.kind == "encoder-decoder":
        found["encoder_graphs"] = {level: graph_files(path)[0] for level, path in lora.items()}
    return found


def _adapter_name(source: ExportSource) -> str:
    """Return the name of the adapter that the bundle answers with."""
    assert source.adapter is not None
    return adapter_name(source.adapter.path if source.run is None else source.run.path)


def _values_file(source: ExportSource) -> str:
    """Return the path of that adapter's values, relative to the bundle."""
    return f"onnx/{_adapter_name(source)}.safetensors"


def lora_graph(graph: str) -> str:
    """Return the path of the graph with inputs for an adapter that belongs to a graph."""
    return Path(graph).with_name(LORA + Path(graph).name).as_posix()


def _quantization(source: ExportSource, finer: Mapping[str, int]) -> dict[str, Any]:
    """Return the format of the weights; `method` is how codes were chosen, where int8 ranges come from, or None."""
    overrides = {name: {"bits": 8, "rows": rows} for name, rows in finer.items()}
    weights, codes = source.weights, source.weights in BITS
    method = ACTIVATION_RANGES.get(weights)
    if codes:
        method = "gptq" if weights == "int4" and source.rows.calibration else "rtn"
    return {
        "method": method,
        "bits": {"int4": 4, "fp16": 16, "fp32": 32}.get(weights, 8),
        "block_size": source.grid.block_size if codes else None,
        "symmetric": weights in ACTIVATION_RANGES,
        **({"overrides": overrides} if overrides else {}),
    }


def write_genai(folder: Path, family: str, sizes: ModelDims, special: SpecialIds, graph: str) -> None:
    """Write `genai_config.json` and `NAME_genai.onnx` beside the bundle's graph NAME.onnx, with the same weights.

    onnxruntime-genai allocates logits for every position that it reads, unless the graph declares a single one.

    Args:
        folder: The bundle.
        family: Family of the model.
        sizes: Sizes of the model.
        special: The special tokens, as the bundle's other files name them.
        graph: Path of NAME.onnx relative to `folder`.
    """
    model = ir.load(folder / graph)
    model.graph.inputs.remove(model.graph.initializers["num_logits_to_keep"])
    logits = next(output for output in model.graph.outputs if output.name == "logits")
    logits.shape = ir.Shape(["batch_size", 1, sizes.vocabulary])
    path = Path(graph).with_stem(f"{Path(graph).stem}_genai").as_posix()
    ir.save(model, folder / path)
    write_json(folder / "genai_config.json", _genai_config(family, sizes, special, path))


def _genai_config(family: str, sizes: ModelDims, special: SpecialIds, graph: str) -> dict[str, Any]:
    """Return the config of the decoder at `graph`, a path relative to the bundle.

    Other families are declared as `decoder`, onnxruntime-genai's type for a decoder with only the inputs named here.
    """
    return {
        "model": {
            "type": family if family in GENAI_FAMILIES else "decoder",
            "vocab_size": sizes.vocabulary,
            "context_length": sizes.positions,
            # onnxruntime-genai requires a number here.
            "bos_token_id": special.bos if special.bos is not None else special.pad,
            "eos_token_id": list(special.ends),
            "pad_token_id": special.pad,
            "decoder": {
                "filename": graph,
                "hidden_size": sizes.hidden,
                "head_size": sizes.head_dim,
                "num_attention_heads": sizes.heads,
                "num_hidden_layers": sizes.layers,
                "num_key_value_heads": sizes.kv_heads,
                "session_options": {"provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": sizes.positions, "past_present_share_buffer": True},
    }
