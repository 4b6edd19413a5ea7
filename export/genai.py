"""Files for onnxruntime-genai in a decoder bundle: its config, and a graph whose logits have one position."""

from pathlib import Path
from typing import Any

import onnx_ir as ir

from edge_ft.artifacts import write_json
from edge_ft.data import TextTokenizer
from edge_ft.models.dims import ModelDims

__all__ = ["write_genai"]

KNOWN = ("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""Families that onnxruntime-genai supports under transformers' name."""


def write_genai(folder: Path, family: str, sizes: ModelDims, tokenizer: TextTokenizer, graph: str) -> None:
    """Write `genai_config.json` and `NAME_genai.onnx` beside the bundle's graph NAME.onnx, with the same weights.

    onnxruntime-genai allocates logits for every position that it reads, unless the graph declares a single one.

    Args:
        folder: The bundle.
        family: Family of the model.
        sizes: Sizes of the model.
        tokenizer: Gives the ids of the special tokens.
        graph: Path of NAME.onnx relative to `folder`.
    """
    model = ir.load(folder / graph)
    keep = model.graph.initializers["num_logits_to_keep"]
    model.graph.inputs.remove(keep)
    logits = next(output for output in model.graph.outputs if output.name == "logits")
    logits.shape = ir.Shape(["batch_size", 1, sizes.vocabulary])
    path = Path(graph).with_stem(f"{Path(graph).stem}_genai").as_posix()
    ir.save(model, folder / path)
    write_json(folder / "genai_config.json", _config(family, sizes, tokenizer, path))


def _config(family: str, sizes: ModelDims, tokenizer: TextTokenizer, graph: str) -> dict[str, Any]:
    """Return the config of the decoder at `graph`, a path relative to the bundle.

    Other families are declared as `decoder`, onnxruntime-genai's type for a decoder with only the inputs named here.
    """
    stops = sorted(tokenizer.stop_ids)
    return {
        "model": {
            "type": family if family in KNOWN else "decoder",
            "vocab_size": sizes.vocabulary,
            "context_length": sizes.positions,
            "bos_token_id": tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.pad_id,
            "eos_token_id": stops or [tokenizer.pad_id],
            "pad_token_id": tokenizer.pad_id,
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
